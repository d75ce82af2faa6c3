"""Receipts: which samples a rank consumed, in order, as a digest that anyone with the data can make again."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot.proof import Check
from tokenmill.dataroot.view_record import load_view
from tokenmill.errors import ReceiptError
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.samplers import Sampler

_CHUNK_SAMPLES = 1 << 16


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank says it consumed."""

    version: Literal[1] = 1
    sample_ids_sha256: str
    """SHA-256 of the data set's `sample_ids.bin`; of a view, `ViewRecord.samples_sha256`."""
    sampler: Sampler
    """What said which samples to take."""
    samples: int
    """Consumed, from the sampler's first on."""
    ids_sha256: str
    """SHA-256 of the ids consumed, in order, 8 little-endian bytes each."""

    def save(self, path: Path | str) -> None:
        """Write it as JSON, whole or not at all."""
        atomic.write_whole(Path(path), msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


class ReceiptWriter:
    """Hashes the ids of the samples that a rank consumes.

    Args:
        dataset: what they are taken from.
        sampler: what says which to take.

    Raises:
        DataRootError: the data root is not consolidated, so that nothing says what its ids are.
    """

    def __init__(self, dataset: TokenDataset, sampler: Sampler) -> None:
        self._sample_ids_sha256 = dataset.samples_sha256
        self._dataset = dataset
        self._sampler = sampler
        self._digest = hashlib.sha256()
        self.samples = 0
        """Consumed so far."""

    def add(self, indices: list[int] | NDArray[np.int64]) -> None:
        """Note samples, in the order consumed."""
        self._digest.update(self._dataset.ids_of(indices).tobytes())
        self.samples += len(indices)

    def receipt(self) -> Receipt:
        """For all samples so far."""
        return Receipt(
            sample_ids_sha256=self._sample_ids_sha256,
            sampler=self._sampler,
            samples=self.samples,
            ids_sha256=self._digest.hexdigest(),
        )


def load_receipt(path: Path | str) -> Receipt:
    """Load a receipt that was saved.

    Raises:
        ReceiptError: there is none, or it is not one.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Receipt)
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReceiptError(f"{path}: not a receipt: {reason}", next_step="give a file that a trainer saved") from None


def check_receipt(root: Path | str, receipt: Receipt) -> list[Check]:
    """Compare a receipt with the data it speaks of; neither a trainer nor a model is needed.

    What the sampler takes is made again, and the ids are those in `sample_ids.bin`, once that file is what
    `consolidated.json` says. Those of a view are made of its tokens, once its index is what `view.json` says.

    Raises:
        DataRootError: the data root is not consolidated, or its files are not of the recorded size.
    """
    root = Path(root)
    view = load_view(root)
    dataset = TokenDataset(root)
    expected = {layout.SAMPLE_IDS: dataset.samples_sha256} if view is None else view.index_sha256
    sampler = receipt.sampler
    checks = [
        *(Check(f"{name} sha256", sha256, _stored_sha256(root / name)) for name, sha256 in expected.items()),
        Check("data set of the receipt", dataset.samples_sha256, receipt.sample_ids_sha256),
        Check("samples of the data set", str(len(dataset)), str(sampler.dataset_len)),
        Check("samples consumed", f"at most {len(sampler)}", _at_most(receipt.samples, len(sampler))),
    ]
    if not all(check.passed for check in checks):
        return checks
    digest = hashlib.sha256()
    for begin in range(0, receipt.samples, _CHUNK_SAMPLES):
        indices = sampler.indices(begin, min(begin + _CHUNK_SAMPLES, receipt.samples))
        digest.update(dataset.ids_of(indices).tobytes())
    return [*checks, Check("ids consumed, sha256", digest.hexdigest(), receipt.ids_sha256)]


def _stored_sha256(path: Path) -> str:
    with atomic.translate_read_errors(path):
        return _sha256(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _sha256(path: Path, mtime_ns: int) -> str:
    """Return the SHA-256 of a file with that modification time; cached, as receipts of many ranks need the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _at_most(found: int, limit: int) -> str:
    return f"at most {limit}" if 0 <= found <= limit else str(found)

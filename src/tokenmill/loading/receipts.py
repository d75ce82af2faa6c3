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
from tokenmill.errors import ReceiptError
from tokenmill.loading.data_root import not_consolidated
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.samplers import Sampler
from tokenmill.loading.view import open_root

_CHUNK_SAMPLES = 1 << 16


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank says it consumed."""

    version: Literal[1] = 1
    sample_ids_sha256: str
    """SHA-256 of the data set's `sample_ids.bin`."""
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
        record = dataset.record
        if record is None:
            raise not_consolidated(dataset.root)
        self._sample_ids_sha256 = record.sample_ids_sha256
        self._ids = dataset.sample_ids
        self._sampler = sampler
        self._digest = hashlib.sha256()
        self.samples = 0
        """Consumed so far."""

    def add(self, indices: list[int] | NDArray[np.int64]) -> None:
        """Note samples, in the order consumed."""
        self._digest.update(self._ids[np.asarray(indices, np.int64)].tobytes())
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
    `consolidated.json` says.

    Raises:
        DataRootError: the data root is not consolidated, or its files are not of the recorded size.
    """
    root = Path(root)
    found = open_root(root)
    ids = found.sample_ids()
    assert found.record is not None
    sha256 = found.record.sample_ids_sha256
    path = root / layout.SAMPLE_IDS
    with atomic.translate_read_errors(path):
        stored = _sha256(path, path.stat().st_mtime_ns)
    sampler = receipt.sampler
    checks = [
        Check("sample_ids.bin sha256", sha256, stored),
        Check("data set of the receipt", sha256, receipt.sample_ids_sha256),
        Check("samples of the data set", str(len(ids)), str(sampler.dataset_len)),
        Check("samples consumed", f"at most {len(sampler)}", _at_most(receipt.samples, len(sampler))),
    ]
    if not all(check.passed for check in checks):
        return checks
    digest = hashlib.sha256()
    for begin in range(0, receipt.samples, _CHUNK_SAMPLES):
        digest.update(ids[sampler.indices(begin, min(begin + _CHUNK_SAMPLES, receipt.samples))].tobytes())
    return [*checks, Check("ids consumed, sha256", digest.hexdigest(), receipt.ids_sha256)]


@functools.lru_cache(maxsize=1)
def _sha256(path: Path, mtime_ns: int) -> str:
    """Return the SHA-256 of a file with that modification time; cached, as receipts of many ranks need the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _at_most(found: int, limit: int) -> str:
    return f"at most {limit}" if 0 <= found <= limit else str(found)

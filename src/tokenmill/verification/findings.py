"""Findings: what a verification found, and what all its checks need. Reads only.

Nothing here, or in the modules of its checks, is shared with what writes a data root.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.options import OnBytes
from tokenmill.transfer.journal import elsewhere

_CHUNK_NBYTES = 8 << 20


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it must be."""

    file: str
    position: str
    """Where in the file: a byte, a token, a sample, a row, a field."""
    what: str
    expected: str
    found: str


class Checked(msgspec.Struct):
    """A group of checks that was made."""

    what: str
    findings: int


class VerifyRun:
    """One verification of a data root: its records, and what was found so far."""

    def __init__(self, root: Path, *, workers: int, on_progress: OnBytes) -> None:
        self.root = root
        self.workers = workers
        self.manifest, self.record = manifests.load_records(root, proven=False)
        self.elsewhere = elsewhere(root)
        """Files that are in a store and not here, on purpose, by name: what is not here is not looked for."""
        self.checked: list[Checked] = []
        self.findings: list[Finding] = []
        self.done_nbytes = 0
        self.to_read_nbytes = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._stopped = False
        """After Ctrl-C: threads stop reading."""

    @property
    def has_tokens_file(self) -> bool:
        """Whether `tokens.bin` is what holds the tokens, here."""
        return self.record is not None and self.record.complete and layout.TOKENS not in self.elsewhere

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of a stored token."""
        name = self.manifest.stored_dtype if self.manifest else self.record.dtype if self.record else "uint16"
        return np.dtype(name).newbyteorder("<")

    def require(self, holds: bool, file: str, position: str, what: str, *, expected: object, found: object) -> bool:
        """Note a finding unless something holds."""
        if not holds:
            with self._lock:
                self.findings.append(Finding(file, position, what, str(expected), str(found)))
        return holds

    def same(self, file: str, position: str, what: str, *, expected: object, found: object) -> bool:
        """Note a finding unless two values are the same."""
        return self.require(expected == found, file, position, what, expected=expected, found=found)

    def group(self, what: str, *steps: Callable[[], None]) -> None:
        """Make checks, side by side, and note that they were made."""
        before = len(self.findings)
        pool = ThreadPoolExecutor(self.workers)
        try:
            for future in [pool.submit(step) for step in steps]:
                future.result()
        except BaseException:
            self._stopped = True
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        self.findings[before:] = sorted(self.findings[before:], key=lambda f: (f.file, f.what))
        self.checked.append(Checked(what, len(self.findings) - before))

    def read(self, nbytes: int) -> None:
        """Note that so many bytes were read."""
        with self._lock:
            self.done_nbytes += nbytes
            self._on_progress(min(self.done_nbytes, self.to_read_nbytes), self.to_read_nbytes)

    def expected_shards(self) -> list[tuple[int, str]]:
        """Return tokens and SHA-256 of every shard, by whatever records them."""
        if self.manifest is not None:
            return [(shard.tokens, shard.sha256) for shard in self.manifest.shards]
        return [(shard.tokens, shard.sha256) for shard in self.record.shards] if self.record else []

    def chunks(self, path: Path, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a file; each chunk is overwritten by the next. A short file ends early."""
        buffer = memoryview(bytearray(_CHUNK_NBYTES))
        with atomic.translate_read_errors(path), path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end and not self._stopped:
                count = file.readinto(buffer[: min(len(buffer), end - begin)])
                if not count:
                    return
                begin += count
                self.read(count)
                yield buffer[:count]

    def check_digest(self, path: Path, expected: str) -> None:
        found = hashlib.sha256()
        for chunk in self.chunks(path, 0, path.stat().st_size):
            found.update(chunk)
        self.same(path.name, "the file", "sha256", expected=expected, found=found.hexdigest())


class Checks:
    """A group of checks that add to an inquiry."""

    def __init__(self, job: VerifyRun) -> None:
        self.job = job
        self.root = job.root


def shard_header(dtype: np.dtype[Any], tokens: int) -> bytes:
    """Return what `numpy.save` writes before a 1-D array of so many tokens (NPY format, version 1.0)."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({tokens},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"

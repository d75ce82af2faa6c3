"""Tokens file: writes `tokens.bin` and `sample_ids.bin`, both whole or absent.

Bytes are appended once; writing, SHA-256 and sample ids go side by side. What is durable of an
interrupted file is adopted: read and hashed again, not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import sample_ids as ids
from tokenmill.dataroot.atomic import translate_write_errors
from tokenmill.dataroot.id_workers import IdWorkers
from tokenmill.dataroot.manifest import Consolidated
from tokenmill.errors import RecipeError, StorageError
from tokenmill.options import available_cores

CHUNK_NBYTES = 2 << 20
"""Read, hashed and written at once: a few of them should stay in the processor's cache."""
IDS_NBYTES = 8 << 20
"""Size of the range of tokens whose ids one request asks for."""
_WAITING = 6
"""Chunks that wait for the SHA-256 lane."""
_MAX_WORKERS = 4
"""More make ids faster than one core hashes the stream."""


SYNC_NBYTES = 256 << 20
"""Written to `tokens.bin` before the disk is told to take it."""


class TokensFile:
    """The two files of a data root. One thread appends.

    Args:
        root: the data root.
        record: what to make: dtype, samples and ids.
        workers: processes that make ids; None takes the cores, at most 4.

    Raises:
        StorageError: the disk is full or not writable. What is durable stays for the next run.
    """

    def __init__(self, root: Path, record: Consolidated, *, workers: int | None = None) -> None:
        self.path = root / layout.TOKENS
        self.partial = _partial(self.path)
        self._ids_path = root / layout.SAMPLE_IDS
        self._record = record
        self._window = record.window_nbytes
        with translate_write_errors(self.path):
            self._file: io.FileIO = open(self.partial, "r+b" if self.partial.exists() else "w+b", buffering=0)  # noqa: SIM115, PTH123
            self._ids_file: io.FileIO = _partial(self._ids_path).open("wb", buffering=0)
        self.nbytes = 0
        """Appended or adopted so far."""
        self._sha256 = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._unhashed: deque[Future[None]] = deque()
        self._workers = IdWorkers(self.partial, self._window, workers or min(_MAX_WORKERS, available_cores()))
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._synced: Future[None] | None = None
        """The sync of the last bytes for which one was asked."""
        self._unsynced_nbytes = 0
        self._windows_asked = 0
        self._ids: deque[Future[bytes]] = deque()
        self._ids_sha256 = hashlib.sha256()
        self._ids_nbytes = 0

    @property
    def stored_nbytes(self) -> int:
        """Size of the file as an earlier run left it."""
        return self.partial.stat().st_size

    @property
    def allocated_nbytes(self) -> int:
        """What it takes of the disk."""
        return 512 * getattr(self.partial.stat(), "st_blocks", 0)

    def digest(self, header: bytes, nbytes: int, *, at: int | None = None) -> str:
        """SHA-256 of `header` and the `nbytes` stored at byte `at` (None: after the adopted bytes)."""
        sha256 = hashlib.sha256(header)
        for chunk in self._stored(self.nbytes if at is None else at, nbytes):
            sha256.update(chunk)
        return sha256.hexdigest()

    def adopt(self, nbytes: int, header: bytes = b"") -> str:
        """Take over the next `nbytes`, stored by others; SHA-256 of `header` and them."""
        sha256 = hashlib.sha256(header)
        for chunk in self._stored(self.nbytes, nbytes):
            hashed = self._hash(chunk)
            sha256.update(chunk)
            hashed.result()
            self._advance(len(chunk))
        return sha256.hexdigest()

    def _stored(self, at: int, nbytes: int) -> Iterator[memoryview]:
        """Chunks of the file; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK_NBYTES, nbytes)))
        with atomic.translate_read_errors(self.partial), self.partial.open("rb", buffering=0) as file:
            file.seek(at)
            while nbytes:
                count = file.readinto(buffer[: min(nbytes, len(buffer))])
                if not count:
                    raise StorageError(
                        f"{self.partial}: ended {nbytes} bytes early: another process changed it",
                        next_step="make sure that nothing else writes there, then run the same command again",
                    )
                nbytes -= count
                yield buffer[:count]

    def begin(self, total_nbytes: int | None) -> None:
        """Drop what was stored after the adopted bytes; claim room for all bytes if their number is known."""
        with translate_write_errors(self.path):
            self._file.truncate(self.nbytes)
            self._file.seek(self.nbytes)
            if total_nbytes is not None and total_nbytes > self.nbytes and hasattr(os, "posix_fallocate"):
                with _where_supported():
                    os.posix_fallocate(self._file.fileno(), self.nbytes, total_nbytes - self.nbytes)

    def append(self, data: memoryview) -> Future[None]:
        """Write bytes; they must not change until the future is done."""
        hashed = self._hash(data)
        with translate_write_errors(self.path):
            rest = data
            while len(rest):
                rest = rest[self._file.write(rest) :]
        self._sync_along(len(data))
        self._advance(len(data))
        return hashed

    def _sync_along(self, nbytes: int) -> None:
        """Have the disk take what was written while more is: all at once at the end, everything would wait for it."""
        self._unsynced_nbytes += nbytes
        if self._unsynced_nbytes >= SYNC_NBYTES and (self._synced is None or self._synced.done()):
            if self._synced is not None:
                self._synced.result()
            self._unsynced_nbytes = 0
            self._synced = self._syncing.submit(self._sync_data)

    def _sync_data(self) -> None:
        with translate_write_errors(self.path):
            getattr(os, "fdatasync", os.fsync)(self._file.fileno())

    def _hash(self, data: memoryview) -> Future[None]:
        future = self._hashing.submit(self._sha256.update, data)
        self._unhashed.append(future)
        while len(self._unhashed) > _WAITING:
            self._unhashed.popleft().result()
        return future

    def _advance(self, nbytes: int) -> None:
        """Ask for the ids of the windows that have become whole, many at a time."""
        self.nbytes += nbytes
        batch = max(1, IDS_NBYTES // self._window)
        while self._windows_asked + batch <= self.nbytes // self._window:
            self._ask(batch * self._window)

    def _ask(self, nbytes: int) -> None:
        begin = self._windows_asked * self._window
        self._ids.append(self._workers.submit(begin, nbytes))
        self._windows_asked += -(-nbytes // self._window)
        while len(self._ids) > 2 * self._workers.count:
            self._write_ids(self._ids.popleft().result())

    def _write_ids(self, data: bytes) -> None:
        self._ids_sha256.update(data)
        self._ids_nbytes += len(data)
        with translate_write_errors(self._ids_path):
            rest = memoryview(data)
            while rest:
                rest = rest[self._ids_file.write(rest) :]

    def sync(self) -> None:
        """Make durable what was appended."""
        if self._synced is not None:
            self._synced.result()
        self._sync_data()

    def seal(self) -> Consolidated:
        """Make both files durable, still under their temporary names; the record of what they are."""
        tokens = self.nbytes // self._record.itemsize
        samples = tokens // self._record.seq_len
        covered = min(self.nbytes, samples * self._window)
        if covered > self._windows_asked * self._window:
            self._ask(covered - self._windows_asked * self._window)
        while self._ids:
            self._write_ids(self._ids.popleft().result())
        self._write_ids(ids.EMPTY_ID * (samples - self._windows_asked))
        for future in self._unhashed:
            future.result()
        if self._synced is not None:
            self._synced.result()
        with translate_write_errors(self.path):
            self._file.truncate(self.nbytes)
            os.fsync(self._file.fileno())
            os.fsync(self._ids_file.fileno())
        sealed = msgspec.structs.replace(
            self._record,
            complete=True,
            tokens=tokens,
            samples=samples,
            tokens_sha256=self._sha256.hexdigest(),
            sample_ids_sha256=self._ids_sha256.hexdigest(),
        )
        assert self._ids_nbytes == sealed.sample_ids_nbytes
        return sealed

    def publish(self) -> None:
        """Give both files their names."""
        self.close()
        atomic.publish(_partial(self._ids_path), self._ids_path)
        atomic.publish(self.partial, self.path)

    def discard(self) -> None:
        """Remove both files and their record."""
        self.close()
        forget(self.path.parent)

    def close(self) -> None:
        """Let go of threads, processes and files; what is stored stays."""
        self._workers.close()
        for pool in (self._hashing, self._syncing):
            pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()
        self._ids_file.close()

    def __enter__(self) -> TokensFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reopen(root: Path) -> None:
    """Turn published files that are not recorded as complete back into unfinished ones."""
    with translate_write_errors(root):
        if (root / layout.TOKENS).exists():
            (root / layout.TOKENS).replace(_partial(root / layout.TOKENS))
        (root / layout.SAMPLE_IDS).unlink(missing_ok=True)


def forget(root: Path) -> None:
    """Remove what a run left that was refused before it made anything."""
    for path in (_partial(root / layout.TOKENS), _partial(root / layout.SAMPLE_IDS), root / layout.CONSOLIDATED):
        with translate_write_errors(path):
            path.unlink(missing_ok=True)


def require_defined(id_scheme: layout.IdScheme, nbytes: int) -> None:
    """`templar-v1` looks at `tokens.bin` as 32-bit integers.

    Raises:
        RecipeError: its size does not divide by 4.
    """
    if id_scheme == "templar-v1" and nbytes % 4:
        raise RecipeError(
            f"id scheme templar-v1 is undefined for {nbytes} bytes of tokens: expected a multiple of 4",
            next_step="use --id-scheme blake2b-64",
        )


def _partial(path: Path) -> Path:
    return path.with_name(path.name + layout.PARTIAL_SUFFIX)


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    """Some file systems cannot reserve room; they find out later, as we do."""
    import errno

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise

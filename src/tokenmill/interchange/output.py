"""Output: the directory of an export: files that are whole or absent, and `export.json`, which says what they are."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot.manifest import encode, load_record
from tokenmill.errors import ExportError, StorageError

EXPORT = "export.json"
_PUBLISHED_AT_ONCE = 2
"""One waits for the disk while another is read again."""
_SYNC_NBYTES = 128 << 20
"""Written to a file before the disk is told to take it: all at once at the end, everything would wait for it."""
_PIECE_NBYTES = 1 << 20
_SAVE_SECONDS = 1.0
_VERSION = 3
"""As of all records (`dataroot.manifest.VERSION`)."""


class WrittenFile(msgspec.Struct):
    """A file of an export."""

    nbytes: int
    sha256: str
    linked: bool = False
    """Whether it is a hard link to `tokens.bin` of the data set."""


class ExportedSplit(msgspec.Struct, kw_only=True):
    """What was exported under one name: `train` or `val`."""

    root: str
    identity: str
    """SHA-256 over the digests of the data set's shards; of a view, over all that defines its samples."""
    dtype: str
    tokens: int
    documents: int
    tokens_sha256: str = ""
    """SHA-256 of all tokens, as the data set stores them."""
    inner_eos: int = 0
    """EOS ids inside documents."""


class ExportRecord(msgspec.Struct, kw_only=True):
    """All of `export.json`."""

    version: int = _VERSION
    complete: bool = False
    format: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    seq_len: int
    splits: dict[str, ExportedSplit]
    files: dict[str, WrittenFile] = {}
    notes: list[str] = []
    digests: dict[str, str] = {}
    """SHA-256 of every other field, as in the manifest."""

    def is_of(self, other: ExportRecord) -> bool:
        """Return whether both are the same export, from wherever its data sets lie."""
        ours, theirs = (
            [(name, each.identity, each.tokens, each.dtype) for name, each in sorted(record.splits.items())]
            for record in (self, other)
        )
        return (self.format, self.tokenizer_sha256, self.seq_len, ours) == (
            other.format,
            other.tokenizer_sha256,
            other.seq_len,
            theirs,
        )


def load_export(folder: Path) -> ExportRecord | None:
    """Load the record of an export; None if the directory has none.

    Raises:
        DataRootError: it cannot be read, is not ours, or was changed.
    """
    return load_record(folder / EXPORT, ExportRecord)


class OutputFile:
    """A file that is being written.

    Its XXH3-128 is made meanwhile, at the speed of memory; SHA-256 is made of what is read again once it is durable.
    """

    def __init__(self, file: atomic.AtomicFile, syncing: ThreadPoolExecutor, on_written: Callable[[int], None]) -> None:
        self._file = file
        self._on_written = on_written
        self._syncing = syncing
        self._synced: Future[None] | None = None
        self._unsynced_nbytes = 0
        self._xxh3 = xxhash.xxh3_128()
        self.nbytes = 0

    def write(self, data: bytes | memoryview | NDArray[Any]) -> int:
        """Write bytes, or the bytes of an array."""
        view = memoryview(data.data if not isinstance(data, bytes | memoryview) else data).cast("B")
        for at in range(0, len(view), _PIECE_NBYTES):  # each is hashed while the processor's cache has it
            piece = view[at : at + _PIECE_NBYTES]
            self._xxh3.update(piece)
            self._file.write(piece)
        self._on_written(len(view))
        self.nbytes += len(view)
        self._unsynced_nbytes += len(view)
        if self._unsynced_nbytes >= _SYNC_NBYTES and (self._synced is None or self._synced.done()):
            self.await_sync()
            self._synced, self._unsynced_nbytes = self._syncing.submit(self._file.sync), 0
        return len(view)

    def await_sync(self) -> None:
        """Wait until what was asked of the disk is done."""
        if self._synced is not None:
            self._synced.result()

    @property
    def xxh3(self) -> str:
        """XXH3-128 of all that was written."""
        return self._xxh3.hexdigest()


class ByteSink(io.RawIOBase):
    """A file that is being written, as libraries write files."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self._file.write(memoryview(data))


class Output:
    """Fills the directory of an export.

    Args:
        folder: the directory; made if it does not exist.
        record: of the export; files that an earlier run finished are in it.
        copy: whether files are never linked.
        on_written: called with the bytes that were just written.
    """

    def __init__(
        self, folder: Path, record: ExportRecord, *, copy: bool, on_written: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        self.folder = folder
        self._on_written = on_written
        self.record = record
        self._copy = copy
        for partial in folder.rglob(f"*{layout.PARTIAL_SUFFIX}"):
            with atomic.translate_write_errors(partial):
                partial.unlink()
        self._publishing = ThreadPoolExecutor(_PUBLISHED_AT_ONCE, thread_name_prefix="publish")
        self._published: deque[Future[None]] = deque()
        self._proven: set[str] = set()
        """Files that were read again, or are the data set's own."""
        self._save_due = 0.0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the threads; what is being published is, or is removed."""
        self._publishing.shutdown()

    def is_done(self, name: str) -> bool:
        """Whether an earlier run finished a file."""
        return is_written(self.folder, self.record, name)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[OutputFile]:
        """Write a file, which gets its name at the end.

        Raises:
            StorageError: the disk is full, or cannot be written.
        """
        path = self.folder / name
        with atomic.translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        file = atomic.AtomicFile(path)
        try:
            output = OutputFile(file, self._publishing, self._on_written)
            yield output
            output.await_sync()
        except BaseException:
            file.discard()
            raise
        self._published.append(self._publishing.submit(self._publish, name, file, output))
        while len(self._published) > _PUBLISHED_AT_ONCE:
            self._published.popleft().result()

    def _publish(self, name: str, file: atomic.AtomicFile, output: OutputFile) -> None:
        """Make a file durable, read it again, and enter it, while the next one is written."""
        try:
            file.publish()
        except BaseException:
            file.discard()
            raise
        sha256, xxh3 = self._read_again(name)
        if xxh3 != output.xxh3:
            raise self._not_as_written(name, f"xxh3-128 {output.xxh3}", xxh3)
        self._note(name, WrittenFile(output.nbytes, sha256))

    def settle(self) -> None:
        """Wait until all files are published."""
        while self._published:
            self._published.popleft().result()

    def link(self, source: Path, name: str, sha256: str) -> bool:
        """Give a file that is there a second name, if the file system can; `sha256` is what it must hold."""
        path = self.folder / name
        if self._copy:
            return False
        with atomic.translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(source, path)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES):
                    return False
                raise
        self._note(name, WrittenFile(path.stat().st_size, sha256, linked=True))
        return True

    def _note(self, name: str, written: WrittenFile) -> None:
        with self._lock:
            self._proven.add(name)
            self.record.files[name] = written
            if time.monotonic() >= self._save_due:  # the rest is entered at the end
                save_export(self.folder, self.record)
                self._save_due = time.monotonic() + _SAVE_SECONDS

    def finish(self) -> None:
        """Wait for all files, and read those of earlier runs again.

        Raises:
            StorageError: one does not hold what was written.
        """
        self.settle()
        self.record.files = dict(sorted(self.record.files.items()))
        for name, written in self.record.files.items():
            if name not in self._proven and (found := self._read_again(name)[0]) != written.sha256:
                raise self._not_as_written(name, f"sha256 {written.sha256}", found)

    def _read_again(self, name: str) -> tuple[str, str]:
        """SHA-256 and XXH3-128 of a file."""
        path = self.folder / name
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        buffer = memoryview(bytearray(_PIECE_NBYTES))
        with atomic.translate_read_errors(path), path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                xxh3.update(buffer[:count])
                sha256.update(buffer[:count])
        return sha256.hexdigest(), xxh3.hexdigest()

    def _not_as_written(self, name: str, expected: str, found: str) -> StorageError:
        return StorageError(
            f"{self.folder / name}: expected what was written, {expected}, found {found}",
            next_step="check the disk; delete the directory, and run the same command again",
        )


def is_written(folder: Path, record: ExportRecord, name: str) -> bool:
    """Whether a file is recorded, and there in its size."""
    done, path = record.files.get(name), folder / name
    return done is not None and path.is_file() and path.stat().st_size == done.nbytes


def save_export(folder: Path, record: ExportRecord) -> None:
    """Replace the record atomically."""
    atomic.write_whole(folder / EXPORT, encode(record))


def require_room(folder: Path, nbytes: int) -> None:
    """Refuse what will not fit.

    Raises:
        StorageError: the disk is too small.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise StorageError(
            f"{folder}: the disk cannot hold it: {nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            next_step="make room, or choose another directory",
        )


def require_foreign_to_none(folder: Path) -> None:
    """Require that a directory is new or empty.

    Raises:
        ExportError: it holds something that is no export.
    """
    ours = (layout.LOCK, EXPORT + layout.PARTIAL_SUFFIX)  # of a run that was killed at once
    if folder.exists() and (not folder.is_dir() or any(path.name not in ours for path in folder.iterdir())):
        raise ExportError(f"{folder}: holds something that is no export", next_step="choose another directory")

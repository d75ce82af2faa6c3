"""Storage: local files that are whole or absent, and the lock of a data root.

A file is written beside its name, fsynced, renamed, and its directory fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import filelock

from tokenmill import layout
from tokenmill.errors import DataRootError, StorageError


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Args:
        path: its name.
        tag: tells apart the files in the making of several writers of the same name, of which each is right.

    Use as a context manager: leaving it normally publishes the file, an exception removes it.

    Raises:
        StorageError: the disk is full or not writable. Nothing remains of the file then.
    """

    def __init__(self, path: Path, tag: str = "") -> None:
        self.path = path
        self._partial = path.with_name(path.name + tag + layout.PARTIAL_SUFFIX)
        with reported(path):
            self._file: io.FileIO = self._partial.open("wb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        with reported(self.path):
            view = memoryview(data).cast("B")
            while len(view):
                view = view[self._file.write(view) :]

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace bytes written before."""
        with reported(self.path):
            self._file.seek(offset)
            self.write(data)
            self._file.seek(0, os.SEEK_END)

    def publish(self) -> None:
        with reported(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        publish(self._partial, self.path)

    def discard(self) -> None:
        self._file.close()
        # A disk that fails here has failed before, and that error is the one to tell; the next run
        # removes what is left.
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def read_back(self) -> io.BufferedReader:
        """The bytes written so far, from the start."""
        return self._partial.open("rb")

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.publish()
        except BaseException:
            self.discard()
            raise


def publish(partial: Path, path: Path) -> None:
    """Give a durable file its name, durably."""
    with reported(path):
        partial.replace(path)
        _fsync_directory(path.parent)


def write_whole(path: Path, data: bytes | memoryview, tag: str = "") -> None:
    """Write a small file atomically; `tag` as of `AtomicFile`."""
    with AtomicFile(path, tag) as file:
        file.write(data)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn an `OSError` on `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"{path}: cannot be written: {error.strerror}",
            next_step="make room on the disk, then run the same command again: finished shards are kept"
            if full
            else "check that the directory can be written, then run the same command again",
        ) from None


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an `OSError` while `path` is read into a `DataRootError`."""
    try:
        yield
    except OSError as error:
        raise DataRootError(
            f"{path}: cannot be read: {error.strerror or error}",
            next_step="check the permissions and the disk, then run the same command again",
        ) from None


def _fsync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open directories, and journals renames itself
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory one may write to but not list
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_root(root: Path) -> None:
    """Make the data root's directory, durably."""
    if root.is_dir():
        return
    with reported(root):
        root.mkdir(parents=True, exist_ok=True)
        _fsync_directory(root.parent)


_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
_LOCK_SECONDS = 1.0
"""A process that was killed may take a moment to let go of its lock."""


def _no_locks(root: Path, reason: str) -> DataRootError:
    return DataRootError(
        f"{root}: its file system has no locks ({reason}), which keep two runs from writing to one data root",
        next_step="use a directory on a local disk, or mount the file system with locks (NFS: with lockd and without "
        "nolock; Lustre: with flock)",
    )


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold the data root's lock; the operating system lets go of it when the process ends, however it ends.

    Raises:
        DataRootError: another process holds it.
    """
    lock = filelock.FileLock(root / layout.LOCK)
    with reported(root):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of versions that take a file's existence for a lock then
                lock.acquire(timeout=_LOCK_SECONDS, poll_interval=0.02)
        except filelock.Timeout:
            raise DataRootError(
                f"{root}: another tokenmill process is at work on this data root",
                next_step="wait for it, stop it, or choose another directory",
            ) from None
        except (NotImplementedError, OSError) as error:
            number = getattr(error, "errno", None) or errno.ENOSYS
            if number not in _NO_LOCKS:
                raise
            raise _no_locks(root, errno.errorcode[number]) from None
        if isinstance(lock, filelock.SoftFileLock):
            lock.release()
            raise _no_locks(root, "ENOSYS")
    try:
        yield
    finally:
        lock.release()


def remove_partials(root: Path) -> None:
    """Delete what a killed run left half-written. Call with the lock held."""
    for pattern in (layout.SHARD_GLOB, layout.DOCUMENTS_GLOB, layout.MANIFEST):
        for partial in root.glob(f"{pattern}*{layout.PARTIAL_SUFFIX}"):
            with reported(partial):
                partial.unlink()

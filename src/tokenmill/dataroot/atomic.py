"""Storage: local files that are whole or absent, and the lock of a data root.

A file is written beside its name, fsynced, renamed, and its directory fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tokenmill.dataroot import layout
from tokenmill.errors import DataRootError, StorageError


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Args:
        path: its name.
        temp_suffix: tells apart the temporary files of several writers of the same name, each of which writes the same.

    Use as a context manager: leaving it normally publishes the file, an exception removes it.

    Raises:
        StorageError: the disk is full or not writable. Nothing remains of the file then.
    """

    def __init__(self, path: Path, temp_suffix: str = "") -> None:
        self.path = path
        self._partial = path.with_name(path.name + temp_suffix + layout.PARTIAL_SUFFIX)
        with translate_write_errors(path):
            self._file: io.FileIO = self._partial.open("wb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        with translate_write_errors(self.path):
            view = memoryview(data).cast("B")
            while len(view):
                view = view[self._file.write(view) :]

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace bytes written before."""
        with translate_write_errors(self.path):
            self._file.seek(offset)
            self.write(data)
            self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Have the disk take what was written so far."""
        with translate_write_errors(self.path):
            getattr(os, "fdatasync", os.fsync)(self._file.fileno())

    def publish(self) -> None:
        with translate_write_errors(self.path):
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
        """Return the bytes written so far, from the start."""
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
    with translate_write_errors(path):
        partial.replace(path)
        _fsync_directory(path.parent)


def write_whole(path: Path, data: bytes | memoryview, temp_suffix: str = "") -> None:
    """Write a small file atomically; `temp_suffix` as of `AtomicFile`."""
    with AtomicFile(path, temp_suffix) as file:
        file.write(data)


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
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
def translate_read_errors(path: Path) -> Iterator[None]:
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
    with translate_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _fsync_directory(root.parent)


def remove_partials(root: Path) -> None:
    """Delete what a killed run left half-written. Call with the lock held."""
    for pattern in (layout.SHARD_GLOB, layout.DOCUMENTS_GLOB, layout.MANIFEST):
        for partial in root.glob(f"{pattern}*{layout.PARTIAL_SUFFIX}"):
            with translate_write_errors(partial):
                partial.unlink()


def remove(root: Path, *names: str) -> None:
    """Delete files of a data root, as far as they are there.

    Raises:
        StorageError: one cannot be deleted.
    """
    for name in names:
        with translate_write_errors(root / name):
            (root / name).unlink(missing_ok=True)

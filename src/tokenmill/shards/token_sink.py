"""Token sinks: where the tokens of one shard go, a file of its own or a range of `tokens.bin`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from tokenmill.dataroot.atomic import AtomicFile, translate_write_errors
from tokenmill.dataroot.tokens_file import TokensFile
from tokenmill.errors import StorageError

_READ_NBYTES = 1 << 20


class TokenSink(Protocol):
    """Where the tokens of one shard go."""

    path: Path

    def write(self, tokens: memoryview) -> None: ...

    def digest(self, header: bytes) -> str:
        """SHA-256 of `header` and the tokens written."""
        ...

    def publish(self, header: bytes) -> int:
        """Make the shard durable; the modification time of its file in ns, 0 if it has none."""
        ...

    def discard(self) -> None:
        """Remove what was written."""
        ...


class FileSink:
    """A file of its own, `train_NNNNNN.npy`."""

    def __init__(self, path: Path, header: bytes, temp_suffix: str = "") -> None:
        self.path = path
        self._header = header
        self._file = AtomicFile(path, temp_suffix)
        try:
            self._file.write(header)
        except StorageError:
            self._file.discard()
            raise

    def write(self, tokens: memoryview) -> None:
        self._file.write(tokens)

    def digest(self, header: bytes) -> str:
        self._set_header(header)
        with self._file.read_back() as written:
            return hashlib.file_digest(written, "sha256").hexdigest()

    def publish(self, header: bytes) -> int:
        self._set_header(header)
        self._file.publish()
        return self.path.stat().st_mtime_ns

    def discard(self) -> None:
        self._file.discard()

    def _set_header(self, header: bytes) -> None:
        if header != self._header:
            self._file.overwrite(0, header)
            self._header = header


class AppendSink:
    """A stretch of `tokens.bin`; shards are written one after the other."""

    def __init__(self, file: TokensFile) -> None:
        self.path = file.path
        self._file = file
        self._begin = file.nbytes
        self._nbytes = 0

    def write(self, tokens: memoryview) -> None:
        self._file.append(tokens)
        self._nbytes += len(tokens)

    def digest(self, header: bytes) -> str:
        return self._file.digest(header, self._nbytes, at=self._begin)

    def publish(self, header: bytes) -> int:  # it has no header here
        self._file.sync()
        return 0

    def discard(self) -> None:
        """Nothing: what is not recorded is cut off by the next run."""


class RangeSink:
    """A range of `tokens.bin`, whose place in it is known before the shards in front of it are made.

    Writers of the same range write the same bytes.
    """

    def __init__(self, path: Path, begin: int) -> None:
        self.path = path
        self._begin = self._end = begin
        with translate_write_errors(path):
            # The first writer makes it. Never truncate: other tasks write other ranges.
            # Not for reading: over NFS a page that is read would be written back with a neighbour's bytes in it.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, tokens: memoryview) -> None:
        with translate_write_errors(self.path):
            while tokens:
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
                count = os.write(self._descriptor, tokens)
                tokens, self._end = tokens[count:], self._end + count

    def digest(self, header: bytes) -> str:
        return _digest_of_range(self.path, self._begin, self._end, header)

    def publish(self, header: bytes) -> int:  # it has no header here
        with translate_write_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        return 0

    def discard(self) -> None:
        os.close(self._descriptor)


class LinkedSink:
    """A range of a file that holds the tokens already, and is to be linked as `tokens.bin`: nothing is written."""

    def __init__(self, path: Path, begin: int) -> None:
        self.path = path
        self._begin = self._end = begin

    def write(self, tokens: memoryview) -> None:
        self._end += len(tokens)

    def digest(self, header: bytes) -> str:
        return _digest_of_range(self.path, self._begin, self._end, header)

    def publish(self, header: bytes) -> int:
        return 0

    def discard(self) -> None:
        """Nothing: the file is another's."""


def _digest_of_range(path: Path, begin: int, end: int, header: bytes) -> str:
    """SHA-256 of `header` and a range of a file."""
    sha256 = hashlib.sha256(header)
    with translate_write_errors(path), path.open("rb") as file:
        file.seek(begin)
        for at in range(begin, end, _READ_NBYTES):
            sha256.update(file.read(min(_READ_NBYTES, end - at)))
    return sha256.hexdigest()

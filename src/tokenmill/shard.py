"""Shard, stage 5: parts of blocks → a shard, its documents sidecar, and its record.

A shard streams to its place, a file of its own or a stretch of `tokens.bin`: memory holds one part
at a time. Write and hash run where `append` is called, off the driver's thread.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill import layout
from tokenmill.encode import BAD, EMPTY, NULL, SPECIAL
from tokenmill.errors import SourceChangedError, StorageError
from tokenmill.manifest import Count, Cursor, ShardRecord
from tokenmill.pack import Block, Part
from tokenmill.storage import AtomicFile, reported, write_whole
from tokenmill.tokens_file import TokensFile

_DOCUMENTS_SCHEMA = pa.schema(
    {
        "start": pa.int64(),
        "tokens": pa.int64(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "row": pa.int64(),
    }
)
_DOCUMENTS_ROW_GROUP = 1 << 18
_READ_NBYTES = 1 << 20


class Place(Protocol):
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


class ShardFile:
    """A file of its own, `train_NNNNNN.npy`."""

    def __init__(self, path: Path, header: bytes, tag: str = "") -> None:
        self.path = path
        self._header = header
        self._file = AtomicFile(path, tag)
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


class ShardStretch:
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


class ShardRange:
    """A range of `tokens.bin`, whose place in it is known before the shards in front of it are made.

    Writers of the same range write the same bytes.
    """

    def __init__(self, path: Path, begin: int) -> None:
        self.path = path
        self._begin = self._end = begin
        with reported(path):
            # Made by whoever comes first; never cut off here, lest another's bytes go.
            # Not for reading: over NFS a page that is read would be written back with a neighbour's bytes in it.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, tokens: memoryview) -> None:
        with reported(self.path):
            while tokens:
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
                count = os.write(self._descriptor, tokens)
                tokens, self._end = tokens[count:], self._end + count

    def digest(self, header: bytes) -> str:
        sha256 = hashlib.sha256(header)
        with reported(self.path), self.path.open("rb") as file:
            file.seek(self._begin)
            for at in range(self._begin, self._end, _READ_NBYTES):
                sha256.update(file.read(min(_READ_NBYTES, self._end - at)))
        return sha256.hexdigest()

    def publish(self, header: bytes) -> int:  # it has no header here
        with reported(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        return 0

    def discard(self) -> None:
        os.close(self._descriptor)


class ShardWriter:
    """One shard in the making.

    Args:
        root: the data root.
        index: of the shard.
        place: where its tokens go.
        tokens: the shard's size if it is full; the last one may end with less.
        dtype: of a token.
        paths: names of the source files, by index.
        tag: as of `storage.AtomicFile`, for the sidecar.
    """

    def __init__(
        self,
        root: Path,
        index: int,
        place: Place,
        *,
        tokens: int,
        dtype: layout.TokenDType,
        paths: pa.Array,
        tag: str = "",
    ) -> None:
        self.index = index
        self._place = place
        self._expected = tokens
        self._dtype = dtype
        self._tokens = 0
        self._documents = Documents(root / layout.documents_name(index), paths, tag)
        self._ledger: dict[int, Count] = {}
        self._sha256 = hashlib.sha256(layout.npy_header(dtype, tokens))

    def append(self, block: Block, part: Part, position: int) -> None:
        """Write a part whose first token is at `position` of the stream."""
        rows = block.rows(part.begin, part.end)
        tokens = np.empty(part.tokens, self._dtype)
        np.concatenate(rows.pieces(part.skip, part.tokens), out=tokens)
        data = tokens.data.cast("B")
        self._place.write(data)
        self._sha256.update(data)
        self._tokens += part.tokens
        self.count(tally(block.rows(part.first_start, part.end)))
        self._note_documents(rows, position - part.skip, part.skip > 0)

    @property
    def is_full(self) -> bool:
        return self._tokens == self._expected

    def count(self, counts: list[Count]) -> None:
        """Enter rows into the ledger."""
        for count in counts:
            self._ledger.setdefault(count.file, Count(count.file)).add(count)

    def _note_documents(self, rows: Block, first_start: int, skip_first: bool) -> None:
        starts = first_start + np.cumsum(rows.length) - rows.length
        found = np.flatnonzero(rows.length > 0)[int(skip_first) :]
        self._documents.append(starts[found], rows.length[found], rows.file[found], rows.row[found])

    def finish(self, next_cursor: Cursor, expected: ShardRecord | None) -> ShardRecord:
        """Publish the sidecar, then the shard; its record.

        Raises:
            SourceChangedError: the shard was made before and is another now. It is not published.
        """
        header = layout.npy_header(self._dtype, self._tokens)
        sha256 = self._sha256.hexdigest() if self._tokens == self._expected else self._place.digest(header)
        if expected is not None and (sha256, next_cursor) != (expected.sha256, expected.next_cursor):
            raise SourceChangedError(
                f"{self._place.path.parent / layout.shard_name(self.index)}: made again it is another shard: "
                f"expected sha256 {expected.sha256}, found {sha256}",
                next_step="the text of the corpus changed since: restore it, or start in another directory",
            )
        documents_sha256 = self._documents.publish()
        mtime_ns = self._place.publish(header)
        return ShardRecord(
            index=self.index,
            tokens=self._tokens,
            sha256=sha256,
            documents=self._documents.count,
            documents_sha256=documents_sha256,
            next_cursor=next_cursor,
            mtime_ns=mtime_ns,
            ledger=[self._ledger[file] for file in sorted(self._ledger)],
        )

    def discard(self) -> None:
        """Remove what was written of the shard."""
        self._place.discard()


class Documents:
    """The documents sidecar in the making; memory holds one row group and the compressed rest."""

    def __init__(self, path: Path, paths: pa.Array, tag: str = "") -> None:
        self._path = path
        self._tag = tag
        self._paths = paths
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, _DOCUMENTS_SCHEMA, compression="zstd")
        self._waiting: list[NDArray[np.int64]] = []
        self._waiting_rows = 0
        self.count = 0

    def append(
        self, start: NDArray[np.int64], tokens: NDArray[np.int64], file: NDArray[np.int64], row: NDArray[np.int64]
    ) -> None:
        """Note documents, arrays of shape `(documents,)`."""
        self._waiting.append(np.stack([start, tokens, file, row]))
        self.count += len(start)
        self._waiting_rows += len(start)
        while self._waiting_rows >= _DOCUMENTS_ROW_GROUP:
            self._write(_DOCUMENTS_ROW_GROUP)

    def _write(self, rows: int) -> None:
        """Write the first `rows` documents that wait: where row groups end must not depend on blocks."""
        waiting = np.hstack(self._waiting)
        start, tokens, file, row = waiting[:, :rows]
        used, index = np.unique(file, return_inverse=True)
        source = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), self._paths.take(pa.array(used)))
        self._writer.write_table(pa.table([start, tokens, source, row], schema=_DOCUMENTS_SCHEMA), row_group_size=rows)
        self._waiting = [waiting[:, rows:]]
        self._waiting_rows -= rows

    def publish(self) -> str:
        """Write the file; its SHA-256."""
        if self._waiting_rows:
            self._write(self._waiting_rows)
        self._writer.close()
        data = memoryview(self._sink.getvalue())
        write_whole(self._path, data, self._tag)
        return hashlib.sha256(data).hexdigest()


def tally(rows: Block) -> list[Count]:
    """The rows of a block by source file and kind."""
    if len(rows) == 0:
        return []
    files, file = np.unique(rows.file, return_inverse=True)
    null = np.bincount(file, rows.flags & NULL > 0, len(files)).astype(int)
    empty = np.bincount(file, rows.flags & EMPTY > 0, len(files)).astype(int)
    special = np.bincount(file, rows.flags & SPECIAL > 0, len(files)).astype(int)
    bad = np.bincount(file, rows.flags & BAD > 0, len(files)).astype(int)
    every = np.bincount(file, minlength=len(files))
    counts = np.stack([files, every - null - empty - bad, null, empty, special, bad], axis=1)
    return [Count(*row) for row in counts.tolist()]

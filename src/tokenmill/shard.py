"""Shard, stage 5: parts of blocks → a shard file, its documents sidecar, and its record.

A shard streams to its file: memory holds one part at a time. Write and hash run where `append` is
called, off the driver's thread.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill import layout
from tokenmill.encode import EMPTY, NULL, SPECIAL
from tokenmill.manifest import Count, Cursor, ShardRecord
from tokenmill.pack import Block, Part
from tokenmill.storage import AtomicFile


class ShardWriter:
    """One shard in the making.

    Args:
        root: the data root.
        index: of the shard.
        tokens: the shard's size if it is full; the last one may end with less.
        dtype: of a token.
        paths: names of the source files, by index.
    """

    def __init__(
        self,
        root: Path,
        index: int,
        *,
        tokens: int,
        dtype: layout.TokenDType,
        paths: pa.Array,
    ) -> None:
        self._root = root
        self._index = index
        self._expected = tokens
        self._dtype = dtype
        self._paths = paths
        self._tokens = 0
        self._documents: list[tuple[NDArray[np.int64], ...]] = []
        self._ledger: dict[int, Count] = {}
        self._file = AtomicFile(root / layout.shard_name(index))
        self._sha256 = hashlib.sha256()
        self._write(layout.npy_header(dtype, tokens))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def append(self, block: Block, part: Part, position: int) -> None:
        """Write a part whose first token is at `position` of the stream."""
        rows = block.rows(part.begin, part.end)
        tokens = np.empty(part.tokens, self._dtype)
        np.concatenate(rows.pieces(part.skip, part.tokens), out=tokens)
        self._write(tokens.data.cast("B"))
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
        self._documents.append((starts[found], rows.length[found], rows.file[found], rows.row[found]))

    def finish(self, next_cursor: Cursor) -> ShardRecord:
        """Publish the sidecar, then the shard; its record."""
        if self._tokens < self._expected:
            header = layout.npy_header(self._dtype, self._tokens)
            self._file.overwrite(0, header)
            with self._file.read_back() as written:
                self._sha256 = hashlib.file_digest(written, "sha256")
        columns = [np.concatenate(column) for column in zip(*self._documents, strict=True)]
        documents_sha256 = self._write_documents(*columns)
        self._file.publish()
        return ShardRecord(
            index=self._index,
            tokens=self._tokens,
            sha256=self._sha256.hexdigest(),
            documents=len(columns[0]),
            documents_sha256=documents_sha256,
            next_cursor=next_cursor,
            mtime_ns=self._file.path.stat().st_mtime_ns,
            ledger=[self._ledger[file] for file in sorted(self._ledger)],
        )

    def _write_documents(
        self, start: NDArray[np.int64], length: NDArray[np.int64], file: NDArray[np.int64], row: NDArray[np.int64]
    ) -> str:
        used, index = np.unique(file, return_inverse=True)
        source = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), self._paths.take(pa.array(used)))
        table = pa.table({"start": start, "tokens": length, "source": source, "row": row})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = memoryview(sink.getvalue())
        with AtomicFile(self._root / layout.documents_name(self._index)) as out:
            out.write(data)
        return hashlib.sha256(data).hexdigest()

    def discard(self) -> None:
        """Remove what was written of the shard."""
        self._file.discard()


def tally(rows: Block) -> list[Count]:
    """The rows of a block by source file and kind."""
    if len(rows) == 0:
        return []
    files, file = np.unique(rows.file, return_inverse=True)
    null = np.bincount(file, rows.flags & NULL > 0, len(files)).astype(int)
    empty = np.bincount(file, rows.flags & EMPTY > 0, len(files)).astype(int)
    special = np.bincount(file, rows.flags & SPECIAL > 0, len(files)).astype(int)
    every = np.bincount(file, minlength=len(files))
    documents = every - null - empty
    return [Count(int(f), int(documents[i]), int(null[i]), int(empty[i]), int(special[i])) for i, f in enumerate(files)]

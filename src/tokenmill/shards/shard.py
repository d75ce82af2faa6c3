"""Shard, stage 5: parts of blocks → a shard, its documents sidecar, and its record.

A shard streams to its sink, a file of its own or a stretch of `tokens.bin`: memory holds one part
at a time. Write and hash run where `append` is called, off the driver's thread.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.atomic import write_whole
from tokenmill.dataroot.manifest import Count, Cursor, ShardRecord
from tokenmill.encoding.encoder import BAD, EMPTY, NULL, SPECIAL
from tokenmill.errors import SourceChangedError
from tokenmill.shards.pack import EmittedRows, ShardSlice
from tokenmill.shards.token_sink import TokenSink

DOCUMENTS_ROW_GROUP = 1 << 18
METADATA_NBYTES = 64 << 20
"""Strings of metadata that end a row group earlier."""


class ShardWriter:
    """Writes one shard and its sidecar.

    Args:
        root: the data root.
        index: of the shard.
        sink: where its tokens go.
        tokens: the shard's size if it is full; the last one may end with less.
        dtype: of a token.
        paths: names of the source files, by index.
        schema: of the sidecar.
        temp_suffix: as of `atomic.AtomicFile`, for the sidecar.
    """

    def __init__(
        self,
        root: Path,
        index: int,
        sink: TokenSink,
        *,
        tokens: int,
        dtype: npy.TokenDType,
        paths: pa.Array,
        schema: pa.Schema,
        temp_suffix: str = "",
    ) -> None:
        self.index = index
        self._sink = sink
        self._expected = tokens
        self._dtype = dtype
        self._tokens = 0
        self._documents = Documents(root / layout.documents_name(index), paths, schema, temp_suffix)
        self._ledger: dict[int, Count] = {}
        self._sha256 = hashlib.sha256(npy.npy_header(dtype, tokens))

    def append(self, block: EmittedRows, part: ShardSlice, position: int) -> None:
        """Write a part whose first token is at `position` of the stream."""
        rows = block.rows(part.begin, part.end)
        for tokens in rows.gather(part.skip, part.tokens):
            data = tokens.data.cast("B")
            self._sink.write(data)
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

    def _note_documents(self, rows: EmittedRows, first_start: int, skip_first: bool) -> None:
        starts = first_start + np.cumsum(rows.length) - rows.length
        found = np.flatnonzero(rows.length > 0)[int(skip_first) :]
        hashes = rows.text_xxh3.view(np.int64)
        columns = (starts, rows.length, rows.row, hashes, rows.file)
        metadata = None if rows.metadata is None else rows.metadata.take(pa.array(found))
        self._documents.append(np.stack([column[found] for column in columns]), metadata)

    def finish(self, next_cursor: Cursor, expected: ShardRecord | None) -> ShardRecord:
        """Publish the sidecar, then the shard; its record.

        Raises:
            SourceChangedError: the shard was made before and is another now. It is not published.
        """
        header = npy.npy_header(self._dtype, self._tokens)
        sha256 = self._sha256.hexdigest() if self._tokens == self._expected else self._sink.digest(header)
        if expected is not None and (sha256, next_cursor) != (expected.sha256, expected.next_cursor):
            raise SourceChangedError(
                f"{self._sink.path.parent / layout.shard_name(self.index)}: made again it is another shard: "
                f"expected sha256 {expected.sha256}, found {sha256}",
                next_step="the text of the corpus changed since: restore it, or start in another directory",
            )
        documents_sha256 = self._documents.publish()
        mtime_ns = self._sink.publish(header)
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
        self._sink.discard()


class Documents:
    """Writes the documents sidecar; memory holds one row group and the compressed rest."""

    def __init__(self, path: Path, paths: pa.Array, schema: pa.Schema, temp_suffix: str = "") -> None:
        self._path = path
        self._tag = temp_suffix
        self._paths = paths
        self._sink = pa.BufferOutputStream()
        self._schema = schema
        how: dict[str, object] = {"compression": "zstd"}
        if "text_xxh3" in schema.names:  # smaller and three times as fast to write; hashes neither repeat nor compress
            packed = {"start", "tokens", "row"}
            plain = {*packed, "text_xxh3"}
            how = {
                "compression": {name: "none" if name in plain else "zstd" for name in schema.names},
                "use_dictionary": [name for name in schema.names if name not in plain],
                "column_encoding": dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
            }
        stored = pa.schema([field.with_nullable(True) for field in self._schema])
        self._writer = pq.ParquetWriter(self._sink, stored, **how)
        self._waiting: list[NDArray[np.int64]] = []
        self._metadata: list[pa.Table] = []
        """Metadata of the documents that wait, if there is any."""
        self._sizes: NDArray[np.int64] = np.empty(0, np.int64)
        """Bytes of its strings, by document."""
        self._waiting_rows = 0
        self.count = 0

    def append(self, documents: NDArray[np.int64], metadata: pa.Table | None) -> None:
        """Note documents: start, tokens, row, hash and source file of each, shape `(5, documents)`; and metadata."""
        self._waiting.append(documents)
        if metadata is not None:
            self._metadata.append(metadata)
            self._sizes = np.append(self._sizes, _string_nbytes(metadata))
        self.count += documents.shape[1]
        self._waiting_rows += documents.shape[1]
        while rows := self._whole_group():
            self._write(rows)

    def _whole_group(self) -> int:
        """Return the rows of the next row group, 0 if it is not whole: decided by the documents, not by blocks."""
        ends = np.cumsum(self._sizes[:DOCUMENTS_ROW_GROUP])
        if len(ends) and ends[-1] >= METADATA_NBYTES:
            return int(np.searchsorted(ends, METADATA_NBYTES)) + 1
        return DOCUMENTS_ROW_GROUP if self._waiting_rows >= DOCUMENTS_ROW_GROUP else 0

    def _write(self, rows: int) -> None:
        """Write the first `rows` documents that wait: where row groups end must not depend on blocks."""
        waiting = np.hstack(self._waiting)
        start, tokens, row, hashes, file = waiting[:, :rows]
        used, index = _distinct(file)
        source = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), self._paths.take(pa.array(used)))
        columns: dict[str, Any] = {"start": start, "tokens": tokens, "source": source, "row": row}
        columns["text_xxh3"] = hashes.view(np.uint64)
        if self._metadata:
            metadata = pa.concat_tables(self._metadata)
            columns |= {name: metadata[name].slice(0, rows) for name in metadata.column_names}
            self._metadata = [metadata.slice(rows)]
            self._sizes = self._sizes[rows:]
        table = pa.table({name: columns[name] for name in self._schema.names}).cast(self._writer.schema)
        self._writer.write_table(table, row_group_size=rows)
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


def _string_nbytes(metadata: pa.Table) -> NDArray[np.int64]:
    sizes = np.zeros(len(metadata), np.int64)
    for column in metadata.columns:
        if pa.types.is_large_string(column.type):
            sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return sizes


def tally(rows: EmittedRows) -> list[Count]:
    """Return the rows of a block by source file and kind."""
    if len(rows) == 0:
        return []
    files, file = _distinct(rows.file)
    null, empty, special, bad = (
        np.bincount(file[rows.flags & flag > 0], minlength=len(files)) for flag in (NULL, EMPTY, SPECIAL, BAD)
    )
    every = np.bincount(file, minlength=len(files))
    counts = np.stack([files, every - null - empty - bad, null, empty, special, bad], axis=1)
    return [Count(*row) for row in counts.tolist()]


def _distinct(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different numbers among natural ones, ascending, and where each of `numbers` is among them.

    As `numpy.unique` does, which sorts: that is fifteen times slower where the numbers are not much larger than there
    are many of them.
    """
    if len(numbers) and int(numbers.max()) > 4 * len(numbers):
        used, index = np.unique(numbers, return_inverse=True)
        return used, index
    occurs = np.bincount(numbers) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[numbers]

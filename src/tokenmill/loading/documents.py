"""Documents: where the documents of a finished data root begin and what they came from. Reads only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Manifest
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.errors import DataRootError
from tokenmill.recipe import SIDECAR_COLUMNS

_VERIFY = "run tokenmill verify on the data root"
STARTS_NBYTES = 1 << 30
"""Size of the starts that are cached, 8 bytes a document; beyond it the least recently used shards are read again."""


class Document(NamedTuple):
    """A document of the stream."""

    start: int
    """Its first token, counted in the whole stream."""
    tokens: int
    source: str
    row: int
    text_xxh3: int | None = None
    """XXH3-64 of its text; None where the sidecar has none."""
    metadata: Mapping[str, object] = {}
    """Values of the metadata columns."""


class DocumentPart(NamedTuple):
    """What lies of a document among some tokens."""

    document: Document
    """Its `start` is where it would begin if all of it lay as the part does."""
    begin: int
    """First token, counted as `start`."""
    end: int


class FoundRow(NamedTuple):
    """What a row of a source file became."""

    document: Document
    samples: list[int]
    """Whole samples that hold tokens of it, ascending."""


def documents_of(table: pa.Table) -> list[Document]:
    """Return the documents of a sidecar, or of some rows of it."""
    names = [name for name in table.column_names if name in SIDECAR_COLUMNS]
    metadata = [name for name in table.column_names if name not in SIDECAR_COLUMNS]
    return [
        Document(**{name: row[name] for name in names}, metadata={name: row[name] for name in metadata})
        for row in table.to_pylist()
    ]


def file_numbers(table: pa.Table, numbers: Mapping[str, int]) -> NDArray[np.int64]:
    """Return the number of each document's source file, shape `(documents,)`; -1 for one that has none."""
    if len(table) == 0:
        return np.empty(0, np.int64)
    source = table["source"].combine_chunks()
    known = np.array([numbers.get(path, -1) for path in source.dictionary.to_pylist()], np.int64)
    found: NDArray[np.int64] = known[source.indices.to_numpy()]
    return found


class DocumentIndex:
    """Finds documents by the tokens they hold, from the sidecars; one row group of one is in memory at a time."""

    def __init__(self, root: Path, manifest: Manifest, seq_len: int) -> None:
        if not manifest.shards:
            raise DataRootError(f"{root}: {layout.MANIFEST} lists no shards", next_step=_VERIFY)
        self._root = root
        self._shards = manifest.shards
        self._tokens, self._seq_len = manifest.tokens, seq_len
        self._shard_size = manifest.recipe.shard_size
        self._schema = documents_schema(manifest)
        self._read: tuple[tuple[int, int], pa.Table] | None = None
        """Shard, row group, and its documents."""
        self._groups: dict[int, NDArray[np.int64]] = {}
        """Where each row group of a sidecar begins, and the end."""
        self._starts: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def between(self, begin: int, end: int) -> list[Document]:
        """Return the documents that hold tokens `begin` to `end`, in order."""
        shard, first = self._find(begin)
        found: list[Document] = []
        while shard < len(self._shards):
            starts = self._starts_of(shard)
            last = int(np.searchsorted(starts, end))
            for table in self._rows(shard, first, last):
                found += documents_of(table)
            if last < len(starts):
                break
            shard, first = shard + 1, 0
        return [document for document in found if document.start + document.tokens > begin]

    def at_tokens(self, tokens: NDArray[np.int64]) -> list[Document]:
        """Return the documents that hold some tokens, in their order; each part of a sidecar is read once."""
        places = [self._find(token) for token in tokens.tolist()]
        found: dict[tuple[int, int], Document] = {}
        for shard, row in sorted(set(places)):
            (table,) = self._rows(shard, row, row + 1)
            (found[shard, row],) = documents_of(table)
        return [found[place] for place in places]

    def _find(self, token: int) -> tuple[int, int]:
        """Return the shard in whose sidecar the document is that holds a token, and its row there."""
        shard = min(token // self._shard_size, len(self._shards) - 1)
        while (row := int(np.searchsorted(self._starts_of(shard), token, side="right")) - 1) < 0 and shard > 0:
            shard -= 1  # it began shards ago
        return shard, max(0, row)

    def parts_between(self, begin: int, end: int) -> list[DocumentPart]:
        """Return the documents that hold tokens `begin` to `end`, in order, and which of these they hold."""
        return [
            DocumentPart(each, max(begin, each.start), min(end, each.start + each.tokens))
            for each in self.between(begin, end)
        ]

    def parts_of(self, stretches: Sequence[tuple[int, int]]) -> list[list[DocumentPart]]:
        """Return the same of many stretches; in ascending order they are found fastest."""
        return [self.parts_between(begin, end) for begin, end in stretches]

    def starts_between(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the tokens from `begin` to before `end` at which a document starts, in order.

        The first call for a shard reads the starts of all its documents, which stay in memory.
        """
        found = []
        for shard in range(begin // self._shard_size, min(-(-end // self._shard_size), len(self._shards))):
            starts = self._starts_of(shard)
            found.append(starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)])
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.int64)])

    def starts_in(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the tokens in each stretch at which a document starts: as `starts_between`, of many at once."""
        first = begins // self._shard_size
        last = np.minimum((ends - 1) // self._shard_size, len(self._shards) - 1)
        found: list[list[NDArray[np.int64]]] = [[] for _ in begins]
        shards = np.unique(np.concatenate([first, last])).tolist()
        for shard in range(shards[0], shards[-1] + 1) if len(begins) and int((last - first).max()) > 1 else shards:
            inside = np.flatnonzero((first <= shard) & (last >= shard))
            starts = self._starts_of(shard)
            edges = np.searchsorted(starts, np.stack([begins[inside], ends[inside]])).tolist()
            for stretch, low, high in zip(inside.tolist(), *edges, strict=True):
                found[stretch].append(starts[low:high])
        nothing = np.empty(0, np.int64)
        return [each[0] if len(each) == 1 else np.concatenate([nothing, *each]) for each in found]

    def _starts_of(self, shard: int) -> NDArray[np.int64]:
        with self._lock:
            starts = self._starts.pop(shard, None)
            if starts is None:
                starts = self._table(shard, columns=["start"])["start"].to_numpy()
            self._starts[shard] = starts  # the last of a dict is the one used last
            while len(self._starts) > 1 and sum(each.nbytes for each in self._starts.values()) > STARTS_NBYTES:
                del self._starts[next(iter(self._starts))]
            return starts

    def document(self, number: int) -> Document:
        """Return a document by its number in the stream."""
        for shard, record in enumerate(self._shards):
            if number < record.documents:
                (table,) = self._rows(shard, number, number + 1)
                return documents_of(table)[0]
            number -= record.documents
        raise IndexError(number)

    def find_row(self, source: str, row: int) -> FoundRow | None:
        """Return what a source row became; None if it became nothing."""
        for shard in range(len(self._shards)):
            table = self._table(shard, filters=[("source", "=", source), ("row", "=", row)])
            if len(table):
                (document,) = documents_of(table)
                end = min(document.start + document.tokens, self._tokens)
                whole = self._tokens // self._seq_len
                return FoundRow(
                    document, list(range(document.start // self._seq_len, min(whole, -(-end // self._seq_len))))
                )
        return None

    def tables(self) -> Iterator[pa.Table]:
        """Yield the documents of all sidecars in order, a row group at a time."""
        for shard in range(len(self._shards)):
            with self._opened(shard) as file:
                found, expected = file.metadata.num_rows, self._shards[shard].documents
                if found != expected:
                    raise DataRootError(
                        f"{self._root / layout.documents_name(shard)}: expected {expected} documents, found {found}",
                        next_step=_VERIFY,
                    )
                for group in range(file.num_row_groups):
                    yield self._checked(file.read_row_group(group, use_threads=False), self._schema)

    def sidecar(self, shard: int) -> pa.Table:
        """Return the documents that start in a shard, in the columns of `dataroot.sidecar`."""
        return self._table(shard)

    def _rows(self, shard: int, first: int, end: int) -> Iterator[pa.Table]:
        """Yield the rows `first` to before `end` of a sidecar; the row group that was read last stays in memory."""
        if first >= end:
            return
        if shard not in self._groups:
            with self._opened(shard) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._groups[shard] = np.cumsum([0, *rows])
        bounds = self._groups[shard]
        for group in range(int(np.searchsorted(bounds, first, side="right")) - 1, int(np.searchsorted(bounds, end))):
            read = self._read
            if read is None or read[0] != (shard, group):
                with self._opened(shard) as file:
                    table = self._checked(file.read_row_group(group, use_threads=False), self._schema)
                self._read = read = ((shard, group), table)
            base = int(bounds[group])
            yield read[1].slice(max(first - base, 0), min(end - base, len(read[1])) - max(first - base, 0))

    @contextmanager
    def _opened(self, shard: int) -> Iterator[pq.ParquetFile]:
        with self._open(shard) as file:
            yield pq.ParquetFile(file, pre_buffer=False)

    @contextmanager
    def _open(self, shard: int) -> Iterator[BinaryIO]:
        """Open a sidecar, whose damage is an error of ours.

        Raises:
            DataRootError: it is missing, or not a documents sidecar.
        """
        path = self._root / layout.documents_name(shard)
        if not path.is_file():
            raise DataRootError(f"{path}: is missing", next_step=_VERIFY)
        try:
            with path.open("rb") as file:  # Arrow opens no path that is not UTF-8
                yield file
        except (pa.ArrowException, ValueError, OSError) as error:  # cast raises plain ValueErrors
            what = str(error).splitlines()[0]
            raise DataRootError(f"{path}: not a documents sidecar: {what}", next_step=_VERIFY) from None

    def _checked(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        table = table.cast(schema).unify_dictionaries()
        table.validate(full=True)  # damage can leave names that are not UTF-8
        return table

    def _table(self, shard: int, *, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        schema = self._schema if columns is None else pa.schema([self._schema.field(name) for name in columns])
        with self._open(shard) as file:
            # Threads of its own would outlive an error, and end the process with an abort.
            how = {"use_threads": False, "pre_buffer": False}
            return self._checked(pq.read_table(file, columns=columns, filters=filters, **how), schema)

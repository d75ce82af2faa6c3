"""Documents: where the documents of a finished data root begin and what they came from. Reads only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """Finds documents by the tokens they hold, from the sidecars; one sidecar is in memory at a time."""

    def __init__(self, root: Path, manifest: Manifest, seq_len: int) -> None:
        if not manifest.shards:
            raise DataRootError(f"{root}: {layout.MANIFEST} lists no shards", next_step=_VERIFY)
        self._root = root
        self._shards = manifest.shards
        self._tokens, self._seq_len = manifest.tokens, seq_len
        self._shard_size = manifest.recipe.shard_size
        self._schema = documents_schema(manifest)
        self._read: tuple[int, pa.Table] | None = None
        self._starts: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def between(self, begin: int, end: int) -> list[Document]:
        """Return the documents that hold tokens `begin` to `end`, in order."""
        found: list[Document] = []
        shard = min(begin // self._shard_size, len(self._shards) - 1)
        # The document that holds the first token may have begun shards ago.
        while shard > 0 and not self._starts_by(shard, begin):
            shard -= 1
        while shard < len(self._shards) and shard * self._shard_size < end:
            table = self.sidecar(shard)
            starts = table["start"].to_numpy()
            ends = starts + table["tokens"].to_numpy()
            inside = np.flatnonzero((starts < end) & (ends > begin))
            if len(inside):
                found += documents_of(table.slice(int(inside[0]), len(inside)))
            shard += 1
        return found

    def parts_between(self, begin: int, end: int) -> list[DocumentPart]:
        """Return the documents that hold tokens `begin` to `end`, in order, and which of these they hold."""
        return [
            DocumentPart(each, max(begin, each.start), min(end, each.start + each.tokens))
            for each in self.between(begin, end)
        ]

    def _starts_by(self, shard: int, token: int) -> bool:
        starts = self.sidecar(shard)["start"]
        return len(starts) > 0 and starts[0].as_py() <= token

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
                return documents_of(self.sidecar(shard).slice(number, 1))[0]
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
        """Yield the sidecar of each shard, in order."""
        for shard in range(len(self._shards)):
            yield self._table(shard)

    def sidecar(self, shard: int) -> pa.Table:
        """Return the documents that start in a shard, in the columns of `dataroot.sidecar`."""
        if self._read is None or self._read[0] != shard:
            self._read = shard, self._table(shard)
        return self._read[1]

    def _table(self, shard: int, *, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        path = self._root / layout.documents_name(shard)
        if not path.is_file():
            raise DataRootError(f"{path}: is missing", next_step=_VERIFY)
        schema = self._schema if columns is None else pa.schema([self._schema.field(name) for name in columns])
        try:
            with path.open("rb") as file:  # Arrow opens no path that is not UTF-8
                # Threads of its own would outlive an error, and end the process with an abort.
                how = {"use_threads": False, "pre_buffer": False}
                table = pq.read_table(file, columns=columns, filters=filters, **how)
            table = table.cast(schema).unify_dictionaries()
            table.validate(full=True)  # damage can leave names that are not UTF-8
        except (pa.ArrowException, ValueError, OSError) as error:  # cast raises plain ValueErrors
            what = str(error).splitlines()[0]
            raise DataRootError(f"{path}: not a documents sidecar: {what}", next_step=_VERIFY) from None
        return table

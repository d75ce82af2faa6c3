"""Load, stage 8: a data root's tokens and the documents they belong to, memory-mapped. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill import layout, storage
from tokenmill import manifest as manifests
from tokenmill.errors import DataRootError, QueryError
from tokenmill.manifest import Consolidated, Manifest

_VERIFY = "run tokenmill verify on the data root"
_DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("start", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)


class TokenStream:
    """The token stream of a data root, from `tokens.bin` or from its shards, whichever is there.

    Args:
        root: the data root.
        manifest: its manifest, if it has one.
        record: of its consolidation, if it has one.

    Raises:
        DataRootError: neither is there, or a file is not as long as it must be.
    """

    def __init__(self, root: Path, manifest: Manifest | None, record: Consolidated | None) -> None:
        self._arrays: list[NDArray[Any]] = []
        if record is not None and record.complete:
            self.tokens, self.dtype = record.tokens, np.dtype(record.dtype).newbyteorder("<")
            self.paths = [root / layout.TOKENS]
            self._arrays = [_map(self.paths[0], self.dtype, record.tokens, 0)]
        elif manifest is not None and manifest.complete:
            self.tokens, self.dtype = manifest.tokens, np.dtype(manifest.stored_dtype).newbyteorder("<")
            self.paths = [root / layout.shard_name(shard.index) for shard in manifest.shards]
            for path, shard in zip(self.paths, manifest.shards, strict=True):
                self._arrays.append(_map(path, self.dtype, shard.tokens, layout.NPY_HEADER_NBYTES))
        else:
            raise DataRootError(
                f"{root}: expected a finished data set, found neither a complete {layout.MANIFEST} nor "
                f"a complete {layout.CONSOLIDATED}",
                next_step="run tokenmill pretokenize (or consolidate, for downloaded shards) to its end",
            )
        self._starts = np.cumsum([0, *map(len, self._arrays)])

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Tokens `begin` to `end` of the stream, shape `(end - begin,)`; a view if one file has them."""
        if not 0 <= begin <= end <= self.tokens:
            raise QueryError(
                f"tokens {begin} to {end}: the data set has {self.tokens}",
                next_step=f"ask for tokens from 0 to {self.tokens - 1}",
            )
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        pieces = []
        while begin < end:
            offset = begin - int(self._starts[first])
            pieces.append(self._arrays[first][offset : offset + end - begin])
            begin += len(pieces[-1])
            first += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def chunks(self, tokens: int) -> Iterator[NDArray[Any]]:
        """All tokens, at most so many at once."""
        for array in self._arrays:
            for at in range(0, len(array), tokens):
                yield array[at : at + tokens]


def _map(path: Path, dtype: np.dtype[Any], tokens: int, offset: int) -> NDArray[Any]:
    expected = offset + tokens * dtype.itemsize
    if not path.exists():
        raise DataRootError(f"{path}: is missing", next_step=_VERIFY)
    with storage.readable(path):
        found = path.stat().st_size
        if found != expected:
            raise DataRootError(f"{path}: expected {expected} bytes, found {found}", next_step=_VERIFY)
        return np.memmap(path, dtype, "r", offset, (tokens,)) if tokens else np.empty(0, dtype)


class Document(NamedTuple):
    """A document of the stream."""

    start: int
    """Its first token, counted in the whole stream."""
    tokens: int
    source: str
    row: int


class DocumentIndex:
    """Finds documents by the tokens they hold, from the sidecars; one sidecar is in memory at a time."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        if not manifest.shards:
            raise DataRootError(f"{root}: {layout.MANIFEST} lists no shards", next_step=_VERIFY)
        self._root = root
        self._shards = manifest.shards
        self._shard_size = manifest.recipe.shard_size
        self._read: tuple[int, pa.Table] | None = None

    def between(self, begin: int, end: int) -> list[Document]:
        """The documents that hold tokens `begin` to `end`, in order."""
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
                found += [Document(**row) for row in table.slice(int(inside[0]), len(inside)).to_pylist()]
            shard += 1
        return found

    def _starts_by(self, shard: int, token: int) -> bool:
        starts = self.sidecar(shard)["start"]
        return len(starts) > 0 and starts[0].as_py() <= token

    def of_row(self, source: str, row: int) -> Document | None:
        """The document that a source row became; None if it became none."""
        for shard in range(len(self._shards)):
            table = self._table(shard, filters=[("source", "=", source), ("row", "=", row)])
            if len(table):
                return Document(**table.to_pylist()[0])
        return None

    def sidecar(self, shard: int) -> pa.Table:
        """The documents that start in a shard: `start`, `tokens`, `source`, `row`."""
        if self._read is None or self._read[0] != shard:
            self._read = shard, self._table(shard)
        return self._read[1]

    def _table(self, shard: int, **filters: Any) -> pa.Table:
        path = self._root / layout.documents_name(shard)
        if not path.is_file():
            raise DataRootError(f"{path}: is missing", next_step=_VERIFY)
        try:
            return pq.read_table(path, **filters).cast(_DOCUMENTS_SCHEMA).unify_dictionaries()
        except (pa.ArrowException, ValueError, OSError) as error:  # cast raises plain ValueErrors
            what = str(error).splitlines()[0]
            raise DataRootError(f"{path}: not a documents sidecar: {what}", next_step=_VERIFY) from None


class DataRoot(NamedTuple):
    """What is known of a data root that is finished."""

    root: Path
    manifest: Manifest | None
    record: Consolidated | None

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        if self.record is not None:
            return self.record.seq_len
        assert self.manifest is not None
        return self.manifest.recipe.seq_len

    def tokens(self) -> TokenStream:
        """Its tokens."""
        return TokenStream(self.root, self.manifest, self.record)

    def documents(self) -> DocumentIndex:
        """Its documents.

        Raises:
            DataRootError: it has no manifest, so where tokens come from is not known.
        """
        if self.manifest is None:
            raise DataRootError(
                f"{self.root}: where its tokens come from is not known: expected {layout.MANIFEST}, found none",
                next_step="only data roots that tokenmill pretokenize made have provenance",
            )
        return DocumentIndex(self.root, self.manifest)

    def sample_ids(self) -> NDArray[np.uint64]:
        """The ids of all samples, shape `(samples,)`.

        Raises:
            DataRootError: the data root is not consolidated.
        """
        if self.record is None or not self.record.complete:
            raise DataRootError(
                f"{self.root}: it has no sample ids: expected a complete {layout.CONSOLIDATED}, found none",
                next_step=f"run: tokenmill consolidate {self.root}",
            )
        return _map(self.root / layout.SAMPLE_IDS, np.dtype("<u8"), self.record.samples, 0)


def open_root(root: Path) -> DataRoot:
    """A data root with what is recorded of it.

    Raises:
        DataRootError: nothing is, or it cannot be read.
    """
    found = DataRoot(root, manifests.load(root), manifests.load_consolidated(root))
    if found.manifest is None and found.record is None:
        raise DataRootError(
            f"{root}: expected {layout.MANIFEST} or {layout.CONSOLIDATED}, found neither",
            next_step="give a directory that tokenmill pretokenize or consolidate made",
        )
    return found

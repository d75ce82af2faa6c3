"""View: samples of documents that lie in data roots, in an order of their own; what a trainer opens. Reads only.

A view's index says for each of its documents where it begins in the view and where its tokens lie in the streams of
its sources. `docs/format.md` specifies the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.manifest import FileRecord, TokenizerRecord
from tokenmill.dataroot.view_record import ViewRecord, load_view, require_pinned, source_root
from tokenmill.errors import DataRootError, QueryError
from tokenmill.loading.data_root import DataRoot, MappedArray, Piece, TokenStream
from tokenmill.loading.samplers import permute

if TYPE_CHECKING:
    import pyarrow as pa

    from tokenmill.loading.documents import Document, DocumentIndex

_INDEX = np.dtype("<i8")
_SEARCHED = 1 << 20
"""Entries of the index that are looked through at once."""


def sample_key(seed: int) -> str:
    """Return the key of the permutation (`samplers.permute`) of a view whose samples are shuffled."""
    return f"view/{seed}"


class ViewIndex(NamedTuple):
    """Where documents lie; they are numbered in the order of the view before its samples are shuffled."""

    begins: NDArray[np.int64]
    """First token of each document, and the end of the last, counted in the view; shape `(documents + 1,)`."""
    places: NDArray[np.int64]
    """First token of each document, counted over the streams of all sources one after the other."""

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where tokens `begin` to before `end` lie, as `(first, end)`: neighbours that lie so are joined."""
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.begins, end, side="left"))
        starts = self.places[first:last].copy()
        ends = starts + np.diff(self.begins[first : last + 1])
        starts[0] += begin - int(self.begins[first])
        ends[-1] -= int(self.begins[last]) - end
        is_first = np.concatenate([[True], starts[1:] != ends[:-1]])
        is_last = np.concatenate([is_first[1:], [True]])
        yield from zip(starts[is_first].tolist(), ends[is_last].tolist(), strict=True)


class ViewStream:
    """The tokens of a view, with the interface of `TokenStream`.

    Args:
        streams: of the sources, in order.
        index: of the view.
        seq_len: tokens per sample.
        key: of the permutation of samples; None where they stay in order.
    """

    whole: None = None
    """The tokens are in many places."""

    def __init__(self, streams: Sequence[TokenStream], index: ViewIndex, *, seq_len: int, key: str | None) -> None:
        self.dtype = streams[0].dtype
        self._streams = streams
        self._bases = np.cumsum([0, *(stream.tokens for stream in streams)])
        self.index = index
        self._seq_len = seq_len
        self._key = key
        tokens = int(index.begins[-1])
        self._samples = tokens // seq_len
        self.tokens = tokens if key is None else self._samples * seq_len

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Return tokens `begin` to `end`, shape `(end - begin,)`, read-only."""
        if not 0 <= begin <= end <= self.tokens:
            raise QueryError(
                f"tokens {begin} to {end}: the view has {self.tokens}",
                next_step=f"ask for tokens from 0 to {self.tokens - 1}",
            )
        pieces = [
            self._read(first, last)
            for inner_begin, inner_end in self.unshuffled(begin, end)
            for first, last in self.index.runs(inner_begin, inner_end)
        ]
        if not pieces:
            return np.empty(0, self.dtype)
        found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        found.flags.writeable = False
        return found

    def _read(self, first: int, last: int) -> NDArray[Any]:
        at = int(np.searchsorted(self._bases, first, side="right")) - 1
        pieces = []
        while first < last:  # neighbours may lie in two sources
            base, end = int(self._bases[at]), min(last, int(self._bases[at + 1]))
            pieces.append(self._streams[at].read(first - base, end - base))
            first, at = end, at + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def unshuffled(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where tokens `begin` to before `end` are before samples are shuffled, in stretches."""
        if begin == end:
            return
        if self._key is None:
            yield begin, end
            return
        samples = np.arange(begin // self._seq_len, -(-end // self._seq_len), dtype=np.uint64)
        moved = permute(samples, self._samples, self._key).astype(np.int64)
        for sample, place in zip(samples.tolist(), moved.tolist(), strict=True):
            shift = (place - sample) * self._seq_len
            first, last = max(begin, sample * self._seq_len), min(end, (sample + 1) * self._seq_len)
            yield first + shift, last + shift

    def samples_with(self, begin: int, end: int) -> list[int]:
        """Return the whole samples that hold tokens `begin` to before `end`, before samples are shuffled."""
        found = np.arange(begin // self._seq_len, min(self._samples, (end - 1) // self._seq_len + 1), dtype=np.uint64)
        if self._key is not None and len(found):
            found = np.sort(permute(found, self._samples, self._key, inverse=True))
        return [int(sample) for sample in found]

    def chunks(self, tokens: int) -> Iterator[NDArray[Any]]:
        """Yield all tokens, at most so many at once."""
        for begin in range(0, self.tokens, tokens):
            yield self.read(begin, min(begin + tokens, self.tokens))

    def note_read(self, nbytes: int, places: int = 1) -> None:
        """Do nothing: the streams of the sources note what is read of them."""


class OpenView(NamedTuple):
    """A view and its sources, opened; with the interface of `DataRoot`.

    Raises:
        DataRootError: a source is not the data root that the view was built from, or the index is not as long as it
            must be.
    """

    root: Path
    view: ViewRecord
    sources: list[DataRoot]

    @property
    def record(self) -> None:
        """A view is not consolidated."""
        return None

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        return self.view.seq_len

    @property
    def tokenizer(self) -> TokenizerRecord:
        """What made the tokens of all its sources."""
        found = self.sources[0].tokenizer
        assert found is not None
        return found

    @property
    def eos_token(self) -> str | None:
        """What ends a document."""
        return self.sources[0].eos_token

    @property
    def document_count(self) -> int:
        """Number of its documents."""
        return self.view.documents

    @property
    def files(self) -> list[FileRecord]:
        """Source files of all its sources."""
        return [
            msgspec.structs.replace(file, path=f"{source.name}/{file.path}")
            for source, root in zip(self.view.sources, self.sources, strict=True)
            for file in root.files
        ]

    def tokens(self) -> ViewStream:
        """Return its tokens."""
        key = sample_key(self.view.seed) if self.view.shuffle == "samples" else None
        streams = [source.tokens() for source in self.sources]
        return ViewStream(streams, self.open_index(), seq_len=self.view.seq_len, key=key)

    def open_index(self) -> ViewIndex:
        """Return its index, mapped."""
        return _map_index(self.root, self.view)

    def documents(self) -> ViewDocuments:
        """Return its documents."""
        return ViewDocuments(self)

    def sample_ids(self) -> NDArray[np.uint64]:
        """Raise: a view stores no ids."""
        raise DataRootError(
            f"{self.root}: a view stores no sample ids",
            next_step="ask TokenDataset for single ones (sample_id), which it makes of the tokens",
        )

    def samples_with(self, begin: int, end: int) -> list[int]:
        """Return the samples that hold tokens of a document that `ViewDocuments.of_row` found."""
        return self.tokens().samples_with(begin, end)


class ViewDocuments:
    """Finds the documents of a view; with the interface of `DocumentIndex`. Sources are named before their files."""

    def __init__(self, view: OpenView) -> None:
        self._view = view
        self._stream = view.tokens()
        self._index = self._stream.index
        self._bases = np.cumsum([0, *(source.tokens for source in view.view.sources)])
        self._documents: list[DocumentIndex] = [source.documents() for source in view.sources]

    def between(self, begin: int, end: int) -> list[Document]:
        """Return the documents that hold tokens `begin` to `end`, in order; one that lies in two samples comes twice.

        `start` is where the document would begin if all of it lay as the part that is there does.
        """
        found: list[Document] = []
        for first, last in self._stream.unshuffled(begin, end):
            for number in range(*self._numbers(first, last)):
                start = begin + int(self._index.begins[number]) - first
                found.append(self.document(number)._replace(start=start))
            begin += last - first
        return found

    def document(self, number: int) -> Document:
        """Return a document by its number in the view before samples are shuffled; `start` is counted there."""
        place = int(self._index.places[number])
        at = int(np.searchsorted(self._bases, place, side="right")) - 1
        (found,) = self._documents[at].between(place - int(self._bases[at]), place - int(self._bases[at]) + 1)
        name = self._view.view.sources[at].name
        return found._replace(start=int(self._index.begins[number]), source=f"{name}/{found.source}")

    def _numbers(self, begin: int, end: int) -> tuple[int, int]:
        first = int(np.searchsorted(self._index.begins, begin, side="right")) - 1
        return first, int(np.searchsorted(self._index.begins, end, side="left"))

    def starts_between(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the tokens from `begin` to before `end` at which a document starts, in order."""
        found = []
        for first, last in self._stream.unshuffled(begin, end):
            bounds = np.searchsorted(self._index.begins[:-1], [first, last])
            found.append(self._index.begins[bounds[0] : bounds[1]] + (begin - first))
            begin += last - first
        return np.concatenate([*found, np.empty(0, np.int64)])

    def of_row(self, source: str, row: int) -> Document | None:
        """Return the document that a row of a file became; None if it is not in the view."""
        name, _, path = source.partition("/")
        at = next((i for i, each in enumerate(self._view.view.sources) if each.name == name), None)
        document = None if at is None else self._documents[at].of_row(path, row)
        if document is None:
            return None
        place = int(self._bases[at]) + document.start
        for begin in range(0, len(self._index.places), _SEARCHED):
            hits = np.flatnonzero(self._index.places[begin : begin + _SEARCHED] == place)
            if len(hits):
                return self.document(begin + int(hits[0]))
        return None

    def tables(self) -> Iterator[pa.Table]:
        """Yield the sidecars of all sources without the documents that are not in the view."""
        for number in range(len(self._documents)):
            yield from self.tables_of(number)

    def tables_of(self, number: int) -> Iterator[pa.Table]:
        """Yield the same of one source."""
        import pyarrow as pa

        name, base = self._view.view.sources[number].name, int(self._bases[number])
        inside = (self._index.places >= base) & (self._index.places < int(self._bases[number + 1]))
        places = np.sort(self._index.places[inside]) - base
        for table in self._documents[number].tables():
            here = table.filter(pa.array(np.isin(table["start"].to_numpy(), places)))
            names = pa.array([f"{name}/{path}" for path in _dictionary_of(here)], pa.string())
            indices = here["source"].combine_chunks().indices if len(here) else pa.array([], pa.int32())
            column = pa.DictionaryArray.from_arrays(indices, names)
            yield here.set_column(here.schema.get_field_index("source"), "source", column)


def _dictionary_of(table: pa.Table) -> list[str]:
    if not len(table):
        return []
    found: list[str] = table["source"].combine_chunks().dictionary.to_pylist()
    return found


def check_index(folder: Path, record: ViewRecord) -> ViewIndex:
    """Return the index of a view once it is what its record says, read whole.

    Raises:
        DataRootError: it is not, or names tokens that its sources do not have.
    """
    for name, sha256 in ((layout.VIEW_BEGINS, record.begins_sha256), (layout.VIEW_PLACES, record.places_sha256)):
        path = folder / name
        if not path.is_file():
            raise DataRootError(f"{path}: is missing", next_step="build the view again")
        with atomic.translate_read_errors(path), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DataRootError(
                f"{path}: expected sha256 {sha256}, found {found}",
                next_step="build the view again, or restore the file",
            )
    begins, places = index = _map_index(folder, record)
    tokens = sum(source.tokens for source in record.sources)
    is_right = int(begins[0]) == 0 and int(begins[-1]) == record.tokens
    if is_right and len(places):
        is_right = int(places.min()) >= 0 and int(places.max()) < tokens and bool((begins[1:] > begins[:-1]).all())
    if not is_right:
        raise DataRootError(
            f"{folder}: its index names tokens that its sources do not have", next_step="build the view again"
        )
    return index


def _map_index(folder: Path, record: ViewRecord) -> ViewIndex:
    begins = MappedArray(Piece(folder / layout.VIEW_BEGINS, record.documents + 1), _INDEX).array
    places = MappedArray(Piece(folder / layout.VIEW_PLACES, record.documents), _INDEX).array
    return ViewIndex(begins, places)


def open_root(root: Path) -> DataRoot | OpenView:
    """Open a data root, or a view, with what is recorded of it.

    Raises:
        DataRootError: nothing is, or it cannot be read.
    """
    return open_view(root) or DataRoot(root, *manifests.load_records(root))


def open_view(folder: Path) -> OpenView | None:
    """Open a view with its sources; None if the directory is none.

    Raises:
        DataRootError: as of `OpenView`.
    """
    record = load_view(folder)
    if record is None:
        return None
    sources: list[DataRoot] = []
    for source in record.sources:
        root = source_root(folder, source)
        with atomic.translate_read_errors(root):
            manifest = require_pinned(root, manifests.load(root) if root.is_dir() else None, source)
        identity = "text" if manifest.documents_version > 1 else "tokens"
        found = manifest.tokens, manifest.stored_dtype, manifest.tokenizer.sha256, identity
        if found != (source.tokens, record.dtype, record.tokenizer_sha256, source.identity):
            raise DataRootError(
                f"{folder}: {layout.VIEW} does not agree with {root} in tokens, dtype, tokenizer or identity",
                next_step="build the view again",
            )
        sources.append(DataRoot(root, manifest, manifests.load_consolidated(root)))
    if not sources:
        raise DataRootError(f"{folder}: the view has no source", next_step="build it again")
    return OpenView(folder, record, sources)

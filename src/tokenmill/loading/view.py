"""View: samples of documents that lie in data roots, in an order of their own; what a trainer opens. Reads only.

A view's index says for each of its documents where it begins in the view and where its tokens lie in the streams of
its sources. `docs/format.md` specifies the files.
"""

from __future__ import annotations

import hashlib
import itertools
import math
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
from tokenmill.loading.arrangement import Arrangement, InOrder, MixedSource, MixedStage, Mixture, Shuffled
from tokenmill.loading.data_root import (
    PLACES_AT_ONCE,
    DataRoot,
    MappedArray,
    Piece,
    TokenStream,
    Windows,
    most_parts,
    release_pages,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from tokenmill.loading.documents import Document, DocumentIndex, DocumentPart, FoundRow

PADDING_PLACE = -1
"""In the index, where no document is: padding."""
_SEARCHED = 1 << 20
"""Entries of the index that are looked through at once."""


def sample_key(seed: int) -> str:
    """Return the key of the permutation (`samplers.permute`) of a view whose samples are shuffled."""
    return f"view/{seed}"


class ViewIndex(NamedTuple):
    """Where documents lie, or pieces of them and padding, in a row: the view before its samples are arranged."""

    begins: NDArray[np.int64]
    """First token of each entry, and the end of the last, counted in the row; shape `(entries + 1,)`."""
    places: NDArray[np.int64]
    """First token of each entry, counted over the streams of all sources one after the other; `PADDING_PLACE` for
    padding; shape `(entries,)`."""

    def release(self) -> None:
        """Release the mapped pages of both; they are mapped again as they are read."""
        for array in self:
            release_pages(array)

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first entry that holds tokens `begin` to before `end`, and one past the last."""
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        return first, int(np.searchsorted(self.begins, end, side="left"))

    def parts(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Parts:
        """Return what stretches of the row consist of, in order; none of them is empty."""
        first = np.searchsorted(self.begins, begins, side="right") - 1
        counts = np.searchsorted(self.begins, ends, side="left") - first
        stretch = np.repeat(np.arange(len(begins)), counts)
        entry = np.arange(len(stretch)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        place, begin = self.places[entry], self.begins[entry]
        cut = np.maximum(begins[stretch] - begin, 0)
        length = np.minimum(self.begins[entry + 1], ends[stretch]) - begin - cut
        return Parts(stretch, np.where(place < 0, PADDING_PLACE, place + cut), length)


class Parts(NamedTuple):
    """What stretches of a row consist of; arrays of shape `(parts,)`."""

    stretch: NDArray[np.int64]
    """Which stretch it is of."""
    place: NDArray[np.int64]
    """As of `ViewIndex.places`."""
    length: NDArray[np.int64]

    def starts(self, stride: int) -> NDArray[np.int64]:
        """Return where each part begins if the `i`-th stretch begins at `i * stride`."""
        before = np.cumsum(self.length) - self.length
        firsts = np.flatnonzero(np.diff(self.stretch, prepend=-1))
        starts: NDArray[np.int64] = before - before[firsts][self.stretch] + self.stretch * stride
        return starts

    def joined(self, bases: NDArray[np.int64]) -> Parts:
        """Join neighbours that lie side by side in one source; sources begin at `bases`."""
        source = np.searchsorted(bases, self.place, side="right")
        follows = (self.place[1:] == self.place[:-1] + self.length[:-1]) & (self.place[:-1] >= 0)
        follows &= (source[1:] == source[:-1]) & (self.stretch[1:] == self.stretch[:-1])
        if not follows.any():
            return self
        firsts = np.flatnonzero(np.concatenate([[True], ~follows]))
        return Parts(self.stretch[firsts], self.place[firsts], np.add.reduceat(self.length, firsts))


class ViewStream:
    """The tokens of a view, with the interface of `TokenStream`.

    Args:
        streams: of the sources, in order.
        index: of the view.
        arrangement: of its samples.
        seq_len: tokens per sample.
        padding_id: what padding is; None where samples are not packed.
    """

    whole: None = None
    """The tokens are in many places."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        index: ViewIndex,
        arrangement: Arrangement,
        *,
        seq_len: int,
        padding_id: int | None,
    ) -> None:
        self.dtype = streams[0].dtype
        self._is_packed = padding_id is not None
        self.index = index
        self.arrangement = arrangement
        self._streams = streams
        self._wholes = [stream.whole for stream in streams]
        self._bases = np.cumsum([0, *(stream.tokens for stream in streams)])
        self._seq_len = seq_len
        self._padding_id = padding_id
        is_in_order = isinstance(arrangement, InOrder)
        self.tokens = int(index.begins[-1]) if is_in_order else arrangement.samples * seq_len

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Return tokens `begin` to `end`, shape `(end - begin,)`, read-only."""
        if not 0 <= begin <= end <= self.tokens:
            raise QueryError(
                f"tokens {begin} to {end}: the view has {self.tokens}",
                next_step=f"ask for tokens from 0 to {self.tokens - 1}",
            )
        found = np.empty(end - begin, self.dtype)
        if begin < end:
            begins, ends = self.unarranged(begin, end)
            self.copy(self.index.parts(begins, ends), found)
        found.flags.writeable = False
        return found

    def gather(self, samples: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy samples into `out`, shape `(len(samples), seq_len)`, cast to its dtype."""
        begins = self.arrangement.begins(samples)
        flat = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        self.copy(self.index.parts(begins, begins + self._seq_len), flat.reshape(-1))
        if flat is not out:
            out[...] = flat

    def windows(self, samples: NDArray[np.int64]) -> Windows:
        """Return samples with what follows them, and where documents begin in them."""
        begins = self.arrangement.begins(samples)
        ends = begins + self._seq_len
        has_next = np.zeros(len(samples), np.bool_) if self._is_packed else ends < self._row_end(samples)
        tokens = np.empty((len(samples), self._seq_len + 1), self.dtype)
        parts = self.index.parts(begins, ends + has_next)
        self.copy(parts, tokens.reshape(-1), self._seq_len + 1)
        starts = parts.starts(self._seq_len)
        is_inside = starts < (parts.stretch + 1) * self._seq_len  # the token after a sample may be a part of its own
        next_begins = np.zeros(len(samples), np.bool_)
        next_begins[parts.stretch[~is_inside]] = True
        padded = np.flatnonzero(parts.place < 0)
        padding = np.stack([starts[padded], starts[padded] + parts.length[padded]], axis=1)
        bounds = np.append(starts[is_inside], len(samples) * self._seq_len)
        return Windows(tokens, has_next, bounds, next_begins, padding)

    def _row_end(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the part of the row ends that each sample is cut from."""
        if isinstance(self.arrangement, Mixture):
            return self.arrangement.row_ends[self.arrangement.locate(samples)[0]]
        return np.full(len(samples), self.index.begins[-1], np.int64)

    def copy(self, parts: Parts, out: NDArray[Any], stride: int | None = None) -> None:
        """Copy parts into `out`: one after the other, or the `i`-th stretch from token `i * stride` on."""
        parts = parts.joined(self._bases)
        source = np.searchsorted(self._bases, parts.place, side="right") - 1
        begins = parts.place - self._bases[source]
        to = np.cumsum(parts.length) - parts.length if stride is None else parts.starts(stride)
        rows = [source, begins, begins + parts.length, to, to + parts.length]
        for at in range(0, len(source), PLACES_AT_ONCE):
            some = slice(at, at + PLACES_AT_ONCE)
            read = np.bincount(np.maximum(source[some], 0), weights=parts.length[some])
            for number in np.flatnonzero(read).tolist():
                self._streams[number].note_read(int(read[number]) * self.dtype.itemsize, len(source[some]))
            for number, begin, end, first, last in zip(*(column[some].tolist() for column in rows), strict=True):
                if number < 0:
                    out[first:last] = self._padding_id
                elif (whole := self._wholes[number]) is not None:  # a slice of it takes a tenth of the time of a read
                    out[first:last] = whole[begin:end]
                else:
                    out[first:last] = self._streams[number].read(begin, end)

    def unarranged(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the stretches of the row, begins and ends, that tokens `begin` to before `end` of the view are."""
        if isinstance(self.arrangement, InOrder) or begin == end:
            return np.array([begin]), np.array([end])
        samples = np.arange(begin // self._seq_len, -(-end // self._seq_len), dtype=np.int64)
        shift = self.arrangement.begins(samples) - samples * self._seq_len
        first = np.maximum(begin, samples * self._seq_len)
        last = np.minimum(end, (samples + 1) * self._seq_len)
        return first + shift, last + shift

    def max_documents(self) -> int:
        """Return the most documents, pieces of some, or stretches of padding that a sample holds."""
        begins, most = self.index.begins, 0
        parts = self.arrangement.parts if isinstance(self.arrangement, Mixture) else ((0, self.arrangement.samples),)
        for first, samples in parts:
            for at in range(0, samples, _SEARCHED):
                edges = first + np.arange(at, min(samples, at + _SEARCHED) + 1) * self._seq_len
                most = max(most, most_parts(begins, edges))
        return most

    def source_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the source of each sample's first token, shape `(len(samples),)`."""
        if isinstance(self.arrangement, Mixture):
            return self.arrangement.locate(samples)[0]
        entries = np.searchsorted(self.index.begins, self.arrangement.begins(samples), side="right") - 1
        return np.searchsorted(self._bases, self.index.places[entries], side="right") - 1

    def chunks(self, tokens: int) -> Iterator[NDArray[Any]]:
        """Yield all tokens but padding, at most so many at once."""
        for begin in range(0, self.tokens, tokens):
            parts = self.index.parts(*self.unarranged(begin, min(begin + tokens, self.tokens)))
            parts = Parts(*(column[parts.place >= 0] for column in parts))
            found = np.empty(int(parts.length.sum()), self.dtype)
            self.copy(parts, found)
            yield found

    def limit_resident(self, nbytes: int) -> None:
        """As `TokenStream.limit_resident`, of each source."""
        for stream in self._streams:
            stream.limit_resident(nbytes)

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
        every = [source.tokenizer for source in self.sources if source.tokenizer is not None]
        return next((each for each in every if each.fim_ids is not None), every[0])

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
        return ViewStream(
            [source.tokens() for source in self.sources],
            self.open_index(),
            self.arrangement(),
            seq_len=self.view.seq_len,
            padding_id=self.view.padding_id,
        )

    def arrangement(self) -> Arrangement:
        """Return the order of its samples."""
        view = self.view
        if not view.stages:
            if view.shuffles_samples:
                return Shuffled(view.samples, view.seq_len, sample_key(view.seed))
            return InOrder(view.samples, view.seq_len)
        shape = (len(view.stages), 2, layout.SCHEDULE_PERIOD)
        schedule = _map(self.root / layout.VIEW_SCHEDULE, math.prod(shape), "<u2").reshape(shape)
        names = [source.name for source in view.sources]
        if int(schedule[:, 0].max()) >= len(names):
            raise DataRootError(
                f"{self.root / layout.VIEW_SCHEDULE}: names sources that the view does not have",
                next_step="build the view again, or restore the file; tokenmill verify checks it",
            )
        begins = itertools.accumulate((source.span for source in view.sources), initial=0)
        return Mixture(
            [
                MixedSource(source.name, begin, source.span, source.samples)
                for source, begin in zip(view.sources, begins, strict=False)
            ],
            [
                MixedStage(stage.samples, np.array([stage.shares.get(name, 0) for name in names], np.int64), *period)
                for stage, period in zip(view.stages, schedule, strict=True)
            ],
            seq_len=view.seq_len,
            seed=view.seed if view.shuffles_samples else None,
        )

    def open_index(self) -> ViewIndex:
        """Return its index, mapped."""
        return _map_index(self.root, self.view)

    @property
    def cuts_documents(self) -> bool:
        """Whether documents do not lie whole, one after the other."""
        return self.view.packing != "concat" or bool(self.view.stages) or self.view.shuffles_samples

    def documents(self) -> ViewDocuments:
        """Return its documents."""
        return ViewDocuments(self)

    def sample_ids(self) -> NDArray[np.uint64]:
        """Raise: a view stores no ids."""
        raise DataRootError(
            f"{self.root}: a view stores no sample ids",
            next_step="ask TokenDataset for single ones (sample_id), which it makes of the tokens",
        )


class ViewDocuments:
    """Finds the documents of a view; with the interface of `DocumentIndex`. Sources are named before their files."""

    def __init__(self, view: OpenView) -> None:
        self._view = view
        self._stream = view.tokens()
        self._index = self._stream.index
        self._bases = np.cumsum([0, *(source.tokens for source in view.view.sources)])
        self._documents: list[DocumentIndex] = [source.documents() for source in view.sources]

    def parts_between(self, begin: int, end: int) -> list[DocumentPart]:
        """Return the documents that hold tokens `begin` to `end`, in order, and which of these they hold."""
        (found,) = self.parts_of([(begin, end)])
        return found

    def parts_of(self, stretches: Sequence[tuple[int, int]]) -> list[list[DocumentPart]]:
        """Return the same of many stretches; each part of a sidecar is read once for all of them."""
        from tokenmill.loading.documents import DocumentPart

        lying: list[tuple[int, int, int, int, int]] = []
        for number, (begin, end) in enumerate(stretches):
            at = begin
            for first, last in zip(*(edges.tolist() for edges in self._stream.unarranged(begin, end)), strict=True):
                entries = range(*self._index.between(first, last))
                lying += [(number, e, at - first, first, last) for e in entries if self._index.places[e] >= 0]
                at += last - first
        documents = self._at(np.array([self._index.places[entry] for _, entry, *_ in lying], np.int64))
        found: list[list[DocumentPart]] = [[] for _ in stretches]
        for (number, entry, shift, first, last), document in zip(lying, documents, strict=True):
            begin, end = (int(edge) for edge in self._index.begins[entry : entry + 2])
            start = begin - (int(self._index.places[entry]) - document.start) + shift
            part = DocumentPart(document._replace(start=start), max(first, begin) + shift, min(last, end) + shift)
            found[number].append(part)
        return found

    def of_entry(self, entry: int) -> Document | None:
        """Return the document of an entry of the index; None for padding.

        `start` is where it would begin in the row if all of it lay as the entry does.
        """
        place = int(self._index.places[entry])
        if place < 0:
            return None
        found = self.at(place)
        return found._replace(start=int(self._index.begins[entry]) - (place - found.start))

    def document(self, number: int) -> Document:
        """Return a document of a view that packs none, by its number; `start` is counted in the row."""
        found = self.of_entry(number)
        assert found is not None
        return found

    def at(self, place: int) -> Document:
        """Return the document that holds the token at a place; `start` is counted as places are."""
        return self._at(np.array([place], np.int64))[0]

    def _at(self, places: NDArray[np.int64]) -> list[Document]:
        found: dict[int, Document] = {}
        sources = np.searchsorted(self._bases, places, side="right") - 1
        for number in np.unique(sources).tolist():
            base, name = int(self._bases[number]), self._view.view.sources[number].name
            here = np.unique(places[sources == number])
            for place, each in zip(here.tolist(), self._documents[number].at_tokens(here - base), strict=True):
                found[place] = each._replace(start=base + each.start, source=f"{name}/{each.source}")
        return [found[place] for place in places.tolist()]

    def starts_between(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the tokens from `begin` to before `end` at which a document, a piece of one, or padding starts."""
        found = []
        for first, last in zip(*(edges.tolist() for edges in self._stream.unarranged(begin, end)), strict=True):
            bounds = np.searchsorted(self._index.begins[:-1], [first, last])
            found.append(self._index.begins[bounds[0] : bounds[1]] + (begin - first))
            begin += last - first
        return np.concatenate([*found, np.empty(0, np.int64)])

    def find_row(self, source: str, row: int) -> FoundRow | None:
        """Return what a row of a file became; None if it is not in the view."""
        from tokenmill.loading.documents import FoundRow

        name, _, path = source.partition("/")
        at = next((i for i, each in enumerate(self._view.view.sources) if each.name == name), None)
        found = None if at is None else self._documents[at].find_row(path, row)
        if at is None or found is None:
            return None
        place = int(self._bases[at]) + found.document.start
        end = min(place + found.document.tokens, int(self._bases[at + 1]))
        entries: list[int] = []
        for begin in range(0, len(self._index.places), _SEARCHED):
            some = self._index.places[begin : begin + _SEARCHED]
            entries += (begin + np.flatnonzero((some >= place) & (some < end))).tolist()
        if not entries:
            return None
        edges = [(int(self._index.begins[entry]), int(self._index.begins[entry + 1])) for entry in entries]
        samples = sorted({sample for edge in edges for sample in self._stream.arrangement.samples_with(*edge).tolist()})
        document = self.document(entries[0])
        return FoundRow(document, samples)

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
    for name, sha256 in record.index_sha256.items():
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
    is_right = int(begins[0]) == 0 and int(begins[-1]) == record.tokens + record.padding
    if is_right and len(places):
        lowest = PADDING_PLACE if record.padding else 0
        is_right = int(places.min()) >= lowest and int(places.max()) < tokens and bool((begins[1:] > begins[:-1]).all())
    if not is_right:
        raise DataRootError(
            f"{folder}: its index names tokens that its sources do not have", next_step="build the view again"
        )
    return index


def _map_index(folder: Path, record: ViewRecord) -> ViewIndex:
    return ViewIndex(
        _map(folder / layout.VIEW_BEGINS, record.entries + 1, "<i8"),
        _map(folder / layout.VIEW_PLACES, record.entries, "<i8"),
    )


def _map(path: Path, entries: int, dtype: str) -> NDArray[Any]:
    return MappedArray(Piece(path, entries), np.dtype(dtype)).array


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

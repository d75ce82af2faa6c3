"""Disjoint: whether two views share a document, by its text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import DataRootError
from tokenmill.loading.view import OpenView, check_index, open_view
from tokenmill.views.catalogue import open_sources

_LISTED = 10


class Disjointness(msgspec.Struct, kw_only=True):
    """What comparing two views found."""

    views: tuple[str, str]
    documents: tuple[int, int]
    texts: tuple[int, int]
    """Different ones among the documents."""
    identity: str
    """By what documents were compared: the hash of their `text`, or of their `tokens`."""
    shared: int
    """Texts that both views have."""
    examples: list[str]
    """The first of them: hash, and source, file and row in the first view."""

    @property
    def passed(self) -> bool:
        """Whether no text is in both."""
        return self.shared == 0


def prove_disjoint(first: Path, second: Path) -> Disjointness:
    """Compare the documents of two views by the hashes of their text.

    Raises:
        DataRootError: one is no view, its sources are not as it was built from, or some documents are known by their
            text and others by their tokens.
    """
    views = [_opened(folder) for folder in (first, second)]
    kinds = {(source.identity, _tokens_of(view, source.identity)) for view in views for source in view.view.sources}
    if len(kinds) > 1:
        raise DataRootError(
            f"{first} and {second}: some of their data roots have hashes of text, and others have none, or come from "
            "different tokenizers: their documents cannot be compared",
            next_step="make the data roots without text_xxh3 again with this version of tokenmill pretokenize",
        )
    documents = [_documents(view) for view in views]
    texts = [np.unique(each.identity) for each in documents]
    shared = np.intersect1d(texts[0], texts[1], assume_unique=True)
    return Disjointness(
        views=(str(first), str(second)),
        documents=(len(documents[0].place), len(documents[1].place)),
        texts=(len(texts[0]), len(texts[1])),
        identity=next(iter(kinds))[0],
        shared=len(shared),
        examples=[_example(views[0], documents[0], value) for value in shared[:_LISTED]],
    )


def _opened(folder: Path) -> OpenView:
    view = open_view(folder) if folder.is_dir() else None
    if view is None:
        raise DataRootError(f"{folder}: expected a view, found none", next_step="give what tokenmill view build made")
    return view


def _tokens_of(view: OpenView, identity: str) -> tuple[str, str] | None:
    """Return what hashes of tokens depend on."""
    return (view.view.tokenizer_sha256, view.view.dtype) if identity == "tokens" else None


class _Documents(NamedTuple):
    """Documents of a view, in the order of its sources; arrays of shape `(documents,)`."""

    identity: NDArray[np.uint64]
    place: NDArray[np.int64]


def _documents(view: OpenView) -> _Documents:
    places = np.sort(check_index(view.root, view.view).places)
    found = [_Documents(np.empty(0, np.uint64), np.empty(0, np.int64))]
    base = 0
    for catalogue in open_sources(view.root, view.view.sources):
        for _, documents in catalogue.tables():
            start = documents.start + base
            # What is cut into pieces is there by its first one.
            taken = np.searchsorted(places, start) < np.searchsorted(places, start, side="right")
            found.append(_Documents(documents.identity[taken], start[taken]))
        base += catalogue.stream.tokens
    every = _Documents(*(np.concatenate(column) for column in zip(*found, strict=True)))
    if len(every.place) != view.view.documents:
        raise DataRootError(
            f"{view.root}: its index names {len(every.place)} documents: expected {view.view.documents}",
            next_step="run tokenmill verify on the view",
        )
    return every


def _example(view: OpenView, documents: _Documents, value: np.uint64) -> str:
    place = documents.place[np.flatnonzero(documents.identity == value)[0]]
    document = view.documents().at(int(place))
    return f"{int(value):016x}  {document.source} row {document.row}"

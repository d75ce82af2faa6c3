"""Choice: which documents of its data roots a view takes, in which order. 28 bytes of memory a document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot.view_record import pin_of
from tokenmill.errors import DataRootError
from tokenmill.views.catalogue import Catalogue, documents_at
from tokenmill.views.order import document_keys, file_key, is_held_out
from tokenmill.views.removal import RemovalList
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.sql import Condition

OnDocuments = Callable[[int, int], None]
"""Called with documents read and documents to read."""

UNFINISHED, WHERE, REMOVED, SPLIT, DUPLICATE = "unfinished", "where", "removed", "split", "duplicate"
"""Why a document is not in a view: the stream of its data root ends inside it; the condition is not true; the removal
list names it; it is on the other side of the holdout; an earlier document has the same text."""

_MOST_TOKENS = (1 << 32) - 1
_PARTS = 16
"""Hashes are looked through for equal ones by their first bits, a part at a time."""
_COMPARED = 1 << 20


class Choice(NamedTuple):
    """Documents that are taken, at first source after source in stream order; arrays of shape `(documents,)`."""

    place: NDArray[np.int64]
    """First token, counted over the streams of all sources one after the other."""
    length: NDArray[np.uint32]
    identity: NDArray[np.uint64]
    key: NDArray[np.uint64]
    """By which they are ordered; empty where they stay as they lie."""

    def taken(self, kept: NDArray[np.bool_]) -> Choice:
        """Return those for which the mask is true."""
        return Choice._make(column[kept] if len(column) else column for column in self)


def bases_of(catalogues: list[Catalogue]) -> NDArray[np.int64]:
    """Return where the stream of each source begins, and where the last ends; shape `(sources + 1,)`."""
    return np.cumsum([0, *(catalogue.stream.tokens for catalogue in catalogues)])


def choose(
    spec: ViewSpec,
    catalogues: list[Catalogue],
    removals: list[RemovalList],
    left_out: list[dict[str, int]],
    on_progress: OnDocuments,
) -> Choice:
    """Return the documents that are taken, but for duplicates, and count the others in `left_out`."""
    total = sum(catalogue.manifest.documents for catalogue in catalogues)
    is_shuffled = spec.shuffle == "documents"
    found = Choice(
        np.empty(total, np.int64),
        np.empty(total, np.uint32),
        np.empty(total, np.uint64),
        np.empty(total if is_shuffled else 0, np.uint64),
    )
    done = used = 0
    for number, (source, catalogue) in enumerate(zip(spec.sources, catalogues, strict=True)):
        base = int(bases_of(catalogues)[number])
        of_file = [file_key(spec.seed, catalogue.name, file.path) for file in catalogue.manifest.files]
        file_keys = np.array(of_file, np.uint64)
        with ExitStack() as stack:
            condition = _condition(source, stack)
            for table, documents in catalogue.tables():
                reasons = [(UNFINISHED, documents.start + documents.length > catalogue.stream.tokens)]
                if condition is not None:
                    failed = np.ones(len(table), bool)
                    failed[condition.rows(table)] = False
                    reasons.append((WHERE, failed))
                reasons.append((REMOVED, removals[number].matches(documents)))
                if spec.holdout:
                    held_out = is_held_out(documents.identity, spec.holdout)
                    reasons.append((SPLIT, held_out if spec.split == "train" else ~held_out))
                taken = documents.chosen(_count(reasons, left_out[number], len(table)))
                end = used + len(taken.start)
                if end > total or (len(taken.length) and int(taken.length.max()) > _MOST_TOKENS):
                    raise _odd(catalogue, end > total)
                found.place[used:end] = taken.start + base
                found.length[used:end] = taken.length
                found.identity[used:end] = taken.identity
                if is_shuffled:
                    found.key[used:end] = document_keys(file_keys[taken.file], taken.row)
                done, used = done + len(table), end
                on_progress(done, total)
    return Choice._make(column[:used] for column in found)


def _odd(catalogue: Catalogue, has_more: bool) -> DataRootError:
    what = "its sidecars have more documents than the manifest" if has_more else "a document of 2**32 tokens or more"
    return DataRootError(
        f"{catalogue.root}: source {catalogue.name!r}: {what}",
        next_step="run tokenmill verify on the data root" if has_more else "leave it out with a condition",
    )


def _condition(source: ViewSource, stack: ExitStack) -> Condition | None:
    if source.where is None:
        return None
    return stack.enter_context(Condition(source.where, f"source {source.name!r}: where"))


def _count(reasons: list[tuple[str, NDArray[np.bool_]]], counts: dict[str, int], documents: int) -> NDArray[np.bool_]:
    """Return which documents are kept; each of the others counts for the first reason there is against it."""
    kept = np.ones(documents, bool)
    for reason, applies in reasons:
        if count := int(np.count_nonzero(kept & applies)):
            counts[reason] = counts.get(reason, 0) + count
        kept &= ~applies
    return kept


class SameData(NamedTuple):
    """Two sources that take the same documents of the same data."""

    first: str
    second: str
    documents: int
    """That both take."""
    is_whole: bool
    """Whether neither takes others."""


def find_same(choice: Choice, catalogues: list[Catalogue]) -> list[SameData]:
    """Return pairs of sources that share documents: of data roots of the same pin, or of the same identities."""
    bases = bases_of(catalogues)
    bounds = np.searchsorted(choice.place, bases).tolist()
    pins = [pin_of(catalogue.manifest) for catalogue in catalogues]
    contents = []
    for catalogue, begin, end in zip(catalogues, bounds, bounds[1:], strict=False):
        identity = choice.identity[begin:end]
        known = catalogue.identity, catalogue.manifest.tokenizer.sha256
        contents.append((known, end - begin, int(identity.sum()), int(np.bitwise_xor.reduce(identity))))
    found = []
    for second, catalogue in enumerate(catalogues):
        for first in range(second):
            begin, end = bounds[first], bounds[first + 1]
            count = end - begin
            if contents[first] == contents[second] and count:
                found.append(SameData(catalogues[first].name, catalogue.name, count, True))
            elif pins[first] == pins[second]:
                places = choice.place[begin:end] - bases[first]
                others = choice.place[bounds[second] : bounds[second + 1]] - bases[second]
                if shared := len(np.intersect1d(places, others, assume_unique=True)):
                    found.append(SameData(catalogues[first].name, catalogue.name, shared, False))
    return found


def find_repeats(choice: Choice, catalogues: list[Catalogue]) -> NDArray[np.int64]:
    """Return the documents, ascending, whose text an earlier one has, by source name, file and row.

    Hashes find them, and tokens confirm that.
    """
    members = _of_equal_hash(choice.identity)
    if len(members) == 0:
        return members
    bases = bases_of(catalogues)
    places = choice.place[members]
    source = np.searchsorted(bases, places, side="right") - 1
    ranks = _Origins.of(places, catalogues).ranks()
    order = np.lexsort((*ranks, choice.identity[members]))
    repeats: list[int] = []
    hashed: int | None = None
    seen: set[bytes] = set()
    for at in order.tolist():
        if (identity := int(choice.identity[members[at]])) != hashed:
            hashed, seen = identity, set()
        start = int(places[at] - bases[source[at]])
        tokens = catalogues[source[at]].read(start, int(choice.length[members[at]]))
        digest = hashlib.sha256(tokens.tobytes()).digest()
        if digest in seen:
            repeats.append(int(members[at]))
        seen.add(digest)
    return np.sort(np.array(repeats, np.int64))


def _of_equal_hash(identity: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the documents, ascending, whose hash another one has, too."""
    first_bits = np.ascontiguousarray(identity, "<u8").view(np.uint8)[7::8] // (256 // _PARTS)
    equal = []
    for part in range(_PARTS):
        ranked = np.sort(identity[first_bits == part])
        equal.append(np.unique(ranked[1:][ranked[1:] == ranked[:-1]]))
    repeated = np.concatenate(equal)
    if len(repeated) == 0:
        return np.empty(0, np.int64)
    found = []
    for begin in range(0, len(identity), _COMPARED):
        some = identity[begin : begin + _COMPARED]
        at = np.minimum(np.searchsorted(repeated, some), len(repeated) - 1)
        found.append(begin + np.flatnonzero(repeated[at] == some))
    return np.concatenate(found)


class _Origins(NamedTuple):
    """Where documents come from; arrays of shape `(documents,)`."""

    source: NDArray[np.int64]
    """Number of the source, in the order of names."""
    file: NDArray[np.int64]
    """Number of the file, in the order of paths, in its source."""
    row: NDArray[np.int64]

    @classmethod
    def of(cls, places: NDArray[np.int64], catalogues: list[Catalogue]) -> _Origins:
        """Read the origins of documents at `places`, in any order."""
        found = cls(*(np.empty(len(places), np.int64) for _ in range(3)))
        names = sorted(catalogue.name for catalogue in catalogues)
        ranks: dict[str, NDArray[np.int64]] = {}
        for catalogue, here, documents in documents_at(catalogues, places):
            if catalogue.name not in ranks:
                ranks[catalogue.name] = np.argsort(np.argsort([file.path for file in catalogue.manifest.files]))
            found.source[here] = names.index(catalogue.name)
            found.file[here], found.row[here] = ranks[catalogue.name][documents.file], documents.row
        return found

    def ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return sort keys for `lexsort`, the first one last."""
        return self.row, self.file, self.source


def order_by_key(choice: Choice, catalogues: list[Catalogue]) -> NDArray[np.int64]:
    """Return documents in ascending order of their keys, ties by source name, file and row."""
    order = np.argsort(choice.key)
    ties = []
    for begin in range(0, max(0, len(order) - 1), _COMPARED):
        ranked = choice.key[order[begin : begin + _COMPARED + 1]]
        ties.append(begin + np.flatnonzero(ranked[1:] == ranked[:-1]))
    pairs = np.concatenate(ties) if ties else np.empty(0, np.int64)
    if len(pairs):  # among 10**8 documents, with a chance of 1 in 3,700
        at = np.unique(np.concatenate([pairs, pairs + 1]))
        tied = order[at]
        origins = _Origins.of(choice.place[tied], catalogues)
        order[at] = tied[np.lexsort((*origins.ranks(), choice.key[tied]))]
    return order

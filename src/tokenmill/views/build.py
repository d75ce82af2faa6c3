"""Build: a spec and its data roots → the index of a view and its record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.view_record import SourceRecord, ViewRecord, load_view, pin_of
from tokenmill.errors import DataRootError, RecipeError
from tokenmill.views.catalogue import Catalogue, Documents
from tokenmill.views.order import document_keys, file_key, is_held_out
from tokenmill.views.removal import RemovalList, load_removals
from tokenmill.views.spec import ViewSource, ViewSpec, validate_spec
from tokenmill.views.sql import Condition

OnDocuments = Callable[[int, int], None]
"""Called with documents read and documents to read."""

_WRITTEN = 1 << 20
"""Entries of the index that are written at once."""

UNFINISHED, WHERE, REMOVED, SPLIT, DUPLICATE = "unfinished", "where", "removed", "split", "duplicate"
"""Why a document is not in a view: the stream of its data root ends inside it; the condition is not true; the removal
list names it; it is on the other side of the holdout; an earlier document has the same text."""


class Built(NamedTuple):
    """A view that is not stored yet."""

    record: ViewRecord
    begins: NDArray[np.int64]
    places: NDArray[np.int64]
    notes: list[str]
    """What a user should know of it."""
    duplicates: int
    """Documents of the view whose text an earlier one has as well."""


class _Chosen(NamedTuple):
    """Documents of all sources that are taken; every array has shape `(documents,)`."""

    place: NDArray[np.int64]
    length: NDArray[np.int64]
    identity: NDArray[np.uint64]
    source: NDArray[np.int32]
    file: NDArray[np.int32]
    row: NDArray[np.int64]

    def taken(self, at: NDArray[np.int64] | NDArray[np.bool_]) -> _Chosen:
        return _Chosen._make(column[at] for column in self)


def plan_view(spec: ViewSpec, *, on_progress: OnDocuments = lambda done, total: None) -> Built:
    """Choose and order the documents of a view, and store nothing.

    Raises:
        RecipeError: the spec cannot be meant.
        DataRootError: a data root is not there, is unfinished, or was made with another tokenizer than the others.
    """
    try:
        validate_spec(spec)
    except msgspec.ValidationError as error:
        raise RecipeError(f"view: {error}", next_step="correct it") from None
    catalogues = [Catalogue(Path(source.root), source.name) for source in spec.sources]
    _refuse_mixed(catalogues)
    removals = [
        load_removals(None if source.remove is None else Path(source.remove), catalogue)
        for source, catalogue in zip(spec.sources, catalogues, strict=True)
    ]
    left_out: list[dict[str, int]] = [{} for _ in catalogues]
    chosen = _choose(spec, catalogues, removals, left_out, on_progress)
    first = _first_of_each(chosen, catalogues)
    duplicates = len(first) - int(np.count_nonzero(first))
    if spec.duplicates == "first":
        for number, counts in enumerate(left_out):
            if count := int(np.count_nonzero(~first & (chosen.source == number))):
                counts[DUPLICATE] = count
        chosen = chosen.taken(first)
        duplicates = 0
    chosen = chosen.taken(_order(spec, chosen, catalogues))
    record = _record(spec, catalogues, removals, chosen, left_out)
    notes = [
        f"source {catalogue.name}: its sidecars have no hashes of text, so documents are told apart by their tokens"
        for catalogue in catalogues
        if catalogue.identity == "tokens"
    ]
    return Built(record, np.concatenate([[0], np.cumsum(chosen.length)]), chosen.place, notes, duplicates)


def build_view(
    spec: ViewSpec, folder: Path, *, on_progress: OnDocuments = lambda done, total: None
) -> tuple[Built, bool]:
    """Store a view in a directory; whether it was there already.

    Raises:
        RecipeError, DataRootError: as `plan_view`; also, the directory holds something else.
        StorageError: it cannot be written.
    """
    before = load_view(folder) if folder.is_dir() else None
    if before is None and folder.is_dir() and (other := next(_foreign(folder), None)):
        raise DataRootError(
            f"{folder}: {other} is there: expected an empty directory for the view",
            next_step="choose another directory",
        )
    built = plan_view(spec, on_progress=on_progress)
    roots = [_from(folder, source.root) for source in spec.sources]
    for source, root in zip(built.record.sources, roots, strict=True):
        source.root = root
    built.record.begins_sha256, built.record.places_sha256 = map(_digest, (built.begins, built.places))
    manifests.encode(built.record)  # makes the digests, by which records are compared
    if before is not None:
        if before.digests != built.record.digests:
            raise DataRootError(
                f"{folder}: holds another view, which trainers may rely on",
                next_step="choose another directory, or delete this one",
            )
        return built, True
    with atomic.translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_data_root(folder):
        for name, array in ((layout.VIEW_BEGINS, built.begins), (layout.VIEW_PLACES, built.places)):
            with atomic.AtomicFile(folder / name) as file:
                for at in range(0, len(array), _WRITTEN):
                    file.write(array[at : at + _WRITTEN].astype("<i8").data.cast("B"))
        atomic.write_whole(folder / layout.VIEW, manifests.encode(built.record))
    return built, False


def _foreign(folder: Path) -> Iterator[str]:
    ours = {layout.LOCK, layout.VIEW_BEGINS, layout.VIEW_PLACES}
    for path in sorted(folder.iterdir()):
        if path.name not in ours and not path.name.endswith(layout.PARTIAL_SUFFIX):
            yield path.name


def _from(folder: Path, root: str) -> str:
    """Return a data root's path as the record has it: relative to the view, if it is not absolute."""
    return root if Path(root).is_absolute() else os.path.relpath(Path(root).absolute(), folder.absolute())


def _digest(array: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<i8").data).hexdigest()


def _refuse_mixed(catalogues: list[Catalogue]) -> None:
    first = catalogues[0].manifest
    for catalogue in catalogues[1:]:
        for what, expected, found in (
            ("a tokenizer.json of SHA-256", first.tokenizer.sha256, catalogue.manifest.tokenizer.sha256),
            ("EOS with the id", first.tokenizer.eos_id, catalogue.manifest.tokenizer.eos_id),
            ("tokens of", first.stored_dtype, catalogue.manifest.stored_dtype),
        ):
            if expected != found:
                raise DataRootError(
                    f"{catalogue.root}: source {catalogue.name!r}: expected {what} {expected} as in "
                    f"{catalogues[0].root}, found {found}",
                    next_step="view data roots together that were made with one tokenizer and one dtype",
                )


def _choose(
    spec: ViewSpec,
    catalogues: list[Catalogue],
    removals: list[RemovalList],
    left_out: list[dict[str, int]],
    on_progress: OnDocuments,
) -> _Chosen:
    """Return the documents that are taken, source after source in stream order, and count the others."""
    found: list[_Chosen] = []
    total = sum(catalogue.manifest.documents for catalogue in catalogues)
    done = base = 0
    for number, (source, catalogue) in enumerate(zip(spec.sources, catalogues, strict=True)):
        with ExitStack() as stack:
            condition = _condition(source, stack)
            for table, documents in catalogue.tables():
                reasons: list[tuple[str, NDArray[np.bool_]]] = [
                    (UNFINISHED, documents.start + documents.length > catalogue.stream.tokens)
                ]
                if condition is not None:
                    failed = np.ones(len(table), bool)
                    failed[condition.rows(table)] = False
                    reasons.append((WHERE, failed))
                reasons.append((REMOVED, removals[number].matches(documents)))
                if spec.holdout:
                    held_out = is_held_out(documents.identity, spec.holdout)
                    reasons.append((SPLIT, held_out if spec.split == "train" else ~held_out))
                kept = _count(reasons, left_out[number], len(table))
                found.append(_taken(documents.chosen(kept), base, number))
                done += len(table)
                on_progress(done, total)
        base += catalogue.stream.tokens
    return _Chosen._make(np.concatenate(columns) for columns in zip(*found, strict=True))


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


def _taken(documents: Documents, base: int, source: int) -> _Chosen:
    return _Chosen(
        documents.start + base,
        documents.length,
        documents.identity,
        np.full(len(documents.start), source, np.int32),
        documents.file.astype(np.int32),
        documents.row,
    )


def _first_of_each(chosen: _Chosen, catalogues: list[Catalogue]) -> NDArray[np.bool_]:
    """Return which documents are the first of their text, by source name, file and row; tokens confirm the rest."""
    first = np.ones(len(chosen.place), bool)
    ranked = np.argsort(chosen.identity, kind="stable")
    sorted_ = chosen.identity[ranked]
    repeats = np.flatnonzero(sorted_[1:] == sorted_[:-1])
    if len(repeats) == 0:
        return first
    bounds = np.flatnonzero(np.concatenate([[True], sorted_[1:] != sorted_[:-1], [True]]))
    sizes = np.diff(bounds)
    bases = np.cumsum([0, *(catalogue.stream.tokens for catalogue in catalogues)])

    def tokens(at: int) -> bytes:
        source = int(chosen.source[at])
        start = int(chosen.place[at]) - int(bases[source])
        data: bytes = catalogues[source].read(start, int(chosen.length[at])).tobytes()
        return data

    for group in np.flatnonzero(sizes > 1).tolist():
        members = ranked[bounds[group] : bounds[group + 1]].tolist()
        members.sort(key=lambda at: _rank(chosen, catalogues, at))
        seen: set[bytes] = set()
        for at in members:
            digest = hashlib.sha256(tokens(at)).digest()
            first[at] = digest not in seen
            seen.add(digest)
    return first


def _rank(chosen: _Chosen, catalogues: list[Catalogue], at: int) -> tuple[str, str, int]:
    catalogue = catalogues[int(chosen.source[at])]
    return catalogue.name, catalogue.manifest.files[int(chosen.file[at])].path, int(chosen.row[at])


def _order(spec: ViewSpec, chosen: _Chosen, catalogues: list[Catalogue]) -> NDArray[np.int64]:
    """Return the documents in the order of the view, as places in `chosen`."""
    if spec.shuffle != "documents":
        return np.arange(len(chosen.place))
    keys = np.empty(len(chosen.place), np.uint64)
    for number, catalogue in enumerate(catalogues):
        here = chosen.source == number
        of_file = [file_key(spec.seed, catalogue.name, file.path) for file in catalogue.manifest.files]
        keys[here] = document_keys(np.array(of_file, np.uint64)[chosen.file[here]], chosen.row[here])
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    # Among 10**8 documents, equal keys have a chance of 1 in 3,700.
    for at in np.flatnonzero(ranked[1:] == ranked[:-1])[::-1].tolist():
        end = at + 1 + int(np.searchsorted(ranked[at + 1 :], ranked[at], side="right"))
        order[at:end] = sorted(order[at:end].tolist(), key=lambda each: _rank(chosen, catalogues, each))
    return order


def _record(
    spec: ViewSpec,
    catalogues: list[Catalogue],
    removals: list[RemovalList],
    chosen: _Chosen,
    left_out: list[dict[str, int]],
) -> ViewRecord:
    lengths = {catalogue.opened.seq_len for catalogue in catalogues}
    if spec.seq_len is None and len(lengths) > 1:
        raise RecipeError(
            f"view: seq_len is not given, and its data roots have samples of {' and '.join(map(str, sorted(lengths)))}",
            next_step="give seq_len, the number of tokens per sample",
        )
    taken = np.bincount(chosen.source, minlength=len(catalogues)).tolist()
    return ViewRecord(
        seq_len=spec.seq_len or lengths.pop(),
        seed=spec.seed,
        shuffle=spec.shuffle,
        holdout=spec.holdout,
        split=spec.split,
        duplicates=spec.duplicates,
        dtype=catalogues[0].manifest.stored_dtype,
        tokenizer_sha256=catalogues[0].manifest.tokenizer.sha256,
        sources=[
            SourceRecord(
                name=source.name,
                root=source.root,
                tokens=catalogue.stream.tokens,
                pin=pin_of(catalogue.manifest),
                identity=catalogue.identity,
                where=source.where,
                removed=removal.entries,
                documents=catalogue.manifest.documents,
                taken=count,
                left_out=reasons,
            )
            for source, catalogue, removal, count, reasons in zip(
                spec.sources, catalogues, removals, taken, left_out, strict=True
            )
        ],
        documents=len(chosen.place),
        tokens=int(chosen.length.sum()),
    )

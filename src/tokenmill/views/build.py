"""Build: a spec and its data roots → the index of a view and its record."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
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
from tokenmill.loading.view import check_index
from tokenmill.views.catalogue import Catalogue
from tokenmill.views.choice import DUPLICATE, OnDocuments, bases_of, choose, find_repeats, order_by_key
from tokenmill.views.removal import RemovalList, load_removals
from tokenmill.views.spec import ViewSpec, validate_spec

_WRITTEN = 1 << 20
"""Entries of the index that are written at once."""


class Built(NamedTuple):
    """A view that is not stored yet."""

    record: ViewRecord
    begins: NDArray[np.int64]
    places: NDArray[np.int64]
    duplicates: int
    """Documents of the view whose text an earlier one has as well."""


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
    choice = choose(spec, catalogues, removals, left_out, on_progress)
    repeats = find_repeats(choice, catalogues)
    if spec.duplicates == "first":
        kept = np.ones(len(choice.place), bool)
        kept[repeats] = False
        counts = np.diff(np.searchsorted(choice.place[repeats], bases_of(catalogues))).tolist()
        for reasons, count in zip(left_out, counts, strict=True):
            if count:
                reasons[DUPLICATE] = count
        choice = choice.taken(kept)
        repeats = repeats[:0]
    copies = [removal.copies(choice.identity) for removal in removals]
    taken = np.diff(np.searchsorted(choice.place, bases_of(catalogues))).tolist()
    place, length = choice.place, choice.length
    if spec.shuffle == "documents":
        choice = choice._replace(identity=choice.identity[:0].copy())  # frees it
        order = order_by_key(choice, catalogues)
        del choice
        place, length = place[order], length[order]
    begins = np.zeros(len(place) + 1, np.int64)
    np.cumsum(length, out=begins[1:])
    record = _record(spec, catalogues, removals, taken, left_out)
    record.documents, record.tokens = len(place), int(begins[-1])
    notes = [
        f"source {catalogue.name}: its sidecars have no hashes of text, so documents are told apart by their tokens"
        for catalogue in catalogues
        if catalogue.identity == "tokens"
    ]
    for source, removal, count in zip(record.sources, removals, copies, strict=True):
        if unmatched := removal.unmatched:
            notes.append(
                f"source {source.name}: {len(unmatched)} of {len(removal.entries)} entries of its removal list name no "
                f"document: {', '.join(unmatched[:3])}{', ...' if unmatched[3:] else ''}"
            )
        if count:
            notes.append(
                f"source {source.name}: {count} documents that stay have the text of one that is removed; to remove "
                "them, too, name it by its text_xxh3 in the removal list of each source"
            )
    if record.samples == 0:
        notes.append(f"the view has no whole sample of {record.seq_len} tokens")
    record.notes = notes
    return Built(record, begins, place, len(repeats))


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
        with contextlib.suppress(DataRootError):
            check_index(folder, before)
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
    if Path(root).is_absolute():
        return root
    there = Path(root).absolute()
    # Links on the way are followed, as the system does for `..`; the data root itself may be one.
    return os.path.relpath(there.parent.resolve() / there.name, folder.absolute().resolve())


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


def _record(
    spec: ViewSpec,
    catalogues: list[Catalogue],
    removals: list[RemovalList],
    taken: list[int],
    left_out: list[dict[str, int]],
) -> ViewRecord:
    lengths = {catalogue.opened.seq_len for catalogue in catalogues}
    if spec.seq_len is None and len(lengths) > 1:
        raise RecipeError(
            f"view: seq_len is not given, and its data roots have samples of {' and '.join(map(str, sorted(lengths)))}",
            next_step="give seq_len, the number of tokens per sample",
        )
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
        documents=0,
        tokens=0,
    )

"""Build: a spec and its data roots → the index of a view and its record."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.view_record import Packing, SourceRecord, ViewRecord, load_view, pin_of
from tokenmill.errors import DataRootError, RecipeError
from tokenmill.loading.view import check_index
from tokenmill.progress import also_shown
from tokenmill.views.catalogue import Catalogue
from tokenmill.views.choice import (
    DUPLICATE,
    Choice,
    OnDocuments,
    SameData,
    bases_of,
    choose,
    find_repeats,
    find_same,
    order_by_key,
)
from tokenmill.views.mixture import mix
from tokenmill.views.packing import count_samples, pack
from tokenmill.views.removal import RemovalList, load_removals
from tokenmill.views.spec import ViewSpec, validate_spec

_WRITTEN = 1 << 20
"""Entries of the index that are written at once."""
_COMPARED = (2048, 4096, 8192)
"""Lengths of samples that `compare_packings` looks at, beside the view's own."""


class PackingPlan(msgspec.Struct, frozen=True):
    """What the samples of a view would be with a policy and a length."""

    packing: Packing
    seq_len: int
    samples: int
    """Samples of one epoch."""
    documents_per_sample: float
    """In the mean, pieces of documents counted."""
    cut: int
    """Documents that lie in more than one sample."""
    padding: int
    """Tokens."""
    tail: int
    """Tokens after the last whole sample."""


class Built(NamedTuple):
    """A view that is not stored yet."""

    record: ViewRecord
    begins: NDArray[np.int64]
    places: NDArray[np.int64]
    schedule: NDArray[np.uint16]
    """The schedule of a mixture, as in `mixture.Mixed`."""
    duplicates: int
    """Documents of the view whose text an earlier one has as well."""
    packings: list[PackingPlan]
    """What other policies and lengths would give, if that was asked for."""


class _Row(NamedTuple):
    """Documents, or pieces of them and padding, in the order in which they are cut into samples."""

    place: NDArray[np.int64]
    length: NDArray[np.int64] | NDArray[np.uint32]
    bounds: list[int]
    """Bounds of the parts that are cut by themselves: each source of a mixture, or the whole."""

    def parts(self) -> Iterator[tuple[NDArray[np.int64], Any]]:
        """Yield places and lengths of each part."""
        for begin, end in itertools.pairwise(self.bounds):
            yield self.place[begin:end], self.length[begin:end]


def plan_view(
    spec: ViewSpec, *, compare_packings: bool = False, on_progress: OnDocuments = lambda done, total: None
) -> Built:
    """Choose and order the documents of a view, and store nothing.

    Args:
        spec: what to take.
        compare_packings: also say what the samples would be with both policies and several lengths.
        on_progress: called as documents are read.

    Raises:
        RecipeError: the spec cannot be meant, or a source of a mixture does not last.
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
    if spec.is_mixture and spec.duplicates == "keep" and (same := _drawn_twice(spec, find_same(choice, catalogues))):
        if spec.same_data == "refuse" or not all(pair.is_whole for pair in same):
            raise _same_data(same)
        merged, notes = _merged(spec, same)
        built = plan_view(merged, compare_packings=compare_packings, on_progress=on_progress)
        built.record.notes = [*notes, *built.record.notes]
        return built
    repeats = find_repeats(choice, catalogues)
    if spec.duplicates == "first":
        choice = _without(choice, repeats, catalogues, left_out)
        repeats = repeats[:0]
    copies = [removal.copies(choice.identity) for removal in removals]
    taken = np.diff(np.searchsorted(choice.place, bases_of(catalogues))).tolist()
    row = _in_order(spec, choice, catalogues, taken)
    del choice
    record = _record(spec, catalogues, removals, taken, left_out)
    record.documents, record.tokens = len(row.place), int(row.length.sum(dtype=np.int64))
    seq_len = record.seq_len
    packings = []
    if compare_packings:
        lengths = sorted({seq_len, *_COMPARED})
        policies: tuple[Packing, ...] = ("concat", "best-fit")
        packings = [_packing_plan(row, packing, length) for length in lengths for packing in policies]
    if spec.packing == "best-fit":
        record.cut = int(np.count_nonzero(row.length > seq_len))
        record.padding_id = catalogues[0].manifest.tokenizer.eos_id
        row = _packed(row, seq_len)
        record.index_entries = len(row.place)
    begins = np.zeros(len(row.place) + 1, np.int64)
    np.cumsum(row.length, out=begins[1:])
    record.padding = int(begins[-1]) - record.tokens
    schedule = _mix(spec, record, begins[row.bounds]) if spec.is_mixture else np.empty(0, np.uint16)
    record.notes = _notes(record, catalogues, removals, copies)
    return Built(record, begins, row.place, schedule, len(repeats), packings)


def _without(
    choice: Choice, repeats: NDArray[np.int64], catalogues: list[Catalogue], left_out: list[dict[str, int]]
) -> Choice:
    """Leave out documents that are repeats, and count them."""
    kept = np.ones(len(choice.place), bool)
    kept[repeats] = False
    counts = np.diff(np.searchsorted(choice.place[repeats], bases_of(catalogues))).tolist()
    for reasons, count in zip(left_out, counts, strict=True):
        if count:
            reasons[DUPLICATE] = count
    return choice.taken(kept)


def _mix(spec: ViewSpec, record: ViewRecord, bounds: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Enter the stages of a mixture whose sources begin and end at `bounds`, in tokens; return the schedule."""
    for source, asked, span in zip(record.sources, spec.sources, np.diff(bounds).tolist(), strict=True):
        source.max_epochs, source.span, source.samples = asked.max_epochs, span, span // record.seq_len
    samples = {source.name: source.samples for source in record.sources}
    left_out = {source.name: source.left_out for source in record.sources}
    record.stages, schedule = mix(spec, samples, record.seq_len, left_out)
    return schedule


def _in_order(spec: ViewSpec, choice: Choice, catalogues: list[Catalogue], taken: list[int]) -> _Row:
    """Put documents in the order of the view; in a mixture source by source."""
    bounds = [*itertools.accumulate(taken, initial=0)] if spec.is_mixture else [0, len(choice.place)]
    if spec.shuffle != "documents":
        return _Row(choice.place, choice.length, bounds)
    choice = choice._replace(identity=choice.identity[:0].copy())  # frees it
    order = order_by_key(choice, catalogues)
    if spec.is_mixture:
        source = np.searchsorted(bounds, order, side="right").astype(np.uint16)
        order = order[np.argsort(source, kind="stable")]
    return _Row(choice.place[order], choice.length[order], bounds)


def _packed(row: _Row, seq_len: int) -> _Row:
    places, lengths, bounds = [row.place[:0]], [np.empty(0, np.int64)], [0]
    for place, length in row.parts():
        bounds.append(bounds[-1])
        for entries in pack(place, length, seq_len):
            places.append(entries.place)
            lengths.append(entries.length)
            bounds[-1] += len(entries.place)
    return _Row(np.concatenate(places), np.concatenate(lengths), bounds)


def _packing_plan(row: _Row, packing: Packing, seq_len: int) -> PackingPlan:
    samples = pieces = cut = padding = tail = 0
    for _, length in row.parts():
        tokens = int(length.sum(dtype=np.int64))
        if packing == "concat":
            ends = np.cumsum(length, dtype=np.int64)
            spanned = (ends - 1) // seq_len - (ends - length) // seq_len + 1
            samples += tokens // seq_len
            tail += tokens % seq_len
        else:
            spanned = -(-length.astype(np.int64) // seq_len)
            used = count_samples(length, seq_len)
            samples += used
            padding += used * seq_len - tokens
        pieces += int(spanned.sum())
        cut += int(np.count_nonzero(spanned > 1))
    mean = pieces / max(1, samples)
    return PackingPlan(packing, seq_len, samples, round(mean, 3), cut, padding, tail)


def _notes(
    record: ViewRecord, catalogues: list[Catalogue], removals: list[RemovalList], copies: list[int]
) -> list[str]:
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
        if record.stages and not any(source.name in stage.shares for stage in record.stages):
            notes.append(f"source {source.name}: no stage takes anything of it")
    if record.samples == 0:
        notes.append(f"the view has no whole sample of {record.seq_len} tokens")
    return notes


def _drawn_twice(spec: ViewSpec, same: list[SameData]) -> list[SameData]:
    """Return the pairs of sources of which some stage draws both, or one stage one, and another the other."""
    drawn = {name for stage in spec.mixed_stages for name, weight in (stage.weights or {}).items() if weight}
    return [pair for pair in same if {pair.first, pair.second} <= drawn]


def _same_data(same: list[SameData]) -> RecipeError:
    pair = same[0]
    what = "are the same documents" if pair.is_whole else f"share {pair.documents} documents of the same data"
    more = f" (and {len(same) - 1} more such pairs)" if same[1:] else ""
    step = (
        'leave one out, or give same_data = "merge", which makes them one'
        if pair.is_whole
        else ('give conditions that take different documents, or duplicates = "first", which takes each once')
    )
    return RecipeError(
        f"view: sources {pair.first!r} and {pair.second!r} {what}{more}: they would come more often than their "
        "weights and epochs say",
        next_step=step,
    )


def _merged(spec: ViewSpec, same: list[SameData]) -> tuple[ViewSpec, list[str]]:
    """Return the spec without sources that are others under another name; those take over their weights."""
    kept: dict[str, str] = {}
    for pair in same:
        kept.setdefault(pair.second, kept.get(pair.first, pair.first))

    def summed(weights: Iterable[tuple[str, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, weight in weights:
            first = kept.get(name, name)
            found[first] = found.get(first, 0.0) + weight
        return found

    epochs = {source.name: source.max_epochs for source in spec.sources}
    for name, first in kept.items():
        if epochs[name] != epochs[first]:
            raise RecipeError(
                f"view: sources {first!r} and {name!r} are the same documents, and have max_epochs {epochs[first]:g} "
                f"and {epochs[name]:g}",
                next_step="give both the same max_epochs to merge them, or leave one out",
            )
    weights = summed((source.name, source.weight) for source in spec.sources if source.weight is not None)
    sources = [
        msgspec.structs.replace(source, weight=weights.get(source.name))
        for source in spec.sources
        if source.name not in kept
    ]
    stages = [
        msgspec.structs.replace(stage, weights=None if stage.weights is None else summed(stage.weights.items()))
        for stage in spec.stages
    ]
    notes = [f"source {name}: has the same documents as {first}, and is merged with it" for name, first in kept.items()]
    return msgspec.structs.replace(spec, sources=sources, stages=stages), notes


def build_view(
    spec: ViewSpec, folder: Path, *, on_progress: OnDocuments = lambda done, total: None, progress: bool = False
) -> tuple[Built, bool]:
    """Store a view in a directory; whether it was there already. `progress` shows it, as the command line does.

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
    with also_shown(on_progress, wanted=progress, what="documents") as tell:
        built = plan_view(spec, on_progress=tell)
    for source in built.record.sources:
        source.root = _from(folder, source.root)
    record, files = built.record, _index_files(built)
    record.begins_sha256, record.places_sha256, *of_schedule = map(_digest, files.values())
    record.schedule_sha256 = "".join(of_schedule)
    if before is not None:
        record.version, record.digests = before.version, before.digests
        if before != record:
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
        for name, array in files.items():
            with atomic.AtomicFile(folder / name) as file:
                for at in range(0, len(array), _WRITTEN):
                    file.write(array[at : at + _WRITTEN].data.cast("B"))
        atomic.write_whole(folder / layout.VIEW, manifests.encode(built.record))
    return built, False


def _index_files(built: Built) -> dict[str, NDArray[Any]]:
    """Return the files of the index, as they are stored."""
    files: dict[str, NDArray[Any]] = {
        layout.VIEW_BEGINS: built.begins.astype("<i8", copy=False),
        layout.VIEW_PLACES: built.places.astype("<i8", copy=False),
    }
    if built.record.stages:
        files[layout.VIEW_SCHEDULE] = built.schedule.reshape(-1).astype("<u2", copy=False)
    return files


def _foreign(folder: Path) -> Iterator[str]:
    ours = {layout.LOCK, layout.VIEW_BEGINS, layout.VIEW_PLACES, layout.VIEW_SCHEDULE}
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


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _refuse_mixed(catalogues: list[Catalogue]) -> None:
    first = catalogues[0].manifest
    for catalogue in catalogues[1:]:
        for what, expected, found in (
            ("a tokenizer.json of SHA-256", first.tokenizer.sha256, catalogue.manifest.tokenizer.sha256),
            ("BOS with the id", first.tokenizer.bos_id, catalogue.manifest.tokenizer.bos_id),
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
        packing=spec.packing,
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

"""Export: a data set → the files of a trainer. Whole or absent, resumed, and read again once they are written."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from tokenmill.dataroot import atomic
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.errors import ExportError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.datatrove import Datatrove
from tokenmill.interchange.format import Format
from tokenmill.interchange.huggingface import HuggingFace
from tokenmill.interchange.litdata import LitData
from tokenmill.interchange.llmc import LlmC
from tokenmill.interchange.mds import Mds
from tokenmill.interchange.megatron import Megatron
from tokenmill.interchange.nanogpt import NanoGpt
from tokenmill.interchange.olmo import Olmo
from tokenmill.interchange.output import (
    EXPORT,
    ExportedSplit,
    ExportRecord,
    Output,
    is_written,
    load_export,
    require_foreign_to_none,
    require_room,
    save_export,
)
from tokenmill.interchange.torchtitan import TorchTitan
from tokenmill.options import OnBytes
from tokenmill.progress import also_shown
from tokenmill.redact import escape_surrogates

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (Megatron(), NanoGpt(), LlmC(), Olmo(), Datatrove(), Mds(), LitData(), HuggingFace(), TorchTitan())
}
"""By the names that `--to` takes."""


class ExportReport(msgspec.Struct, kw_only=True):
    """What an export did, or would do."""

    out: str
    format: str
    reader: str
    """What reads it."""
    status: str
    """`complete`, `already complete`, or `planned`."""
    files: dict[str, int]
    """Sizes in bytes; those of a plan may be estimates."""
    linked: int
    """Number of files that are hard links."""
    tokens: dict[str, int]
    """By split."""
    documents: dict[str, int]
    notes: list[str]
    seconds: float


def plan_export(root: Path | str, out: Path | str, to: str, *, validation: Path | str | None = None) -> ExportReport:
    """Return what `export` would do, without doing it; raise what it would raise before it begins.

    Raises:
        ExportError: the format cannot hold the data set.
        DataRootError: it is none, or is not finished.
    """
    kind = _format(to)
    datasets = _open(kind, root, validation)
    _record(Path(out), kind, datasets)
    report = _report(Path(out), kind, datasets, _planned_files(kind, datasets))
    return msgspec.structs.replace(report, notes=_notes(datasets))


def export(
    root: Path | str,
    out: Path | str,
    to: str,
    *,
    validation: Path | str | None = None,
    copy: bool = False,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> ExportReport:
    """Write a data set in the format of a trainer, or continue an earlier export.

    Args:
        root: a data root that tokenmill made, or a view; what is trained on.
        out: the directory; made if it does not exist.
        to: a name of `FORMATS`.
        validation: a data root or a view that becomes the validation set.
        copy: whether `tokens.bin` is copied where it could be linked.
        on_progress: called with bytes written and, about, bytes to write.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        ExportError: the format cannot hold the data set, or `out` holds something else.
        DataRootError: it is none, or is not finished.
        StorageError: the disk is full or cannot be written. Finished files stay, and the same call continues.
    """
    started = time.monotonic()
    out = Path(out)
    kind = _format(to)
    datasets = _open(kind, root, validation)
    record = _record(out, kind, datasets)
    if record.complete and all(is_written(out, record, name) for name in record.files):
        return _finished(_report(out, kind, datasets, {}), record, "already complete", started)
    total = sum(size for name, size in _planned_files(kind, datasets).items() if name not in record.files)
    require_room(out, total)
    atomic.make_root(out)
    written = 0
    with lock_data_root(out), also_shown(on_progress, wanted=progress) as tell:

        def count(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            tell(written, max(total, written))

        record.complete = False
        save_export(out, record)
        output = Output(out, record, copy=copy, on_written=count)
        try:
            for split, dataset in datasets.items():
                kind.write(dataset, split, output)
                output.settle()
                done = record.splits[split]
                done.tokens_sha256, done.inner_eos = dataset.digest(), dataset.inner_eos()
            output.finish()
        finally:
            output.close()
        record.notes, record.complete = _notes(datasets), True
        save_export(out, record)
    return _finished(_report(out, kind, datasets, {}), record, "complete", started)


def _finished(report: ExportReport, record: ExportRecord, status: str, started: float) -> ExportReport:
    return msgspec.structs.replace(
        report,
        status=status,
        files={name: file.nbytes for name, file in record.files.items()},
        linked=sum(file.linked for file in record.files.values()),
        notes=record.notes,
        seconds=round(time.monotonic() - started, 3),
    )


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ExportError(f"format {name!r}: not known", next_step=f"choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _open(kind: Format, root: Path | str, validation: Path | str | None) -> dict[str, ExportedDataset]:
    datasets = {"train": ExportedDataset(Path(root))}
    if validation is not None:
        datasets["val"] = ExportedDataset(Path(validation))
        first, second = datasets["train"], datasets["val"]
        if (first.tokenizer.sha256, first.dtype) != (second.tokenizer.sha256, second.dtype):
            raise ExportError(
                f"{validation}: was made with another tokenizer or dtype than {root}",
                next_step="make both with the same",
            )
        if first.identity == second.identity:
            raise ExportError(
                f"{validation}: is the same data as {root}, so a validation loss would be one of training",
                next_step='build a view with holdout and split = "validation" (docs/views.md), and give that',
            )
    for dataset in datasets.values():
        if dataset.tokens == 0 or dataset.documents == 0:
            raise ExportError(f"{dataset.root}: has no documents", next_step="export one that has some")
        kind.refuse(dataset)
    return datasets


def _record(out: Path, kind: Format, datasets: dict[str, ExportedDataset]) -> ExportRecord:
    """Return the record of an earlier export, which must be the same; a fresh one if there was none."""
    train = datasets["train"]
    fresh = ExportRecord(
        format=kind.name,
        tokenizer=train.tokenizer.name,
        tokenizer_sha256=train.tokenizer.sha256,
        vocab_size=train.tokenizer.vocab_size,
        eos_id=train.tokenizer.eos_id,
        seq_len=train.seq_len,
        splits={
            split: ExportedSplit(
                root=escape_surrogates(dataset.root),
                identity=dataset.identity,
                dtype=dataset.dtype.name,
                tokens=dataset.tokens,
                documents=dataset.documents,
            )
            for split, dataset in datasets.items()
        },
    )
    found = load_export(out) if out.is_dir() else None
    if found is None:
        require_foreign_to_none(out)
        return fresh
    if not found.is_of(fresh):
        raise ExportError(
            f"{out}: holds another export: {found.format} of "
            f"{', '.join(split.root for split in found.splits.values())}, by {EXPORT}",
            next_step="choose another directory, or delete that one",
        )
    return found


def _planned_files(kind: Format, datasets: dict[str, ExportedDataset]) -> dict[str, int]:
    return {name: nbytes for split, dataset in datasets.items() for name, nbytes in kind.files(dataset, split).items()}


def _notes(datasets: dict[str, ExportedDataset]) -> list[str]:
    """Return what a user should know of what was exported."""
    notes = []
    for split, dataset in datasets.items():
        if not dataset.cuts_documents and not dataset.ends_with_eos:
            notes.append(f"{split}: the last document is cut off (total_tokens), and has no end token")
        if dataset.inner_eos():
            notes.append(
                f"{split}: {dataset.inner_eos():,} end tokens (id {dataset.tokenizer.eos_id}) lie inside documents: "
                "readers that look for them find documents that are none (--special-in-text text makes none of text)"
            )
    return notes


def _report(out: Path, kind: Format, datasets: dict[str, ExportedDataset], files: dict[str, int]) -> ExportReport:
    return ExportReport(
        out=str(out),
        format=kind.name,
        reader=kind.reader,
        status="planned",
        files=files,
        linked=0,
        tokens={split: dataset.tokens for split, dataset in datasets.items()},
        documents={split: dataset.documents for split, dataset in datasets.items()},
        notes=[],
        seconds=0.0,
    )

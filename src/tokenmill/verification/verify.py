"""Verify, stage 7: a data root against its own records. Reads only; shares no code with what wrote the bytes.

What the records mean is specified in `docs/format.md`; everything is computed again from there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot.view_record import ViewRecord, load_view
from tokenmill.errors import DataRootError
from tokenmill.options import OnBytes, StoreOptions, available_cores
from tokenmill.progress import also_shown
from tokenmill.redact import escape_surrogates
from tokenmill.verification.deep import verify_deep
from tokenmill.verification.documents import DocumentChecks
from tokenmill.verification.findings import Checked, Finding, VerifyRun
from tokenmill.verification.records import RecordChecks
from tokenmill.verification.tokens import TokenChecks
from tokenmill.verification.view import ViewChecks


class Verification(msgspec.Struct, kw_only=True):
    """What a verification found."""

    root: str
    checked: list[Checked]
    findings: list[Finding]
    nbytes: int
    """Read."""
    seconds: float
    elsewhere: dict[str, str] = {}
    """Files that are not here on purpose, by name, and the store that has them: they were not looked at."""

    @property
    def passed(self) -> bool:
        return not self.findings


def verify(
    root: Path | str,
    *,
    quick: bool = False,
    deep: int | None = None,
    dataset: Sequence[str] | None = None,
    tokenizer: str | None = None,
    store: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
    workers: int | None = None,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> Verification:
    """Compare every byte of a finished data root with what its records say; of a view, its index and its sources.

    Args:
        root: the data root, or a view.
        quick: only sizes, headers, and whether the records agree with themselves.
        deep: also encode so many documents of the source again, and rebuild one shard from it.
        dataset: where the corpus is now, for `deep`; None: where the recipe says.
        tokenizer: where the tokenizer is now, likewise.
        store: how to reach a corpus that is not local.
        workers: threads; None takes every core.
        on_progress: called with bytes read and bytes to read.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        DataRootError: nothing is recorded of the data root, or a record cannot be read.
        SourceError, TokenizerError: `deep` needs the corpus or the tokenizer, and cannot have it.
    """
    with also_shown(on_progress, wanted=progress) as tell:
        options = _Options(quick, deep, dataset, tokenizer, store, workers or available_cores(), tell)
        return _verify(Path(root), options)


class _Options(NamedTuple):
    """The arguments of `verify`."""

    quick: bool
    deep: int | None
    dataset: Sequence[str] | None
    tokenizer: str | None
    store: StoreOptions
    workers: int
    on_progress: OnBytes


def _verify(root: Path, options: _Options) -> Verification:
    view = load_view(root) if root.is_dir() else None
    return _verify_root(root, options) if view is None else _verify_view(root, view, options)


def _verify_root(root: Path, options: _Options) -> Verification:
    started, deep = time.monotonic(), options.deep
    job = VerifyRun(root, workers=options.workers, on_progress=options.on_progress)
    RecordChecks(job).check()
    if not options.quick:
        TokenChecks(job).check()
        DocumentChecks(job).check()
    if deep and job.elsewhere:
        name, where = next(iter(job.elsewhere.items()))
        raise DataRootError(
            f"{root}: a part of a data set cannot be compared with the source: {name} is not here but in {where} "
            f"({len(job.elsewhere)} such files)",
            next_step="download the rest, or verify without --deep",
        )
    if deep and job.manifest is not None and job.manifest.imported is not None:
        raise DataRootError(
            f"{root}: was imported as tokens, and has no corpus to compare with", next_step="verify it without --deep"
        )
    if deep and job.manifest is not None and job.manifest.view is not None:
        raise DataRootError(
            f"{root}: was written from a view, and its corpus is that of the view's data roots",
            next_step="verify it without --deep, and those data roots with it",
        )
    if deep and job.manifest is not None:
        verify_deep(job, deep, dataset=options.dataset, tokenizer=options.tokenizer, store=options.store)
    elif deep:
        raise DataRootError(
            f"{root}: expected {layout.MANIFEST}, found none: its source is not known",
            next_step="verify it without --deep",
        )
    return Verification(
        root=escape_surrogates(root),
        checked=job.checked,
        findings=job.findings,
        nbytes=job.done_nbytes,
        seconds=round(time.monotonic() - started, 3),
        elsewhere=dict(sorted(job.elsewhere.items())),
    )


def _verify_view(folder: Path, record: ViewRecord, options: _Options) -> Verification:
    """Verify a view, and each of its sources; what is wrong with one of these is told under its name."""
    started = time.monotonic()
    checks = ViewChecks(folder, record, quick=options.quick)
    checks.check()
    nbytes = checks.nbytes
    elsewhere: dict[str, str] = {}
    for source in record.sources:
        if not (folder / source.root / layout.MANIFEST).is_file():
            continue  # told by the checks of the view
        result = _verify(folder / source.root, options)
        nbytes += result.nbytes
        checks.checked += [Checked(f"{source.name}: {each.what}", each.findings) for each in result.checked]
        checks.findings += [
            msgspec.structs.replace(each, file=f"{source.name}: {each.file}") for each in result.findings
        ]
        elsewhere |= {f"{source.name}/{name}": store for name, store in result.elsewhere.items()}
    return Verification(
        root=escape_surrogates(folder),
        checked=checks.checked,
        findings=checks.findings,
        nbytes=nbytes,
        seconds=round(time.monotonic() - started, 3),
        elsewhere=dict(sorted(elsewhere.items())),
    )

"""The command that follows a run elsewhere: watch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tokenmill.cli.options import data_root_argument, json_option
from tokenmill.dataroot import layout
from tokenmill.errors import DataRootError

if TYPE_CHECKING:  # they take as long to load as all of `tokenmill --help`
    from tokenmill.dataroot.manifest import Manifest
    from tokenmill.progress import ProgressRow

_LOOK_SECONDS = 1.0
_SILENT_SECONDS = 60.0
"""A run that says nothing for so long is likely over."""


@click.command(short_help="Follow a run that another terminal or machine works on.")
@data_root_argument
@click.option("--once", is_flag=True, help="Print how far the run is, and end.")
@json_option
def watch(data_root: Path, *, once: bool, as_json: bool) -> None:
    """Follow the run of pretokenize that works on DATA_ROOT, until the data set is complete.

    Reads its records and its log, which a run on another machine writes to a shared disk; changes nothing.
    A line is printed each time that something has changed. The exit code is 0 once the data set is complete;
    Ctrl-C ends the watching, and not the run.

    \b
    Examples:
      tokenmill watch /shared/data
      tokenmill watch /shared/data --once --json
    """
    said = ""
    for row, manifest in _states(data_root):
        line = _line(row, manifest)
        if as_json:
            line = _as_json(row, manifest)
        if line != said:
            click.echo(line)
            said = line
        if once or (manifest is not None and manifest.complete):
            return


def _states(root: Path) -> Iterator[tuple[ProgressRow | None, Manifest | None]]:
    """Yield the last row of the log, and the manifest, once a second."""
    from tokenmill.dataroot import manifest as manifests
    from tokenmill.progress import last_logged_row

    read: tuple[int, Manifest | None] = (-1, None)
    while True:
        path = root / layout.MANIFEST
        changed = path.stat().st_mtime_ns if path.exists() else 0
        if changed != read[0]:
            read = (changed, manifests.load(root))
        row = last_logged_row(root / layout.LOG)
        if row is None and read[1] is None and not (root / layout.LOG).is_file():
            raise DataRootError(
                f"{root}: no run is at work here: expected {layout.MANIFEST} or {layout.LOG}, found neither",
                next_step="give the directory that tokenmill pretokenize writes to",
            )
        yield row, read[1]
        time.sleep(_LOOK_SECONDS)


def _line(row: ProgressRow | None, manifest: Manifest | None) -> str:
    from tokenmill.progress import count, duration, shown_row

    kept = f"{len(manifest.shards):,} shards, {count(manifest.tokens)} tokens recorded" if manifest else "no shard yet"
    if manifest is not None and manifest.complete:
        return f"complete: {kept}"
    if row is None:
        return f"{kept}; the log tells of no run at work: it was stopped, or says nothing of its progress"
    silent = time.time() - row.time
    if silent > _SILENT_SECONDS:
        return f"{kept}; the run has said nothing for {duration(silent // 60 * 60)}: it has ended, or was killed"
    return f"{shown_row(row).text}  ({kept})"


def _as_json(row: ProgressRow | None, manifest: Manifest | None) -> str:
    import msgspec

    state = {
        "complete": manifest is not None and manifest.complete,
        "shards": len(manifest.shards) if manifest else 0,
        "recorded_tokens": manifest.tokens if manifest else 0,
        "progress": row,
    }
    return msgspec.json.encode(state).decode()

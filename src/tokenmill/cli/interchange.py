"""Commands of interchange: export."""

from __future__ import annotations

from pathlib import Path

import click

from tokenmill.cli.console import RESUME, end_on_signals, print_result
from tokenmill.cli.options import json_option

FORMATS = ("megatron", "nanogpt", "llmc", "olmo", "datatrove", "mds", "litdata", "parquet", "torchtitan")


@click.command(short_help="Write a data set in the format of a trainer.")
@click.argument("data_root", type=click.Path(path_type=Path, file_okay=False), metavar="DATA_ROOT|VIEW")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), metavar="OUT")
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Format of the files.")
@click.option(
    "--split",
    "validation",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="VIEW",
    help="View or data set that becomes the validation set (val), beside the first, which is train.",
)
@click.option("--copy", is_flag=True, help="Copy tokens.bin where it could be linked.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be written and what stands against it, and write nothing."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")
@json_option
def export(
    data_root: Path,
    out: Path,
    *,
    to: str,
    validation: Path | None,
    copy: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a finished data set, or a view, into the directory OUT as a trainer reads it (docs/trainers.md).

    Where the bytes are those of tokens.bin, the file is a hard link to it. What is written is read again, and
    OUT/export.json says what it is. After a crash, a kill or Ctrl-C, run the same command again: what is
    finished is kept.

    \b
    Examples:
      tokenmill export data/ megatron/ --to megatron
      tokenmill export train/ gpt/ --to nanogpt --split validation/     # two views
    """
    from tokenmill.cli import report
    from tokenmill.interchange.export import export as write
    from tokenmill.interchange.export import plan_export

    if dry_run:
        found = plan_export(data_root, out, to, validation=validation)
    else:
        with end_on_signals(lambda: f"finished files are kept in {out}; {RESUME}"):
            found = write(data_root, out, to, validation=validation, copy=copy)
    if as_json or not quiet:
        print_result(found, report.export_lines(found), as_json=as_json)

"""The command that shows a data set on one page: report."""

from __future__ import annotations

from pathlib import Path

import click

from tokenmill.cli.console import print_result
from tokenmill.cli.options import data_root_argument, json_option


@click.command(short_help="Show a data set on one HTML page.")
@data_root_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The file to write; an existing one is replaced.",
)
@click.option(
    "--comparison",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="JSON that tokenmill tokenizers compare --json printed; becomes a section of the page.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")
@json_option
def report(data_root: Path, *, output: Path, comparison: Path | None, quiet: bool, as_json: bool) -> None:
    """Show the data set or view in DATA_ROOT on one HTML page, which opens from disk and loads nothing.

    The page has how the data set was made, what became of every row, tokens by source and value, lengths,
    frequencies, duplicates, order, mixture, packing, the run, digests, and a hundred random samples to look into.
    Requires the extra report. The page holds text of the data set and paths of its sources: share it as such.

    \b
    Example:
      tokenmill report data/ -o report.html
    """
    from tokenmill.progress import byte_display
    from tokenmill.reporting.report import report as write_report

    with byte_display(quiet=quiet or as_json) as on_progress:
        found = write_report(data_root, output, comparison=comparison, on_progress=on_progress)
    if as_json or not quiet:
        lines = [f"{found.path}: {found.nbytes / 1e6:.1f} MB, in {found.seconds:.1f} s"]
        print_result(found, lines, as_json=as_json)

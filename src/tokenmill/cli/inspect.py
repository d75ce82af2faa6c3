"""Commands that look into a data set: info, show, where, stats, receipts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from tokenmill.cli.console import print_result
from tokenmill.cli.interchange import FORMATS
from tokenmill.cli.options import Count, all_option, combine, data_root_argument, json_option, store_options
from tokenmill.options import StoreOptions


@click.command(short_help="Describe a data set and how it was made.")
@click.argument("data_root")
@combine(store_options)
@all_option
@json_option
def info(data_root: str, *, endpoint_url: str | None, anonymous: bool, every: bool, as_json: bool) -> None:
    """Describe the data set or view in DATA_ROOT, a directory or s3://BUCKET/PREFIX, and how it was made."""
    from tokenmill.cli import wording
    from tokenmill.dataroot.view_record import load_view
    from tokenmill.loading import info as infos

    view = load_view(Path(data_root)) if Path(data_root).is_dir() else None
    if view is not None:
        print_result(view, wording.view_lines(view), as_json=as_json)
        return
    found = infos.info(data_root, StoreOptions(endpoint_url, anonymous))
    print_result(found, wording.info_lines(found, every=every), as_json=as_json)


@click.command(short_help="Print the text of a sample, and where it came from.")
@data_root_argument
@click.option("--sample", type=Count(0), required=True, metavar="I", help="Number of the sample, from 0.")
@click.option("--ids", "with_ids", is_flag=True, help="Print a line for every token: its place, its id, its text.")
@click.option("--plain", is_flag=True, help="Print the text alone, without the bounds of tokens.")
@click.option("--limit", type=Count(1), metavar="TOKENS", help="Print the first so many tokens.  [default: all]")
@json_option
def show(data_root: Path, *, sample: int, with_ids: bool, plain: bool, limit: int | None, as_json: bool) -> None:
    """Print the text of a sample, with the bounds of tokens and documents, its id, and where it came from."""
    from tokenmill.cli import wording
    from tokenmill.loading import provenance

    if plain and with_ids:
        raise click.UsageError("--plain contradicts --ids")
    found = provenance.show(data_root, sample)
    if as_json and limit is not None:
        found = found._replace(tokens=found.tokens[:limit])
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if plain:
        lines = wording.plain_lines(found, limit)
    elif with_ids:
        lines = wording.token_lines(found, limit)
    else:
        lines = wording.sample_lines(found, colour=colour, limit=limit)
    print_result(found, lines, as_json=as_json)


@click.command(short_help="Find where a sample comes from, or which samples hold a row.")
@data_root_argument
@click.option("--sample", type=Count(0), metavar="I", help="Number of a sample, from 0.")
@click.option("--token", type=Count(0), metavar="T", help="Number of a token of the whole stream, from 0.")
@click.option("--sample-id", metavar="HEX", help="Id of a sample, as 16 hexadecimal digits.")
@click.option("--source", metavar="FILE", help="A source file, as the manifest lists it; requires --row.")
@click.option("--row", type=Count(0), metavar="R", help="Number of a row of that file, from 0.")
@click.option("--trainer", type=click.Choice(FORMATS), help="Trainer that reads an export of the data set.")
@click.option(
    "--position",
    metavar="N[:OFFSET]",
    help="Where it is: document (megatron), row (parquet), sample (mds), block (litdata) or window (datatrove), and, "
    "if one token is meant, its offset; for others the token, for llmc FILE:TOKEN.",
)
@json_option
def where(
    data_root: Path,
    *,
    sample: int | None,
    token: int | None,
    sample_id: str | None,
    source: str | None,
    row: int | None,
    trainer: str | None,
    position: str | None,
    as_json: bool,
) -> None:
    """Find where a sample or a token comes from, or which samples hold a row of a source file.

    With --trainer: where the tokens come from at which a trainer that reads an export is (docs/trainers.md).

    \b
    Examples:
      tokenmill where data/ --sample 17
      tokenmill where data/ --source part-00003.parquet --row 12
      tokenmill where data/ --trainer megatron --position 17:200
    """
    from tokenmill.cli import wording
    from tokenmill.loading import provenance

    given = [option is not None for option in (sample, token, sample_id, source, trainer)]
    if sum(given) != 1 or (source is None) != (row is None) or (trainer is None) != (position is None):
        raise click.UsageError(
            "give one of --sample, --token, --sample-id, --source with --row, or --trainer with --position"
        )
    if source is not None and row is not None:
        samples = provenance.where_row(data_root, source, row)
        print_result(samples, wording.samples_lines(samples), as_json=as_json)
        return
    if sample is not None:
        places = [provenance.where_sample(data_root, sample)]
    elif token is not None:
        places = [provenance.where_token(data_root, token)]
    elif trainer is not None and position is not None:
        from tokenmill.interchange.position import where_trainer

        places = [where_trainer(data_root, trainer, position)]
    else:
        places = provenance.where_sample_id(data_root, str(sample_id))
    print_result(places, [line for place in places for line in wording.place_lines(place)], as_json=as_json)


@click.command(short_help="Check which samples ranks say they trained on.")
@data_root_argument
@click.argument("receipt", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@json_option
def receipts(data_root: Path, receipt: tuple[Path, ...], *, as_json: bool) -> None:
    """Check each RECEIPT, which a trainer saved, against the data set in DATA_ROOT.

    A receipt names the sampler that a rank followed, and the SHA-256 of the ids that it consumed, in order.
    Both are made again from the data set; no trainer and no model are needed. The exit code is 1 if a
    receipt is wrong.

    \b
    Example:
      tokenmill receipts data/ checkpoints/receipt-rank*.json
    """
    from tokenmill.cli import wording
    from tokenmill.loading.receipts import check_receipt, load_receipt

    checks = {str(path): check_receipt(data_root, load_receipt(path)) for path in receipt}
    print_result(checks, wording.receipt_lines(checks), as_json=as_json)
    if not all(check.passed for each in checks.values() for check in each):
        raise click.exceptions.Exit(1)


@click.command(short_help="Count lengths, frequencies and duplicate samples.")
@data_root_argument
@click.option("--order", is_flag=True, help="Instead, measure how far the order of documents is from a random one.")
@all_option
@json_option
def stats(data_root: Path, *, order: bool, every: bool, as_json: bool) -> None:
    """Count lengths of documents, frequencies of tokens, tokens per source file, and samples that occur twice.

    With --order: how documents of one source file, and of one text, are spread over the data set, beside what a random
    permutation gives, and beside a shuffle through a buffer. Reads sidecars only.
    """
    from tokenmill.cli import wording
    from tokenmill.loading import stats as statistics
    from tokenmill.progress import byte_display

    if order:
        from tokenmill.loading.order_quality import order_quality

        quality = order_quality(data_root)
        print_result(quality, wording.order_lines(quality), as_json=as_json)
        return
    with byte_display(quiet=as_json) as on_progress:
        found = statistics.stats(data_root, on_progress=on_progress)
    print_result(found, wording.stats_lines(found, every=every), as_json=as_json)

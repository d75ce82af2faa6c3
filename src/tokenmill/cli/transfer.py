"""Commands that move data: download, upload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenmill.cli.console import RESUME, InterruptedByUserError, catch_signals, exit_interrupted, print_result
from tokenmill.cli.options import combine, data_root_argument, json_option, store_options
from tokenmill.options import StoreOptions

if TYPE_CHECKING:
    from tokenmill.transfer.selection import Selection, TransferReport

_transfer_options = combine(
    [
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="Transfer only files whose path matches; may be repeated.",
        ),
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Transfer no files whose path matches; may be repeated."
        ),
        click.option(
            "--shards", metavar="N[-M]", help="Transfer only these shards and their sidecars, for example 0-3."
        ),
        *store_options,
        click.option("--dry-run", is_flag=True, help="Print what would be transferred, and transfer nothing."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails."),
    ]
)


@click.command(short_help="Download a data set from a bucket.")
@click.argument("source")
@data_root_argument
@_transfer_options
@json_option
def download(source: str, data_root: Path, **options: Any) -> None:
    """Download the data set at SOURCE (s3://BUCKET/PREFIX, file:// or a path) to the directory DATA_ROOT.

    Only what is missing or different is transferred. After a crash or Ctrl-C, run the same command again:
    it resumes in the middle of a file. A file gets its name only when it is whole and its digest is right.
    Credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.

    \b
    Examples:
      tokenmill download s3://bucket/data data/ --endpoint-url https://s3.example.org
      tokenmill download s3://bucket/data data/ --shards 0-3
    """
    from tokenmill.transfer.download import download as transfer

    def move(selection: Selection, store: StoreOptions, **rest: Any) -> TransferReport:
        return transfer(source, data_root, selection, store=store, **rest)

    _transfer(move, **options)


@click.command(short_help="Upload a data set to a bucket or the hub.")
@data_root_argument
@click.argument("target")
@_transfer_options
@click.option("--private", is_flag=True, help="Make the data set of the hub a private one, if it is made.")
@click.option("--license", metavar="ID", help="License for the card of the hub, as of tokenmill card.")
@json_option
def upload(data_root: Path, target: str, *, private: bool, license: str | None, **options: Any) -> None:
    """Upload the data set in DATA_ROOT to TARGET (s3://BUCKET/PREFIX, file:// or a path), the manifest last.

    TARGET may also be hf://datasets/OWNER/NAME: the data set goes there with its card, a Croissant file and a
    preview (tokenmill card); HF_TOKEN must be allowed to write there.

    Only what is missing or different is transferred. After a crash or Ctrl-C, run the same command again:
    parts that arrived are kept. Credentials come from the environment: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.

    \b
    Example:
      tokenmill upload data/ s3://bucket/data --endpoint-url https://s3.example.org
    """
    if target.startswith("hf://"):
        _publish(data_root, target, private=private, license=license, **options)
        return
    if private or license is not None:
        raise click.UsageError("--private and --license are for hf:// alone")
    from tokenmill.transfer.upload import upload as transfer

    def move(selection: Selection, store: StoreOptions, **rest: Any) -> TransferReport:
        return transfer(data_root, target, selection, store=store, **rest)

    _transfer(move, **options)


def _publish(
    data_root: Path,
    target: str,
    *,
    private: bool,
    license: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Send a data set to the hub."""
    from tokenmill.cli import wording
    from tokenmill.publishing.hub import upload_to_hub

    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    if any(options.values()):
        raise click.UsageError(
            "hf:// takes whole data sets: leave out --include, --exclude, --shards and options of s3"
        )
    catch_signals()
    try:
        found = upload_to_hub(data_root, target, private=private, license=license, dry_run=dry_run)
    except InterruptedByUserError as stop:
        exit_interrupted(RESUME, stop)
    if as_json or not quiet:
        print_result(found, wording.published_lines(found), as_json=as_json)


def _transfer(
    move: Callable[..., TransferReport],
    *,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    shards: str | None,
    endpoint_url: str | None,
    anonymous: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from tokenmill.cli import wording
    from tokenmill.progress import byte_display
    from tokenmill.transfer.selection import Selection, shard_range

    selection = Selection(include, exclude, None if shards is None else shard_range(shards))
    catch_signals()
    try:
        with byte_display(quiet=quiet or as_json) as on_progress:
            result = move(selection, StoreOptions(endpoint_url, anonymous), dry_run=dry_run, on_progress=on_progress)
    except InterruptedByUserError as stop:
        exit_interrupted(RESUME, stop)
    if as_json or not quiet:
        print_result(result, wording.transfer_lines(result), as_json=as_json)

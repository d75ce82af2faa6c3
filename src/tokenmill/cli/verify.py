"""The command that proves data: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokenmill.cli.console import end_on_signals, print_result
from tokenmill.cli.options import (
    Count,
    combine,
    data_root_argument,
    json_option,
    max_document_size_option,
    store_options,
    worker_count,
    workers_option,
)
from tokenmill.options import StoreOptions


@click.command(short_help="Prove that a data set is what its records say.")
@data_root_argument
@click.option("--quick", is_flag=True, help="Check only sizes, headers, and that the manifest agrees with itself.")
@click.option(
    "--deep",
    type=Count(1),
    metavar="N",
    help="Also encode N documents of the source again, and rebuild one shard from it.",
)
@click.option(
    "--dataset",
    multiple=True,
    metavar="PATH",
    help="Where the corpus is now, for --deep.  [default: where the manifest says]",
)
@click.option(
    "--tokenizer",
    metavar="PATH|NAME",
    help="Where the tokenizer is now, for --deep.  [default: where the manifest says]",
)
@max_document_size_option
@combine(store_options)
@workers_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless something is wrong.")
@json_option
def verify(
    data_root: Path,
    *,
    workers: int | None,
    max_document_nbytes: int,
    endpoint_url: str | None,
    anonymous: bool,
    quiet: bool,
    as_json: bool,
    dataset: tuple[str, ...],
    **options: Any,
) -> None:
    """Prove that the data set in DATA_ROOT is what its records say.

    Reads every byte: digests, sample ids, token ids, documents, ledger. Writes nothing. With --deep it
    goes back to the source and to the reference tokenizer backend. The exit code is 1 if anything is wrong.
    """
    from tokenmill.cli import wording
    from tokenmill.progress import byte_display
    from tokenmill.verification.verify import verify as prove

    if options["quick"] and options["deep"]:
        raise click.UsageError("--quick and --deep exclude each other")
    store = StoreOptions(endpoint_url, anonymous, max_document_nbytes=max_document_nbytes)
    with (
        end_on_signals(lambda: "the data set was not proven"),
        byte_display(quiet=quiet or as_json) as on_progress,
    ):
        result = prove(
            data_root,
            dataset=dataset or None,
            store=store,
            workers=worker_count(workers),
            on_progress=on_progress,
            **options,
        )
    if as_json or not (quiet and result.passed):
        print_result(result, wording.verification_lines(result), as_json=as_json)
    if not result.passed:
        raise click.exceptions.Exit(1)

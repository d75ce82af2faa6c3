"""Commands about tokenizers: compare."""

from __future__ import annotations

from typing import Any

import click

from tokenmill.cli.console import print_result
from tokenmill.cli.options import Count, combine, json_option, store_options
from tokenmill.options import StoreOptions


@click.group(short_help="Compare tokenizers on a corpus.")
def tokenizers() -> None:
    """Choose a tokenizer by figures."""


@tokenizers.command(short_help="Compare tokenizers on a sample of a corpus.")
@click.argument("tokenizer", nargs=-1, required=True)
@click.option("--dataset", multiple=True, required=True, metavar="PATH|URL", help="The corpus, as of pretokenize.")
@click.option("--text-column", default="text", show_default=True, metavar="NAME", help="Column that holds the text.")
@click.option("--text-separator", metavar="STRING", help="String that ends a document in plain text files.")
@click.option(
    "--metadata-column",
    "metadata_columns",
    multiple=True,
    metavar="[NAME=]PATH[:TYPE]",
    help="Column whose values are compared one by one (may be repeated).",
)
@click.option(
    "--sample",
    "sample_nbytes",
    type=Count(1),
    default="16Mi",
    show_default=True,
    metavar="BYTES",
    help="Size of the text that is encoded, about.",
)
@click.option("--lossy", is_flag=True, help="Compare tokenizers that do not keep the text, too.")
@combine(store_options)
@json_option
def compare(
    tokenizer: tuple[str, ...],
    *,
    dataset: tuple[str, ...],
    endpoint_url: str | None,
    anonymous: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Encode a sample of a corpus with each TOKENIZER, and compare what they make of it, and how fast.

    The sample is the same each time: documents from all over the corpus, from each file as much as is its
    share. Intervals are of 95% confidence. A tokenizer that loses text is refused, unless --lossy is given.
    The JSON can become a section of a report: tokenmill report DATA_ROOT --comparison FILE.

    \b
    Example:
      tokenmill tokenizers compare llama2/ gpt2/ --dataset corpus/ --metadata-column lang
    """
    from tokenmill.cli import wording
    from tokenmill.comparison.compare import compare_tokenizers

    found = compare_tokenizers(tokenizer, list(dataset), store=StoreOptions(endpoint_url, anonymous), **options)
    print_result(found, wording.comparison_lines(found), as_json=as_json)

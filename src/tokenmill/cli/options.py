"""Options that several commands share, each with its help text, and what their values mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenmill.dataroot import layout
from tokenmill.options import available_cores, parse_count

if TYPE_CHECKING:
    from tokenmill.pipeline.cluster_engine import ClusterEngine

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A whole number, as people write large ones: 1_000_000, 1M, 150Gi, 1e9."""

    name = "count"

    def __init__(self, least: int | None = None) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            count = value if isinstance(value, int) else parse_count(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self._least is not None and count < self._least:
            self.fail(f"{value}: expected {self._least} or more", param, ctx)
        return count


class _FirstNameShown(click.Option):
    """An option whose other names are old spellings, which help leaves out."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def combine(options: Sequence[Decorator]) -> Decorator:
    """Return a decorator that adds options in the order of the list."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


recipe_options = combine(
    [
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            help="Name of a built-in recipe (demo or templar-150b), or a TOML file with the settings below. Options "
            "override it.",
        ),
        click.option(
            "--dataset",
            multiple=True,
            metavar="PATH|URL",
            help="The corpus: a directory, a glob or a file (may be repeated); "
            "hf://datasets/OWNER/NAME[@REVISION][/PATH] or OWNER/NAME; s3://BUCKET/PREFIX; https:// files.",
        ),
        click.option(
            "--tokenizer",
            metavar="PATH|NAME",
            help="A directory with tokenizer.json, such a file, or a name on the Hugging Face hub.",
        ),
        click.option(
            "--text-column", metavar="NAME", help="Column or JSON field that holds the documents.  [default: text]"
        ),
        click.option(
            "--metadata-column",
            "metadata_columns",
            multiple=True,
            metavar="[NAME=]PATH[:TYPE]",
            help="Column or JSON field that is kept of each document, to select by it later (may be repeated); "
            "meta.lang is one inside another; TYPE is string (the default), int64, float64 or bool.",
        ),
        click.option(
            "--text-separator",
            metavar="STRING",
            help="String that ends a document in plain text files.  [default: each file is one document]",
        ),
        click.option(
            "--shuffle",
            type=click.Choice(["buffer", "none"]),
            help="Order of the documents: shuffled through a buffer, or as they are read.  [default: buffer]",
        ),
        click.option("--order", type=click.Choice(["buffer", "sequential"]), hidden=True),
        click.option("--seed", type=int, help="Seed of the shuffle.  [default: 42]"),
        click.option(
            "--buffer-size", type=Count(), metavar="ROWS", help="Rows that the shuffle buffer holds.  [default: 10000]"
        ),
        click.option("--shard-size", type=Count(), metavar="TOKENS", help="Tokens per shard.  [default: 268435456]"),
        click.option(
            "--total-tokens",
            type=Count(),
            metavar="TOKENS",
            help="Stop after this many tokens.  [default: the whole corpus]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "uint16", "uint32"]),
            help="Data type of a stored token; auto takes the smallest that holds the vocabulary.  [default: auto]",
        ),
        click.option(
            "--special-in-text",
            type=click.Choice(["parse", "text"]),
            help="What a control-token string such as '</s>' in a document becomes: the control token (parse) or "
            "ordinary text.  [default: parse]",
        ),
        click.option(
            "--eos-token", metavar="TOKEN", help="Token that ends every document.  [default: the tokenizer's own]"
        ),
        click.option(
            "--bos",
            type=click.Choice(["none", "prepend"]),
            help="Whether every document begins with the beginning-of-sequence token.  [default: none]",
        ),
        click.option("--bos-token", metavar="TOKEN", help="That token.  [default: the tokenizer's own]"),
        click.option(
            "--fim-rate",
            type=click.FloatRange(0, 1),
            metavar="SHARE",
            help="Share of the documents that are taken apart, to train a model to fill in the middle.  [default: 0.0]",
        ),
        click.option(
            "--fim-spm-rate",
            type=click.FloatRange(0, 1),
            metavar="SHARE",
            help="Share of those in the order suffix, prefix, middle, not prefix, suffix, middle.  [default: 0.5]",
        ),
        click.option(
            "--fim-tokens",
            nargs=3,
            metavar="PREFIX MIDDLE SUFFIX",
            help="Tokens that stand before these parts.  [default: the tokenizer's, if it has known ones]",
        ),
        click.option("--seq-len", type=Count(), metavar="TOKENS", help="Tokens per training sample.  [default: 2048]"),
    ]
)

workers_option = click.option(
    "--workers",
    "--num-proc",
    "workers",
    type=int,
    metavar="N",
    help="Number of threads; 0 or less means 75% of the cores.  [default: all cores]",
)

speed_options = combine(
    [
        workers_option,
        click.option(
            "--chunk-size",
            "span_rows",
            type=Count(1),
            metavar="ROWS",
            help="Rows that are encoded together.  [default: as many as make a few megabytes of text]",
        ),
        click.option(
            "--tokenizer-backend",
            "--engine-tokenizer",
            "tokenizer_backend",
            cls=_FirstNameShown,
            type=click.Choice(["auto", "gigatoken", "hf"]),
            default="auto",
            show_default=True,
            help="Library that encodes: auto takes gigatoken if it is proven to honour the tokenizer, else HF "
            "tokenizers. The bytes are the same.",
        ),
    ]
)

engine_options = combine(
    [
        click.option(
            "--engine",
            type=click.Choice(["threads", "ray"]),
            default="threads",
            show_default=True,
            help="Where the work is done: on threads of this process, or on all processors of a running Ray cluster. "
            "The bytes are the same.",
        ),
        click.option(
            "--ray-address",
            metavar="auto|HOST:PORT|local",
            help="Address of the Ray cluster's head; local starts Ray on this machine alone.  [default: RAY_ADDRESS, "
            "or auto]",
        ),
    ]
)

bad_rows_option = click.option(
    "--on-bad-rows",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What to do about a row that is not valid JSON or UTF-8: stop there, or leave it out, counted and listed in "
    "skipped.jsonl.",
)

max_document_size_option = click.option(
    "--max-document-size",
    "max_document_nbytes",
    type=Count(1),
    default="1Gi",
    show_default=True,
    metavar="BYTES",
    help="A larger document, or one in a larger line, is an error, before memory is taken for it.",
)

store_options = [
    click.option(
        "--endpoint-url",
        metavar="URL",
        help="Address of an S3 store other than AWS.  [default: AWS_ENDPOINT_URL from the environment]",
    ),
    click.option("--anonymous", is_flag=True, help="Read public s3:// buckets without credentials."),
]

all_option = click.option("--all", "every", is_flag=True, help="List every file, where there are more than 20.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
data_root_argument = click.argument("data_root", type=click.Path(path_type=Path, file_okay=False))
output_argument = click.argument("output", type=click.Path(path_type=Path, file_okay=False))
id_scheme_option = click.option(
    "--id-scheme",
    type=click.Choice(layout.ID_SCHEMES),
    help="Scheme of the sample ids.  [default: templar-v1 for the published Templar data set, else blake2b-64]",
)


def recipe_fields(fields: dict[str, object]) -> dict[str, object]:
    """Return the fields of the recipe that options set.

    Raises:
        UsageError: `--shuffle` and `--order` contradict each other.
    """
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if (shuffle := given.pop("shuffle", None)) is not None:
        order = "sequential" if shuffle == "none" else shuffle
        if given.setdefault("order", order) != order:
            raise click.UsageError(f"--shuffle {shuffle} contradicts --order {given['order']}")
    if isinstance(dataset := given.get("dataset"), tuple) and len(dataset) == 1:
        given["dataset"] = dataset[0]
    return given


def worker_count(workers: int | None) -> int:
    """Return the number of threads that `--workers` means."""
    if workers is None:
        return available_cores()
    return workers if workers > 0 else max(1, available_cores() * 3 // 4)


@contextmanager
def open_cluster(engine: str, address: str | None) -> Iterator[ClusterEngine | None]:
    """Connect to the cluster that `--engine` asks for; None for threads.

    Raises:
        UsageError: an address without a cluster.
        EngineError: no cluster is there.
    """
    if address is not None and engine != "ray":
        raise click.UsageError("--ray-address requires --engine ray")
    if engine == "threads":
        yield None
        return
    from tokenmill.ray import RayEngine

    with RayEngine(address) as cluster:
        yield cluster

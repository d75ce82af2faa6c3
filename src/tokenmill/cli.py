"""Command line: translates arguments to a recipe and pipeline calls, prints; no logic.

Results go to standard output, progress and messages to standard error. Exit codes are those of
`errors.py`, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from tokenmill import layout
from tokenmill.engine import available_cores
from tokenmill.errors import TokenmillError
from tokenmill.recipe import Recipe, builtin_recipes, load_recipe

if TYPE_CHECKING:
    from tokenmill.pipeline import Prepared, Summary
    from tokenmill.preflight import Preflight

log = logging.getLogger("tokenmill")
log.addHandler(logging.NullHandler())  # until there is a data root to keep a log in

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --num_proc is --num-proc
    "max_content_width": 100,
}


class _InterruptedError(Exception):
    """Ctrl-C or SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with `arguments` (None: those of the process) and exit."""
    try:
        cli.main(arguments, standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TokenmillError as error:
        log.error("%s", error)  # noqa: TRY400  # the traceback is of no use to a user
        click.echo(f"tokenmill: error: {error}", err=True)
        sys.exit(error.exit_code)
    except _InterruptedError as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(0)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="tokenmill")
def cli() -> None:
    """Turn text corpora into training data for language models.

    The same recipe gives the same bytes, whatever the workers, the engine or the crashes.
    """


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """A flag for every field of the recipe, named as the field."""
    options = [
        click.option(
            "--recipe", metavar="NAME|FILE", help=f"Built-in ({', '.join(builtin_recipes())}) or a TOML file."
        ),
        click.option(
            "--dataset",
            multiple=True,
            metavar="PATH",
            help="Corpus: a directory, a glob or a parquet file; may be repeated for files.",
        ),
        click.option("--tokenizer", metavar="PATH|NAME", help="A directory, a tokenizer.json, or a hub name."),
        click.option("--text-column", metavar="NAME", help="Column that holds the documents.  [text]"),
        click.option("--order", type=click.Choice(["buffer", "sequential"]), help="Order of documents.  [buffer]"),
        click.option("--seed", type=int, help="Of the shuffle.  [42]"),
        click.option("--buffer-size", type=int, metavar="ROWS", help="Slots of the shuffle's reservoir.  [10000]"),
        click.option("--shard-size", type=int, metavar="TOKENS", help="Tokens per shard.  [268435456]"),
        click.option("--total-tokens", type=int, metavar="TOKENS", help="Stop after this many.  [the whole corpus]"),
        click.option("--dtype", type=click.Choice(["auto", "uint16", "uint32"]), help="Of a stored token.  [auto]"),
        click.option(
            "--special-in-text",
            type=click.Choice(["parse", "text"]),
            help="What '</s>' in a document becomes: the control token, or plain text.  [parse]",
        ),
        click.option("--eos-token", metavar="TOKEN", help="Ends every document.  [the tokenizer's]"),
        click.option("--seq-len", type=int, metavar="TOKENS", help="Tokens per training sample.  [2048]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_speed_options = [
    click.option(
        "--num-proc",
        "workers",
        type=int,
        metavar="N",
        help="Encode threads; 0 or less means 75% of the cores.  [all cores]",
    ),
    click.option(
        "--chunk-size", "span_rows", type=click.IntRange(1), metavar="ROWS", help="Rows encoded at once.  [by text]"
    ),
    click.option(
        "--engine-tokenizer",
        type=click.Choice(["auto", "gigatoken", "hf"]),
        default="auto",
        show_default=True,
        help="auto is gigatoken where it takes the tokenizer, else HF tokenizers; the bytes are the same.",
    ),
]


def _with(options: list[Callable[..., Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@cli.command()
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@_recipe_options
@_with(_speed_options)
@click.option("--dry-run", is_flag=True, help="Print the plan and what it needs; make nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, on standard output.")
def pretokenize(
    output: Path,
    recipe: str | None,
    *,
    workers: int | None,
    span_rows: int | None,
    engine_tokenizer: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **fields: object,
) -> None:
    """Tokenize a corpus into shards in the directory OUTPUT.

    Run the same command again after a crash, a kill or Ctrl-C: it goes on from the last whole shard
    and the bytes are the same.

    \b
    Examples:
      tokenmill pretokenize data/ --dataset corpus/ --tokenizer llama2/
      tokenmill pretokenize data/ --recipe my.toml --total-tokens 1000000000 --dry-run
    """
    resolved = load_recipe(recipe, _overrides(fields))
    cores = _cores(workers)
    if dry_run:
        _dry_run(resolved, output, cores, engine_tokenizer, as_json)
        return
    run(
        resolved,
        output,
        workers=cores,
        span_rows=span_rows,
        engine_tokenizer=engine_tokenizer,
        quiet=quiet,
        as_json=as_json,
    )


@cli.command()
@click.argument("output", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@_with(_speed_options[:1])
def demo(output: Path, workers: int | None) -> None:
    """Pretokenize Python's own standard library into the directory OUTPUT (demo), offline.

    Uses a small tokenizer that ships with tokenmill, writes several shards, shows what is in them.
    """
    from tokenmill.demo import TOKENIZER, demo_recipe, excerpt, write_corpus

    corpus, root = output / "corpus", output / "tokens"
    if not corpus.is_dir():
        click.echo(f"writing Python's standard library to {corpus} as parquet")
        write_corpus(corpus)
    run(demo_recipe(corpus), root, workers=_cores(workers))
    click.echo(f"\nThe data is in {root}; its first shard begins:\n")
    click.echo("\n".join(f"    {line}" for line in excerpt(root).splitlines()))
    click.echo(
        "\nNext, your own text (a directory of parquet files with a column 'text'):\n"
        f"    {_program()} pretokenize data/ --dataset corpus/ --tokenizer {TOKENIZER} --dry-run"
    )


def _program() -> str:
    """How to call this program again: by its path if it was called so."""
    return sys.argv[0] if Path(sys.argv[0]).name == "tokenmill" else "tokenmill"


def _overrides(fields: dict[str, object]) -> dict[str, object]:
    """The recipe fields that were given as flags."""
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if isinstance(dataset := given.get("dataset"), tuple) and len(dataset) == 1:
        given["dataset"] = dataset[0]
    return given


def _cores(workers: int | None) -> int:
    if workers is None:
        return available_cores()
    return workers if workers > 0 else max(1, available_cores() * 3 // 4)


def run(
    recipe: Recipe,
    output: Path,
    *,
    workers: int,
    span_rows: int | None = None,
    engine_tokenizer: str = "auto",
    quiet: bool = False,
    as_json: bool = False,
) -> Summary:
    """Pretokenize with progress, a log file, a summary, and a clean end on Ctrl-C."""
    from tokenmill import pipeline, storage
    from tokenmill.allocator import keep_freed_memory
    from tokenmill.progress import display

    keep_freed_memory()
    storage.make_root(output)
    _log_to(output / layout.LOG)
    log.info("pretokenize %s: %s", output, msgspec.json.encode(recipe).decode())
    _catch_signals()
    try:
        with display(quiet=quiet or as_json) as shown:
            summary = pipeline.pretokenize(
                recipe,
                output,
                workers=workers,
                span_rows=span_rows,
                engine_tokenizer=engine_tokenizer,
                show=shown.show,
                begin=lambda plan: shown.expect(plan.tokens),
            )
    except _InterruptedError as stop:
        log.info("interrupted")
        _say_interrupted(output, stop)
    log.info("%s", msgspec.json.encode(summary).decode())
    if as_json:
        click.echo(msgspec.json.encode(summary))
    elif not quiet:
        _print_summary(summary)
    return summary


def _dry_run(recipe: Recipe, output: Path, workers: int, engine_tokenizer: str, as_json: bool) -> None:
    from tokenmill import pipeline, preflight

    prepared, figures = pipeline.plan(recipe, output, workers=workers, engine_tokenizer=engine_tokenizer)
    if as_json:
        click.echo(msgspec.json.encode({"recipe": prepared.recipe, "preflight": figures}))
    else:
        _print_plan(prepared, figures, output, workers)
    preflight.check_disk(figures, output)


def _print_plan(prepared: Prepared, figures: Preflight, output: Path, workers: int) -> None:
    from tokenmill.progress import count, duration

    recipe, corpus, encoder = prepared
    about = "" if figures.rows_exact else "about "
    order = f"buffer of {recipe.buffer_size:,} rows, seed {recipe.seed}" if recipe.order == "buffer" else "sequential"
    limit = "the whole corpus" if recipe.total_tokens is None else f"stops at {recipe.total_tokens:,}"
    lines = {
        "output": str(output),
        "corpus": f"{corpus.root}: {figures.files:,} files, {figures.source_nbytes / 1e9:.3f} GB, "
        f"{about}{figures.rows:,} rows",
        "tokenizer": f"{encoder.tokenizer.name}: {encoder.tokenizer.vocab_size:,} ids, EOS {recipe.eos_token} "
        f"= {encoder.tokenizer.eos_id}, engine {encoder.engine.version}",
        "order": order,
        "tokens": f"about {count(figures.tokens)} ({limit}; "
        f"the corpus has about {count(figures.estimated_corpus_tokens)})",
        "done": f"{figures.done_tokens:,} tokens, by an earlier run",
        "shards": f"about {figures.shards:,} of {recipe.shard_size:,} tokens, {figures.dtype}",
        "disk": f"about {figures.disk_needed_nbytes / 1e9:.3f} GB needed, {figures.disk_free_nbytes / 1e9:.1f} GB free",
        "memory": f"about {figures.estimated_memory_nbytes / 1e9:.2f} GB",
        "time": f"about {duration(figures.estimated_seconds)} with {workers} workers",
    }
    if not figures.done_tokens:
        del lines["done"]
    for name, value in lines.items():
        click.echo(f"{name:<10} {value}")


def _print_summary(summary: Summary) -> None:
    if summary.status == "already complete":
        click.echo(
            f"{summary.root}: already complete: {summary.tokens:,} tokens in {_shards(summary.shards)}; nothing to do"
        )
        return
    for name in summary.remade:
        click.echo(f"{name} was missing or damaged: made again")
    click.echo(
        f"{summary.root}: {summary.tokens:,} tokens in {_shards(summary.shards)} ({summary.dtype}), "
        f"{summary.documents:,} documents"
    )
    click.echo(
        f"rows {summary.rows:,} = {summary.documents:,} documents + {summary.skipped_null:,} null + "
        f"{summary.skipped_empty:,} empty; {summary.special_documents:,} documents hold control-token strings"
    )
    click.echo(
        f"{summary.new_tokens:,} tokens in {summary.seconds:.1f} s, {summary.tokens_per_second / 1e6:.1f} M tokens/s; "
        f"{summary.audited_documents:,} documents checked with the reference engine, all equal"
    )


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def _say_interrupted(output: Path, stop: _InterruptedError) -> NoReturn:
    from tokenmill import manifest as manifests

    manifest = manifests.load(output)
    done = f"{len(manifest.shards)} shards with {manifest.tokens:,} tokens are" if manifest else "nothing is"
    click.echo(f"tokenmill: stopped: {done} done in {output}; run the same command again to go on", err=True)
    sys.exit(stop.exit_code)


def _catch_signals() -> None:
    """The first Ctrl-C or SIGTERM ends the run cleanly, a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _InterruptedError(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _log_to(path: Path) -> None:
    from tokenmill import storage

    with storage.reported(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

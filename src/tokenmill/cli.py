"""Command line: translates arguments to a recipe and pipeline calls, prints; no logic.

Results go to standard output, progress and messages to standard error. Exit codes are those of
`errors.py`, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from tokenmill import layout
from tokenmill.crash import supervised
from tokenmill.engine import available_cores
from tokenmill.errors import TokenmillError
from tokenmill.options import OnBadRows, StoreOptions, parse_count
from tokenmill.recipe import Recipe, builtin_recipes, load_recipe
from tokenmill.redact import redacted

if TYPE_CHECKING:
    from tokenmill.engine import ClusterEngine
    from tokenmill.pipeline import Summary
    from tokenmill.preflight import Preflight
    from tokenmill.transfer import Report as TransferReport
    from tokenmill.transfer import Selection

log = logging.getLogger("tokenmill")
say = logging.getLogger("tokenmill.say")
"""What a user should see at once."""
log.addHandler(logging.NullHandler())  # until there is a data root to keep a log in

_READ_SOURCES = ("pretokenize", "test-shard", "verify", "demo")
"""Commands that hand files of others to native libraries."""

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --num_proc is --num-proc
    "max_content_width": 100,
}


class _InterruptedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: nothing that handles errors may take it for one."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with `arguments` (None: those of the process) and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a check mark must not fail a run on an ASCII terminal
    sys.excepthook = _show_bug
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words and words[0] in _READ_SOURCES:
            supervised()
        exit_code = cli.main(arguments, standalone_mode=False)
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
    except Exception as error:  # noqa: BLE001  # a bug of ours, which must not look like a finding
        _show_bug(type(error), error, error.__traceback__)
        sys.exit(70)
    sys.exit(exit_code)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback, without what may be a credential in it."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


class _Saying(logging.Handler):
    """Shows at once what a user should see, above the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"tokenmill: {redacted(record.getMessage())}", err=True)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="tokenmill")
def cli() -> None:
    """Turn text corpora into training data for language models.

    The same recipe gives the same bytes, whatever the workers, the engine or the crashes.
    """


class _Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
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


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """A flag for every field of the recipe, named as the field."""
    options = [
        click.option(
            "--recipe", metavar="NAME|FILE", help=f"Built-in ({', '.join(builtin_recipes())}) or a TOML file."
        ),
        click.option(
            "--dataset",
            multiple=True,
            metavar="PATH|URL",
            help="Corpus: a directory, a glob or a file (may be repeated); hf://datasets/OWNER/NAME[@REVISION][/PATH] "
            "or OWNER/NAME; s3://BUCKET/PREFIX; https:// files.",
        ),
        click.option("--tokenizer", metavar="PATH|NAME", help="A directory, a tokenizer.json, or a hub name."),
        click.option("--text-column", metavar="NAME", help="Column or JSON field that holds the documents.  [text]"),
        click.option(
            "--text-separator", metavar="STRING", help="Ends a document in plain text files.  [a file is a document]"
        ),
        click.option("--order", type=click.Choice(["buffer", "sequential"]), help="Order of documents.  [buffer]"),
        click.option("--seed", type=int, help="Of the shuffle.  [42]"),
        click.option("--buffer-size", type=_Count(), metavar="ROWS", help="Slots of the shuffle's reservoir.  [10000]"),
        click.option("--shard-size", type=_Count(), metavar="TOKENS", help="Tokens per shard.  [268435456]"),
        click.option(
            "--total-tokens", type=_Count(), metavar="TOKENS", help="Stop after this many.  [the whole corpus]"
        ),
        click.option("--dtype", type=click.Choice(["auto", "uint16", "uint32"]), help="Of a stored token.  [auto]"),
        click.option(
            "--special-in-text",
            type=click.Choice(["parse", "text"]),
            help="What '</s>' in a document becomes: the control token, or plain text.  [parse]",
        ),
        click.option("--eos-token", metavar="TOKEN", help="Ends every document.  [the tokenizer's]"),
        click.option("--seq-len", type=_Count(), metavar="TOKENS", help="Tokens per training sample.  [2048]"),
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
        help="Encode threads; 0 or less means 75% of the cores; a cluster has its own.  [all cores]",
    ),
    click.option("--chunk-size", "span_rows", type=_Count(1), metavar="ROWS", help="Rows encoded at once.  [by text]"),
    click.option(
        "--engine-tokenizer",
        type=click.Choice(["auto", "gigatoken", "hf"]),
        default="auto",
        show_default=True,
        help="auto is gigatoken where it takes the tokenizer, else HF tokenizers; the bytes are the same.",
    ),
]


_on_bad_rows = click.option(
    "--on-bad-rows",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Malformed JSON or UTF-8: stop there, or leave the row out, counted and listed in skipped.jsonl.",
)

_store_options = [
    click.option("--endpoint-url", metavar="URL", help="Of an S3 store other than AWS.  [AWS_ENDPOINT_URL]"),
    click.option("--anonymous", is_flag=True, help="Read public s3:// buckets without credentials."),
]

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
_data_root = click.argument("data_root", type=click.Path(path_type=Path, file_okay=False))
_id_scheme = click.option(
    "--id-scheme",
    type=click.Choice(layout.ID_SCHEMES),
    help="Of sample ids.  [templar-v1 for the published Templar data set, else blake2b-64]",
)


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
@click.option("--consolidated", is_flag=True, help="Write tokens.bin and sample_ids.bin at once, no shards.")
@_id_scheme
@_on_bad_rows
@_with(_store_options)
@click.option("--upload-to", metavar="URL", help="s3://BUCKET/PREFIX that gets each shard as it is finished.")
@click.option(
    "--keep-local",
    type=click.BOOL,
    default=True,
    metavar="yes|no",
    help="Whether shards stay here once they are in --upload-to.  [yes]",
)
@click.option(
    "--engine",
    type=click.Choice(["threads", "ray"]),
    default="threads",
    show_default=True,
    help="Where the work is done: here, or on a Ray cluster that is there already; the bytes are the same.",
)
@click.option(
    "--ray-address",
    metavar="auto|HOST:PORT|local",
    help="Of the cluster's head; local starts Ray on this machine alone.  [RAY_ADDRESS, or auto]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and what it needs; make nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@_json
def pretokenize(
    output: Path,
    recipe: str | None,
    *,
    workers: int | None,
    span_rows: int | None,
    engine_tokenizer: str,
    consolidated: bool,
    id_scheme: layout.IdScheme | None,
    on_bad_rows: OnBadRows,
    endpoint_url: str | None,
    anonymous: bool,
    upload_to: str | None,
    keep_local: bool,
    engine: str,
    ray_address: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **fields: object,
) -> None:
    """Tokenize a corpus into shards in the directory OUTPUT.

    The corpus is parquet, Arrow/Feather, JSON Lines or plain text (.gz and .zst too), local or remote.
    Run the same command again after a crash, a kill or Ctrl-C: it goes on from the last whole shard
    and the bytes are the same.

    \b
    Examples:
      tokenmill pretokenize data/ --dataset corpus/ --tokenizer llama2/
      tokenmill pretokenize data/ --recipe my.toml --total-tokens 1000000000 --dry-run
      tokenmill pretokenize /shared/data --dataset hf://datasets/OWNER/NAME --tokenizer llama2/ --engine ray
    """
    if ray_address is not None and engine != "ray":
        raise click.UsageError("--ray-address goes with --engine ray")
    resolved = load_recipe(recipe, _overrides(fields))
    shared: dict[str, Any] = {
        "workers": _cores(workers),
        "engine_tokenizer": engine_tokenizer,
        "consolidated": consolidated,
        "store": StoreOptions(endpoint_url, anonymous),
    }
    if dry_run:
        _dry_run(resolved, output, as_json, keep_local=keep_local, **shared)
        return
    with _cluster(engine, ray_address) as cluster:
        summary = run(
            resolved,
            output,
            span_rows=span_rows,
            id_scheme=id_scheme,
            on_bad_rows=on_bad_rows,
            upload_to=upload_to,
            keep_local=keep_local,
            engine=cluster,
            **shared,
            quiet=quiet,
            as_json=as_json,
        )
    if summary.proof is not None and not summary.proof.passed:
        raise click.exceptions.Exit(1)


@cli.command(short_help="Join shards into tokens.bin and sample_ids.bin.")
@_data_root
@click.option("--seq-len", type=_Count(1), metavar="TOKENS", help="Tokens per sample.  [the recipe's, or 2048]")
@click.option(
    "--token-dtype",
    type=click.Choice(["uint8", "uint16", "uint32"]),
    help="What the shards must hold.  [what they hold]",
)
@_id_scheme
@click.option("--consume", is_flag=True, help="Delete each shard once its bytes are durable in tokens.bin.")
@click.option("--skip-validation", is_flag=True, help="Compare with nothing; prove nothing.")
@click.option(
    "--published",
    type=click.Choice(["templar-150b"]),
    help="Shards without a manifest must be those of this published data set.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, and nothing printed unless it fails.")
@_json
def consolidate(
    data_root: Path,
    *,
    token_dtype: str | None,
    skip_validation: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Join the shards in DATA_ROOT into tokens.bin, with the ids of all samples in sample_ids.bin.

    Works on shards made by tokenmill and on downloaded ones. What the files must be is compared with
    the manifest and with published digests; exit code 1 if anything differs. Run the same command
    again after a crash or Ctrl-C: what is durable is not copied again.

    \b
    Examples:
      tokenmill consolidate data/
      tokenmill consolidate data/ --consume          # needs room for one shard, not for all
    """
    from tokenmill import report
    from tokenmill.consolidation import consolidate as join
    from tokenmill.progress import byte_display

    if data_root.is_dir():
        _log_to(data_root / layout.LOG)
        log.info("consolidate %s: %s", data_root, options)
    _catch_signals()
    try:
        with byte_display(quiet=quiet or as_json) as show:
            result = join(data_root, dtype=token_dtype, validate=not skip_validation, show=show, **options)
    except _InterruptedError as stop:
        _say_stopped("run the same command again to go on", stop)
    if as_json:
        click.echo(msgspec.json.encode(result))
    elif not (quiet and result.proof.passed):
        _echo(report.consolidation_lines(result, skipped=skip_validation))
    if not result.proof.passed:
        raise click.exceptions.Exit(1)


@cli.command("test-shard", short_help="Make only the first shard of a data set.")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@_recipe_options
@_with(_speed_options)
@_on_bad_rows
@_with(_store_options)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def test_shard(
    output: Path,
    recipe: str | None,
    *,
    workers: int | None,
    span_rows: int | None,
    engine_tokenizer: str,
    on_bad_rows: OnBadRows,
    endpoint_url: str | None,
    anonymous: bool,
    quiet: bool,
    **fields: object,
) -> None:
    """Make only the first shard of a data set, in the directory OUTPUT, to try things on.

    The shard is the one that `tokenmill pretokenize` with the same flags makes first, byte for byte.
    One that is there already is kept if it has at least 90% of the wanted tokens.
    """
    from tokenmill import report, single_shard

    wanted = single_shard.first_shard(load_recipe(recipe, _overrides(fields)))
    path = output / layout.shard_name(0)
    existing = single_shard.existing_tokens(output)
    if existing is not None:
        _tell(quiet, f"{path}: a shard of {existing:,} tokens is there already")
        if single_shard.is_sufficient(existing, wanted):
            _tell(quiet, f"that is at least 90% of the wanted {wanted.shard_size:,}: it is kept, nothing to do")
            return
        _tell(quiet, f"that is less than 90% of the wanted {wanted.shard_size:,}: it is made again")
    single_shard.make_way(output, wanted)
    run(
        wanted,
        output,
        workers=_cores(workers),
        span_rows=span_rows,
        engine_tokenizer=engine_tokenizer,
        on_bad_rows=on_bad_rows,
        store=StoreOptions(endpoint_url, anonymous),
        quiet=quiet,
    )
    if not quiet:
        _echo(report.statistics_lines(single_shard.shard_statistics(path)))


@cli.command(short_help="Prove that a data set is what its records say.")
@_data_root
@click.option("--quick", is_flag=True, help="Only sizes, headers and whether the manifest agrees with itself; instant.")
@click.option(
    "--deep",
    type=_Count(1),
    metavar="N",
    help="Also encode N documents of the source again, and rebuild one shard from it.",
)
@click.option(
    "--dataset", multiple=True, metavar="PATH", help="Where the corpus is now, for --deep.  [as the manifest says]"
)
@click.option("--tokenizer", metavar="PATH|NAME", help="Where the tokenizer is now, for --deep.  [likewise]")
@_with(_store_options)
@click.option("--num-proc", "workers", type=int, metavar="N", help="Threads; 0 or less means 75% of the cores.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and nothing printed unless something is wrong.")
@_json
def verify(
    data_root: Path,
    *,
    workers: int | None,
    endpoint_url: str | None,
    anonymous: bool,
    quiet: bool,
    as_json: bool,
    dataset: tuple[str, ...],
    **options: Any,
) -> None:
    """Prove that the data set in DATA_ROOT is what its records say; exit code 1 if anything is not.

    Reads every byte: digests, sample ids, token ids, documents, ledger. Writes nothing. With --deep it
    goes back to the source and the reference tokenizer engine.
    """
    from tokenmill import report
    from tokenmill.progress import byte_display
    from tokenmill.verification import verify as check

    if options["quick"] and options["deep"]:
        raise click.UsageError("--quick and --deep exclude each other")
    with byte_display(quiet=quiet or as_json) as show:
        store = StoreOptions(endpoint_url, anonymous)
        result = check(data_root, dataset=dataset or None, store=store, workers=_cores(workers), show=show, **options)
    if as_json:
        click.echo(msgspec.json.encode(result))
    elif not (quiet and result.passed):
        _echo(report.verification_lines(result))
    if not result.passed:
        raise click.exceptions.Exit(1)


_transfer_options = [
    click.option("--include", multiple=True, metavar="PATTERN", help="Only files whose path matches; may be repeated."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="No files whose path matches; may be repeated."),
    click.option("--shards", metavar="N[-M]", help="Only these shards and their documents, for example 0-3."),
    *_store_options,
    click.option("--dry-run", is_flag=True, help="Print what would be transferred; transfer nothing."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, and nothing printed unless it fails."),
]


@cli.command(short_help="Bring a data set from a bucket.")
@click.argument("source")
@_data_root
@_with(_transfer_options)
@_json
def download(source: str, data_root: Path, **options: Any) -> None:
    """Bring the data set at SOURCE (s3://BUCKET/PREFIX, file:// or a path) to the directory DATA_ROOT.

    Only what is missing or different travels; run the same command again after a crash or Ctrl-C: it goes
    on in the middle of a file. A file has its name only when it is whole and its digest is right.
    Credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.

    \b
    Examples:
      tokenmill download s3://bucket/data data/ --endpoint-url https://s3.example.org
      tokenmill download s3://bucket/data data/ --shards 0-3
    """
    from tokenmill.downloads import download as bring

    def move(selection: Selection, store: StoreOptions, **rest: Any) -> TransferReport:
        return bring(source, data_root, selection, store=store, **rest)

    _transfer(move, **options)


@cli.command(short_help="Send a data set to a bucket.")
@_data_root
@click.argument("target")
@_with(_transfer_options)
@_json
def upload(data_root: Path, target: str, **options: Any) -> None:
    """Send the data set in DATA_ROOT to TARGET (s3://BUCKET/PREFIX, file:// or a path), the manifest last.

    Only what is missing or different travels; run the same command again after a crash or Ctrl-C: parts
    that arrived are kept. Credentials come from the environment: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.

    \b
    Example:
      tokenmill upload data/ s3://bucket/data --endpoint-url https://s3.example.org
    """
    from tokenmill.uploads import upload as send

    def move(selection: Selection, store: StoreOptions, **rest: Any) -> TransferReport:
        return send(data_root, target, selection, store=store, **rest)

    _transfer(move, **options)


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
    from tokenmill import report
    from tokenmill.progress import byte_display
    from tokenmill.transfer import Selection, shard_range

    selection = Selection(include, exclude, None if shards is None else shard_range(shards))
    _catch_signals()
    try:
        with byte_display(quiet=quiet or as_json) as progress:
            result = move(selection, StoreOptions(endpoint_url, anonymous), dry_run=dry_run, show=progress)
    except _InterruptedError as stop:
        _say_stopped("run the same command again to go on", stop)
    if as_json:
        click.echo(msgspec.json.encode(result))
    elif not quiet:
        _echo(report.transfer_lines(result))


@cli.command()
@click.argument("data_root")
@_with(_store_options)
@_json
def info(data_root: str, *, endpoint_url: str | None, anonymous: bool, as_json: bool) -> None:
    """What the data set in DATA_ROOT, a directory or s3://BUCKET/PREFIX, is, and how it was made."""
    from tokenmill import look, report

    found = look.info(data_root, StoreOptions(endpoint_url, anonymous))
    _show(found, report.info_lines(found), as_json)


@cli.command(short_help="The text of a sample, and where it came from.")
@_data_root
@click.option("--sample", type=_Count(0), required=True, metavar="I", help="Which one, from 0.")
@click.option("--ids", "with_ids", is_flag=True, help="A line for every token: its place, its id, its text.")
@_json
def show(data_root: Path, *, sample: int, with_ids: bool, as_json: bool) -> None:
    """The text of a sample, with the bounds of tokens and documents, its id, and where it came from."""
    from tokenmill import look, report

    found = look.show(data_root, sample)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = report.token_lines(found) if with_ids else report.sample_lines(found, colour=colour)
    _show(found, lines, as_json)


@cli.command(short_help="Where a sample comes from, and back.")
@_data_root
@click.option("--sample", type=_Count(0), metavar="I", help="A sample, from 0.")
@click.option("--token", type=_Count(0), metavar="T", help="A token of the whole stream, from 0.")
@click.option("--sample-id", metavar="HEX", help="A sample by its id, as 16 hexadecimal digits.")
@click.option("--source", metavar="FILE", help="A source file, as the manifest lists it; with --row.")
@click.option("--row", type=_Count(0), metavar="R", help="A row of it, from 0.")
@_json
def where(
    data_root: Path,
    *,
    sample: int | None,
    token: int | None,
    sample_id: str | None,
    source: str | None,
    row: int | None,
    as_json: bool,
) -> None:
    """Where a sample or a token comes from; or which samples hold a row of the source.

    \b
    Examples:
      tokenmill where data/ --sample 17
      tokenmill where data/ --source part-00003.parquet --row 12
    """
    from tokenmill import look, report

    given = [option is not None for option in (sample, token, sample_id, source)]
    if sum(given) != 1 or (source is None) != (row is None):
        raise click.UsageError("give one of --sample, --token, --sample-id, or --source with --row")
    if source is not None and row is not None:
        samples = look.where_row(data_root, source, row)
        _show(samples, report.samples_lines(samples), as_json)
        return
    if sample is not None:
        places = [look.where_sample(data_root, sample)]
    elif token is not None:
        places = [look.where_token(data_root, token)]
    else:
        places = look.where_sample_id(data_root, str(sample_id))
    _show(places, [line for place in places for line in report.place_lines(place)], as_json)


@cli.command(short_help="Check what ranks say they trained on.")
@_data_root
@click.argument("receipt", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@_json
def receipts(data_root: Path, receipt: tuple[Path, ...], *, as_json: bool) -> None:
    """Check each RECEIPT, which a trainer saved, against the data set in DATA_ROOT; exit code 1 if one is wrong.

    A receipt says which sampler a rank followed, and the SHA-256 of the ids it consumed, in order. Both
    are made again from the data set; no trainer and no model are needed.

    \b
    Example:
      tokenmill receipts data/ checkpoints/receipt-rank*.json
    """
    from tokenmill import report
    from tokenmill.receipts import check_receipt, load_receipt

    checks = {str(path): check_receipt(data_root, load_receipt(path)) for path in receipt}
    _show(checks, report.receipt_lines(checks), as_json)
    if not all(check.passed for each in checks.values() for check in each):
        raise click.exceptions.Exit(1)


@cli.command(short_help="Lengths, frequencies, duplicate samples.")
@_data_root
@_json
def stats(data_root: Path, *, as_json: bool) -> None:
    """Lengths of documents, frequencies of tokens, tokens per source file, samples that occur twice."""
    from tokenmill import look, report
    from tokenmill.progress import byte_display

    with byte_display(quiet=as_json) as progress:
        found = look.stats(data_root, show=progress)
    _show(found, report.stats_lines(found), as_json)


def _show(found: object, lines: Iterable[str], as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        _echo(lines)


def _tell(quiet: bool, line: str) -> None:
    if not quiet:
        click.echo(line)


@cli.command(short_help="Pretokenize Python's own standard library.")
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
    click.echo(f"\nThe data is in {root}; it begins:\n")
    click.echo("\n".join(f"    {line}" for line in excerpt(root).splitlines()))
    click.echo(
        "\nNext, your own text (a directory of parquet files with a column 'text'):\n"
        f"    {_program()} pretokenize data/ --dataset corpus/ --tokenizer {TOKENIZER} --dry-run"
    )


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _program() -> str:
    """How to call this program again: by its path if it was called so."""
    return sys.argv[0] if Path(sys.argv[0]).name == "tokenmill" else "tokenmill"


def _overrides(fields: dict[str, object]) -> dict[str, object]:
    """The recipe fields that were given as flags."""
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if isinstance(dataset := given.get("dataset"), tuple) and len(dataset) == 1:
        given["dataset"] = dataset[0]
    return given


@contextmanager
def _cluster(engine: str, address: str | None) -> Iterator[ClusterEngine | None]:
    """The cluster that is asked for, as long as it is needed; None for threads."""
    if engine == "threads":
        yield None
        return
    from tokenmill.ray import RayEngine

    with RayEngine(address) as cluster:
        yield cluster


def _cores(workers: int | None) -> int:
    if workers is None:
        return available_cores()
    return workers if workers > 0 else max(1, available_cores() * 3 // 4)


def run(recipe: Recipe, output: Path, *, quiet: bool = False, as_json: bool = False, **options: Any) -> Summary:
    """Pretokenize with progress, a log file, a summary, and a clean end on Ctrl-C."""
    from tokenmill import pipeline, report, storage
    from tokenmill.allocator import keep_freed_memory
    from tokenmill.locations import without_secrets
    from tokenmill.progress import display

    keep_freed_memory()
    if not quiet:
        say.addHandler(_Saying())
    storage.make_root(output)
    _log_to(output / layout.LOG)
    shown_recipe = msgspec.structs.replace(recipe, dataset=without_secrets(recipe.dataset))
    log.info("pretokenize %s: %s", output, msgspec.json.encode(shown_recipe).decode())
    _catch_signals()
    said: set[str] = set()
    try:
        with display(quiet=quiet or as_json) as shown:

            def begin(plan: Preflight) -> None:
                shown.expect(plan.tokens)
                said.update(plan.notes)
                for note in plan.notes:
                    say.warning("note: %s", note)

            summary = pipeline.pretokenize(recipe, output, show=shown.show, begin=begin, **options)
    except _InterruptedError as stop:
        _say_interrupted(output, stop)
    log.info("%s", msgspec.json.encode(summary).decode())
    if as_json:
        click.echo(msgspec.json.encode(summary))
    elif not quiet or (summary.proof is not None and not summary.proof.passed):
        _echo(report.summary_lines(summary, said))
    return summary


def _dry_run(recipe: Recipe, output: Path, as_json: bool, *, workers: int, keep_local: bool, **options: Any) -> None:
    from tokenmill import pipeline, preflight, report

    prepared, figures = pipeline.plan(recipe, output, workers=workers, **options)
    if as_json:
        click.echo(msgspec.json.encode({"recipe": prepared.recipe, "preflight": figures}))
    else:
        _echo(report.plan_lines(prepared, figures, output, workers))
    preflight.check_disk(figures, output, shards_at_once=None if keep_local else pipeline.SHARDS_PASSING)


def _say_interrupted(output: Path, stop: _InterruptedError) -> NoReturn:
    from tokenmill import manifest as manifests

    manifest = manifests.load(output)
    done = f"{len(manifest.shards)} shards with {manifest.tokens:,} tokens are" if manifest else "nothing is"
    _say_stopped(f"{done} done in {output}; run the same command again to go on", stop)


def _say_stopped(what: str, stop: _InterruptedError) -> NoReturn:
    log.info("interrupted")
    click.echo(f"tokenmill: stopped: {what}", err=True)
    sys.exit(stop.exit_code)


def _catch_signals() -> None:
    """The first Ctrl-C or SIGTERM ends the run cleanly, a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _InterruptedError(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


class _Redacting(logging.Formatter):
    """Lines without what may be a credential."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _LogFile(logging.FileHandler):
    """The log, which is best effort: where it cannot be written, that is said once and the run goes on."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exc_info()[1]
        if not self._has_failed:
            self._has_failed = True
            click.echo(
                f"tokenmill: {self.baseFilename}: the log cannot be written: {error}; it is incomplete", err=True
            )


def _log_to(path: Path) -> None:
    from tokenmill import storage

    with storage.reported(path):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Redacting("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

"""Commands that make data: pretokenize, consolidate, test-shard, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenmill.cli.console import (
    GRACE_SECONDS,
    RAY_GRACE_SECONDS,
    RESUME,
    InterruptedByUserError,
    catch_signals,
    echo_lines,
    exit_interrupted,
    log,
    log_to,
    print_result,
    program_name,
    say,
    show_messages,
)
from tokenmill.cli.options import (
    Count,
    bad_rows_option,
    combine,
    data_root_argument,
    engine_options,
    id_scheme_option,
    json_option,
    max_document_size_option,
    open_cluster,
    output_argument,
    recipe_fields,
    recipe_options,
    speed_options,
    store_options,
    worker_count,
    workers_option,
)
from tokenmill.options import OnBadRows, StoreOptions

if TYPE_CHECKING:
    from tokenmill.dataroot.layout import IdScheme
    from tokenmill.pipeline.preflight import Preflight
    from tokenmill.pipeline.summary import Summary
    from tokenmill.recipe import Recipe


@click.command(short_help="Tokenize a corpus into shards (alias: tokenize).")
@output_argument
@recipe_options
@speed_options
@click.option("--consolidated", is_flag=True, help="Write tokens.bin and sample_ids.bin at once, and no shard files.")
@id_scheme_option
@bad_rows_option
@max_document_size_option
@combine(store_options)
@click.option(
    "--upload-to", metavar="URL", help="s3://BUCKET/PREFIX that gets each shard as it is finished, the manifest last."
)
@click.option(
    "--keep-local",
    type=click.BOOL,
    default=True,
    metavar="yes|no",
    help="Whether shards stay in OUTPUT once they are in the bucket of --upload-to.  [default: yes]",
)
@engine_options
@click.option(
    "--only-new",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DATA_ROOT",
    help="Leave out the files of the corpus that this earlier data root was made from; may be given several times. A "
    "view joins both (docs/views.md).",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and what it needs, and make nothing.")
@click.option(
    "--metrics",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what the progress line shows to FILE as JSON Lines, a line each second (docs/format.md).",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
@json_option
def pretokenize(
    output: Path,
    recipe: str | None,
    *,
    workers: int | None,
    span_rows: int | None,
    tokenizer_backend: str,
    consolidated: bool,
    id_scheme: IdScheme | None,
    on_bad_rows: OnBadRows,
    max_document_nbytes: int,
    endpoint_url: str | None,
    anonymous: bool,
    upload_to: str | None,
    keep_local: bool,
    engine: str,
    ray_address: str | None,
    only_new: tuple[Path, ...],
    dry_run: bool,
    metrics: Path | None,
    quiet: bool,
    as_json: bool,
    **fields: object,
) -> None:
    """Tokenize a corpus into shards in the directory OUTPUT.

    The corpus is parquet, Arrow/Feather, JSON Lines or plain text (.gz and .zst too), local or remote.
    After a crash, a kill or Ctrl-C, run the same command again: it resumes after the last whole shard,
    and the bytes are the same.

    \b
    Examples:
      tokenmill pretokenize data/ --dataset corpus/ --tokenizer llama2/
      tokenmill pretokenize data/ --recipe my.toml --total-tokens 1e9 --dry-run
      tokenmill pretokenize /shared/data --dataset hf://datasets/OWNER/NAME --tokenizer llama2/ --engine ray
    """
    from tokenmill.recipe import load_recipe

    resolved = load_recipe(recipe, recipe_fields(fields))
    shared: dict[str, Any] = {
        "workers": worker_count(workers),
        "tokenizer_backend": tokenizer_backend,
        "consolidated": consolidated,
        "store": StoreOptions(endpoint_url, anonymous, max_document_nbytes=max_document_nbytes),
        "only_new": only_new,
    }
    if dry_run:
        _print_plan(resolved, output, as_json, keep_local=keep_local, **shared)
        return
    with open_cluster(engine, ray_address) as cluster:
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
            metrics=metrics,
            quiet=quiet,
            as_json=as_json,
        )
    if summary.proof is not None and not summary.proof.passed:
        raise click.exceptions.Exit(1)


@click.command(short_help="Join shards into tokens.bin and sample_ids.bin (alias: merge).")
@data_root_argument
@click.option(
    "--seq-len", type=Count(1), metavar="TOKENS", help="Tokens per training sample.  [default: the recipe's, or 2048]"
)
@click.option(
    "--token-dtype",
    type=click.Choice(["uint8", "uint16", "uint32"]),
    help="Data type that the shards must hold.  [default: the one they hold]",
)
@id_scheme_option
@click.option("--consume", is_flag=True, help="Delete each shard once its bytes are durable in tokens.bin.")
@click.option("--skip-validation", is_flag=True, help="Compare with nothing, and prove nothing.")
@click.option(
    "--published",
    type=click.Choice(["templar-150b"]),
    help="Require that shards without a manifest are those of this published data set.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")
@json_option
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

    Works on shards that tokenmill made and on downloaded ones. The files are compared with the manifest
    and with published digests; the exit code is 1 if anything differs. After a crash or Ctrl-C, run the
    same command again: what is durable is not copied again.

    \b
    Examples:
      tokenmill consolidate data/
      tokenmill consolidate data/ --consume          # needs room for one shard, not for all
    """
    from tokenmill.cli import wording
    from tokenmill.progress import byte_display
    from tokenmill.shards.consolidate import consolidate as join

    if data_root.is_dir():
        log_to(data_root)
        log.info("consolidate %s: %s", data_root, options)
    catch_signals()
    try:
        with byte_display(quiet=quiet or as_json) as on_progress:
            result = join(
                data_root, dtype=token_dtype, validate=not skip_validation, on_progress=on_progress, **options
            )
    except InterruptedByUserError as stop:
        exit_interrupted(RESUME, stop)
    if as_json or not (quiet and result.proof.passed):
        print_result(result, wording.consolidation_lines(result, skipped=skip_validation), as_json=as_json)
    if not result.proof.passed:
        raise click.exceptions.Exit(1)


@click.command("test-shard", short_help="Make only the first shard of a data set.")
@output_argument
@recipe_options
@speed_options
@bad_rows_option
@max_document_size_option
@combine(store_options)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
def test_shard(
    output: Path,
    recipe: str | None,
    *,
    workers: int | None,
    span_rows: int | None,
    tokenizer_backend: str,
    on_bad_rows: OnBadRows,
    max_document_nbytes: int,
    endpoint_url: str | None,
    anonymous: bool,
    quiet: bool,
    **fields: object,
) -> None:
    """Make only the first shard of a data set, in the directory OUTPUT, to try things on.

    The shard is the one that `tokenmill pretokenize` with the same options makes first, byte for byte.
    An existing shard is kept if it has at least 90% of the wanted tokens.
    """
    from tokenmill.cli import first_shard, wording
    from tokenmill.dataroot import layout
    from tokenmill.recipe import load_recipe

    wanted = first_shard.first_shard(load_recipe(recipe, recipe_fields(fields)))
    path = output / layout.shard_name(0)
    existing = first_shard.existing_tokens(output)
    if existing is not None:
        is_kept = first_shard.is_sufficient(existing, wanted)
        share = "at least 90%" if is_kept else "less than 90%"
        end = "it is kept, nothing to do" if is_kept else "it is made again"
        if not quiet:
            click.echo(f"{path}: a shard of {existing:,} tokens is there already")
            click.echo(f"it has {share} of the wanted {wanted.shard_size:,} tokens: {end}")
        if is_kept:
            return
    first_shard.make_way(output, wanted)
    run(
        wanted,
        output,
        workers=worker_count(workers),
        span_rows=span_rows,
        tokenizer_backend=tokenizer_backend,
        on_bad_rows=on_bad_rows,
        store=StoreOptions(endpoint_url, anonymous, max_document_nbytes=max_document_nbytes),
        quiet=quiet,
    )
    if not quiet:
        echo_lines(wording.statistics_lines(first_shard.shard_statistics(path)))


@click.command(short_help="Pretokenize Python's own standard library.")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@workers_option
def demo(output: Path, workers: int | None) -> None:
    """Pretokenize Python's own standard library into the directory OUTPUT (default: demo), offline.

    Uses a small tokenizer that comes with tokenmill, writes several shards, and shows what is in them.
    """
    from tokenmill.cli.demo import TOKENIZER, demo_recipe, excerpt, write_corpus

    corpus, root = output / "corpus", output / "tokens"
    if not corpus.is_dir():
        click.echo(f"writing Python's standard library to {corpus} as parquet")
        write_corpus(corpus)
    run(demo_recipe(corpus), root, workers=worker_count(workers))
    click.echo(f"\nThe data is in {root}; it begins:\n")
    click.echo("\n".join(f"    {line}" for line in excerpt(root).splitlines()))
    click.echo(
        "\nNext, your own text (a directory of parquet files with a column 'text'):\n"
        f"    {program_name()} pretokenize data/ --dataset corpus/ --tokenizer {TOKENIZER} --dry-run"
    )


def run(
    recipe: Recipe,
    output: Path,
    *,
    quiet: bool = False,
    as_json: bool = False,
    metrics: Path | None = None,
    **options: Any,
) -> Summary:
    """Pretokenize with progress, a log file, a summary, and a clean end on Ctrl-C."""
    import msgspec

    from tokenmill.cli import wording
    from tokenmill.corpus.location import without_secrets
    from tokenmill.dataroot import atomic
    from tokenmill.pipeline.allocator import keep_freed_memory
    from tokenmill.pipeline.pretokenize import pretokenize
    from tokenmill.progress import PROGRESS, ProgressRow, run_display

    keep_freed_memory()
    if not quiet:
        show_messages()
    atomic.make_root(output)
    if not _is_corpus(output, recipe):
        log_to(output)
    shown_recipe = msgspec.structs.replace(recipe, dataset=without_secrets(recipe.dataset))
    log.info("pretokenize %s: %s", output, msgspec.json.encode(shown_recipe).decode())
    catch_signals(lambda: _describe_done(output), RAY_GRACE_SECONDS if options.get("engine") else GRACE_SECONDS)
    said: set[str] = set()

    def log_row(row: ProgressRow) -> None:
        log.info("%s%s", PROGRESS, msgspec.json.encode(row).decode())

    try:
        with run_display(quiet=quiet or as_json, metrics=metrics, log=log_row) as shown:

            def on_plan(plan: Preflight) -> None:
                shown.expect(plan.tokens)
                said.update(plan.notes)
                for note in plan.notes:
                    say.warning("note: %s", note)

            summary = pretokenize(recipe, output, on_progress=shown.show, on_plan=on_plan, **options)
    except InterruptedByUserError as stop:
        exit_interrupted(_describe_done(output), stop)
    log.info("%s", msgspec.json.encode(summary).decode())
    if as_json or not quiet or (summary.proof is not None and not summary.proof.passed):
        print_result(summary, wording.summary_lines(summary, said), as_json=as_json)
    return summary


def _is_corpus(output: Path, recipe: Recipe) -> bool:
    """Return whether a run would write into its own corpus, which is refused; a log would become a part of it."""
    datasets = [recipe.dataset] if isinstance(recipe.dataset, str) else recipe.dataset
    return any("://" not in dataset and Path(dataset).resolve() == output.resolve() for dataset in datasets)


def _print_plan(recipe: Recipe, output: Path, as_json: bool, *, workers: int, keep_local: bool, **options: Any) -> None:
    from tokenmill.cli import wording
    from tokenmill.pipeline.preflight import SHARDS_PASSING, check_disk
    from tokenmill.pipeline.pretokenize import plan

    inputs, figures = plan(recipe, output, workers=workers, **options)
    found = {"recipe": inputs.recipe, "preflight": figures}
    print_result(found, wording.plan_lines(inputs, figures, output, workers), as_json=as_json)
    check_disk(figures, output, shards_at_once=None if keep_local else SHARDS_PASSING)


def _describe_done(output: Path) -> str:
    """Describe what an interrupted run leaves, and how to continue."""
    from tokenmill.dataroot import manifest as manifests

    manifest = manifests.load(output)
    done = f"{len(manifest.shards)} shards with {manifest.tokens:,} tokens are" if manifest else "nothing is"
    return f"{done} done in {output}; {RESUME}"

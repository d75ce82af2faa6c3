"""Commands of views: plan, build, write, prove-disjoint."""

from __future__ import annotations

from pathlib import Path

import click

from tokenmill.cli.console import RESUME, end_on_signals, log_to, print_result
from tokenmill.cli.options import (
    Count,
    engine_options,
    json_option,
    open_cluster,
    output_argument,
    worker_count,
    workers_option,
)


@click.group(short_help="Shuffle, split, select and grow data sets without tokenizing again.")
def view() -> None:
    """Choose and order documents of finished data sets: an index, while their tokens stay where they are.

    A view is described by a TOML file (docs/views.md). Once it is built, `TokenDataset`, info, show, where, stats and
    verify read it as they read a data root.

    \b
    Example:
      tokenmill view plan pretrain.toml
      tokenmill view build pretrain.toml train/
    """


_spec_argument = click.argument("spec", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.toml")
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")


@view.command(short_help="Say what a view would be.")
@_spec_argument
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@json_option
def plan(spec: Path, *, quiet: bool, as_json: bool) -> None:
    """Say what the view that FILE.toml describes would be, and store nothing.

    That is documents, tokens, samples, and what is left out and why; for a mixture what each stage takes of each
    source, and how often; and for both ways of packing and several lengths how much is padding, and how many documents
    are cut.
    """
    import msgspec

    from tokenmill.cli import wording
    from tokenmill.progress import count_display
    from tokenmill.views.build import plan_view
    from tokenmill.views.spec import load_spec

    with (
        end_on_signals(lambda: "nothing was written"),
        count_display("documents", quiet=quiet or as_json) as on_progress,
    ):
        built = plan_view(load_spec(spec), compare_packings=True, on_progress=on_progress)
    lines = wording.view_lines(built.record, built.duplicates)
    found = msgspec.to_builtins(built.record) | {"packings": built.packings}
    print_result(found, [*lines, *wording.packing_lines(built.record, built.packings)], as_json=as_json)


@view.command(short_help="Store a view in a directory.")
@_spec_argument
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="VIEW")
@_quiet_option
@json_option
def build(spec: Path, folder: Path, *, quiet: bool, as_json: bool) -> None:
    """Store the view that FILE.toml describes in the directory VIEW: an index of 16 bytes a document, and view.json.

    The data sets that it is made from must stay where they are; their digests are kept, and are compared when the view
    is opened. A view that is there already is not replaced by another.
    """
    from tokenmill.cli import wording
    from tokenmill.progress import count_display
    from tokenmill.views.build import build_view
    from tokenmill.views.spec import load_spec

    with (
        end_on_signals(lambda: "no view was stored"),
        count_display("documents", quiet=quiet or as_json) as on_progress,
    ):
        built, was_there = build_view(load_spec(spec), folder, on_progress=on_progress)
    last = f"{folder}: was built already" if was_there else f"\u2705 {folder}: built"
    lines = [*wording.view_lines(built.record, built.duplicates), last]
    if as_json or not quiet:
        print_result(built.record, lines, as_json=as_json)


@view.command(short_help="Make a data set of its own of a view.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="VIEW")
@output_argument
@click.option("--shard-size", type=Count(1), metavar="TOKENS", help="Tokens per shard.  [default: the first source's]")
@workers_option
@engine_options
@_quiet_option
@json_option
def write(
    folder: Path,
    output: Path,
    *,
    shard_size: int | None,
    workers: int | None,
    engine: str,
    ray_address: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy the documents of VIEW, in its order, into shards in the directory OUTPUT: a data set of its own.

    What the view leaves out is not in it; its sidecars say where each document comes from originally. If the sources
    do not fit in memory, documents pass through files in OUTPUT, which take as much room as the shards once more. After
    a crash, a kill or Ctrl-C, run the same command again: it resumes, and the bytes are the same.
    """
    from tokenmill.cli import wording
    from tokenmill.dataroot import atomic
    from tokenmill.progress import count_display
    from tokenmill.views.write import write_view

    atomic.make_root(output)
    log_to(output)
    with (
        open_cluster(engine, ray_address) as cluster,
        end_on_signals(lambda: f"whole shards are kept in {output}; {RESUME}"),
        count_display("tokens", quiet=quiet or as_json) as on_progress,
    ):
        found = write_view(
            folder,
            output,
            shard_size=shard_size,
            workers=worker_count(workers),
            engine=cluster,
            on_progress=on_progress,
        )
    if as_json or not quiet:
        print_result(found, wording.written_lines(found), as_json=as_json)


@view.command("prove-disjoint", short_help="Prove that two views share no document.")
@click.argument("first", type=click.Path(path_type=Path, file_okay=False), metavar="VIEW")
@click.argument("second", type=click.Path(path_type=Path, file_okay=False), metavar="OTHER_VIEW")
@json_option
def prove_disjoint(first: Path, second: Path, *, as_json: bool) -> None:
    """Prove that two views share no document, by the hashes of their texts. The exit code is 1 if they do."""
    from tokenmill.cli import wording
    from tokenmill.views.disjoint import prove_disjoint as compare

    found = compare(first, second)
    print_result(found, wording.disjointness_lines(found), as_json=as_json)
    if not found.passed:
        raise click.exceptions.Exit(1)

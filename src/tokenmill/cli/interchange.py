"""Commands of interchange: export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokenmill.cli.console import RESUME, end_on_signals, log_to, print_result
from tokenmill.cli.options import Count, json_option

FORMATS = ("megatron", "nanogpt", "llmc", "olmo", "datatrove", "mds", "litdata", "parquet", "torchtitan")


@click.command(short_help="Write a data set in the format of a trainer.")
@click.argument("data_root", type=click.Path(path_type=Path, file_okay=False), metavar="DATA_ROOT|VIEW")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), metavar="OUT")
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Format of the files.")
@click.option(
    "--split",
    "validation",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="VIEW",
    help="View or data set that becomes the validation set (val), beside the first, which is train.",
)
@click.option("--copy", is_flag=True, help="Copy tokens.bin where it could be linked.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be written and what stands against it, and write nothing."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")
@json_option
def export(
    data_root: Path,
    out: Path,
    *,
    to: str,
    validation: Path | None,
    copy: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a finished data set, or a view, into the directory OUT as a trainer reads it (docs/trainers.md).

    Where the bytes are those of tokens.bin, the file is a hard link to it. What is written is read again, and
    OUT/export.json says what it is. After a crash, a kill or Ctrl-C, run the same command again: what is
    finished is kept.

    \b
    Examples:
      tokenmill export data/ megatron/ --to megatron
      tokenmill export train/ gpt/ --to nanogpt --split validation/     # two views
    """
    from tokenmill.cli import wording
    from tokenmill.interchange.export import export as write
    from tokenmill.interchange.export import plan_export
    from tokenmill.progress import byte_display

    if dry_run:
        found = plan_export(data_root, out, to, validation=validation)
    else:
        with (
            end_on_signals(lambda: f"finished files are kept in {out}; {RESUME}"),
            byte_display(quiet=quiet or as_json) as on_progress,
        ):
            found = write(data_root, out, to, validation=validation, copy=copy, on_progress=on_progress)
    if as_json or not quiet:
        print_result(found, wording.export_lines(found), as_json=as_json)


@click.command("import", short_help="Make a data set of what others tokenized.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("data_root", type=click.Path(path_type=Path, file_okay=False), metavar="DATA_ROOT")
@click.option(
    "--from",
    "kind",
    required=True,
    type=click.Choice([*FORMATS, "raw"]),
    help="Format of the files; raw is .bin or .npy that are nothing but tokens.",
)
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True, help="Files to take.")
@click.option(
    "--tokenizer",
    metavar="PATH|NAME",
    help="Tokenizer that made the tokens.  [default: as export.json says, where tokenmill made the files]",
)
@click.option("--eos-id", type=int, metavar="ID", help="Id that ends a document.  [default: the tokenizer's own]")
@click.option("--dtype", type=click.Choice(["uint16", "uint32"]), help="Type of a token, of files that do not say it.")
@click.option("--seq-len", type=Count(1), default=2048, show_default=True, metavar="TOKENS", help="Tokens per sample.")
@click.option(
    "--shard-size", type=Count(1), default=1 << 28, metavar="TOKENS", help="Tokens per shard.  [default: 268435456]"
)
@click.option("--append-eos", is_flag=True, help="Give documents an end token that have none; else they are refused.")
@click.option("--copy", is_flag=True, help="Copy the tokens where tokens.bin could be a link to the file.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless the command fails.")
@json_option
def import_(source: Path, data_root: Path, *, kind: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Make a data set in the directory DATA_ROOT of files that a trainer reads, such as those of a Megatron prefix.

    Documents keep their bounds; where the format has none they are taken to end where their end token is, which is a
    guess. Afterwards verify, views, consolidate, TokenDataset, export and upload work on it. Where the format keeps all
    tokens in one file and nothing else in it, tokens.bin becomes a hard link to that file, if both are on one disk;
    otherwise tokens are copied into shards. After a crash, a kill or Ctrl-C, run the same command again.

    \b
    Examples:
      tokenmill import corpus_text_document data/ --from megatron --tokenizer llama2/
      tokenmill import fineweb10B/ data/ --from llmc --eos-id 50256
    """
    from tokenmill.cli import wording
    from tokenmill.dataroot import atomic
    from tokenmill.interchange.importing import import_data
    from tokenmill.progress import count_display

    atomic.make_root(data_root)
    log_to(data_root)
    with (
        end_on_signals(lambda: f"whole shards are kept in {data_root}; {RESUME}"),
        count_display("tokens", quiet=quiet or as_json) as on_progress,
    ):
        found = import_data(source, data_root, kind, **options, on_progress=on_progress)
    if as_json or not quiet:
        print_result(found, wording.import_lines(found), as_json=as_json)

"""Bad input and bad disks: each stops with its exit code and says what, where, expected, found, next."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import run_cli, write_parquet
from support.runs import every_digest
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.progress import TOKENIZING, Progress
from tokenmill.recipe import Recipe
from tokenmill.shards import shard


def fails(*arguments: object, code: int, message: str) -> None:
    """The command exits with `code`, one error, a next step, and no traceback."""
    result = run_cli("pretokenize", *arguments)
    assert result.returncode == code, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "\n  next: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n  next: ") == 1
    assert result.stdout == ""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def given(corpus: Path | str, *more: object) -> tuple[object, ...]:
    return ("--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 2000, *more)


def test_truncated_parquet(out: Path, corpus: Path) -> None:
    path = corpus / "a.parquet"
    os.truncate(path, path.stat().st_size // 2)
    fails(out, *given(corpus), code=3, message=r"a\.parquet: not a readable parquet file")


def test_corrupt_row_group_is_named(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "a.parquet"
    path.parent.mkdir()
    texts = [os.urandom(800).hex() for _ in range(6000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=2000, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(group.data_page_offset + group.total_compressed_size // 2)
        file.write(b"\xff" * 4096)
    fails(out, *given(tmp_path / "corpus"), code=3, message=r"a\.parquet: row group 1: cannot be read")


def test_flipped_bit_in_a_page_with_a_checksum(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "a.parquet"
    path.parent.mkdir()
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": ["a" * 100] * 300}), path, row_group_size=100, **options)
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    with path.open("r+b") as file:
        file.seek(group.data_page_offset + group.total_compressed_size // 2)
        file.write(b"b")
    fails(out, *given(tmp_path / "corpus"), code=3, message=r"a\.parquet: row group 2: cannot be read: .*checksum")


def test_missing_column_lists_those_there_are(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["x"], url=["u"])
    message = r"a\.parquet: no column 'body': found the columns text, url"
    fails(out, *given(tmp_path / "c", "--text-column", "body"), code=3, message=message)


def test_column_that_is_not_text(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["x"], number=[1])
    message = r"a\.parquet: column 'number': expected strings, found int64"
    fails(out, *given(tmp_path / "c", "--text-column", "number"), code=3, message=message)


def test_empty_directory_and_missing_paths(out: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    fails(out, *given(tmp_path / "c"), code=3, message="no file of a known format in it")
    fails(out, *given(tmp_path / "nowhere"), code=3, message="no such file or directory")
    fails(out, *given(f"{tmp_path}/c/*.parquet"), code=3, message="no file matches it")
    fails(out, *given("owner/data-set"), code=3, message=r"data set owner/data-set: HF_HUB_OFFLINE is set")


def test_corpus_without_rows(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", pa.array([], pa.string()))
    fails(out, *given(tmp_path / "c"), code=3, message="1 files with no rows at all")


def test_corpus_without_text(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", pa.array([None, "", None], pa.string()))
    fails(out, *given(tmp_path / "c"), code=3, message="3 rows and none has text")


def test_invalid_utf8_in_a_binary_column(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", pa.array([b"fine"] * 20 + [b"\xc3("], pa.binary()))
    fails(out, *given(tmp_path / "c"), code=3, message=r"a\.parquet: row 20: the text is not valid UTF-8")


def test_nul_bytes_and_binary_text_are_fine(out: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", pa.array([b"a\x00b", "naïve".encode()], pa.binary()))
    assert run_cli("pretokenize", out, *given(tmp_path / "c")).returncode == 0


@pytest.mark.timeout(600)
def test_a_document_of_200_megabytes(out: Path, tmp_path: Path) -> None:
    line = "All work and no play makes a very long document. "
    giant = line * (200_000_000 // len(line))
    write_parquet(tmp_path / "c" / "a.parquet", ["before", giant, "after"])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), order="sequential", shard_size=1 << 24)
    summary = pretokenize(recipe, out)
    assert summary.documents == 3
    assert summary.shards == -(-summary.tokens // (1 << 24)) > 1
    last = np.load(out / f"train_{summary.shards - 1:06d}.npy")
    row = pq.read_table(out / f"documents_{summary.shards - 1:06d}.parquet").to_pylist()[-1]
    assert (row["row"], row["start"] + row["tokens"]) == (2, summary.tokens)
    assert last[-1] == 2


def test_source_that_vanishes_between_files(out: Path, corpus: Path) -> None:
    """Planned, partly read, then gone."""
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), shard_size=2000, buffer_size=10)
    vanishing = corpus / "sub" / "c.parquet"

    def vanish(progress: Progress) -> None:
        if progress.phase == TOKENIZING:
            vanishing.unlink(missing_ok=True)

    with pytest.raises(errors.SourceError, match=r"c\.parquet: .*the file is gone") as caught:
        pretokenize(recipe, out, span_rows=3, workers=1, on_progress=vanish)
    assert caught.value.exit_code == 3


def test_output_inside_the_corpus(tmp_path: Path, corpus: Path) -> None:
    for output in (corpus, corpus / "deeper" / "out"):
        for more in ((), ("--dry-run",)):
            fails(output, *given(corpus, *more), code=5, message="lies inside the corpus")
    fails(corpus, *given(f"{corpus}/*.parquet"), code=5, message="lies inside the corpus")
    assert run_cli("pretokenize", tmp_path / "out", *given(corpus)).returncode == 0


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname != "Linux", reason="other systems take no such name")
def test_paths_that_are_not_utf8(out: Path, corpus: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/c\xff")
    Path(odd).symlink_to(corpus)
    fails(out, "--tokenizer", TOKENIZER, "--dataset", odd, code=2, message=r"dataset: .*c\\xff is not UTF-8")
    fails(out, "--tokenizer", odd, "--dataset", corpus, code=2, message=r"tokenizer: .*c\\xff is not UTF-8")


def test_recipe_mistakes(out: Path, corpus: Path, tmp_path: Path) -> None:
    fails(out, *given(corpus), "--recipe", "nonesuch", code=2, message="neither a built-in recipe nor a file")
    fails(out, "--tokenizer", TOKENIZER, code=2, message="no recipe is given: dataset is missing")
    fails(out, *given(corpus, "--shard-size", 0), code=2, message=r"`int` >= 1 - at `\$\.shard_size`")
    recipe = tmp_path / "r.toml"
    for text, message in (("sed = 1", "unknown field `sed`"), ("seed = [", "not TOML"), ('seed = "x"', r"\$\.seed")):
        recipe.write_text(text)
        fails(out, *given(corpus), "--recipe", recipe, code=2, message=message)


def test_more_mistakes(out: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'seed = "\xe9"')
    fails(out, "--recipe", tmp_path / "latin.toml", code=2, message="cannot be read")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    (tmp_path / "c").mkdir()
    pq.write_table(table, tmp_path / "c" / "a.parquet")
    fails(out, *given(tmp_path / "c"), code=3, message="two columns are called 'text'")
    with pytest.raises(errors.SourceError, match="the list of source files is empty"):
        pretokenize(Recipe(dataset=(), tokenizer=str(TOKENIZER)), out)


def test_tokenizer_mistakes(out: Path, corpus: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "none", "llama2/", "./llama2", "none.json"):
        fails(out, "--dataset", corpus, "--tokenizer", missing, code=4, message="no such file or directory")
    fails(out, "--dataset", corpus, "--tokenizer", tmp_path, code=4, message=r"cannot read .*tokenizer\.json")
    (tmp_path / "tokenizer.json").write_text((TOKENIZER / "tokenizer.json").read_text())
    fails(out, "--dataset", corpus, "--tokenizer", tmp_path, code=4, message="no end-of-sequence token")
    fails(out, "--dataset", corpus, "--tokenizer", "owner/unknown", code=4, message="the hub cannot be reached")


def test_disk_too_small_is_refused_early(out: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(errors.StorageError, match=r"cannot hold the result: about .* GB needed, 0\.00 GB free"):
        pretokenize(recipe, out)
    assert not list(out.glob("train_*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root on Linux only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("ballast_nbytes", [3_000_000, 4_000_000])
def test_disk_that_fills_up(small_disk: Path, tmp_path: Path, ballast_nbytes: int) -> None:
    """ENOSPC in the middle of a shard: the partial file goes, earlier shards stay, a rerun completes."""
    write_parquet(tmp_path / "c" / "a.parquet", [f"number {i} " * 50 for i in range(4000)], row_group_size=100)
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), buffer_size=100, shard_size=100_000)
    pretokenize(recipe, tmp_path / "whole")
    root, ballast = small_disk / "out", small_disk / "ballast"
    with pytest.raises(errors.StorageError, match=r"cannot be written: No space left on device") as caught:
        pretokenize(recipe, root, on_plan=lambda plan: ballast.write_bytes(bytes(ballast_nbytes)))
    assert "make room on the disk" in caught.value.next_step
    kept = every_digest(root)
    whole = every_digest(tmp_path / "whole")
    assert len(kept) < len(whole)
    assert kept.items() <= whole.items()
    assert not list(root.glob("*.partial"))
    ballast.unlink()
    pretokenize(recipe, root)
    assert every_digest(root) == whole


def test_a_failed_part_never_closes_a_shard(out: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=10, shard_size=10**6)
    original, calls = shard.ShardWriter.append, []

    def failing_once(self: shard.ShardWriter, *args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise errors.StorageError("the disk hiccuped", next_step="run again")
        original(self, *args)

    monkeypatch.setattr(shard.ShardWriter, "append", failing_once)
    with pytest.raises(errors.StorageError, match="hiccuped"):
        pretokenize(recipe, out, span_rows=3)
    assert not list(out.glob("train_*"))
    assert len(calls) == 3
    assert pretokenize(recipe, out).status == "complete"


def test_root_below_a_file(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file" / "out", *given(corpus), code=6, message="cannot be written: Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the read-only file system below stands in")
def test_read_only_directory(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(tmp_path / "locked" / "out", *given(corpus), code=6, message="cannot be written: Permission denied")


def test_read_only_file_system(small_disk: Path, corpus: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    fails(small_disk / "out", *given(corpus), code=6, message="cannot be written: Read-only file system")

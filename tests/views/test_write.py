"""Views written as data roots: the bytes of the view, on every way, after any end."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DIE_AT, command, run_cli, text, write_parquet
from support.engines import PicklingEngine
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.provenance import where_sample
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.verification.verify import verify
from tokenmill.views import gather, shards
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.write import write_view


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two data roots, one as shards and one as `tokens.bin`; each has a document that is longer than a shard."""
    folder = tmp_path_factory.mktemp("roots")
    made = []
    for number in range(2):
        texts: list[str | None] = [text(i * (number + 1), 2 + i % 50) for i in range(150)]
        texts[40:42] = [None, text(9, 900)]
        write_parquet(folder / f"corpus-{number}" / "a.parquet", texts[:70])
        write_parquet(folder / f"corpus-{number}" / "b" / "c.parquet", texts[70:])
        recipe = Recipe(
            dataset=str(folder / f"corpus-{number}"), tokenizer=str(TOKENIZER), shard_size=1_000, seq_len=32
        )
        pretokenize(recipe, folder / f"root-{number}", consolidated=number == 1)
        made.append(folder / f"root-{number}")
    return made


def built(roots: list[Path], folder: Path, **changes: object) -> Path:
    sources = [ViewSource(name=f"s{number}", root=str(root)) for number, root in enumerate(roots)]
    build_view(ViewSpec(sources=sources, **changes), folder / "view")
    return folder / "view"


def files(root: Path) -> dict[str, str]:
    kept = (".npy", ".parquet")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.iterdir() if p.suffix in kept}


@settings(max_examples=12)
@given(
    shuffle=st.sampled_from(["documents", "none"]),
    holdout=st.sampled_from([0.0, 0.4]),
    shard_size=st.sampled_from([7, 150, 3_000, 10**6]),
    workers=st.integers(1, 3),
    through_disk=st.booleans(),
    bucket=st.sampled_from([2, 500, 1 << 20]),
    block=st.sampled_from([1, 300, 1 << 21]),
    on_cluster=st.booleans(),
)
def test_any_view_is_written_as_it_is_read(
    roots: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    shuffle: str,
    holdout: float,
    shard_size: int,
    workers: int,
    through_disk: bool,
    bucket: int,
    block: int,
    on_cluster: bool,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    shard_size = max(shard_size, 250)  # not too many files
    view = built(roots, folder, shuffle=shuffle, holdout=holdout, seed=block)
    read = TokenDataset(view)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "BUCKET_NBYTES", bucket)
        patch.setattr(gather, "CHUNK_TOKENS", 777)
        patch.setattr(shards, "BLOCK_TOKENS", block)
        engine = PicklingEngine(workers) if on_cluster else None
        options = {"workers": workers, "through_disk": through_disk, "engine": engine}
        report = write_view(view, folder / "out", shard_size=shard_size, **options)
    assert (report.status, report.tokens, report.through_disk) == ("complete", read.tokens, through_disk)
    again = TokenDataset(folder / "out")
    assert again.tokens == read.tokens
    assert np.array_equal(again[:], read[:])
    result = verify(folder / "out")
    assert result.passed, result.findings
    left = {path.name for path in (folder / "out").iterdir() if path.suffix not in (".npy", ".parquet")}
    assert left == {layout.MANIFEST, layout.LOCK}
    for number in range(0, len(read), len(read) // 5 + 1):
        assert where_sample(folder / "out", number).documents == where_sample(view, number).documents
        assert np.array_equal(again.document_bounds(number), read.document_bounds(number))
    hashes = {row["text_xxh3"] for path in roots for row in sidecars(path)}
    assert {row["text_xxh3"] for row in sidecars(folder / "out")} <= hashes


def sidecars(root: Path) -> list[dict[str, object]]:
    return [row for path in sorted(root.glob("documents_*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_what_is_written_is_a_data_root_like_any_other(roots: list[Path], tmp_path: Path) -> None:
    view, out = built(roots, tmp_path), tmp_path / "out"
    write_view(view, out)
    consolidate(out)
    assert verify(out).passed
    sources = [ViewSource(name="again", root=str(out))]
    build_view(ViewSpec(sources=sources, seq_len=16), tmp_path / "second")
    assert verify(tmp_path / "second").passed
    with pytest.raises(errors.DataRootError, match="was written from a view"):
        verify(out, deep=3)
    with pytest.raises(errors.DataRootError, match="was written from a view"):
        pretokenize(Recipe(dataset=str(roots[0].parent / "corpus-0"), tokenizer=str(TOKENIZER)), out)
    origin = manifest.load(out).view
    assert (origin.seed, sorted(origin.sources)) == (0, ["s0", "s1"])
    for line in (["info"], ["show", "--sample", 3], ["where", "--source", "s1/a.parquet", "--row", 5], ["stats"]):
        result = run_cli(line[0], out, *line[1:])
        assert result.returncode == 0, result.stderr


def test_quiet_commands_print_nothing(roots: list[Path], tmp_path: Path) -> None:
    (tmp_path / "view.toml").write_text(f'[[sources]]\nname = "a"\nroot = "{roots[0]}"\n')
    for line in (
        ["build", tmp_path / "view.toml", tmp_path / "view"],
        ["write", tmp_path / "view", tmp_path / "out"],
    ):
        result = run_cli("view", *line, "--quiet")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_refusals(roots: list[Path], tmp_path: Path) -> None:
    view = built(roots, tmp_path)
    with pytest.raises(errors.DataRootError, match="expected a view, found none"):
        write_view(roots[0], tmp_path / "out")
    with pytest.raises(errors.DataRootError, match="is a view"):
        write_view(view, view)
    with pytest.raises(errors.DataRootError, match="that tokenmill pretokenize made"):
        write_view(view, roots[0])
    write_view(view, tmp_path / "out", shard_size=1_000)
    with pytest.raises(errors.DataRootError, match="was written from something else: shard_size"):
        write_view(view, tmp_path / "out", shard_size=2_000)
    samples = built(roots, tmp_path / "samples", shuffle="samples")
    with pytest.raises(errors.DataRootError, match="its samples are shuffled"):
        write_view(samples, tmp_path / "new")
    other = built(roots, tmp_path / "other", seed=1)
    with pytest.raises(errors.DataRootError, match="was written from something else: another view"):
        write_view(other, tmp_path / "out", shard_size=1_000)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train_000000.npy").write_bytes(b"x")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        write_view(view, tmp_path / "foreign")
    listed = tmp_path / "all.txt"
    listed.write_text("".join(f"{path} {row}\n" for path in ("a.parquet", "b/c.parquet") for row in range(150)))
    sources = [ViewSource(name="none", root=str(roots[0]), remove=str(listed))]
    build_view(ViewSpec(sources=sources), tmp_path / "none")
    assert len(TokenDataset(tmp_path / "none")) == 0
    assert verify(tmp_path / "none").passed
    with pytest.raises(errors.DataRootError, match="has no documents"):
        write_view(tmp_path / "none", tmp_path / "new")


@pytest.mark.parametrize("through_disk", [False, True])
def test_killed_at_any_step_it_goes_on(roots: list[Path], tmp_path: Path, through_disk: bool) -> None:
    """Before each fsync and rename, and with the same bytes at the end."""
    view = built(roots, tmp_path, seed=3)
    write_view(view, tmp_path / "whole", shard_size=5_000)
    expected = files(tmp_path / "whole")
    lines = DIE_AT
    if through_disk:
        lines = "from tokenmill.views import write\nwrite.available_memory_nbytes = lambda: 1\n" + lines
    for step in (*range(1, 12), 15, 20, 40):
        root = tmp_path / f"out-{step}"
        line = command("view", "write", view, root, "--shard-size", 5_000, "--quiet")
        died = subprocess.run([sys.executable, "-c", lines, str(step), *line[3:]], timeout=60, check=False)
        assert died.returncode in (-signal.SIGKILL, 0)
        report = write_view(view, root, shard_size=5_000)
        assert files(root) == expected
        assert verify(root).passed
        assert not list(root.glob("*.partial")), report
        if died.returncode == 0:
            return


def test_damaged_shards_are_written_again(roots: list[Path], tmp_path: Path) -> None:
    view, out = built(roots, tmp_path), tmp_path / "out"
    write_view(view, out, shard_size=1_000)
    expected = files(out)
    (out / "train_000003.npy").unlink()
    (out / "documents_000005.parquet").write_bytes(b"x")
    path = out / "train_000007.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    assert write_view(view, out, shard_size=1_000).new_tokens == 3_000
    assert files(out) == expected
    assert verify(out).passed
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != layout.LOCK}
    assert write_view(view, out, shard_size=1_000).status == "already complete"
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != layout.LOCK} == before


def test_an_error_stops_all_and_keeps_what_is_done(
    roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, out = built(roots, tmp_path), tmp_path / "out"
    real = gather.Places.read

    def failing(self: gather.Places, first: int, end: int) -> np.ndarray:
        if first > 150:
            raise errors.StorageError("the disk is gone", next_step="find it")
        return real(self, first, end)

    monkeypatch.setattr(gather.Places, "read", failing)
    with pytest.raises(errors.StorageError, match="the disk is gone"):
        write_view(view, out, shard_size=500, workers=2)
    assert not list(out.glob("*.partial"))
    kept = manifest.load(out)
    assert 0 < len(kept.shards) < 60
    monkeypatch.undo()
    report = write_view(view, out, shard_size=500)
    assert report.new_tokens == report.tokens - kept.tokens
    assert verify(out).passed


def test_the_disk_must_hold_it(roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = built(roots, tmp_path)
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(errors.StorageError, match="the disk cannot hold it"):
        write_view(view, tmp_path / "out")


def test_at_the_command_line(roots: list[Path], tmp_path: Path) -> None:
    view = built(roots, tmp_path)
    result = run_cli("view", "write", view, tmp_path / "out", "--shard-size", "1k", "--workers", 2)
    assert (result.returncode, "shards" in result.stdout) == (0, True), result.stderr
    result = run_cli("view", "write", view, tmp_path / "out", "--shard-size", "1k")
    assert (result.returncode, "already complete" in result.stdout) == (0, True)
    result = run_cli("view", "write", roots[0], tmp_path / "x")
    assert (result.returncode, "expected a view" in result.stderr) == (5, True)

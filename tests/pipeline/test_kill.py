"""kill -9 at any moment: the same command goes on, and the bytes are the same."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import DIE_AT, command, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe

KILLS = 26


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill") / "corpus"
    source = Path(hashlib.__file__).parent
    texts = [path.read_text("utf-8", "replace")[:9_000] for path in sorted(source.glob("*.py"))] * 2
    for number in range(4):
        part = [None if i % 50 == 7 else text for i, text in enumerate(texts[number::4])]
        write_parquet(root / f"{number}.parquet", part, row_group_size=10)
    return root


def arguments(corpus: Path, root: Path) -> list[str]:
    recipe = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--buffer-size", 60, "--shard-size", 30_000]
    return command("pretokenize", root, *recipe, "--quiet")


def digests(root: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.iterdir() if p.suffix in (".npy", ".parquet")
    }


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The digests of an uninterrupted run, and how long it took."""
    root = tmp_path_factory.mktemp("kill") / "whole"
    seconds = []
    for number in range(2):  # what is read for the first time takes longer
        begin = time.monotonic()
        subprocess.run(arguments(corpus, root.with_name(f"whole-{number}")), check=True, timeout=120)
        seconds.append(time.monotonic() - begin)
    return digests(root.with_name("whole-0")), min(seconds)


def check_records(root: Path) -> None:
    """Whatever the manifest records is there, whole."""
    state = manifest.load(root) if root.is_dir() else None
    for shard in state.shards if state else []:
        data = (root / layout.shard_name(shard.index)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256


@pytest.mark.timeout(600)
def test_random_kills(corpus: Path, whole: tuple[dict[str, str], float], tmp_path: Path) -> None:
    expected, seconds = whole
    rng = random.Random(20261123)
    kills = roots = 0
    while kills < KILLS:
        root = tmp_path / str(roots)
        roots += 1
        finished = False
        while not finished:
            run = subprocess.Popen(arguments(corpus, root), stderr=subprocess.DEVNULL)
            try:
                # Start-up takes a third of a run or more; most kills should fall into the work.
                run.wait(seconds * rng.uniform(0.25, 0.95) if kills < KILLS else 120)
                assert run.returncode == 0
                finished = True
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                kills += 1
                check_records(root)
        assert digests(root) == expected
        assert not list(root.glob("*.partial"))
    assert roots < KILLS  # kills did fall into runs that then had to be resumed


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 27])
def test_kill_at_every_step_of_a_durable_write(
    corpus: Path, whole: tuple[dict[str, str], float], tmp_path: Path, call: int
) -> None:
    """Before each fsync and rename of the first manifest, sidecar and shard, and one further on."""
    root = tmp_path / "out"
    line = arguments(corpus, root)
    died = subprocess.run([sys.executable, "-c", DIE_AT, str(call), *line[3:]], timeout=120, check=False)
    assert died.returncode == -9
    check_records(root)
    subprocess.run(line, check=True, timeout=120)
    assert digests(root) == whole[0]


def test_kill_then_library_call(corpus: Path, whole: tuple[dict[str, str], float], tmp_path: Path) -> None:
    run = subprocess.Popen(arguments(corpus, tmp_path / "out"))
    while not list((tmp_path / "out").glob("train_*.npy")) and run.poll() is None:
        time.sleep(0.005)
    run.kill()
    run.wait()
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=60, shard_size=30_000)
    pretokenize(recipe, tmp_path / "out", workers=3, span_rows=4)
    assert digests(tmp_path / "out") == whole[0]

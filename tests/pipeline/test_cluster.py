"""A Ray cluster of several machines (network namespaces): whatever happens to them, the same bytes.

`make test-cluster` runs this; `make test` does not: it takes several minutes.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from conftest import golden
from support.netns import Machines, machines
from support.runs import golden_recipe, shard_digests
from tokenmill.cli.demo import TOKENIZER, write_corpus
from tokenmill.dataroot import layout, manifest
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe

pytestmark = pytest.mark.cluster
pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenmill[ray]'")

Result = subprocess.CompletedProcess[str]

COPIES = 10
SHARD_SIZE = 1 << 20
SECONDS = 240


@pytest.fixture
def cluster() -> Iterator[Machines]:
    """A head and two machines of one processor each."""
    with machines() as made:
        start(made)
        yield made


def start(cluster: Machines) -> None:
    cluster.start(0, processors=0)
    cluster.start(1, processors=1)
    cluster.start(2, processors=1)
    cluster.await_processors(2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What threads make of the larger corpus."""
    folder = tmp_path_factory.mktemp("reference")
    pretokenize(recipe_of(larger_corpus(folder)), folder / "root")
    return shard_digests(folder / "root")


def larger_corpus(folder: Path, copies: int = COPIES) -> Path:
    """Python's library, several times: tens of millions of tokens."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(folder / "library")
    for copy in range(copies):
        for path in sorted((folder / "library").iterdir()):
            shutil.copyfile(path, corpus / f"{copy}-{path.name}")
    return corpus


def recipe_of(corpus: Path) -> Recipe:
    return Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=1_000, shard_size=SHARD_SIZE)


def command(cluster: Machines, *more: object) -> list[str]:
    """A run on the cluster, its driver on the head; spans of 100 rows make many tasks."""
    folder = cluster.folder
    flags = ["--dataset", folder / "corpus", "--tokenizer", TOKENIZER, "--buffer-size", 1_000]
    flags += ["--shard-size", SHARD_SIZE, "--engine", "ray", "--ray-address", cluster.address, "--chunk-size", 100]
    return cluster.inside(sys.executable, "-m", "tokenmill", "pretokenize", folder / "root", *flags, *more)


def driven(
    cluster: Machines, act: Callable[[], None] | None = None, shards: int = 6
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `act` once so many shards are there."""
    process = subprocess.Popen(
        command(cluster), env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        if act is not None:
            await_shards(cluster, process, shards)
            act()
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def await_shards(cluster: Machines, process: subprocess.Popen[str], shards: int) -> None:
    deadline = time.monotonic() + SECONDS
    while len(list((cluster.folder / "root").glob("train_*.npy"))) < shards:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check(cluster: Machines, result: Result, reference: dict[str, str]) -> None:
    assert result.returncode == 0, result.stderr
    assert shard_digests(cluster.folder / "root") == reference


@pytest.mark.parametrize("case", golden("shards.json"), ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
def test_golden_bytes(case: dict) -> None:
    """Those of the original scripts."""
    with machines() as cluster:
        start(cluster)
        recipe, root = golden_recipe(case), cluster.folder / "root"
        flags = [
            "--dataset",
            recipe.dataset,
            "--tokenizer",
            recipe.tokenizer,
            "--dtype",
            "uint16",
            "--seed",
            recipe.seed,
        ]
        flags += ["--buffer-size", recipe.buffer_size, "--shard-size", recipe.shard_size]
        flags += ["--total-tokens", recipe.total_tokens] if recipe.total_tokens else []
        flags += ["--engine", "ray", "--ray-address", cluster.address, "--chunk-size", 137]
        line = cluster.inside(sys.executable, "-m", "tokenmill", "pretokenize", root, *flags)
        result = subprocess.run(
            line, env=cluster.environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert result.returncode == 0, result.stderr
        assert shard_digests(root) == case["shards"]


def test_a_machine_is_killed(cluster: Machines, reference: dict[str, str]) -> None:
    larger_corpus(cluster.folder)
    check(cluster, driven(cluster, lambda: cluster.kill(2)), reference)


def test_a_machine_joins(cluster: Machines, reference: dict[str, str]) -> None:
    """The only one that was there is killed once another has joined."""
    larger_corpus(cluster.folder)
    cluster.kill(2)

    def act() -> None:
        cluster.start(3, processors=1)
        cluster.await_processors(2)
        cluster.kill(1)

    check(cluster, driven(cluster, act), reference)


def test_a_link_is_cut(cluster: Machines, reference: dict[str, str]) -> None:
    larger_corpus(cluster.folder)
    check(cluster, driven(cluster, lambda: cluster.cut(2)), reference)


@pytest.mark.parametrize("what", ["driver", "cluster"])
def test_killed_and_resumed(cluster: Machines, reference: dict[str, str], what: str) -> None:
    """The driver, or everything: the same command goes on from the finished shards."""
    larger_corpus(cluster.folder)
    with subprocess.Popen(command(cluster), env=cluster.environment, text=True, stderr=subprocess.PIPE) as process:
        await_shards(cluster, process, 6)
        if what == "cluster":
            cluster.kill_all()
        process.send_signal(signal.SIGKILL)
    root = cluster.folder / "root"
    recorded = [root / layout.shard_name(shard.index) for shard in manifest.load(root).shards]
    assert recorded
    inodes = [path.stat().st_ino for path in recorded]
    if what == "cluster":
        start(cluster)
    check(cluster, driven(cluster), reference)
    assert [path.stat().st_ino for path in recorded] == inodes  # not made again
    assert not list(root.glob("*.partial"))


def test_a_second_driver_is_refused(cluster: Machines, reference: dict[str, str]) -> None:
    larger_corpus(cluster.folder)
    refused: list[Result] = []

    def act() -> None:
        line = command(cluster)
        refused.append(
            subprocess.run(line, env=cluster.environment, capture_output=True, text=True, check=False, timeout=100)
        )

    check(cluster, driven(cluster, act, shards=3), reference)
    assert refused[0].returncode == 5
    assert "at work on" in refused[0].stderr


def test_a_small_store_spills(tmp_path: Path) -> None:
    """75 MB, the least Ray takes, on one machine, for a shuffle that holds all 80 MB of tokens.

    Every shard needs most of the spans, which Ray reads back from its disk each time: so the shards are few.
    """
    with machines() as cluster:
        cluster.store_nbytes = 76 << 20
        cluster.start(0, processors=0)
        cluster.start(1, processors=1)
        cluster.await_processors(1)
        recipe = msgspec.structs.replace(
            recipe_of(larger_corpus(cluster.folder, 3)), buffer_size=100_000, shard_size=4 * SHARD_SIZE
        )
        pretokenize(recipe, tmp_path / "root")
        line = command(cluster, "--buffer-size", 100_000, "--shard-size", 4 * SHARD_SIZE)
        result = subprocess.run(
            line, env=cluster.environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        check(cluster, result, shard_digests(tmp_path / "root"))
        spilled = cluster.on(1, "grep", "-rl", "Spilled", "/tmp/ray/session_latest/logs")
        assert subprocess.run(spilled, capture_output=True, text=True, check=False).stdout


def test_ctrl_c(cluster: Machines, reference: dict[str, str]) -> None:
    larger_corpus(cluster.folder)
    with subprocess.Popen(command(cluster), env=cluster.environment, text=True, stderr=subprocess.PIPE) as process:
        await_shards(cluster, process, 4)
        process.send_signal(signal.SIGINT)  # nsenter became the command itself
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    check(cluster, driven(cluster), reference)

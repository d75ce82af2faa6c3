"""Benchmarks run: on next to nothing, for what they print and not for how fast it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, text, write_parquet
from tokenmill.cli.demo import TOKENIZER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks read /proc, or start cp and the like")


def printed(name: str, *arguments: object) -> str:
    line = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(2):
        write_parquet(tmp_path / "c" / f"{number}.parquet", [text(i, 9 + i % 30) for i in range(200)])
    return tmp_path / "c"


def test_pretokenize(corpus: Path) -> None:
    lines = printed("pretokenize", corpus, "--tokenizer", TOKENIZER, "--rounds", 1).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["tokenmill", "script", "usual", "engine"]


def test_shapes(tmp_path: Path, corpus: Path) -> None:
    shapes = ["txt", "short", "line"]
    arguments = ["--tokenizer", TOKENIZER, "--scale", 0.0001, "--rounds", 1, "--also", corpus, "--shapes", *shapes]
    lines = printed("shapes", tmp_path / "work", *arguments).splitlines()
    assert [line.split()[0] for line in lines] == ["input", *(f"{shape}-0.0001" for shape in shapes), "c"]


def test_report(tmp_path: Path) -> None:
    lines = printed("report", tmp_path, "--documents", 500, "--rounds", 1).splitlines()
    assert [line.split()[0] for line in lines] == ["500", "report", "stats", "stats"]


def test_driver() -> None:
    assert "us a document" in printed("driver", "--documents", 20_000)


def test_driver_of_a_cluster() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import cluster; cluster.drive(20_000)"
    line = [sys.executable, "-c", program, str(REPOSITORY / "benchmarks")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)
    assert "documents: " in done.stdout, done.stderr


def test_consolidate(tmp_path: Path) -> None:
    found = printed("consolidate", tmp_path, "--gigabytes", 0.004, "--shard-megabytes", 1, "--rounds", 1)
    assert all(way in found for way in ("tokenmill", "original", "cp", "sha256sum"))


def test_views(tmp_path: Path) -> None:
    found = printed("views", tmp_path, "--documents", 3_000, "--sources", 3, "--write-gb", 0.002)
    assert all(what in found for what in ("cp", "through files", "3,000 documents in 3 sources", "a random sample"))
    assert "30 removed" in found
    assert "1,000 documents" in printed("views", tmp_path, "--sparse-gb", 0.002)


def test_mixture(tmp_path: Path) -> None:
    """One of its ways to read batches, as each starts PyTorch."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import mixture
folder = Path(sys.argv[2])
mixture.measure_opening(folder, 3)
mixture.measure_packing(10_000)
print(mixture.timed(sys.executable, mixture.OURS.replace("{fields}", "True"), folder / "many-view", 0.05))
"""
    line = [sys.executable, "-c", program, str(REPOSITORY / "benchmarks"), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    opened, *packed, batches = done.stdout.splitlines()
    assert "3 sources: built" in opened
    assert ["% full" in line for line in packed] == [True, True]
    assert all(figure > 0 for figure in ast.literal_eval(batches)), batches


def test_export(tmp_path: Path) -> None:
    lines = printed("export", tmp_path, "--gigabytes", 0.0002, "--documents", 2_000, "--rounds", 1).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["cp", "megatron,", "megatron"]


def test_identity(corpus: Path) -> None:
    found = printed("identity", corpus, "--tokenizer", TOKENIZER, "--metadata-column", "none", "--rounds", 1)
    assert [line.split()[0] for line in found.splitlines()] == ["without", "hash", "metadata"]


def test_load(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert "tokenmill" in printed("load", tmp_path, "--samples", 1_000, "--seconds", 0.05)

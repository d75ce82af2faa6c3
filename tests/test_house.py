"""The house: imports stay light and point upward, the tour is the tree, memory does not grow."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PRINT_PEAK, REPOSITORY, write_parquet
from tokenmill.demo import TOKENIZER

PACKAGE = REPOSITORY / "src" / "tokenmill"


def tour() -> list[str]:
    """File names in the order of CONTRIBUTING's tour."""
    return re.findall(r"^\| `(\w+\.py)` \|", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def test_tour_names_every_file_once() -> None:
    assert sorted(tour()) == sorted(path.name for path in PACKAGE.glob("*.py"))


def test_modules_import_only_from_earlier_ones() -> None:
    order = tour()
    for name in order[1:]:
        source = (PACKAGE / name).read_text()
        imported = re.findall(r"^from tokenmill\.(\w+) import", source, re.MULTILINE)
        for names in re.findall(r"^from tokenmill import ([\w, ]+)", source, re.MULTILINE):
            imported += [word.split(" as ")[0].strip() for word in names.split(",")]
        for module in imported:
            assert order.index(f"{module}.py") < order.index(name), f"{name} imports {module}"


@pytest.mark.parametrize("module", ["tokenmill", "tokenmill.cli", "tokenmill.dataset", "tokenmill.samplers"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = "pyarrow awkward gigatoken tokenizers huggingface_hub requests botocore rich torch ray pandas"
    program = f"import sys, {module}; print(*[m for m in '{heavy}'.split() if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == ""


def test_each_special_dependency_has_one_home() -> None:
    homes = {
        "gigatoken": "encode_gigatoken.py",
        "awkward": "encode_gigatoken.py",
        "tokenizers": "encode_hf.py",
        "huggingface_hub": "hub.py",
        "requests": "http.py",
        "botocore": "s3.py",
        "tenacity": "retry.py",
        "filelock": "storage.py",
        "rich": "progress.py",
        "psutil": "progress.py",
        "click": "cli.py",
        "torch": "torch.py",
        "ray": "ray.py",
    }
    for dependency, home in homes.items():
        pattern = re.compile(rf"^\s*(import|from) {dependency}\b", re.MULTILINE)
        assert [path.name for path in sorted(PACKAGE.glob("*.py")) if pattern.search(path.read_text())] == [home]


PEAK = (
    """
import sys
from tokenmill.pipeline import pretokenize
from tokenmill.recipe import Recipe
recipe = Recipe(dataset=sys.argv[1], tokenizer=sys.argv[2], buffer_size=200, shard_size=1 << 28)
pretokenize(recipe, sys.argv[3], workers=2)
"""
    + PRINT_PEAK
)


def test_memory_does_not_grow_with_the_corpus_nor_the_shard(tmp_path: Path) -> None:
    """Three times the text, all of it in one shard; held, its tokens alone would be 180 MB more.

    Even the smaller corpus is larger than the window and warms every cache.
    """
    peaks = []
    for files in (12, 36):
        corpus = tmp_path / f"corpus-{files}"
        for number in range(files):
            rng = random.Random(number)
            texts = [rng.randbytes(2500).hex() for _ in range(1000)]
            write_parquet(corpus / f"{number}.parquet", texts, row_group_size=200)
        arguments = [sys.executable, "-c", PEAK, str(corpus), str(TOKENIZER), str(tmp_path / f"out-{files}")]
        peaks.append(int(subprocess.run(arguments, capture_output=True, check=True, timeout=200).stdout))
    assert peaks[1] - peaks[0] < 80_000, peaks


def test_the_demo_tokenizer_is_what_its_script_makes() -> None:
    """On the Python it was trained on; another one's library is another text, and the script says so."""
    script = REPOSITORY / "scripts" / "train_demo_tokenizer.py"
    result = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stdout
    if "not comparable" in result.stdout:
        pytest.skip(result.stdout.strip())


def test_no_credentials_paths_or_hosts_in_the_project() -> None:
    """What must never be committed: key-like strings and machine paths."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"\b(AKIA[0-9A-Z]{16}|hf_[A-Za-z]{30,})\b|/(?:home|Users)/\w|/work/")
    for name in tracked.stdout.splitlines():
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path.is_file() and path != Path(__file__):
            assert not pattern.search(path.read_text("utf-8")), name

"""The house: imports stay light and point down the layers, the tour is the tree, memory does not grow."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import tokenmill
from conftest import PRINT_PEAK, REPOSITORY, write_parquet
from tokenmill.cli.demo import TOKENIZER

PACKAGE = REPOSITORY / "src" / "tokenmill"


LAYERS = (
    "cli",
    "ray | torch | interchange | reporting | publishing",
    "pipeline | verification | views | comparison",
    "shards | loading",
    "encoding | transfer",
    "corpus | dataroot",
    "remote",
    "recipe",
    "options | progress",
    "errors",
    "redact",
)
"""The packages and modules of `tokenmill`: each imports only from those below it, and not from its siblings (`|`)."""


def imported_modules(path: Path) -> list[str]:
    """Full names of the modules of `tokenmill` that a file imports, wherever in it, typing included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "tokenmill"]


def test_every_import_points_down_the_layers() -> None:
    heights = {room: height for height, layer in enumerate(LAYERS) for room in layer.split(" | ")}
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert tops == {*heights, "__init__", "__main__"}
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here.startswith("__"):
            continue
        for name in imported_modules(path):
            there = name.split(".")[1]
            if there == "__version__":
                continue
            assert there == here or heights[there] > heights[here], f"{path.relative_to(PACKAGE)} imports {name}"


def test_tests_share_through_support_and_touch_nothing_private() -> None:
    tests = REPOSITORY / "tests"
    for path in sorted(tests.rglob("*.py")):
        text = path.read_text("utf-8")
        assert not re.findall(r"^(?:from|import) test_\w+", text, re.MULTILINE), f"{path} imports another test"
        names = re.findall(r"^from tokenmill[\w.]* import (\w+)(?: as (\w+))?$", text, re.MULTILINE)
        modules = {alias or name for name, alias in names}
        private = [name for name in re.findall(r"\b(\w+)\._[a-zA-Z]\w*", text) if name in modules]
        private += re.findall(r"setattr\(\w+, \"_[a-zA-Z]\w*\"|tokenmill[.\w]*\._[a-zA-Z]\w*", text)
        assert not private, f"{path} touches {private}"


def test_no_package_stands_in_the_place_of_a_public_function() -> None:
    """A submodule is set as an attribute of its package when it is imported."""
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not rooms & set(tokenmill.__all__)


def defined_names() -> set[str]:
    """Functions and classes of the package, and methods as `Class.method`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_way_of_a_document_is_told_by_names_that_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").partition("## A document from file to batch")[2]
    told = re.findall(r"`([A-Za-z_.]+)`", text.partition("\n## ")[0])
    assert len(told) > 15
    assert set(told) - {"tokens.bin"} <= defined_names()


def test_docstrings_name_modules_that_exist() -> None:
    """As `module.py`, or as `module.Name` with a class or a constant of it."""
    texts: dict[str, str] = defaultdict(str)
    for path in PACKAGE.rglob("*.py"):
        texts[path.stem] += path.read_text("utf-8")
    others = {"item_loader", "tokenmill"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for module, name in re.findall(r"`([a-z_]+)\.(py|[A-Z]\w+)[`.]", path.read_text("utf-8")):
            if module not in others:
                assert module in texts, f"{path}: {module}.{name}"
                assert name == "py" or re.search(rf"^(class )?{name}\b", texts[module], re.M), (
                    f"{path}: {module}.{name}"
                )


def test_contributing_names_every_package_and_the_layers() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) == packages
    assert " > ".join(LAYERS) in " ".join(text.split())


@pytest.mark.parametrize(
    "module", ["tokenmill", "tokenmill.cli.main", "tokenmill.loading.dataset", "tokenmill.loading.samplers"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = "pyarrow awkward gigatoken tokenizers huggingface_hub requests botocore rich torch ray pandas"
    program = f"import sys, {module}; print(*[m for m in '{heavy}'.split() if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == ""


def test_each_special_dependency_has_one_home() -> None:
    homes = {
        "gigatoken": "encoding/gigatoken.py",
        "awkward": "encoding/gigatoken.py",
        "tokenizers": "encoding/hf.py",
        "huggingface_hub": "remote/hub.py",
        "requests": "remote/http.py",
        "botocore": "remote/s3.py",
        "tenacity": "remote/retry.py",
        "filelock": "dataroot/lock.py",
        "rich": "progress.py",
        "altair": "reporting/charts.py",
        "vl_convert": "reporting/charts.py",
        "jinja2": "reporting/page.py",
        "torch": "torch.py",
        "ray": "ray.py",
    }
    for dependency, home in homes.items():
        pattern = re.compile(rf"^\s*(import|from) {dependency}\b", re.MULTILINE)
        found = [
            path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if pattern.search(path.read_text())
        ]
        assert [path.as_posix() for path in found] == [home]
    users = {path.parent.name for path in PACKAGE.rglob("*.py") if re.search(r"^import click", path.read_text(), re.M)}
    assert users == {"cli"}


PEAK = (
    """
import sys
from tokenmill.pipeline import driver
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
driver.BATCH_NBYTES = 2 << 20  # as many batches as a larger corpus would have
recipe = Recipe(dataset=sys.argv[1], tokenizer=sys.argv[2], buffer_size=200, shard_size=1 << 28)
pretokenize(recipe, sys.argv[3], workers=2)
"""
    + PRINT_PEAK
)


def test_memory_does_not_grow_with_the_corpus_nor_the_shard(tmp_path: Path) -> None:
    """Three times the text, all of it in one shard; held, its tokens alone would be 240 MB more.

    Even the smaller corpus is larger than the window and warms every cache. Its words are of characters that are no
    tokens, so that each of their bytes is one.
    """
    rng = random.Random(1)
    words = ["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(3)) for _ in range(200)]
    many = " ".join(rng.choices(words, k=50_000))
    peaks = []
    for files in (12, 36):
        corpus = tmp_path / f"corpus-{files}"
        for number in range(files):
            texts = [many[at : at + 2000] for at in rng.sample(range(len(many) - 2000), 1000)]
            write_parquet(corpus / f"{number}.parquet", texts, row_group_size=200)
        arguments = [sys.executable, "-c", PEAK, str(corpus), str(TOKENIZER), str(tmp_path / f"out-{files}")]
        peaks.append(int(subprocess.run(arguments, capture_output=True, check=True, timeout=200).stdout))
    assert peaks[1] - peaks[0] < 80_000, peaks


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


def test_the_words_are_those_of_plain_technical_english() -> None:
    """What readers stumbled over: attribute docstrings without a subject, and words of another register."""
    words = re.compile(r'"""Of |\b(?:[Gg]oes on|[Ww]hoever|[Nn]obody|in the making|lets? go of|lest)\b')
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
    for path in [*pages, *(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not words.search(line), f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"

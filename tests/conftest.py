"""Fixtures: the demo tokenizer, small corpora made here, and the shared real data where it is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

from tokenmill.demo import TOKENIZER
from tokenmill.recipe import Recipe

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("house")

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

WORDS = [
    "the",
    "cat",
    "def",
    "return",
    "0x1f",
    "café",
    "日本",
    "\U0001f680",
    "</s>",
    "<unk>",
    "\x00",
    "\n\t",
    "",
    "naïve",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits longest begins first, so that files side by side end together."""
    items.sort(key=lambda item: item.path.stem != "test_transfer_faults")


def shared(path: str) -> Path:
    """A path below the shared real data, or a skip that says so."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"the real data is not at hand: {found}")
    return found


def golden(name: str) -> list[dict]:
    """Cases of a golden file; none where it is not at hand, so that the tests show as skipped."""
    path = SHARED / "golden" / name
    return json.loads(path.read_text())["cases"] if path.exists() else []


def text(number: int, words: int) -> str:
    """A document that differs from others with another number."""
    return f"document {number}: " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def write_parquet(path: Path, texts: list, *, row_group_size: int = 7, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents in four files, one of them in a folder, one without rows; two null, two empty."""
    root = tmp_path / "corpus"
    documents: list[str | None] = [text(i, 5 + i % 60) for i in range(300)]
    documents[3] = documents[250] = None
    documents[4] = documents[299] = ""
    write_parquet(root / "a.parquet", documents[:120])
    write_parquet(root / "b.parquet", documents[120:130], row_group_size=3)
    write_parquet(root / "sub" / "c.parquet", documents[130:])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), root / "d.parquet")
    return root


@pytest.fixture
def recipe(corpus: Path) -> Recipe:
    return Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=40, shard_size=2_000, seed=3)


def command(*arguments: object, script: Path | None = None) -> list[str]:
    start = [sys.executable, str(script)] if script else [sys.executable, "-m", "tokenmill"]
    return [*start, *map(str, arguments)]


def run_cli(*arguments: object, script: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(*arguments, script=script),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
        **options,
    )


PRINT_PEAK = """
import re, resource, sys
if sys.platform == "linux":  # ru_maxrss starts at what the process that started this one had
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
"""Program text: prints the peak memory of its process so far, in KiB."""

DIE_AT = """
import os, pathlib, signal, sys
from tokenmill.cli import main
left = int(sys.argv.pop(1))
def dying(original):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
os.fsync = dying(os.fsync)
if hasattr(os, "fdatasync"):
    os.fdatasync = dying(os.fdatasync)
pathlib.Path.replace, pathlib.Path.unlink = dying(pathlib.Path.replace), dying(pathlib.Path.unlink)
main()
"""
"""Program text: the command line, killed before the n-th step of making anything durable; n comes first."""

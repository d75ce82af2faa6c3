"""Fixtures: the demo tokenizer, small corpora made here, and the shared real data where it is at hand."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

from support import forkserver
from tokenmill.cli.demo import TOKENIZER
from tokenmill.interchange import position
from tokenmill.loading import provenance
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.view import OpenView
from tokenmill.options import available_cores
from tokenmill.recipe import Recipe

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("house")

forkserver.install()

IN_MEMORY = Path("/dev/shm")
IN_MEMORY_NBYTES = 8 << 30
"""Free there before tests use it: what they write at the same time is far less."""

if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free >= IN_MEMORY_NBYTES:
    # Thousands of small files, each made durable: a disk would take a fifth of the time of all tests.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))
    (OTHERS := IN_MEMORY / f"tokenmill-tests-{os.getuid()}").mkdir(exist_ok=True)  # libraries leave files there
    os.environ.setdefault("TMPDIR", str(OTHERS))

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


def pytest_collection_finish() -> None:
    """Most of what is loaded by now stays: the collector of garbage need not look at all of it again and again."""
    gc.set_threshold(50_000, 20, 20)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for servers and processes."""
    return available_cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits longest begins first, so that files side by side end together."""
    items.sort(key=lambda item: item.path.stem != "test_transfer_faults")


@pytest.fixture
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of questions about one data root open it once, with its tokens, its documents, and its tokenizer."""

    def once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        kept: dict[Path, Any] = {}

        def opened(found: Any) -> Any:
            if found.root not in kept:
                kept[found.root] = original(found)
            return kept[found.root]

        return opened

    open_root = functools.cache(provenance.open_root)
    for module in (provenance, position):
        monkeypatch.setattr(module, "open_root", open_root)
    monkeypatch.setattr(provenance, "open_backend", once(provenance.open_backend))
    for kind in (DataRoot, OpenView):
        for name in ("tokens", "documents"):
            monkeypatch.setattr(kind, name, once(getattr(kind, name)))


def shared(path: str) -> Path:
    """A path below the shared real data, or a skip that says so."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"the real data is not at hand: {found}")
    return found


def golden(name: str) -> list[Any]:
    """Cases of a golden file; where it is not at hand, one that is skipped and says so.

    Those that need nothing but digests are here; those of the real corpus and tokenizer are beside these.
    """
    here = REPOSITORY / "tests" / "golden" / name
    path = here if here.exists() else SHARED / "golden" / name
    if not path.exists():
        reason = f"the golden digests are not at hand: {path}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="not at hand")]
    return json.loads(path.read_text())["cases"]


def text(number: int, words: int) -> str:
    """A document that differs from others with another number."""
    return f"document {number}: " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def write_parquet(path: Path, texts: list, *, row_group_size: int = 7, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)


def golden_corpus(root: Path) -> Path:
    """600 documents in five files, always the same: the corpus of `golden/demo.json`."""
    texts: list[str | None] = [text(i, 3 + (i * 37) % 90) for i in range(600)]
    texts[17] = texts[444] = None
    texts[18] = texts[599] = ""
    for number, name in enumerate(("b.parquet", "a.parquet", "sub/c.parquet", "d.parquet", "z.parquet")):
        write_parquet(root / name, texts[number * 120 : number * 120 + 120], row_group_size=11 + number)
    return root


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


def write_record(path: Path, fields: dict) -> None:
    """Store a manifest or its counterpart of `tokens.bin` that was edited, with the digests of what it says now."""
    fields["digests"] = {
        field: hashlib.sha256(
            json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        ).hexdigest()
        for field, value in fields.items()
        if field != "digests"
    }
    path.write_text(json.dumps(fields))


def command(*arguments: object, script: Path | None = None) -> list[str]:
    start = [sys.executable, str(script)] if script else [sys.executable, "-m", "tokenmill"]
    return [*start, *map(str, arguments)]


def run_cli(
    *arguments: object, script: Path | None = None, from_scratch: bool = False, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; `from_scratch` starts Python for it, and forks no process (`forkserver`)."""
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    if from_scratch:
        environment["PYTHONNOUSERSITE"] = "1"  # read when Python starts (`support.forkserver`)
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

IMPATIENT = """
import tenacity
from tokenmill.remote import retry
from tokenmill.cli import main
retry.backoff = tenacity.wait_none()
main()
"""
"""Program text: the command line, whose retries do not wait."""

"""The documentation: commands and Python blocks run, in the order of their page; links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import tokenmill
from conftest import REPOSITORY, run_cli, text, write_parquet
from support import forkserver
from support.hub_writes import loopback_hub
from support.servers import AWS, moto, s3_client
from tokenmill.cli.demo import TOKENIZER

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = {
    DOCS / "trainers.md": "tests/loading/test_torch.py and tests/interchange",
    DOCS / "views.md": "tests/views/test_views.py",
    DOCS / "cluster.md": "tests/pipeline/test_cluster.py and test_engines.py",
    DOCS / "reliability.md": "tests/test_campaign.py",
}
"""Pages whose blocks other tests run, with machines or data of their own."""
NOT_RUN = (
    "installs packages",
    "downloads",
    "needs Slurm",
    "needs a run elsewhere",
    "placeholders",
    "for a start-up file",
    "150 Gi tokens",
    "300 GB",
)
"""How a reason begins not to run a block."""
SECONDS = 150
SHORTER = {
    "python examples/local_train.py train/ --steps 60 --batch 8 --log-every 20": "OMP_NUM_THREADS=1 python "
    "examples/local_train.py train/ --steps 6 --batch 2 --log-every 2 --width 32 --layers 1 --heads 2"
}
"""What runs instead, where more of it proves no more."""


class Block(NamedTuple):
    kind: str
    text: str
    reason: str
    """Why it is not run; empty if it is."""


def blocks(page: Path) -> Iterator[Block]:
    found = re.findall(
        r"(?:^[ ]*<!-- not run: ([^\n]*?) -->\n)?^([ ]*)```(\w+)\n(.*?)^\2```", page.read_text("utf-8"), re.S | re.M
    )
    for reason, indent, kind, body in found:
        yield Block(kind, re.sub(f"^{indent}", "", body, flags=re.M), reason)


def runs(page: Path) -> bool:
    return page not in ELSEWHERE and any(
        each.kind in ("sh", "bash", "python") and not each.reason for each in blocks(page)
    )


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def prepare(folder: Path) -> None:
    """What the pages speak of: corpora, tokenizers, and what a clone has."""
    for number in range(2):
        rows = range(number * 150, number * 150 + 150)
        columns = {
            "lang": [("en", "de")[row % 2] for row in rows],
            "url": [f"https://host-{row % 20}.example/{row}" for row in rows],
        }
        write_parquet(
            folder / "corpus" / f"part-{number}.parquet", [text(row, 5 + row % 60) for row in rows], **columns
        )
    write_parquet(folder / "new" / "part-2.parquet", [text(row, 20) for row in range(400, 500)])
    write_parquet(folder / "code-corpus" / "a.parquet", [f"def f{row}(x):\n    return x\n" * 9 for row in range(80)])
    write_parquet(folder / "demo" / "corpus" / "a.parquet", [text(row, 400) for row in range(600)])
    filtered = [{"text": text(row, 30), "metadata": {"lang": "en"}} for row in range(100)]
    (folder / "filtered").mkdir()
    (folder / "filtered" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filtered))
    for name in ("tokenizer", "other-tokenizer"):
        shutil.copytree(TOKENIZER, folder / name)
    for name in ("src", "scripts", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)


@pytest.mark.parametrize("page", list(filter(runs, PAGES)), ids=name_of)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    words = page.read_text("utf-8")
    if "tokenmill.torch" in words or "local_train" in words:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    if "--engine ray" in words and find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    prepare(tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "RAY_"))}
    (commands := tmp_path / "commands").mkdir()
    paths = [commands, Path(sys.executable).parent, os.environ["PATH"]]
    environment = kept | AWS | {"PATH": os.pathsep.join(map(str, paths)), "COLUMNS": "160"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_TOKEN": "a-token"}
    with ExitStack() as servers:
        servers.enter_context(forkserver.command_in(commands))
        if "s3://my-bucket" in words:
            environment["AWS_ENDPOINT_URL"] = servers.enter_context(moto())
            s3_client(environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="my-bucket")
        if "hf://" in words:
            environment["HF_ENDPOINT"] = servers.enter_context(loopback_hub()).url
        for block in blocks(page):
            if block.kind == "toml":
                (tmp_path / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
            if block.reason or block.kind not in ("sh", "bash", "python"):
                continue
            if "make demo" in block.text:  # a line of the README, which CI itself runs
                continue
            line = [sys.executable, "-c"] if block.kind == "python" else ["bash", "-euo", "pipefail", "-c"]
            program = block.text
            for long, short in SHORTER.items():
                program = program.replace(long, short)
            done = subprocess.run(
                [*line, program],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{name_of(page)}:\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    check_of = CHECKS.get(page.stem)
    if check_of is not None:
        check_of(tmp_path)


def loss_falls(folder: Path) -> None:
    log = run_cli("receipts", folder / "train", *sorted((folder / "checkpoint").glob("receipt-*")))
    assert log.returncode == 0
    assert (folder / "report.html").stat().st_size > 1_000_000


def both_are_there(folder: Path) -> None:
    files = tokenmill.TokenDataset(folder / "all")
    assert len(files) > 0
    assert [each["path"] for each in json.loads((folder / "week2" / "manifest.json").read_text())["files"]] == [
        "part-2.parquet"
    ]


def nothing_stays(folder: Path) -> None:
    assert not list((folder / "run").glob("train_*"))
    assert len(list((folder / "part").glob("train_*"))) == 2


CHECKS = {"tutorial": loss_falls, "growth": both_are_there, "buckets": nothing_stays}
"""What a page must have led to, beyond commands that end well."""


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert not block.reason or block.reason.startswith(NOT_RUN), f"{name_of(page)}: {block.reason}"
    for page, where in ELSEWHERE.items():
        assert page in PAGES, where


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{name_of(page)}: {target}"
            if anchor and there.suffix == ".md":
                assert anchor in anchors(there), f"{name_of(page)}: {target}"


def test_the_page_on_python_names_all_of_it() -> None:
    named = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", (DOCS / "python.md").read_text(), re.M)}
    assert set(tokenmill.__all__) - {"tokenize", "merge"} <= named


def test_the_readme_is_short_and_shows_a_figure() -> None:
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    assert len(lines) < 120
    assert any("tokens a second" in line for line in lines[:15])


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("MkDocs is not installed: make docs")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "commands" / "index.html").read_text("utf-8")
    for word in ("tokenmill view prove-disjoint", "tokenmill tokenizers compare", "--max-document-size"):
        assert word in commands
    python = (tmp_path / "site" / "python" / "index.html").read_text("utf-8")
    assert "resume" in python
    assert "load_state_dict" in python
    loads = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css))"', commands)
    assert loads == []  # the site, too, loads nothing from elsewhere

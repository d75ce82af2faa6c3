"""Progress: what a person, a log, a file of metrics and `watch` are told while a run works."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tokenmill
from conftest import command, run_cli, write_parquet
from tokenmill import errors, progress
from tokenmill.cli.demo import TOKENIZER
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.progress import Progress, ProgressRow
from tokenmill.recipe import Recipe
from tokenmill.views.spec import ViewSource, ViewSpec


def phases(reports: list[Progress]) -> list[str]:
    """The phases in their order, each once."""
    names = [report.phase for report in reports]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def test_every_phase_is_reported_from_the_first_moment(tmp_path: Path, corpus: Path) -> None:
    for number in range(4):
        write_parquet(corpus / f"more-{number}.parquet", [f"document {number} {row}" for row in range(50)])
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=150, shard_size=1000)
    reports: list[Progress] = []
    pretokenize(recipe, tmp_path / "out", span_rows=20, on_progress=reports.append)
    assert phases(reports) == [
        "looking at the corpus and the tokenizer",
        "checking the tokenizer, the plan and the disk",
        "reading the first documents",
        "filling the shuffle",
        "tokenizing",
        "finishing the last shards",
    ]
    filling = [(report.done, report.of) for report in reports if report.phase == "filling the shuffle"]
    assert len(filling) > 2
    assert filling == sorted(filling)
    assert all(of == 150 for _, of in filling)
    again: list[Progress] = []
    pretokenize(recipe, tmp_path / "out", on_progress=again.append)
    assert phases(again) == ["looking at the corpus and the tokenizer", "checking what an earlier run made"]


def test_a_line_per_phase_where_there_is_no_terminal(
    tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    pretokenize(recipe, tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "looking at the corpus and the tokenizer",
        "checking the tokenizer, the plan and the disk",
        "reading the first documents",
        "tokenizing",
        "finishing the last shards",
    ]
    assert not any("0/s" in line for line in lines)


def test_the_rate_follows_the_last_half_minute_of_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monitor = progress.RunMonitor()
    monitor.expect(20_000)
    monitor.show(Progress(phase="filling the shuffle", done=4_100, of=10_000))
    now[0] += 100
    assert progress.shown_row(monitor.row()).text.startswith("filling the shuffle 4,100/10,000  41%")
    monitor.show(Progress(tokens=1000))
    assert monitor.row().seconds_left is None  # nothing is known of the rate yet
    now[0] += 10
    monitor.show(Progress(tokens=2000))
    row = monitor.row()
    assert (row.tokens_per_second, row.seconds_left, row.seconds) == (100, 180.0, 110.0)
    text = progress.shown_row(row).text
    assert text.startswith("tokenizing  10%  2.0 k tokens  100/s  3:00 left  0 documents  shard 0")


def test_metrics_and_log_have_what_the_line_shows(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    arguments = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 2000, "--metrics", tmp_path / "m.jsonl"]
    result = run_cli("pretokenize", tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    rows = [msgspec.json.decode(line, type=ProgressRow) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows[0].phase == "looking at the corpus and the tokenizer"
    assert rows[0].seconds < 1
    assert rows[-1].tokens == json.loads((tmp_path / "out" / "manifest.json").read_text())["tokens"]
    assert [row.time for row in rows] == sorted(row.time for row in rows)
    assert rows[-1].memory_nbytes > 1 << 20
    assert progress.logged_rows(tmp_path / "out" / "tokenmill.log") == rows
    assert progress.last_logged_row(tmp_path / "out" / "tokenmill.log") == rows[-1]
    log = tmp_path / "out" / "tokenmill.log"
    log.write_bytes(log.read_bytes() + b'2026-01-01 1 INFO progress {"time": 1')  # a kill came
    assert progress.last_logged_row(log) == rows[-1]


def test_metrics_that_cannot_be_written(tmp_path: Path, corpus: Path) -> None:
    options = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 2000]
    refused = run_cli("pretokenize", tmp_path / "out", *options, "--metrics", tmp_path / "none" / "m.jsonl")
    assert refused.returncode == 6
    assert "cannot be written" in refused.stderr
    assert "Traceback" not in refused.stderr
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "mine.txt").write_text("mine")
    for path, what in ((tmp_path / "fifo", "a pipe"), (tmp_path / "mine.txt", "a file of something else")):
        refused = run_cli("pretokenize", tmp_path / "out", *options, "--metrics", path)
        assert (refused.returncode, what in refused.stderr) == (6, True), refused.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"
    if Path("/dev/full").exists():
        full = run_cli("pretokenize", tmp_path / "out", *options, "--metrics", "/dev/full")
        assert full.returncode == 6
        assert "/dev/full: the rows of --metrics cannot be written" in full.stderr
        assert run_cli("verify", tmp_path / "out").returncode == 0  # the data set itself is whole


def test_watch_follows_a_run_elsewhere(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    for number in range(3):
        texts = [f"document {row} " + "word " * 200 for row in range(number * 10_000, number * 10_000 + 10_000)]
        write_parquet(corpus / f"{number}.parquet", texts, row_group_size=1000)
    nothing = run_cli("watch", out)
    assert nothing.returncode == 5
    assert "no run is at work here" in nothing.stderr
    options = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 500_000]
    run = subprocess.Popen(command("pretokenize", out, *options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "tokenmill.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    state = json.loads(run_cli("watch", out, "--once", "--json").stdout)
    followed = run_cli("watch", out)
    assert run.wait(60) == 0
    assert followed.returncode == 0, followed.stderr
    assert re.fullmatch(r"complete: \d+ shards, .* tokens recorded", followed.stdout.splitlines()[-1])
    assert state["progress"]["phase"]
    assert json.loads(run_cli("watch", out, "--json").stdout)["complete"]


def test_watch_tells_a_run_that_has_ended(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    options = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 2000]
    assert run_cli("pretokenize", out, *options).returncode == 0
    log = out / "tokenmill.log"
    log.write_text(re.sub(r'"time":\d+\.?\d*', f'"time":{time.time() - 185}', log.read_text()))
    (out / "manifest.json").unlink()
    kept = log.read_text()
    log.write_text(kept + "2026-01-01 00:00:00,000 1 INFO interrupted\n")
    assert "tells of no run at work" in run_cli("watch", out, "--once").stdout
    log.write_text(kept)
    said = run_cli("watch", out, "--once").stdout
    assert "no shard yet; the run has said nothing for 3:00: it has ended, or was killed" in said
    watching = subprocess.Popen(command("watch", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == 130
    assert b"Traceback" not in watching.communicate()[1]


def test_a_run_goes_on_when_nobody_reads_its_progress(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert pretokenize(recipe, tmp_path / "out", progress=True).status == "complete"
        monkeypatch.undo()
        with suppress(OSError):
            nobody.close()


def test_errors_of_a_run_are_not_lost_behind_its_progress(tmp_path: Path) -> None:
    with pytest.raises(errors.SourceError):
        pretokenize(Recipe(dataset=str(tmp_path / "no"), tokenizer=str(TOKENIZER)), tmp_path / "out", progress=True)


def test_every_long_function_shows_progress_from_python(tmp_path: Path, recipe: Recipe) -> None:
    """The callback gets what is shown; the last report is of all."""
    root = tmp_path / "out"
    pretokenize(recipe, root)
    spec = ViewSpec(seq_len=64, sources=[ViewSource(name="a", root=str(root))])
    calls: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        calls.append((done, total))

    how: dict[str, Any] = {"progress": True, "on_progress": tell}
    steps: dict[str, Callable[[], object]] = {
        "consolidate": lambda: tokenmill.consolidate(root, **how),
        "verify": lambda: tokenmill.verify(root, **how),
        "upload": lambda: tokenmill.upload(root, str(tmp_path / "there"), **how),
        "download": lambda: tokenmill.download(str(tmp_path / "there"), tmp_path / "back", **how),
        "export": lambda: tokenmill.export(root, tmp_path / "megatron", "megatron", copy=True, **how),
        "import_data": lambda: tokenmill.import_data(tmp_path / "megatron", tmp_path / "imported", "megatron", **how),
        "build_view": lambda: tokenmill.build_view(spec, tmp_path / "view", **how),
    }
    for name, step in steps.items():
        calls.clear()
        step()
        assert calls, name
        done, total = calls[-1]
        assert 0.9 * total <= done <= total, (name, calls[-1])

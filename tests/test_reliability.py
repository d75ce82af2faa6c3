"""Reliability: records that are damaged, runs that were killed at odd moments, files of which something is missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import DIE_AT, command, run_cli, text
from servers import AWS, listening
from test_network import Bucket
from tokenmill import journal, layout, look, manifest, retry
from tokenmill.consolidation import consolidate
from tokenmill.demo import TOKENIZER
from tokenmill.errors import DataRootError, StorageError, TokenmillError
from tokenmill.options import StoreOptions
from tokenmill.pipeline import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.source import find_corpus
from tokenmill.uploads import upload
from tokenmill.verification import verify

Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a bad row, and a finished, consolidated data root of it."""
    root = tmp_path_factory.mktemp("made")
    (root / "c").mkdir()
    lines = [json.dumps({"text": text(i, 5 + i % 40)}) for i in range(200)]
    (root / "c" / "a.jsonl").write_text("\n".join([*lines, "no JSON"]) + "\n")
    pretokenize(recipe(root), root / "root", on_bad_rows="skip")
    consolidate(root / "root")
    journal.Journal(root / "root", "s3://bucket/x").note_all([], "etag")
    return root


def recipe(made: Path) -> Recipe:
    return Recipe(dataset=str(made / "c"), tokenizer=str(TOKENIZER), shard_size=2_000, buffer_size=40, seed=3)


def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "root", tmp_path / "root")
    return tmp_path / "root"


RECORDS = ["manifest.json", "consolidated.json", "transfers.json", "skipped.jsonl"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_record_is_a_traceback(
    data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = copied(made, tmp_path_factory.mktemp("damaged"))
    path = root / data.draw(st.sampled_from(RECORDS))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["byte", "cut", "deep", "huge", "empty", "another"]))
    if kind == "byte":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "deep":
        content = bytearray(b'{"a":' * 50_000)
    elif kind == "huge":
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        at = data.draw(st.sampled_from(digits)) if digits else 0
        content[at : at + 1] = b"99999999999999999999"
    elif kind == "empty":
        content = bytearray()
    else:
        content = bytearray(data.draw(st.sampled_from([b"[]", b"null", b'"x"', b"1e999", b"\xff\xfe{}", b"{}"])))
    path.write_bytes(bytes(content))
    for look_at in (lambda: verify(root), lambda: look.info(root), lambda: verify(root, quick=True)):
        with contextlib.suppress(TokenmillError):
            look_at()


@pytest.mark.parametrize("number", [2**63, 2**64, 10**30])
def test_numbers_that_no_machine_holds_are_refused(number: int, made: Path, tmp_path: Path) -> None:
    root = copied(made, tmp_path)
    fields = json.loads((root / "manifest.json").read_text())
    for path in (("tokens",), ("recipe", "shard_size"), ("shards", 0, "tokens"), ("files", 0, "nbytes")):
        edited = json.loads(json.dumps(fields))
        place = edited
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = number
        (root / "manifest.json").write_text(json.dumps(edited))
        result = run_cli("verify", root, "--quick")
        assert (result.returncode, "Traceback" in result.stderr) == (5, False), (path, result.stderr)


def test_rows_of_unknown_files_are_found(made: Path, tmp_path: Path) -> None:
    root = copied(made, tmp_path)
    with (root / "skipped.jsonl").open("a") as file:
        file.write('{"file": "nowhere.jsonl", "row": 3, "reason": "x"}\n')
    assert [finding.file for finding in verify(root).findings] == ["skipped.jsonl"]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [empty, dangling, folder, fifo])
@pytest.mark.parametrize("name", ["documents_000001.parquet", "tokens.bin", "sample_ids.bin", "train_000001.npy"])
def test_what_cannot_be_read_is_found_and_what_follows_is_looked_at(
    damage: Callable[[Path], None], name: str, made: Path, tmp_path: Path
) -> None:
    root = copied(made, tmp_path)
    damage(root / name)
    other = root / "documents_000003.parquet"
    other.write_bytes(other.read_bytes()[:-1] + b"x")
    found = {finding.file for finding in verify(root).findings}
    assert {name, other.name} <= found
    if damage is not fifo:
        result = run_cli("verify", root)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False), result.stderr


def test_a_data_root_whose_path_is_not_utf8(made: Path, tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        shutil.copytree(made / "root", root)
    except OSError:
        pytest.skip("this file system has no such names")
    assert verify(root).findings == []
    assert verify(root, deep=5).findings == []
    result = run_cli("verify", root, "--json")
    assert json.loads(result.stdout)["root"].endswith("caf\\xe9")
    assert run_cli("info", root, "--json").returncode == 0
    line = ["--dataset", made / "c", "--tokenizer", TOKENIZER, "--on-bad-rows", "skip", "--json"]
    other = root.with_name("other" + root.name)
    assert run_cli("pretokenize", other, *line).returncode == 0


def test_a_bug_does_not_look_like_a_finding() -> None:
    program = "from tokenmill import look, cli\ndef broken(*_): raise RuntimeError('ours')\n"
    program += "look.info = broken; cli.main(['info', 'x'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, "RuntimeError: ours" in result.stderr) == (70, True)


def test_a_test_shard_that_was_killed_at_any_step_is_finished_later(made: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", made / "c", "--tokenizer", TOKENIZER, "--shard-size", 1_500, "--on-bad-rows", "skip"]
    whole = tmp_path / "whole"
    assert run_cli("test-shard", whole, *arguments).returncode == 0
    for step in range(1, 40):
        root = tmp_path / f"killed-{step}"
        line = command("test-shard", root, *arguments)[3:]
        done = subprocess.run(
            [sys.executable, "-c", DIE_AT, str(step), *line], capture_output=True, check=False, timeout=60
        )
        again = run_cli("test-shard", root, *arguments)
        assert again.returncode == 0, again.stderr
        assert verify(root).findings == []
        assert (root / "train_000000.npy").read_bytes() == (whole / "train_000000.npy").read_bytes()
        if done.returncode != -signal.SIGKILL:
            return
    raise AssertionError("it was killed forty times and never came to its end")


def test_a_lost_sidecar_beside_tokens_bin_is_made_again(made: Path, tmp_path: Path) -> None:
    """Where the shards were consumed, and where there never were any."""
    settings_ = {"on_bad_rows": "skip"}
    pretokenize(recipe(made), tmp_path / "joined", consolidated=True, **settings_)
    pretokenize(recipe(made), tmp_path / "consumed", **settings_)
    consolidate(tmp_path / "consumed", consume=True)
    for name in ("joined", "consumed"):
        root = tmp_path / name
        before = {path.name: path.read_bytes() for path in root.iterdir() if path.suffix in (".bin", ".parquet")}
        for damage in (Path.unlink, empty):
            damage(root / "documents_000001.parquet")
            if name == "consumed":
                with pytest.raises(DataRootError, match=r"documents_000001\.parquet is missing[\s\S]*--consolidated"):
                    pretokenize(recipe(made), root, **settings_)
            pretokenize(recipe(made), root, consolidated=True, **settings_)
            assert {path.name: path.read_bytes() for path in root.iterdir() if path.name in before} == before
            assert verify(root).findings == []


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 60), max_size=12), read=st.integers(1, 20), end=st.sampled_from(["\n", "ab", "aab"])
)
def test_rows_across_reads(rows: list[int], read: int, end: str, tmp_path_factory: Folders) -> None:
    """Rows longer than a span and than a read, delimiters cut by reads."""
    from tokenmill import source_stream

    path = tmp_path_factory.mktemp("long") / "a.txt"
    expected = [("xa" * size)[:size] for size in rows]
    path.write_text("".join(row + end for row in expected))
    before = source_stream._READ_NBYTES, source_stream.TEXT_NBYTES
    source_stream._READ_NBYTES, source_stream.TEXT_NBYTES = read, 8
    try:
        reader = find_corpus([str(path)], text_separator=end).open(0)
        found = [value.decode() for span in reader.spans() for value in reader.read(span).array.to_pylist()]
    finally:
        source_stream._READ_NBYTES, source_stream.TEXT_NBYTES = before
    pieces = path.read_text().split(end)
    assert found == (pieces if pieces[-1] else pieces[:-1])


def test_the_log_is_best_effort(made: Path, tmp_path: Path) -> None:
    """A disk that is full for the log alone: said once, and the run is as it would be."""
    program = (
        "import logging, sys\nfrom tokenmill import cli\n"
        "def full(self, record):\n"
        "    try: raise OSError(28, 'No space left on device')\n"
        "    except OSError: self.handleError(record)\n"
        "cli._LogFile.emit = full\ncli.main()"
    )
    line = command("pretokenize", tmp_path / "out", "--dataset", made / "c", "--tokenizer", TOKENIZER)[3:]
    line += ["--on-bad-rows", "skip"]
    result = subprocess.run(
        [sys.executable, "-c", program, *line], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0
    assert "Logging error" not in result.stderr
    assert result.stderr.count("the log cannot be written") == 1
    assert verify(tmp_path / "out").passed


class Damaging(Bucket):
    """Stores another byte than was sent of one file, and answers as if it had not."""

    def do_PUT(self) -> None:  # noqa: N802
        data = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.path.partition("?")[0].removeprefix("/bucket/")
        self.objects[key] = data
        etag = self._etag(key)
        if key.endswith("consolidated.json"):
            self.objects[key] = bytes([data[0] ^ 1]) + data[1:]
        self._answer(200, b"", {"ETag": etag})


def test_the_manifest_goes_only_when_all_else_is_there(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    store = type("Store", (Damaging,), {"objects": {}, "sizes": {}, "asked": []})
    root = copied(made, tmp_path)
    with listening(store) as url, pytest.raises(StorageError, match=r"consolidated\.json: expected"):
        upload(root, "s3://bucket/d", store=StoreOptions(url))
    assert "d/consolidated.json" in store.objects
    assert "d/manifest.json" not in store.objects
    assert retry.TRIES == 8


def test_the_records_of_a_data_root_agree_with_its_files(made: Path) -> None:
    record = manifest.load_consolidated(made / "root")
    assert record is not None
    assert np.memmap(made / "root" / layout.TOKENS, np.uint16).size == record.tokens

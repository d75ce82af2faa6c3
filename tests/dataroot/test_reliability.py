"""Reliability: records that are damaged, runs that were killed at odd moments, files of which something is missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import DIE_AT, command, run_cli, text
from support.buckets import Bucket
from support.servers import AWS, listening
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import find_corpus
from tokenmill.dataroot import layout, manifest
from tokenmill.errors import DataRootError, StorageError, TokenmillError
from tokenmill.loading import info as infos
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.remote import retry
from tokenmill.shards.consolidate import consolidate
from tokenmill.transfer import journal
from tokenmill.transfer.upload import upload
from tokenmill.verification.verify import verify

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
    for look_at in (lambda: verify(root), lambda: infos.info(root), lambda: verify(root, quick=True)):
        with contextlib.suppress(TokenmillError):
            look_at()


def test_a_record_that_changes_while_it_is_saved_agrees_with_its_digests(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a file are entered by one thread, as they are counted, while another saves the record."""
    record = manifest.load(made / "root")
    assert record is not None
    original = manifest.field_digest

    def meddled(value: object) -> str:
        found = original(value)
        record.files[0].rows = (record.files[0].rows or 0) + 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "field_digest", meddled)
        manifest.save(tmp_path, record)
    manifest.load(tmp_path)


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
    found = verify(root).findings
    assert {finding.file for finding in found} == {"skipped.jsonl"}
    assert any("nowhere.jsonl" in str(finding) for finding in found)


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
    out = tmp_path / "out"
    odd = os.fsdecode(os.fsencode(out) + b"/caf\xe9")
    out.mkdir()
    shutil.copytree(root, out / "source")
    for folder in (root, out):
        source = "." if folder == root else "source"
        (folder / "view.toml").write_text(f'seq_len = 8\n[[sources]]\nname = "a"\nroot = "{source}"\n')
    for arguments in (
        ["consolidate", root],
        ["stats", root],
        ["where", root, "--sample", 0],
        ["watch", root, "--once"],
        ["card", root],
        ["view", "plan", root / "view.toml"],
        ["view", "build", root / "view.toml", out / "refused"],  # the index would have to say where its source is
        ["view", "build", out / "view.toml", f"{odd}-view"],
        ["view", "write", f"{odd}-view", f"{odd}-written"],
        ["verify", f"{odd}-view"],
        ["export", root, f"{odd}-export", "--to", "megatron"],
        ["export", root, f"{odd}-mds", "--to", "mds"],
        ["import", f"{odd}-export", f"{odd}-imported", "--from", "megatron"],
        ["import", f"{odd}-mds", f"{odd}-imported-too", "--from", "mds"],
        ["info", f"{odd}-imported"],
        ["pretokenize", f"{odd}-new", "--only-new", other, *line[:-1]],
    ):
        result = run_cli(*arguments, "--json")
        assert "Traceback" not in result.stderr, result.stderr
        expected = 3 if "--only-new" in arguments else 5 if out / "refused" in arguments else 0
        assert result.returncode == expected, (arguments, result.stderr)
        assert result.returncode or json.loads(result.stdout)


def test_a_bug_does_not_look_like_a_finding() -> None:
    program = "from tokenmill.loading import info\nfrom tokenmill.cli import main\n"
    program += "def broken(*_): raise RuntimeError('ours')\n"
    program += "info.info = broken; main(['info', 'x'])"
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
    from tokenmill.corpus import streamed as source_stream

    path = tmp_path_factory.mktemp("long") / "a.txt"
    expected = [("xa" * size)[:size] for size in rows]
    path.write_text("".join(row + end for row in expected))
    before = source_stream.READ_NBYTES, source_stream.TEXT_NBYTES
    source_stream.READ_NBYTES, source_stream.TEXT_NBYTES = read, 8
    try:
        reader = find_corpus([str(path)], text_separator=end).open(0)
        found = [value.decode() for span in reader.spans() for value in reader.read(span).array.to_pylist()]
    finally:
        source_stream.READ_NBYTES, source_stream.TEXT_NBYTES = before
    pieces = path.read_text().split(end)
    assert found == (pieces if pieces[-1] else pieces[:-1])


def test_the_log_is_best_effort(made: Path, tmp_path: Path) -> None:
    """A disk that is full for the log alone: said once, and the run is as it would be."""
    program = (
        "from tokenmill.cli import console, main\n"
        "def full(self, record):\n"
        "    try: raise OSError(28, 'No space left on device')\n"
        "    except OSError: self.handleError(record)\n"
        "console.LogFile.emit = full\nmain()"
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


# Digests of the records


def edits(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to everything in a record that is not a container, and to one container of each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from edits(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from edits(inner, (*path, index))
    yield path


def other(value: object) -> object:
    """Another value of the same type, where there is one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x" if not value or value[-1] != "0" else value[:-1] + "1"
        case None:
            return "x"
        case list():
            return value[1:] if value else [1]
        case dict():
            return dict(list(value.items())[1:]) if value else {"x": "y"}
    raise AssertionError(value)


@pytest.mark.parametrize("name", ["manifest.json", "consolidated.json"])
def test_every_edit_of_a_record_is_refused_and_found(name: str, made: Path, tmp_path: Path) -> None:
    """Of any one place in it: by every reader, and by verify with the field named, or as no record of ours."""
    root = copied(made, tmp_path)
    text = (root / name).read_text()
    load = manifest.load if name == "manifest.json" else manifest.load_consolidated
    count = 0
    for path in edits(json.loads(text)):
        if not path:
            continue
        fields = place = json.loads(text)
        for step in path[:-1]:
            place = place[step]
        for value in (other(place[path[-1]]), None):
            before = place[path[-1]]
            if before == value:
                continue
            place[path[-1]] = value
            (root / name).write_text(json.dumps(fields))
            place[path[-1]] = before
            count += 1
            with pytest.raises(DataRootError, match=re.escape(name)):
                load(root)
            try:
                result = verify(root, quick=True)
            except DataRootError:
                continue
            where = path[1] if path[0] == "digests" and len(path) > 1 else path[0]
            assert any(
                finding.file == name and (finding.position == where or where == "digests")
                for finding in result.findings
            ), (path, value, result.findings)
    assert count > (200 if name == "manifest.json" else 25)
    (root / name).write_text(json.dumps(json.loads(text), indent=4, ensure_ascii=True))  # the same, written otherwise
    assert verify(root, quick=True).passed


def test_a_field_too_many_or_too_few_is_refused(made: Path, tmp_path: Path) -> None:
    root = copied(made, tmp_path)
    fields = json.loads((root / "manifest.json").read_text())
    for change in ({**fields, "more": 1}, {key: value for key, value in fields.items() if key != "notes"}):
        (root / "manifest.json").write_text(json.dumps(change))
        with pytest.raises(DataRootError, match=r"changed since tokenmill wrote it: (more|notes) differ"):
            manifest.load(root)
    result = run_cli("info", root)
    assert (result.returncode, "Traceback" in result.stderr) == (5, False)


def test_a_data_root_keeps_the_sidecars_it_was_begun_with(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the time before `text_xxh3` goes on without, and verifies; a new one has it."""

    def columns(root: Path) -> set[tuple[str, ...]]:
        return {tuple(pq.read_schema(path).names) for path in root.glob("documents_*.parquet")}

    settings_ = {"on_bad_rows": "skip"}
    older = ("start", "tokens", "source", "row")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "DOCUMENTS_VERSION", 1)
        pretokenize(recipe(made), tmp_path / "whole", **settings_)
        pretokenize(recipe(made), tmp_path / "root", **settings_)
    sidecars = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("documents_*.parquet")}
    for path in [*(tmp_path / "root").glob("*_00000[1-9]*")]:
        path.unlink()
    fields = json.loads((tmp_path / "root" / "manifest.json").read_text())
    del fields["documents_version"], fields["digests"]
    (tmp_path / "root" / "manifest.json").write_text(json.dumps(fields | {"version": 1}))
    assert pretokenize(recipe(made), tmp_path / "root", **settings_).remade
    assert columns(tmp_path / "root") == {older}
    assert {path.name: path.read_bytes() for path in (tmp_path / "root").glob("documents_*.parquet")} == sidecars
    assert verify(tmp_path / "root").passed
    pretokenize(recipe(made), tmp_path / "new", **settings_)
    assert columns(tmp_path / "new") == {(*older, "text_xxh3")}


def test_records_of_version_1_are_read_and_written_anew(made: Path, tmp_path: Path) -> None:
    """As data roots of yesterday have them."""
    root = copied(made, tmp_path)
    for name in ("manifest.json", "consolidated.json"):
        fields = json.loads((root / name).read_text()) | {"version": 1}
        del fields["digests"]
        (root / name).write_text(json.dumps(fields))
    assert verify(root).passed
    state, record = manifest.load(root), manifest.load_consolidated(root)
    assert state is not None
    assert record is not None
    manifest.save(root, state)
    manifest.save_consolidated(root, record)
    assert verify(root).passed
    assert json.loads((root / "manifest.json").read_text())["version"] == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_digests_of_fields_are_those_of_the_format(value: object) -> None:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest.field_digest(value) == hashlib.sha256(text.encode()).hexdigest()


# Clocks


@pytest.mark.parametrize(
    ("seconds", "zone"),
    [(-(1 << 31), "Pacific/Kiritimati"), (-1, "America/Adak"), (0, "nonsense"), (1 << 33, "UTC")],
    ids=["1901", "1969", "1970", "2242"],
)
def test_clocks_and_time_zones(seconds: int, zone: str, made: Path, tmp_path: Path) -> None:
    """Times of files are compared, never understood: whenever and wherever a run is, it makes and proves the same."""
    shutil.copytree(made / "c", tmp_path / "c")
    os.utime(tmp_path / "c" / "a.jsonl", (seconds, seconds))
    arguments: list[object] = ["--tokenizer", TOKENIZER, "--shard-size", 2_000, "--buffer-size", 40, "--seed", 3]
    arguments += ["--dataset", tmp_path / "c", "--on-bad-rows", "skip", "--quiet"]
    for line in (
        ["pretokenize", tmp_path / "root", *arguments],
        ["consolidate", tmp_path / "root", "--quiet"],
        ["pretokenize", tmp_path / "root", *arguments],
        ["verify", tmp_path / "root", "--deep", 50],
    ):
        run = subprocess.run(command(*line), env=os.environ | {"TZ": zone}, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        for path in (tmp_path / "root").iterdir():
            os.utime(path, (seconds, seconds), follow_symlinks=False)
    for path in (made / "root").glob("*.npy"):
        assert (tmp_path / "root" / path.name).read_bytes() == path.read_bytes()

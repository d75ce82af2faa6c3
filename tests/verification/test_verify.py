"""Verify: whole data roots pass; of every single corruption it names file and place."""

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import golden, run_cli, shared, text, write_parquet, write_record
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest
from tokenmill.loading import stats as statistics
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.verification.verify import verify

SHARD = 2_000
SEQ_LEN = 128


def make(root: Path, corpus: Path, **options: Any) -> Recipe:
    recipe = Recipe(
        dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=40, shard_size=SHARD, seq_len=SEQ_LEN, seed=5
    )
    pretokenize(recipe, root, **options)
    return recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify") / "corpus"
    documents: list[str | None] = [text(i, 5 + i % 60) for i in range(200)]
    documents[3] = documents[150] = None
    documents[4] = documents[99] = ""
    write_parquet(root / "a.parquet", documents[:120])
    write_parquet(root / "b" / "c.parquet", documents[120:])
    return root


@pytest.fixture(scope="module")
def roots(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`shards`; `both`, shards and tokens.bin; `consumed`, tokens.bin only; `bare`, both without a manifest."""
    folder = tmp_path_factory.mktemp("roots")
    names = ("shards", "both", "consumed", "bare")
    found = {name: folder / name for name in names}
    make(found["shards"], corpus)
    make(found["both"], corpus)
    consolidate(found["both"])
    make(found["consumed"], corpus, consolidated=True)
    make(found["bare"], corpus)
    for path in found["bare"].iterdir():
        if path.suffix != ".npy":
            path.unlink()
    consolidate(found["bare"], seq_len=SEQ_LEN)
    other = folder / "other"
    pretokenize(Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), shard_size=SHARD, seed=6), other)
    return found | {"other": other}


@pytest.mark.parametrize("name", ["shards", "both", "consumed", "bare"])
@pytest.mark.parametrize("quick", [True, False])
def test_whole_roots_pass(roots: dict[str, Path], name: str, quick: bool) -> None:
    before = {path: path.stat().st_mtime_ns for path in roots[name].iterdir()}
    result = verify(roots[name], quick=quick)
    assert result.passed, result.findings
    assert before == {path: path.stat().st_mtime_ns for path in roots[name].iterdir()}


@pytest.mark.parametrize("name", ["shards", "both", "consumed"])
def test_whole_roots_pass_deeply(roots: dict[str, Path], name: str) -> None:
    result = verify(roots[name], deep=30)
    assert result.passed, result.findings
    words = " ".join(check.what for check in result.checked)
    assert "30 documents encoded again" in words
    assert "rebuilt from the source" in words


# Corruptions


def flip(name: str, at: int, bit: int = 1) -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[at] ^= bit
        (root / name).write_bytes(data)

    return corrupt


def cut(name: str, nbytes: int = 1) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size - nbytes)


def grow(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + b"x")


def delete(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def swap(one: str, two: str) -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        (root / one).rename(root / "aside")
        (root / two).rename(root / one)
        (root / "aside").rename(root / two)

    return corrupt


def from_other(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.copy(root.parent / "other" / name, root / name)


def edit(change: Callable[[dict], object], name: str = "manifest.json") -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        fields = json.loads((root / name).read_text())
        change(fields)
        write_record(root / name, fields)

    return corrupt


def edit_record(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return edit(change, "consolidated.json")


def set_token(number: int, value: int, *, forge: bool) -> Callable[[Path], None]:
    """Another token in a shard; forged, its digest in the manifest is changed along with it."""

    def corrupt(root: Path) -> None:
        path = root / f"train_{number // SHARD:06d}.npy"
        tokens = np.load(path)
        tokens[number % SHARD] = value
        np.save(path, tokens)
        if forge:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            edit(lambda m: m["shards"][number // SHARD].update(sha256=digest))(root)

    return corrupt


def sidecar(number: int, column: str, row: int, value: object, *, forge: bool = True) -> Callable[[Path], None]:
    """Another value in a sidecar; forged, its digest in the manifest is changed along with it."""

    def corrupt(root: Path) -> None:
        path = root / f"documents_{number:06d}.parquet"
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        array = pa.array(values, table.schema.field(column).type)
        pq.write_table(table.set_column(table.schema.get_field_index(column), table.schema.field(column), array), path)
        if forge:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            edit(lambda m: m["shards"][number].update(documents_sha256=digest))(root)

    return corrupt


def drop_document(root: Path) -> None:
    path = root / "documents_000001.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, 3), table.slice(4)]), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(lambda m: m["shards"][1].update(documents_sha256=digest))(root)


def _named(table: pa.Table, name: bytes) -> pa.Table:
    """The sidecar with one source file of a name that no text could be."""
    bounds = pa.py_buffer(np.array([0, len(name)], np.int32))
    names = pa.StringArray.from_buffers(1, bounds, pa.py_buffer(name))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), names)
    return table.set_column(2, "source", column)


def last(root: Path) -> int:
    return len(manifest.load(root).shards) - 1


def no_eos(root: Path) -> None:
    """The EOS of the first document is another token, and every digest says so."""
    end = pq.read_table(root / "documents_000000.parquet")["tokens"][0].as_py() - 1
    set_token(end, 300, forge=True)(root)


def at_byte(number: int) -> str:
    return rf"byte {number}\b"


# what: (root, corruption, file, position), the latter two as patterns
CORRUPTIONS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    # shards
    "a bit of a token": ("shards", flip("train_000001.npy", 1_000), r"train_000001\.npy", "the file"),
    "a bit of the last token": ("shards", flip("train_000002.npy", -1), r"train_000002\.npy", "the file"),
    "a bit of a shard's magic": ("shards", flip("train_000001.npy", 0), r"train_000001\.npy", "bytes 0 to 127"),
    "a bit of a shard's dtype": ("shards", flip("train_000001.npy", 23, 6), r"train_000001\.npy", "bytes 0 to 127"),
    "padding of a header": ("shards", flip("train_000001.npy", 120, 32), r"train_000001\.npy", ".*"),
    "a shard cut": ("shards", cut("train_000001.npy"), r"train_000001\.npy", "the file"),
    "a shard cut to its header": ("shards", cut("train_000001.npy", 2 * SHARD), r"train_000001\.npy", "the file"),
    "an empty shard": ("shards", cut("train_000001.npy", 2 * SHARD + 128), r"train_000001\.npy", "the file"),
    "a shard grown": ("shards", grow("train_000000.npy"), r"train_000000\.npy", "the file"),
    "a shard deleted": ("shards", delete("train_000001.npy"), r"train_000001\.npy", "the file"),
    "two shards swapped": ("shards", swap("train_000000.npy", "train_000001.npy"), r"train_000000\.npy", "the file"),
    "a shard of another recipe": ("shards", from_other("train_000001.npy"), r"train_000001\.npy", "the file"),
    "a shard too many": (
        "shards",
        lambda r: shutil.copy(r / "train_000000.npy", r / "train_000099.npy"),
        r"train_000099\.npy",
        "the file",
    ),
    "an id outside the vocabulary": ("shards", set_token(2_345, 4_096, forge=True), r"train_000001\.npy", "token 345"),
    "a bit of a shard beside tokens.bin": (
        "both",
        flip("train_000001.npy", 1_000),
        r"train_000001\.npy",
        at_byte(1_000),
    ),
    # tokens.bin and sample_ids.bin
    "a bit of tokens.bin": ("both", flip("tokens.bin", 9_000), r"tokens\.bin", r"bytes 8000 to 11999, .*train_000002"),
    "a bit of the only copy": ("consumed", flip("tokens.bin", 1), r"tokens\.bin", r"bytes 0 to 3999, .*train_000000"),
    "a bit of bare tokens": ("bare", flip("tokens.bin", 4_001), r"tokens\.bin", r"bytes 4000 to 7999, .*train_000001"),
    "tokens.bin cut": ("consumed", cut("tokens.bin", 2), r"tokens\.bin", "the file"),
    "tokens.bin grown": ("both", grow("tokens.bin"), r"tokens\.bin", "the file"),
    "tokens.bin deleted": ("consumed", delete("tokens.bin"), r"tokens\.bin", "the file"),
    "an id": ("both", flip("sample_ids.bin", 8 * 7 + 3), r"sample_ids\.bin", "sample 7, bytes 56 to 63"),
    "an id of bare shards": ("bare", flip("sample_ids.bin", 8), r"sample_ids\.bin", "sample 1, bytes 8 to 15"),
    "the last id cut": ("consumed", cut("sample_ids.bin", 8), r"sample_ids\.bin", "the file"),
    "an id too many": ("both", grow("sample_ids.bin"), r"sample_ids\.bin", "the file"),
    "sample_ids.bin deleted": ("both", delete("sample_ids.bin"), r"sample_ids\.bin", "the file"),
    "foreign tokens.bin": (
        "shards",
        lambda r: (r / "tokens.bin").write_bytes(b"x" * 100),
        r"tokens\.bin",
        "the file",
    ),
    # the sidecar
    "a bit of a sidecar": ("shards", flip("documents_000001.parquet", 400), r"documents_000001\.parquet", "the file"),
    "a sidecar cut": ("both", cut("documents_000001.parquet", 9), r"documents_000001\.parquet", "the file"),
    "a sidecar deleted": ("consumed", delete("documents_000001.parquet"), r"documents_000001\.parquet", "the file"),
    "two sidecars swapped": (
        "consumed",
        swap("documents_000000.parquet", "documents_000001.parquet"),
        r"documents_000000\.parquet",
        "row 0",
    ),
    "a sidecar of another recipe": ("both", from_other("documents_000001.parquet"), "documents_000001", "the file"),
    "a sidecar too many": (
        "both",
        lambda r: shutil.copy(r / "documents_000000.parquet", r / "documents_000077.parquet"),
        "documents_000077",
        "the file",
    ),
    "a start": ("shards", sidecar(1, "start", 4, lambda v: v + 1), "documents_000001", "row 4"),
    "a start outside its shard": ("both", sidecar(0, "start", 0, SHARD * 2), "documents_000000", "row 0"),
    "a length": ("consumed", sidecar(2, "tokens", 5, lambda v: v - 1), "documents_000002", "row 5|row 6"),
    "a length of nothing": ("consumed", sidecar(2, "tokens", 5, 0), "documents_000002", "row 5"),
    "a source": ("both", sidecar(1, "source", 2, "elsewhere.parquet"), "documents_000001", "row 2"),
    "another known source": (
        "both",
        sidecar(1, "source", 2, lambda v: "a.parquet" if v != "a.parquet" else "b/c.parquet"),
        "manifest",
        r"ledger\[a\.parquet\]",
    ),
    "a row": ("both", sidecar(1, "row", 3, 10_000), "documents_000001", "row 3"),
    "a document left out": ("shards", drop_document, "documents_000001", "row 3|the file"),
    "a document without EOS": ("shards", no_eos, "documents_000000", "row 0"),
    # the manifest
    "seed": ("shards", edit(lambda m: m["recipe"].update(seed=4)), "manifest", "fingerprint"),
    "shard_size": ("shards", edit(lambda m: m["recipe"].update(shard_size=2_001)), "manifest", "fingerprint"),
    "fingerprint": ("both", edit(lambda m: m.update(fingerprint="0" * 64)), "manifest", "fingerprint"),
    "complete": ("shards", edit(lambda m: m.update(complete=False)), "manifest", "complete"),
    "tokens": ("shards", edit(lambda m: m.update(tokens=m["tokens"] + 1)), "manifest", "tokens"),
    "documents": ("consumed", edit(lambda m: m.update(documents=1)), "manifest", "documents"),
    "a shard's index": ("shards", edit(lambda m: m["shards"][1].update(index=7)), "manifest", r"shards\[1\]\.index"),
    "a shard's tokens": (
        "consumed",
        edit(lambda m: m["shards"][0].update(tokens=1_999)),
        "manifest",
        r"shards\[0\]\.tokens",
    ),
    "a shard's sha256": ("shards", edit(lambda m: m["shards"][1].update(sha256="0" * 64)), r"train_000001\.npy", ".*"),
    "a shard's documents": (
        "both",
        edit(lambda m: m["shards"][1].update(documents=1)),
        "manifest",
        r"shards\[1\]\.documents",
    ),
    "a cursor": (
        "both",
        edit(lambda m: m["shards"][1]["next_cursor"].update(position=0)),
        "manifest",
        r"shards\[1\]\.next_cursor",
    ),
    "a record left out": ("shards", edit(lambda m: m["shards"].pop(1)), "manifest", r"shards\[1\]\.index"),
    "a count of a shard's ledger": (
        "shards",
        edit(lambda m: m["shards"][0]["ledger"][0].__setitem__(2, 5)),
        "manifest",
        r"ledger\[",
    ),
    "a row of the ledger": (
        "consumed",
        edit(lambda m: m["ledger"][0].update(null=m["ledger"][0]["null"] + 1)),
        "manifest",
        r"ledger\[a\.parquet\]",
    ),
    "rows of a file": ("both", edit(lambda m: m["files"][1].update(rows=81)), "manifest", r"ledger\[b/c\.parquet\]"),
    "a source file left out": ("both", edit(lambda m: m["ledger"].pop()), "manifest", "ledger"),
    "the vocabulary": ("both", edit(lambda m: m["tokenizer"].update(vocab_size=50)), "train_|tokens", r"token \d+"),
    "the id of EOS": ("both", edit(lambda m: m["tokenizer"].update(eos_id=5)), "documents_000000", "row 0"),
    # the record of the consolidation
    "tokens.bin's sha256": (
        "consumed",
        edit_record(lambda r: r.update(tokens_sha256="0" * 64)),
        "tokens.bin",
        "the file",
    ),
    "the ids' sha256": ("both", edit_record(lambda r: r.update(sample_ids_sha256="0" * 64)), "sample_ids", "the file"),
    "the ids' scheme": ("both", edit_record(lambda r: r.update(id_scheme="templar-v1")), "sample_ids", "sample 0"),
    "seq_len": ("consumed", edit_record(lambda r: r.update(seq_len=64)), "consolidated", "samples"),
    "samples": ("both", edit_record(lambda r: r.update(samples=3)), "consolidated", "samples"),
    "the record's tokens": ("both", edit_record(lambda r: r.update(tokens=3)), "consolidated", "tokens"),
    "the record's dtype": ("both", edit_record(lambda r: r.update(dtype="uint32")), "consolidated", "dtype"),
    "a copied shard": (
        "both",
        edit_record(lambda r: r["shards"][1].update(sha256="0" * 64)),
        "consolidated",
        r"shards\[1\]",
    ),
    "an unfinished consolidation": (
        "both",
        edit_record(lambda r: r.update(complete=False)),
        "consolidated",
        "complete",
    ),
    "a bare shard's digest": (
        "bare",
        edit_record(lambda r: r["shards"][1].update(sha256="0")),
        r"train_000001\.npy",
        ".*",
    ),
}


def test_there_are_enough() -> None:
    assert len(CORRUPTIONS) >= 60


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corruption_is_found_where_it_is(roots: dict[str, Path], tmp_path: Path, what: str) -> None:
    name, corrupt, file, position = CORRUPTIONS[what]
    root = tmp_path / name
    shutil.copytree(roots[name], root)
    shutil.copytree(roots["other"], tmp_path / "other")
    corrupt(root)
    result = verify(root)
    assert not result.passed
    places = [(finding.file, finding.position) for finding in result.findings]
    assert any(re.match(file, f) and re.fullmatch(f"({position}).*", p) for f, p in places), result.findings
    assert all(finding.expected != finding.found for finding in result.findings)


@pytest.mark.parametrize("what", ["a broken manifest", "another version"])
def test_unreadable_records_are_told(roots: dict[str, Path], tmp_path: Path, what: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(roots["both"], root)
    path = root / "manifest.json"
    if what == "a broken manifest":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_text(path.read_text().replace('"version": 3', '"version": 9', 1))
    result = run_cli("verify", root)
    assert (result.returncode, "manifest.json: " in result.stderr) == (5, True)
    (root / "manifest.json").unlink()
    (root / "consolidated.json").unlink()
    assert "found neither" in run_cli("verify", root).stderr


ABSURD: dict[str, Callable[[Path], None]] = {
    "no samples' length": edit_record(lambda r: r.update(seq_len=0)),
    "negative samples": edit_record(lambda r: r.update(samples=-1)),
    "negative tokens": edit(lambda m: m["shards"][0].update(tokens=-5)),
    "a negative file": edit(lambda m: m["shards"][0]["ledger"][0].__setitem__(0, -3)),
    "a file too far": edit(lambda m: m["shards"][0]["ledger"][0].__setitem__(0, 99)),
    "no shards": edit(lambda m: m.update(shards=[])),
    "no files": edit(lambda m: m.update(files=[], ledger=[])),
    "no ledger": edit(lambda m: m.update(ledger=[])),
    "a huge shard": edit(lambda m: m["shards"][-1].update(tokens=1 << 60)),
    "a huge sample": edit_record(lambda r: r.update(seq_len=1 << 60)),
    "an open dtype": edit(lambda m: m["recipe"].update(dtype="auto")),
    "no vocabulary": edit(lambda m: m["tokenizer"].update(vocab_size=0)),
    "no column": lambda root: pq.write_table(pa.table({"start": [0]}), root / "documents_000001.parquet"),
    "no numbers": lambda root: pq.write_table(
        pa.table({"start": ["x"], "tokens": ["y"], "source": ["a.parquet"], "row": ["z"]}),
        root / "documents_000001.parquet",
    ),
    "no values": lambda root: pq.write_table(
        pa.table({"start": [None], "tokens": [None], "source": [None], "row": [None]}),
        root / "documents_000001.parquet",
    ),
    "names that are not UTF-8": lambda root: pq.write_table(
        _named(pq.read_table(root / "documents_000001.parquet"), b"\xe2a.parquet"), root / "documents_000001.parquet"
    ),
    "an empty sidecar": lambda root: (root / "documents_000001.parquet").write_bytes(b""),
    "an empty manifest": lambda root: (root / "manifest.json").write_bytes(b""),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_records_are_findings_or_errors(roots: dict[str, Path], tmp_path: Path, what: str) -> None:
    """Never a pass, never a traceback: neither in verify nor where a person looks."""
    root = tmp_path / "root"
    shutil.copytree(roots["both"], root)
    ABSURD[what](root)
    with contextlib.suppress(errors.DataRootError):
        assert not verify(root).passed
    for line in (["info"], ["stats"], ["where", "--sample", 20], ["show", "--sample", 20]):
        result = run_cli(line[0], root, *line[1:])
        assert "Traceback" not in result.stderr, result.stderr


def test_sidecars_of_many_row_groups(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.shards.shard.DOCUMENTS_ROW_GROUP", 5)
    make(tmp_path / "root", corpus, consolidated=True)
    assert verify(tmp_path / "root", deep=20).passed
    assert statistics.stats(tmp_path / "root").tokens_by_source.keys() == {"a.parquet", "b/c.parquet"}


def test_every_bit_of_a_header_is_found(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    pretokenize(Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), shard_size=SHARD, total_tokens=2 * SHARD), root)
    path = root / "train_000001.npy"
    whole = path.read_bytes()
    for at in range(0, 8 * 128, 3):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        assert "train_000001.npy" in {finding.file for finding in verify(root).findings}


HELD = """
import pathlib, sys, time
from tokenmill.verification import findings
from tokenmill.cli import main
marker, reading = pathlib.Path(sys.argv.pop(1)), findings.VerifyRun.read
def slowly(self, nbytes):
    reading(self, nbytes)
    marker.touch()
    time.sleep(0.5)
findings.VerifyRun.read = slowly
main()
"""
"""Program text: the command line, where verifying a chunk takes half a second; makes the file named first then."""


def test_interrupt_ends_at_once(tmp_path: Path) -> None:
    root, marker = tmp_path / "root", tmp_path / "reading"
    root.mkdir()
    np.save(root / "train_000000.npy", np.zeros(300_000_000, np.uint16))
    consolidate(root)
    line = [sys.executable, "-c", HELD, str(marker), "verify", str(root)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not marker.exists():
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, stderr = run.communicate(timeout=60)
    assert (run.returncode, "Traceback" in stderr) == (130, False)
    assert time.monotonic() - begin < 15  # the rest would take a minute


# Deep


def test_deep_finds_forged_tokens(roots: dict[str, Path], tmp_path: Path) -> None:
    """Every digest was made to agree: only the source can tell."""
    root = tmp_path / "root"
    shutil.copytree(roots["shards"], root)
    set_token(2_222, 777, forge=True)(root)
    assert verify(root).passed
    result = verify(root, deep=10_000)
    assert ("train_000001.npy", "token 2222 of the stream") in [(f.file, f.position) for f in result.findings]


def test_deep_finds_forged_provenance(roots: dict[str, Path], tmp_path: Path) -> None:
    """Two documents of one file have changed rows in the sidecar."""
    root = tmp_path / "root"
    shutil.copytree(roots["consumed"], root)
    rows = pq.read_table(root / "documents_000001.parquet").to_pylist()
    one, two = [i for i, row in enumerate(rows) if row["source"] == rows[0]["source"]][:2]
    sidecar(1, "row", one, rows[two]["row"])(root)
    sidecar(1, "row", two, rows[one]["row"])(root)
    assert verify(root).passed
    result = verify(root, deep=10_000)
    assert any(f.file == "documents_000001.parquet" and "row" in f.position for f in result.findings), result.findings


def test_deep_finds_a_forged_hash(roots: dict[str, Path], tmp_path: Path) -> None:
    """A text hash in the sidecar is not that of the text; a data root of another version of sidecars is refused."""
    root = tmp_path / "root"
    shutil.copytree(roots["shards"], root)
    sidecar(1, "text_xxh3", 3, lambda v: v ^ 1)(root)
    assert verify(root).passed
    result = verify(root, deep=10_000)
    assert ("documents_000001.parquet", "text_xxh3") in [(f.file, f.what) for f in result.findings]
    edit(lambda m: m.update(documents_version=1))(root)
    assert any(f.file == "documents_000001.parquet" for f in verify(root).findings)


FIM_FIELDS = ("fim_rate", "fim_spm_rate", "fim_tokens")


def test_deep_finds_another_order(roots: dict[str, Path], tmp_path: Path, corpus: Path) -> None:
    """A data root of another seed passes for this one until the order is made again."""
    root = tmp_path / "root"
    shutil.copytree(roots["shards"], root)
    edit(lambda m: m["recipe"].update(seed=99))(root)
    fields = json.loads((root / "manifest.json").read_text())["recipe"]
    for later in (
        "dataset",
        "tokenizer",
        "metadata_columns",
        "bos",
        "bos_token",
        "fim_rate",
        "fim_spm_rate",
        "fim_tokens",
    ):
        del fields[later]
    settings = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    edit(lambda m: m.update(fingerprint=hashlib.sha256(settings.encode()).hexdigest()))(root)
    assert verify(root).passed
    result = verify(root, deep=1)
    assert any("order" in finding.what for finding in result.findings), result.findings


def test_deep_finds_a_changed_source(tmp_path: Path, corpus: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    make(tmp_path / "root", tmp_path / "corpus")
    write_parquet(tmp_path / "corpus" / "a.parquet", ["another text"] * 120)
    result = verify(tmp_path / "root", deep=5)
    assert [(Path(f.file).name, f.what) for f in result.findings] == [("a.parquet", "size in bytes")]
    assert verify(tmp_path / "root", deep=5, dataset=[str(corpus)]).passed
    shutil.rmtree(tmp_path / "corpus")
    with pytest.raises(errors.SourceError):
        verify(tmp_path / "root", deep=5)


def test_deep_needs_the_right_tokenizer(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "t")
    assert verify(roots["shards"], deep=3, tokenizer=str(tmp_path / "t")).passed
    with (tmp_path / "t" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(errors.TokenizerError, match=r"expected tokenizer\.json sha256"):
        verify(roots["shards"], deep=3, tokenizer=str(tmp_path / "t"))


def test_deep_needs_a_manifest(roots: dict[str, Path]) -> None:
    with pytest.raises(errors.DataRootError, match=r"expected manifest\.json"):
        verify(roots["bare"], deep=3)


@pytest.mark.parametrize("order", ["buffer", "sequential"])
@pytest.mark.parametrize("total_tokens", [None, 9_999])
def test_deep_rebuilds_any_shard(tmp_path: Path, corpus: Path, order: str, total_tokens: int | None) -> None:
    """Long documents over several shards, rows without text, an end in the middle of a document."""
    from tokenmill.options import StoreOptions
    from tokenmill.verification import deep as verify_deep
    from tokenmill.verification.findings import VerifyRun

    write_parquet(tmp_path / "corpus" / "long.parquet", [text(1, 3_000), None, "", text(2, 2_000), "short"])
    for path in corpus.rglob("*.parquet"):
        shutil.copy(path, tmp_path / "corpus" / path.name)
    recipe = Recipe(
        dataset=str(tmp_path / "corpus"),
        tokenizer=str(TOKENIZER),
        shard_size=1_111,
        order=order,
        total_tokens=total_tokens,
    )
    pretokenize(recipe, tmp_path / "root")
    job = VerifyRun(tmp_path / "root", workers=2, on_progress=lambda done, total: None)
    deep = verify_deep.DeepRun(job, None, None, StoreOptions())
    for shard in range(len(deep.manifest.shards)):
        deep.rebuild(shard)
    deep.check_documents(np.arange(deep.manifest.documents))
    assert job.findings == []


@pytest.mark.parametrize("case", golden("shards.json"), ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
def test_golden_data_passes_deeply(tmp_path: Path, case: dict) -> None:
    fields = {name: case[name] for name in ("shard_size", "total_tokens", "seed", "buffer_size", "seq_len")}
    recipe = Recipe(dataset=str(shared(case["corpus"])), tokenizer=str(shared("data/llama2-tokenizer")), **fields)
    pretokenize(recipe, tmp_path / "out", consolidated=True)
    result = verify(tmp_path / "out", deep=100)
    assert result.passed, result.findings


# The command line


def test_command_line(roots: dict[str, Path], tmp_path: Path) -> None:
    good = run_cli("verify", roots["both"])
    assert (good.returncode, "is what its records say" in good.stdout.splitlines()[-1]) == (0, True)
    assert run_cli("verify", roots["both"], "--quick", "--quiet").stdout == ""
    assert json.loads(run_cli("verify", roots["both"], "--json").stdout)["findings"] == []
    both = run_cli("verify", roots["both"], "--quick", "--deep", 3)
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)
    root = tmp_path / "root"
    shutil.copytree(roots["both"], root)
    flip("sample_ids.bin", 9)(root)
    bad = run_cli("verify", root, "--quiet")
    assert bad.returncode == 1
    assert re.search(
        r"sample_ids\.bin: sample 1, bytes 8 to 15: .*\n  expected  \w{16}\n  found     \w{16}\n", bad.stdout
    )

"""Formats: the same rows give the same bytes in whatever format they are; bad rows are named or counted."""

from __future__ import annotations

import gzip
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_cli, text, write_parquet
from support.runs import every_digest, jsonl
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import Corpus, find_corpus
from tokenmill.dataroot.manifest import load
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.verification.verify import verify

ROWS: list[list[str | None]] = [
    [text(i, 5 + i % 60) for i in range(120)],
    [text(1, 3), None, "", "x\ny", "  \r\n", "\u2028\ufeff", *[text(i, 9) for i in range(90)]],
    [],
    ["one long " * 3_000],
]


def ipc(rows: list[str | None], path: Path, *, stream: bool) -> None:
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    for number, rows in enumerate(ROWS):
        name = folder / f"{number}"
        if kind == "parquet":
            write_parquet(name.with_suffix(".parquet"), pa.array(rows, pa.string()))
        elif kind == "arrow-stream":
            ipc(rows, name.with_suffix(".arrow"), stream=True)
        elif kind == "arrow-file":
            ipc(rows, name.with_suffix(".arrow"), stream=False)
        elif kind == "feather":
            pa.feather.write_feather(pa.table({"text": pa.array(rows, pa.string())}), name.with_suffix(".feather"))
        elif kind == "jsonl.gz":  # two members, as `cat` makes them
            lines = jsonl(rows).splitlines(keepends=True)
            packed = gzip.compress(b"".join(lines[:50])) + gzip.compress(b"".join(lines[50:]))
            (folder / f"{number}.jsonl.gz").write_bytes(packed)
        elif kind == "json.zst":
            (folder / f"{number}.json.zst").write_bytes(zstandard.compress(jsonl(rows)))
        else:
            (folder / f"{number}.jsonl").write_bytes(jsonl(rows))


def recipe(dataset: Path | str, **fields: object) -> Recipe:
    settings = {"tokenizer": str(TOKENIZER), "buffer_size": 40, "shard_size": 1_500, "seed": 3}
    return Recipe(dataset=str(dataset), **(settings | fields))


def shard_digests(root: Path) -> list[str]:
    return [shard.sha256 for shard in load(root).shards]


KINDS = ["parquet", "jsonl", "jsonl.gz", "json.zst", "arrow-stream", "arrow-file", "feather"]


@pytest.mark.parametrize("order", ["buffer", "sequential"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_format_gives_the_same_bytes(tmp_path: Path, kind: str, order: str) -> None:
    for name in ("parquet", kind):
        write(tmp_path / name, name)
        summary = pretokenize(recipe(tmp_path / name, order=order), tmp_path / f"out-{name}", workers=2)
        assert (summary.rows, summary.skipped_null, summary.skipped_empty) == (217, 1, 1)
    assert shard_digests(tmp_path / f"out-{kind}") == shard_digests(tmp_path / "out-parquet")
    assert verify(tmp_path / f"out-{kind}", deep=20).passed
    again = pretokenize(recipe(tmp_path / kind, order=order), tmp_path / f"out-{kind}")
    assert again.status == "already complete"


@pytest.mark.parametrize("kind", ["jsonl.gz", "arrow-stream"])
@pytest.mark.parametrize("span_rows", [None, 7])
def test_streamed_formats_resume(tmp_path: Path, kind: str, span_rows: int | None) -> None:
    """From every shard, and with one missing in the middle."""
    write(tmp_path / "c", kind)
    pretokenize(recipe(tmp_path / "c"), tmp_path / "whole", span_rows=span_rows)
    whole = every_digest(tmp_path / "whole")
    count = len(shard_digests(tmp_path / "whole"))
    for lost in range(count):
        victim = tmp_path / "whole" / f"train_{lost:06d}.npy"
        victim.unlink()
        result = pretokenize(recipe(tmp_path / "c"), tmp_path / "whole", span_rows=span_rows)
        assert result.remade == [victim.name]
        assert every_digest(tmp_path / "whole") == whole


@pytest.mark.parametrize("kind", ["jsonl", "arrow-file"])
def test_total_tokens_ends_in_a_streamed_file(tmp_path: Path, kind: str) -> None:
    for name in ("parquet", kind):
        write(tmp_path / name, name)
        settings = recipe(tmp_path / name, total_tokens=4_000, order="sequential")
        assert pretokenize(settings, tmp_path / f"out-{name}", span_rows=10).tokens == 4_000
        assert verify(tmp_path / f"out-{name}", deep=9).passed
    assert shard_digests(tmp_path / f"out-{kind}") == shard_digests(tmp_path / "out-parquet")


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "c" / "sub").mkdir(parents=True)
    texts = {"a.txt": "first\n\nfile\n", "b.txt": "", "sub/c.txt": "\ufeffthird", "sub/d.txt.gz": "fourth"}
    for name, content in texts.items():
        data = content.encode()
        (tmp_path / "c" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    write_parquet(tmp_path / "p" / "a.parquet", ["first\n\nfile\n", "", "third", "fourth"])
    for name in ("c", "p"):
        pretokenize(recipe(tmp_path / name, order="sequential"), tmp_path / f"out-{name}")
    assert shard_digests(tmp_path / "out-c") == shard_digests(tmp_path / "out-p")


@given(texts=st.lists(st.text(st.characters(exclude_characters="|", exclude_categories=["Cs"]), max_size=30)))
def test_separated_text_is_what_split_says(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_bytes("||".join(texts).encode())
    whole = "||".join(texts).removeprefix("\ufeff").split("||")
    expected = whole[:-1] if not whole[-1] else whole
    assert rows_of(path, text_separator="||") == expected


@given(rows=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=40))
def test_json_lines_are_what_json_says(tmp_path_factory: pytest.TempPathFactory, rows: list[str | None]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(jsonl(rows))
    assert rows_of(path) == rows


def rows_of(path: Path, *, text_separator: str | None = None, span_rows: int = 7) -> list[str | None]:
    file = find_corpus(str(path), "text", text_separator, StoreOptions()).open(0, span_rows=span_rows)
    found = [value for span in file.spans() for value in file.read(span).array.to_pylist()]
    assert file.rows == len(found)
    return [value.decode() if isinstance(value, bytes) else value for value in found]


def test_rows_larger_than_a_span_and_many_spans(tmp_path: Path) -> None:
    rows = ["x" * 6_000_000, "", *[f"{n}" * 50 for n in range(40_000)], "y" * 5_000_000]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows).rstrip(b"\n"))
    assert rows_of(tmp_path / "a.jsonl", span_rows=100_000) == rows


BAD = [
    b'{"text": "good"}',
    b'{"text": "cut off',
    b"[1]",
    b'{"text": 5}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"other": "no text"}',
    b"",
    b'{"text": "good, too"}\r',
]


def test_bad_rows_stop_the_run_by_default(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(b"\n".join(BAD) + b"\n")
    flags = ["--dataset", tmp_path / "c", "--tokenizer", TOKENIZER, "--shard-size", 50]
    result = run_cli("pretokenize", tmp_path / "out", *flags)
    assert result.returncode == 3
    assert "a.jsonl: row 1: line 2: " in result.stderr
    assert "--on-bad-rows skip" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("order", ["buffer", "sequential"])
def test_bad_rows_are_skipped_counted_and_listed(tmp_path: Path, order: str) -> None:
    (tmp_path / "c").mkdir()
    lines = [*BAD, *(jsonl([text(i, 20)]).strip() for i in range(60)), *BAD[1:3]]
    (tmp_path / "c" / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "c" / "b.jsonl").write_bytes(b"\n".join([*BAD, b""] * 3))
    flags = ["--dataset", tmp_path / "c", "--tokenizer", TOKENIZER, "--shard-size", 300, "--order", order]
    flags += ["--on-bad-rows", "skip", "--chunk-size", 5]
    result = run_cli("pretokenize", tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr
    assert "22 bad (listed in skipped.jsonl)" in result.stdout
    ledger = {entry.path: entry for entry in load(tmp_path / "out").ledger}
    assert [(e.documents, e.null, e.empty, e.bad, e.rows) for e in ledger.values()] == [
        (62, 1, 1, 7, 71),
        (6, 3, 5, 15, 29),
    ]
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    expected = [("a.jsonl", row) for row in (1, 2, 3, 4, 5, 69, 70)]
    expected += [("b.jsonl", 10 * n + row) for n in range(3) for row in (1, 2, 3, 4, 5)]
    assert [(entry["file"], entry["row"]) for entry in listed] == expected
    assert all(f"line {entry['row'] + 1}: " in entry["reason"] for entry in listed)
    assert verify(tmp_path / "out", deep=30).passed
    # The same without those rows is the same text.
    kept = [line for line in lines if line not in BAD[1:6]]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(b"\n".join(kept) + b"\n")
    (tmp_path / "d" / "b.jsonl").write_bytes(b"\n".join([*BAD[:1], *BAD[6:], b""] * 3))
    if order == "sequential":
        clean = run_cli("pretokenize", tmp_path / "clean", "--dataset", tmp_path / "d", *flags[2:])
        assert clean.returncode == 0, clean.stderr
        assert shard_digests(tmp_path / "clean") == shard_digests(tmp_path / "out")
        assert not (tmp_path / "clean" / "skipped.jsonl").exists()


def test_skipped_rows_survive_a_resume_once_each(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    lines = [line for i in range(60) for line in (jsonl([text(i, 20)]).strip(), b"not json")]
    (tmp_path / "c" / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    settings = recipe(tmp_path / "c", shard_size=300)
    pretokenize(settings, tmp_path / "out", on_bad_rows="skip")
    whole = (tmp_path / "out" / "skipped.jsonl").read_bytes()
    assert len(whole.splitlines()) == 60
    with (tmp_path / "out" / "skipped.jsonl").open("ab") as file:
        file.write(b'{"file":"a.jsonl","ro')  # a crash in the middle of a line
    (tmp_path / "out" / "train_000002.npy").unlink()
    pretokenize(settings, tmp_path / "out", on_bad_rows="skip")
    assert (tmp_path / "out" / "skipped.jsonl").read_bytes() == whole


def test_verify_holds_the_list_to_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(b"\n".join([*BAD, b""]))
    pretokenize(recipe(tmp_path / "c"), tmp_path / "out", on_bad_rows="skip")
    path = tmp_path / "out" / "skipped.jsonl"
    whole = path.read_bytes()
    assert verify(tmp_path / "out").passed
    for wrong in (b"".join(whole.splitlines(keepends=True)[1:]), b"", b"not json\n", b'{"file": 3}\n', b"[]\n"):
        path.write_bytes(wrong)
        result = verify(tmp_path / "out", quick=True)
        found = {(f.file, f.expected) for f in result.findings if f.expected != hashlib.sha256(whole).hexdigest()}
        assert found == {("skipped.jsonl", "5")}, result.findings


def test_a_resume_opens_no_file_it_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files whose rows were counted only the counts are needed, however many there are."""
    for number in range(30):
        name = tmp_path / "c" / f"{number:02d}"
        name.parent.mkdir(exist_ok=True)
        name.with_suffix(".jsonl").write_bytes(jsonl([text(number * 99 + i, 20) for i in range(40)]))
    settings = recipe(tmp_path / "c", buffer_size=20)
    pretokenize(settings, tmp_path / "out")
    whole = every_digest(tmp_path / "out")
    opened: list[int] = []
    real = Corpus.open

    def counting(self: Corpus, index: int, *, span_rows: int | None = None) -> object:
        if span_rows != 32:  # those are looked at for the estimate
            opened.append(index)
        return real(self, index, span_rows=span_rows)

    monkeypatch.setattr(Corpus, "open", counting)
    last = max((tmp_path / "out").glob("train_*"))
    for lost in (last, last.with_name("train_000007.npy")):
        lost.unlink()
        opened.clear()
        assert pretokenize(settings, tmp_path / "out", span_rows=10).remade == [lost.name]
        assert every_digest(tmp_path / "out") == whole
        assert 0 < len(set(opened)) < 20, opened


def test_parquet_rows_that_are_not_utf8_are_skipped_too(tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff\xfe", None, b"also good"], pa.binary())
    write_parquet(tmp_path / "c" / "a.parquet", values)
    summary = pretokenize(recipe(tmp_path / "c"), tmp_path / "out", on_bad_rows="skip")
    assert (summary.documents, summary.skipped_null, summary.skipped_bad) == (2, 1, 1)
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["reason"] == "the text is not valid UTF-8"
    assert verify(tmp_path / "out", deep=3).passed


def test_damaged_and_mixed_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl([text(i, 50) for i in range(500)]))
    cases = {
        "cut.jsonl.gz": (whole[: len(whole) // 2], "cut.jsonl.gz: cannot be read"),
        "flipped.jsonl.gz": (whole[:3000] + bytes([whole[3000] ^ 255]) + whole[3001:], "cannot be read"),
        "not.jsonl.zst": (b"plain", "cannot be read"),
        "not.arrow": (b"plain text of some length", "cannot be read"),
        "other.csv": (b"a,b", "expected one of .parquet"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        flags = ["--dataset", tmp_path / name, "--tokenizer", TOKENIZER, "--shard-size", 500]
        result = run_cli("pretokenize", tmp_path / f"out-{name}", *flags)
        assert (result.returncode, message in result.stderr) == (3, True), (name, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_folder_is_searched_for_one_format(tmp_path: Path) -> None:
    write(tmp_path / "c", "jsonl")
    (tmp_path / "c" / "README.txt").write_text("not part of the corpus")
    (tmp_path / "c" / "dataset_info.json").write_text("{}")
    corpus = find_corpus(str(tmp_path / "c"))
    assert [file.path for file in corpus.files] == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    both = find_corpus([str(tmp_path / "c" / "*.jsonl"), str(tmp_path / "c" / "README.txt")])
    assert len(both.files) == 5


def test_readers_of_one_file_do_not_race(tmp_path: Path) -> None:
    """As on a resume: several workers ask for spans that nobody has come to yet."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"{n}" for n in range(400)]))
    spans = list(find_corpus(str(tmp_path / "a.jsonl")).open(0, span_rows=50).spans())
    for _ in range(100):
        file = find_corpus(str(tmp_path / "a.jsonl")).open(0, span_rows=50)
        file.keep_only(spans[4:])
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda span, file=file: file.read(span).array.to_pylist(), spans[4:]))
        assert [text for texts in read for text in texts] == [f"{n}" for n in range(200, 400)]


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b'\n{"text": "good", "x": ' + b"[" * 100_000 + b"\n")
    file = find_corpus(str(tmp_path / "a.jsonl")).open(0)
    assert set(file.read(next(file.spans())).bad) == {0, 1}


def test_two_sizes_of_span_read_the_same(tmp_path: Path) -> None:
    write(tmp_path / "c", "jsonl")
    for span_rows in (1, 3, None):
        pretokenize(recipe(tmp_path / "c"), tmp_path / f"{span_rows}", span_rows=span_rows)
    assert np.load(tmp_path / "1" / "train_000000.npy").tolist()
    assert every_digest(tmp_path / "1") == every_digest(tmp_path / "3") == every_digest(tmp_path / "None")

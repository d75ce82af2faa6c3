"""Odd corpora: rows, files and ends of streams that are not what one expects; right, or refused by name."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from conftest import command, run_cli, shared, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.choice import format_of
from tokenmill.corpus.corpus import find_corpus
from tokenmill.dataroot.manifest import load
from tokenmill.errors import RecipeError, SourceError
from tokenmill.options import LARGEST_COUNT, parse_count
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe, load_recipe
from tokenmill.verification.verify import verify


def recipe(corpus: Path, **fields: object) -> Recipe:
    return Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), **{"order": "sequential", **fields})


def texts(path: Path) -> list[str | None]:
    reader = find_corpus(str(path)).open(0)
    return [text for span in reader.spans() for text in reader.read(span).array.to_pylist()]


# Where the stream ends


@pytest.mark.parametrize("kind", ["jsonl", "arrow", "txt"])
@pytest.mark.parametrize("order", ["buffer", "sequential"])
def test_a_stream_that_ends_inside_a_long_streamed_file(kind: str, order: str, tmp_path: Path) -> None:
    """Far longer than what is read ahead, so that its rows are not counted; verified, deeply and not."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [f"document {i} of the corpus" for i in range(200_000)]
    if kind == "jsonl":
        (corpus / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    elif kind == "txt":
        (corpus / "b.txt").write_text("\n\n".join(rows))
    else:
        table = pa.table({"text": rows})
        with pa.ipc.new_stream(corpus / "b.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    settings = recipe(
        corpus, total_tokens=30_000, shard_size=8_000, order=order, buffer_size=100, text_separator="\n\n"
    )
    pretokenize(settings, tmp_path / "out", workers=1, span_rows=1_000)
    assert load(tmp_path / "out").files[0].rows is None
    for options in ({}, {"deep": 20}, {"quick": True}):
        assert verify(tmp_path / "out", **options).findings == []


# JSON Lines


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "fine", "meta": "\\ud800"}', "fine"),
        (b'{"text": "fine", "score": NaN, "x": -Infinity}', "fine"),
        (b'{"meta": "\xff\xfe", "text": "fine"}', "fine"),
        (b'{"text": "fine", "n": ' + b"9" * 6_000 + b"}", "fine"),
        (b'{"text": "caf\xc3\xa9", "a": {"text": NaN}}', "café"),
        (b'{"text": "\\ud83d\\ude80", "a": "\\udc00"}', "\U0001f680"),
    ],
)
def test_what_is_wrong_in_another_field_costs_no_row(line: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "c" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(line + b"\n")
    assert texts(path) == [text]
    pretokenize(recipe(path.parent), tmp_path / "out")
    assert verify(tmp_path / "out", deep=5).passed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "bad \\ud800"}', r"half of a surrogate pair, \\ud800"),
        (b'{"text": "bad \xff"}', "not valid UTF-8: byte 0xff"),
        (b'{"text": 5, "x": NaN}', "Expected `str"),
        (b'{"text": NaN}', "."),
        (b'{"text": "x"', "."),
        (b"[" * 100_000, "."),
        (b'{"text": {"a": 1}}', "Expected `str"),
        (b'"text"', "Expected `object`"),
    ],
)
def test_what_is_wrong_in_the_text_names_the_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(SourceError, match=rf"a\.jsonl: row 1: line 2: .*{reason}"):
        pretokenize(recipe(path), tmp_path / "out")
    assert pretokenize(recipe(path), tmp_path / "out", on_bad_rows="skip").skipped_bad == 1
    assert verify(tmp_path / "out").passed


@given(line=st.binary(max_size=60))
def test_no_line_is_a_traceback(line: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzzed") / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n{"text": "' + line.replace(b"\n", b" ") + b'"}\n')
    assert len(texts(path)) == 2


# Compression


def test_padding_members_and_ends_of_gzip(tmp_path: Path) -> None:
    one, two = (gzip.compress(b'{"text": "%s"}\n' % word) for word in (b"one", b"two"))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(one + two + bytes(700))
    assert texts(path) == ["one", "two"]
    pretokenize(recipe(path), tmp_path / "out")
    assert verify(tmp_path / "out", deep=5).passed
    for data in (one[:-4], one + two[:10], one + b"garbage", b"", one[:20] + b"\xff" * 9 + one[29:]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.jsonl\.gz: cannot be read"):
            texts(path)


def test_a_zstd_window_that_is_too_large(tmp_path: Path) -> None:
    window = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    path = tmp_path / "a.jsonl.zst"
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()  # of a length that is not known
    path.write_bytes(stream.compress(b'{"text": "fine"}\n') + stream.flush())
    with pytest.raises(SourceError, match="zstd -d --long=31"):
        texts(path)
    whole = zstandard.ZstdCompressor().compress(b'{"text": "fine"}\n')
    for cut in (0, 5, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"a\.jsonl\.zst: cannot be read"):
            texts(path)


# Arrow


def ipc_file(texts_: list[str]) -> bytes:
    batch = pa.RecordBatch.from_arrays([pa.array(texts_), pa.array(["PRIVATE " * 9] * len(texts_))], ["text", "other"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("last", [11, 200, 1 << 20, 2**31 - 1, -1])
def test_arrow_offsets_that_lie(last: int, tmp_path: Path) -> None:
    """Inside the file they would make another column's bytes into tokens, outside of it end the process."""
    data = ipc_file(["hello", "world"])
    at = data.index(struct.pack("<3i", 0, 5, 10))
    path = tmp_path / "c" / "a.arrow"
    path.parent.mkdir()
    path.write_bytes(data[:at] + struct.pack("<3i", 0, 5, last) + data[at + 12 :])
    result = run_cli("pretokenize", tmp_path / "out", "--dataset", path.parent, "--tokenizer", TOKENIZER)
    assert result.returncode == 3, result.stderr
    assert "a.arrow: cannot be read" in result.stderr


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view"])
def test_arrow_rows_that_are_not_utf8_are_rows_still(kind: str, tmp_path: Path) -> None:
    array = pa.array([b"ok", b"\xc3\x28", b"fine"]).view(pa.string())
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pa, kind)())
    table = pa.table({"text": array})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    summary = pretokenize(recipe(tmp_path / "a.arrow"), tmp_path / "out", on_bad_rows="skip")
    assert (summary.documents, summary.skipped_bad) == (2, 1)


def test_an_arrow_stream_that_was_cut_off(tmp_path: Path) -> None:
    """After any batch; with both ends that there are."""
    table = pa.table({"text": [f"row {i}" for i in range(3_000)]})
    for name, options in (("new", {}), ("old", {"use_legacy_format": True})):
        sink, ends = pa.BufferOutputStream(), []
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            for batch in table.to_batches(max_chunksize=300):
                writer.write_batch(batch)
                ends.append(sink.tell())
        path = tmp_path / f"{name}.arrow"
        whole = sink.getvalue().to_pybytes()
        path.write_bytes(whole)
        assert len(texts(path)) == 3_000
        for end in ends:
            path.write_bytes(whole[:end])
            with pytest.raises(SourceError, match="cannot be read"):
                texts(path)


@given(data=st.data())
def test_no_damaged_arrow_file_is_a_traceback(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = bytearray(ipc_file([f"text {i}" for i in range(20)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(8, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damaged") / "a.arrow"
    path.write_bytes(bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2]))]))
    try:
        found = texts(path)
    except (SourceError, UnicodeDecodeError):  # whether a text is UTF-8 is looked at when it is encoded
        return
    assert "PRIVATE" not in "".join(text or "" for text in found)


# A library that ends the process


def test_a_file_that_ends_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_parquet(tmp_path / "c" / "a.parquet", ["fine"] * 50)
    (tmp_path / "c" / "b.parquet").write_bytes(shared("cases/files/malformed-levels.parquet").read_bytes())
    result = run_cli("pretokenize", tmp_path / "out", "--dataset", tmp_path / "c", "--tokenizer", TOKENIZER)
    assert result.returncode == 3
    assert "b.parquet: the library that reads it ends the process" in result.stderr
    assert result.stderr.count("next: ") == 1


ENDS = """
import os, pathlib, signal, sys, time
from tokenmill.cli import main
from tokenmill.encoding.encoder import Encoder
number, path = int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
def end(*_, **__):
    path.touch()
    os.kill(os.getpid(), number) if number else time.sleep(60)
Encoder.encode = end
main()
"""
"""Program text: the command line, which ends by a signal, or stands still, where it would encode."""


def ending(number: int, tmp_path: Path) -> subprocess.Popen[str]:
    write_parquet(tmp_path / "c" / "a.parquet", ["fine"] * 50)
    line = command("pretokenize", tmp_path / "out", "--dataset", tmp_path / "c", "--tokenizer", TOKENIZER)[3:]
    program = [sys.executable, "-c", ENDS, str(number), str(tmp_path / "reached"), *line]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the command line works in a child process on Linux only")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGSEGV, 3), (signal.SIGKILL, -9), (signal.SIGUSR1, -10)])
def test_the_command_ends_as_its_work_does(number: int, code: int, tmp_path: Path) -> None:
    with ending(number, tmp_path) as run:
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == code
    assert ("SIGSEGV" in stderr) == (code == 3)
    assert code != 3 or "c/a.parquet" in stderr


def has_ended(pid: str) -> bool:
    """Whether a process is gone, or waits for the one that adopted it to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="the command line works in a child process on Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_ends_the_command_ends_its_work(number: int, tmp_path: Path) -> None:
    with ending(0, tmp_path) as run:
        while not (tmp_path / "reached").exists():
            assert run.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(children) == 1
        while run.poll() is None:  # the second time at once
            run.send_signal(number)
            time.sleep(0.2)
        for _ in range(500):
            if has_ended(children[0]):
                break
            time.sleep(0.01)
        assert has_ended(children[0])
    assert run.returncode in (-number, 128 + number)


# Counts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000000", 10**6),
        ("1_000_000", 10**6),
        ("1M", 10**6),
        ("1e6", 10**6),
        ("1.5k", 1_500),
        ("2.5e3", 2_500),
        ("150Gi", 150 << 30),
        ("150GI", 150 << 30),
        ("1B", 10**9),
        (" 7 ", 7),
        ("-1", -1),
    ],
)
def test_counts_as_people_write_them(text: str, value: int) -> None:
    assert parse_count(text) == value
    if value > 0:
        assert load_recipe(None, {"dataset": "c", "tokenizer": "t", "total_tokens": text}).total_tokens == value


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "1e-3", "1 000", "0x10", "1KiB", "9223372036854775808", "1e30", "nan"]
)
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_count(text)
    with pytest.raises(RecipeError, match="total_tokens"):
        load_recipe(None, {"dataset": "c", "tokenizer": "t", "total_tokens": text})


@given(text=st.text(max_size=12) | st.from_regex(r"[0-9_.]{1,9}(e[0-9]{1,2})?[kmgti]{0,2}", fullmatch=True))
def test_no_text_is_a_traceback_as_a_count(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert abs(parse_count(text)) <= LARGEST_COUNT


def test_counts_on_the_command_line_and_in_recipes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["some words of text"] * 400)
    (tmp_path / "my.toml").write_text(
        f'dataset = "{tmp_path / "c"}"\ntokenizer = "{TOKENIZER}"\nshard_size = "1Ki"\ntotal_tokens = "2k"\n'
    )
    line = ["--recipe", tmp_path / "my.toml", "--buffer-size", "1e2", "--seq-len", "1_0"]
    assert run_cli("pretokenize", tmp_path / "out", *line).returncode == 0
    made = load(tmp_path / "out")
    assert (made.tokens, made.recipe.shard_size, made.recipe.buffer_size, made.recipe.seq_len) == (2_000, 1024, 100, 10)
    for wrong in ("9223372036854775808", "1.5", "many"):
        result = run_cli("pretokenize", tmp_path / "x", *line, "--shard-size", wrong)
        assert result.returncode == 2
        assert wrong in result.stderr
    plan = json.loads(run_cli("pretokenize", tmp_path / "x", *line, "--dry-run", "--json").stdout)
    assert plan["recipe"]["total_tokens"] == 2_000


def test_the_formats_of_names() -> None:
    assert [format_of(name) for name in ("a.JSONL", "b.txt.gz", "c.json", "d.csv")] == ["jsonl", "text", "jsonl", None]

"""Documents larger than the limit: refused by name, in every format, before memory is taken for them."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PRINT_PEAK, command, run_cli
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import find_corpus
from tokenmill.corpus.page_sizes import BoundedPages, PageTooLargeError, parse_page_header
from tokenmill.dataroot import manifest
from tokenmill.errors import SourceError
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe

LIMIT = 10_000
GOOD, LARGE = "good " * 100, "large " * 2_000


def arrow(path: Path, texts: pa.Array) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("text", texts.type)])) as writer:
        writer.write_table(pa.table({"text": texts}))


MAKERS: dict[str, tuple[Callable[[Path, list[str]], None], str, str | None]] = {
    "parquet": (lambda path, texts: pq.write_table(pa.table({"text": texts}), path), "a.parquet", None),
    "parquet, plain": (
        lambda path, texts: pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none"),
        "a.parquet",
        None,
    ),
    "parquet, dictionary": (
        lambda path, texts: pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), path),
        "a.parquet",
        None,
    ),
    "arrow": (lambda path, texts: arrow(path, pa.array(texts)), "a.arrow", None),
    "arrow, view": (lambda path, texts: arrow(path, pa.array(texts, pa.string_view())), "a.arrow", None),
    "arrow, dictionary": (lambda path, texts: arrow(path, pa.array(texts).dictionary_encode()), "a.arrow", None),
    "jsonl": (
        lambda path, texts: path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts)),
        "a.jsonl",
        None,
    ),
    "jsonl.gz": (
        lambda path, texts: path.write_bytes(
            gzip.compress("".join(f'{{"text": "{text}"}}\n' for text in texts).encode())
        ),
        "a.jsonl.gz",
        None,
    ),
    "text": (lambda path, texts: path.write_text("\n".join(texts)), "a.txt", "\n"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_large_document_is_named(kind: str, tmp_path: Path) -> None:
    make, name, separator = MAKERS[kind]
    make(tmp_path / name, [GOOD] * 7 + [LARGE] + [GOOD] * 3)
    options = StoreOptions(max_document_nbytes=LIMIT)

    def read(options: StoreOptions) -> int:
        reader = find_corpus(str(tmp_path / name), text_separator=separator, options=options).open(0)
        return sum(len(reader.read(span).array) for span in reader.spans())

    with pytest.raises(SourceError, match=rf"{re.escape(name)}: row 7: expected a document of at most {LIMIT} bytes"):
        read(options)
    assert read(StoreOptions(max_document_nbytes=len(LARGE) + 20)) == 11


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_file_that_is_a_large_document(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{end}"
    data = LARGE.encode() * 1000
    path.write_bytes(gzip.compress(data) if end else data)
    reader = find_corpus(str(path), options=StoreOptions(max_document_nbytes=LIMIT)).open(0)
    with pytest.raises(SourceError, match="row 0: expected a document of at most 10000 bytes, found"):
        reader.read(next(iter(reader.spans())))


def test_the_command_says_how_to_raise_the_limit(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text(f'{{"text": "{LARGE}"}}\n')
    line = ["--dataset", tmp_path / "c", "--tokenizer", TOKENIZER]
    result = run_cli("pretokenize", tmp_path / "out", *line, "--max-document-size", "10k")
    assert (result.returncode, "--max-document-size" in result.stderr) == (3, True), result.stderr
    assert run_cli("pretokenize", tmp_path / "out", *line, "--max-document-size", "20k").returncode == 0
    assert run_cli("verify", tmp_path / "out", "--deep", "1", "--max-document-size", "20k").returncode == 0


def test_the_limit_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text(f'{{"text": "{GOOD}"}}\n' * 50)
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=500)
    for name, limit in [("a", 600), ("b", 1 << 40)]:
        pretokenize(recipe, tmp_path / name, store=StoreOptions(max_document_nbytes=limit))
    first, second = manifest.load(tmp_path / "a"), manifest.load(tmp_path / "b")
    assert first is not None
    assert second is not None
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]


READ = (
    """
import sys
from tokenmill.corpus.corpus import find_corpus
try:
    reader = find_corpus(sys.argv[1]).open(0)
    for span in reader.spans():
        reader.read(span)
except Exception as error:
    print(type(error).__name__, error)
"""
    + PRINT_PEAK
)


def peak_of(path: Path) -> tuple[str, int]:
    """What reading a file said, and the peak memory of the process in MiB."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    *said, peak = done.stdout.splitlines()
    return "\n".join(said), int(peak) >> 10


def with_first_page_of(path: Path, nbytes: int) -> None:
    """Let the header of the first page declare so many bytes; the size of the header stays."""
    pq.write_table(pa.table({"text": ["x" * 2_000] * 150}), path, compression="snappy", use_dictionary=False)
    at = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    header = parse_page_header(memoryview(data)[at:])
    assert data[at] == 0x15
    begin = at + 3  # field 1 with its kind, its value, the head of field 2
    old = varint(header.uncompressed_nbytes << 1)
    assert data[begin : begin + len(old)] == old
    new = varint(nbytes << 1)
    # The statistics behind it are as long as they please: what the number takes more, they take less.
    data[begin : begin + len(old)] = new
    path.write_bytes(bytes(data))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_a_page_that_declares_more_than_the_limit_costs_nothing(tmp_path: Path) -> None:
    with_first_page_of(tmp_path / "a.parquet", 1_400_000_000)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    usual = peak_of(tmp_path / "b.parquet")[1]
    said, peak = peak_of(tmp_path / "a.parquet")
    assert "declares 1400000000 bytes" in said
    assert "SourceError" in said
    assert peak < usual + 100


def test_a_small_file_of_one_endless_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    reader = find_corpus(str(path), options=StoreOptions(max_document_nbytes=50 << 20)).open(0)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"row 0: expected a document of at most 52428800 bytes, found more"):
        list(reader.spans())
    assert time.monotonic() - began < 20


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 3_000), min_size=1, max_size=60),
    page=st.sampled_from([1, 500, 20_000]),
    read=st.sampled_from([1, 7, 64, 1000, 1 << 20]),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["none", "snappy", "zstd", "gzip", "brotli", "lz4"]),
            "use_dictionary": st.booleans(),
            "write_page_checksum": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
        }
    ),
)
def test_every_page_is_looked_at_however_it_is_read(sizes: list[int], page: int, read: int, options: dict) -> None:
    """All pages of files that pyarrow writes are found, in pieces of any size, and what is read is what is there."""
    sink = io.BytesIO()
    rng = np.random.default_rng(len(sizes))
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in sizes]
    pq.write_table(pa.table({"text": texts}), sink, data_page_size=page, row_group_size=20, **options)
    data = sink.getvalue()
    file = pq.ParquetFile(pa.BufferReader(data))
    chunks = []
    for group in range(file.metadata.num_row_groups):
        column = file.metadata.row_group(group).column(0)
        begin = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
        chunks.append((begin, begin + column.total_compressed_size))

    def passed(limit: int) -> bytes:
        pages = BoundedPages(io.BytesIO(data), len(data), chunks, limit)
        return b"".join(iter(lambda: pages.read(read), b""))

    largest = 0
    for begin, end in chunks:
        at = begin
        while at < end:
            header = parse_page_header(memoryview(data)[at:])
            largest = max(largest, header.uncompressed_nbytes)
            at += header.header_nbytes + header.compressed_nbytes
        assert at == end
    assert passed(largest) == data
    with pytest.raises(PageTooLargeError, match="declares"):
        passed(largest - 1)


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_no_header_is_a_traceback(data: bytes) -> None:
    try:
        header = parse_page_header(memoryview(data))
    except (IndexError, PageTooLargeError):
        return
    assert min(header) >= 0
    assert header.header_nbytes <= len(data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_served_while_a_long_line_is_read(number: signal.Signals, tmp_path: Path) -> None:
    """The command is held in the middle of a line that a pipe of ours gives it, and ends when told to."""
    path = tmp_path / "c" / "a.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(1500):
            file.write(b"x" * 1_000_000)
    line = command("pretokenize", tmp_path / "out", "--dataset", path.parent, "--tokenizer", TOKENIZER)
    run = subprocess.Popen([*line, "--max-document-size", "100Gi"], stderr=subprocess.PIPE, text=True)
    try:
        reading = re.compile(rb"VmRSS:\s+(\d+)")
        while True:  # until it holds a good part of the line
            assert run.poll() is None, run.stderr and run.stderr.read()
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            sizes = [reading.search(Path(f"/proc/{child}/status").read_bytes()) for child in children]
            if any(size and int(size[1]) > 500_000 for size in sizes):
                break
            time.sleep(0.05)
        run.send_signal(number)
        said = run.communicate(timeout=15)[1]  # a second on a machine that is not busy
    finally:
        run.kill()
    assert "Traceback" not in said
    assert run.returncode == 128 + number


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see children begin")
@pytest.mark.parametrize("wait", [0.0, 0.02, 0.05])
def test_ctrl_c_while_id_workers_begin_is_no_traceback(wait: float, tmp_path: Path) -> None:
    """As a terminal sends it: to the whole group, the workers that are just starting included."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text("".join(f'{{"text": "{GOOD} {n}"}}\n' for n in range(8_000)))
    recipe = ["--dataset", tmp_path / "c", "--tokenizer", TOKENIZER, "--shard-size", "100k", "--quiet"]
    assert run_cli("pretokenize", tmp_path / "out", *recipe).returncode == 0
    run = subprocess.Popen(
        command("consolidate", tmp_path / "out"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def has_children() -> bool:
        with contextlib.suppress(OSError):  # threads come and go
            return any((each / "children").read_text() for each in Path(f"/proc/{run.pid}/task").iterdir())
        return False

    while run.poll() is None and not has_children():
        time.sleep(0.001)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert "Traceback" not in said
    assert run_cli("consolidate", tmp_path / "out").returncode == 0

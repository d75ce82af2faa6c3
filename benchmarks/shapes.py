"""tokenmill against a script of twenty lines on corpora of every shape: many small files, short rows, long rows.

    python benchmarks/shapes.py WORK --tokenizer DIR [--shapes NAME ...] [--scale 1.0] [--rounds 3] [--also DIR ...]

Makes each corpus below WORK from the text of Python's own library, once, and runs both sides on it in turn, each in a
process of its own: tokenmill as a user runs it, and `gigatoken.encode_files` + EOS + `np.save`. The ratio is taken per
round, and its median is shown.

    txt       30,000 text files of at most 2 KB
    parquet   20,000 parquet files of 5 rows
    jsonl     20,000 JSON Lines files of 5 rows
    short     10 million rows of 20 characters, in 10 parquet files
    line      one line of JSON of 220 MB
    long      6 text files of 100 MB, a document each

`--also` adds parquet corpora of your own, `--scale` multiplies the sizes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from processes import run_measured

SHARD_TOKENS = 1 << 24


def library(nbytes: int) -> str:
    """The text of Python's library, again and again, as much as that."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text("utf-8", "replace")
    return (text * (nbytes // len(text) + 1))[:nbytes]


def pieces(text: str, count: int, largest: int) -> list[str]:
    """Pieces of a text of random lengths."""
    rng = random.Random(1)
    found = []
    for _ in range(count):
        at = rng.randrange(max(1, len(text) - largest))
        found.append(text[at : at + rng.randint(1, largest)])
    return found


def make_txt(folder: Path, scale: float) -> None:
    for number, text in enumerate(pieces(library(20 << 20), round(30_000 * scale), 2_000)):
        (folder / f"{number:06d}.txt").write_text(text, "utf-8")


def make_parquet(folder: Path, scale: float) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pieces(library(20 << 20), round(100_000 * scale), 4_000)
    for number in range(len(texts) // 5):
        pq.write_table(pa.table({"text": texts[5 * number : 5 * number + 5]}), folder / f"{number:06d}.parquet")


def make_jsonl(folder: Path, scale: float) -> None:
    texts = pieces(library(20 << 20), round(100_000 * scale), 4_000)
    for number in range(len(texts) // 5):
        rows = texts[5 * number : 5 * number + 5]
        (folder / f"{number:06d}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")


def make_short(folder: Path, scale: float) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = library(20 << 20).encode("ascii", "replace")
    rows = round(1_000_000 * scale)
    for number in range(10):
        starts = np.random.default_rng(number).integers(0, len(data) - 20, rows)
        flat = np.frombuffer(data, np.uint8)[starts[:, None] + np.arange(20)]
        offsets = pa.py_buffer(np.arange(0, 20 * rows + 1, 20, dtype=np.int32))
        texts = pa.StringArray.from_buffers(rows, offsets, pa.py_buffer(flat.tobytes()))
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet")


def make_line(folder: Path, scale: float) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"text": library(round(scale * 220_000_000))}) + "\n", "utf-8")


def make_long(folder: Path, scale: float) -> None:
    text = library(round(scale * 100_000_000))
    for number in range(6):
        (folder / f"{number}.txt").write_text(text[number:], "utf-8")


SHAPES: dict[str, Callable[[Path, float], None]] = {
    "txt": make_txt,
    "parquet": make_parquet,
    "jsonl": make_jsonl,
    "short": make_short,
    "line": make_line,
    "long": make_long,
}


def script(files: list[str], tokenizer: str, out: str) -> int:
    """gigatoken's own file reader and threads, then EOS by one masked assignment, then shards."""
    import gigatoken
    import numpy as np

    kind = files[0].rpartition(".")[2]
    if kind == "parquet":
        source = gigatoken.ParquetFileSource(files, column="text")
    elif kind == "jsonl":
        source = gigatoken.JsonlFileSource(files, field="text")
    else:
        source = gigatoken.TextFileSource(files)
    layout = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json").encode_files(source).layout
    flat, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
    ends = offsets[1:] + np.arange(len(offsets) - 1)
    tokens = np.empty(len(flat) + len(ends), np.uint16)
    is_text = np.ones(len(tokens), np.bool_)
    is_text[ends] = False
    tokens[is_text] = flat
    tokens[ends] = 2
    for number, at in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        np.save(f"{out}/train_{number:06d}.npy", tokens[at : at + SHARD_TOKENS])
    return len(tokens)


def measure(way: str, corpus: Path, tokenizer: str) -> tuple[float, float, int]:
    """Run one way in a process of its own: seconds, peak memory in GB, tokens."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as out:
        if way == "tokenmill":
            line = [sys.executable, "-m", "tokenmill", "pretokenize", f"{out}/root", "--dataset", str(corpus)]
            line += ["--tokenizer", tokenizer, "--shard-size", str(SHARD_TOKENS), "--json", "--quiet"]
        else:
            line = [sys.executable, __file__, str(corpus), "--tokenizer", tokenizer, "--script-into", out]
        seconds, peak, printed = run_measured(line)
        return seconds, peak, json.loads(printed)["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--also", nargs="*", default=[], type=Path, help="parquet corpora of your own")
    parser.add_argument("--script-into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.script_into:
        files = sorted(str(path) for path in arguments.work.rglob("*") if path.is_file())
        print(json.dumps({"tokens": script(files, arguments.tokenizer, arguments.script_into)}))
        return
    corpora = []
    for shape in arguments.shapes:
        folder = arguments.work / f"{shape}-{arguments.scale:g}"
        if not folder.exists():
            making = arguments.work / f"{folder.name}.making"
            making.mkdir(parents=True)
            # In a process of its own: what this one takes would show in the peaks of those it starts.
            maker = multiprocessing.get_context("spawn").Process(target=SHAPES[shape], args=(making, arguments.scale))
            maker.start()
            maker.join()
            making.rename(folder)
        corpora.append(folder)
    corpora += arguments.also
    print(f"{'input':<16} {'M tokens':>9} {'tokenmill':>10} {'script':>9} {'ratio':>6} {'peak GB':>8} {'script GB':>9}")
    for corpus in corpora:
        for path in corpus.rglob("*"):  # so that both sides find it in memory
            if path.is_file():
                path.read_bytes()
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            ours.append(measure("tokenmill", corpus, arguments.tokenizer))
            theirs.append(measure("script", corpus, arguments.tokenizer))
        ratio = statistics.median(b[0] / a[0] for a, b in zip(ours, theirs, strict=True))
        seconds, script_seconds = (statistics.median(each[0] for each in side) for side in (ours, theirs))
        peak, script_peak = (max(each[1] for each in side) for side in (ours, theirs))
        print(
            f"{corpus.name:<16} {ours[0][2] / 1e6:9.1f} {seconds:8.1f} s {script_seconds:7.1f} s {ratio:6.2f} "
            f"{peak:8.2f} {script_peak:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

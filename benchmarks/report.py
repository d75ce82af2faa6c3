"""How long, and in how much memory, the report of a data root is made, and the statistics and orders behind it.

    python benchmarks/report.py WORK --documents 10000000

WORK gets a corpus of short documents (16 words each, a fifth of them twice, in parquet files of 500,000), and its data
root; both are kept for the next time. Each figure is a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from processes import run_measured
from tokenmill.cli.demo import TOKENIZER

WORDS = "the of a model data token train loss batch learning rate deep network language text file shard sample order"
PER_FILE = 500_000


def write_corpus(folder: Path, documents: int) -> None:
    """Files of random words, each document with a language."""
    words = np.array(WORDS.split())
    for number, first in enumerate(range(0, documents, PER_FILE)):
        path = folder / f"{number:03}.parquet"
        if path.exists():
            continue
        count = min(PER_FILE, documents - first)
        rng = np.random.default_rng(number)
        texts = [" ".join(row) for row in words[rng.integers(0, len(words), (count, 16))].tolist()]
        texts[count * 4 // 5 :] = texts[: count - count * 4 // 5]
        langs = pa.array(rng.integers(0, 5, count).astype(str)).dictionary_encode()
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts, "lang": langs}), path, row_group_size=50_000)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--tokenizer", default=str(TOKENIZER))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    corpus, root = args.work / f"corpus-{args.documents}", args.work / f"data-{args.documents}"
    write_corpus(corpus, args.documents)
    line = [sys.executable, "-m", "tokenmill"]
    options = ["--dataset", str(corpus), "--tokenizer", args.tokenizer, "--metadata-column", "lang", "-q"]
    run_measured([*line, "pretokenize", str(root), *options])
    ways = {
        "report": ["report", str(root), "-o", str(args.work / "report.html"), "-q"],
        "stats": ["stats", str(root), "--json"],
        "stats --order": ["stats", str(root), "--order", "--json"],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds, peak_gb, _printed = run_measured([*line, *way])
            found[name].append((seconds, peak_gb))
    print(f"{args.documents:,} documents; medians of {args.rounds} rounds in turns")
    for name, rounds in found.items():
        seconds, peak = (float(np.median(column)) for column in zip(*rounds, strict=True))
        print(f"{name:<14} {seconds:6.1f} s  {peak:5.2f} GB")


if __name__ == "__main__":
    main()

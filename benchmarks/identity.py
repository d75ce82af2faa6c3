"""What the identity of documents costs: whole runs with the hash of each text, with metadata, and without either.

    python benchmarks/identity.py CORPUS --tokenizer DIR [--metadata-column NAME ...] [--rounds 5]

Each way runs in turn, each run in a process of its own; the ratios are taken per round, and their medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from processes import run_measured

PROGRAM = """
import sys
import numpy as np
from tokenmill.encoding import encoder
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe

way, dataset, tokenizer, root, *columns = sys.argv[1:]
if way == "without":
    encoder.text_hashes = lambda documents: np.zeros(len(documents), np.uint64)
columns = columns if way == "metadata" else ()
pretokenize(Recipe(dataset=dataset, tokenizer=tokenizer, shard_size=1 << 24, metadata_columns=tuple(columns)), root)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--metadata-column", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ways = ["without", "hash"] + (["metadata"] if args.metadata_column else [])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in ways if number % 2 else reversed(ways):
            with tempfile.TemporaryDirectory() as root:
                line = [sys.executable, "-c", PROGRAM, way, str(args.corpus), args.tokenizer, root]
                seconds[way].append(run_measured([*line, *args.metadata_column])[0])
    for way in ways:
        ratios = [one / other for one, other in zip(seconds[way], seconds["without"], strict=True)]
        print(
            f"{way:9} {statistics.median(seconds[way]):7.2f} s, "
            f"{statistics.median(ratios):.3f} times the time without ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()

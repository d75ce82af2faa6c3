"""`tokenmill pretokenize` from a directory and from a bucket, whole processes, side by side.

    python benchmarks/remote.py CORPUS --tokenizer DIRECTORY --endpoint-url URL [--rounds 3]

CORPUS is a directory of parquet files, put into the server's bucket `bucket` first; the keys are in
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. The server shares the machine's cores with what it serves.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from consolidate import timed
from transfer import client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--endpoint-url", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for path in sorted(arguments.corpus.glob("*.parquet")):
        client(arguments.endpoint_url).put_object(Bucket="bucket", Key=f"corpus/{path.name}", Body=path.read_bytes())
    bucket = ["s3://bucket/corpus", "--endpoint-url", arguments.endpoint_url]
    ways = {"directory": [str(arguments.corpus)], "bucket": bucket}
    figures: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=arguments.corpus.parent) as folder:
        out = Path(folder) / "out"
        for _ in range(arguments.rounds):
            for way, dataset in ways.items():
                line = [sys.executable, "-m", "tokenmill", "pretokenize", str(out), "--dataset", *dataset]
                figures[way].append(timed([*line, "--tokenizer", str(arguments.tokenizer), "--quiet"]))
                shutil.rmtree(out)
    for way, runs in figures.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        ratio = statistics.median(there[0] / here[0] for there, here in zip(runs, figures["directory"], strict=True))
        print(f"{way:<10} {seconds:6.2f} s  {ratio:5.2f}x  peak {max(peak for _, peak in runs):.2f} GB")


if __name__ == "__main__":
    main()

"""Throughput of `tokenmill pretokenize` against the other ways, whole processes, side by side in one run.

    python benchmarks/pretokenize.py CORPUS --tokenizer DIR [--rounds 3] [--limit-rows N]

CORPUS is a directory of parquet files with a column `text`. Each round runs every way once, in turn,
so that a noisy machine hits all of them; the ratio is taken per round and its median is shown.

    tokenmill   this project, the command line as a user runs it
    script      what a user would write in twenty lines: gigatoken.encode_files + EOS + np.save
    usual       a process pool over HF tokenizers + np.save (on the first --usual-files files, it is slow)
    engine      gigatoken alone, from memory, same threads and spans: the limit; reading and start-up not counted
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from processes import run_measured

SHARD_TOKENS = 1 << 24
WAYS = ("tokenmill", "script", "usual", "engine")


def script(files: list[str], tokenizer: str, out: str) -> int:
    """gigatoken's own file reader and threads, then EOS, then shards."""
    import gigatoken
    import numpy as np

    documents = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json").encode_files(
        gigatoken.ParquetFileSource(files, column="text")
    )
    flat = np.asarray(documents.layout.content.data)
    ends = np.asarray(documents.layout.offsets.data)[1:]
    ends = ends + np.arange(len(ends))
    tokens = np.full(len(flat) + len(ends), 2, np.uint16)
    is_text = np.ones(len(tokens), np.bool_)
    is_text[ends] = False
    tokens[is_text] = flat
    for number, at in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        np.save(f"{out}/train_{number:06d}.npy", tokens[at : at + SHARD_TOKENS])
    return len(tokens)


_worker_tokenizer = None


def _start_worker(path: str) -> None:
    global _worker_tokenizer  # noqa: PLW0603
    import tokenizers

    _worker_tokenizer = tokenizers.Tokenizer.from_file(path)


def _encode_document(text: str) -> object:
    import numpy as np

    return np.array([*_worker_tokenizer.encode(text, add_special_tokens=False).ids, 2], np.uint16)


def usual(files: list[str], tokenizer: str, out: str) -> int:
    """A pool of processes that encode documents, as most published scripts do."""
    import multiprocessing

    import numpy as np
    import pyarrow.parquet as pq

    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def texts() -> Iterator[str]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(1000, columns=["text"]):
                yield from batch.column(0).to_pylist()

    shard = np.empty(SHARD_TOKENS, np.uint16)
    number = filled = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), _start_worker, (f"{tokenizer}/tokenizer.json",)) as pool:
        for document in pool.imap(_encode_document, texts(), chunksize=16):
            rest = document
            while filled + len(rest) >= SHARD_TOKENS:
                room = SHARD_TOKENS - filled
                shard[filled:] = rest[:room]
                np.save(f"{out}/train_{number:06d}.npy", shard)
                rest, number, filled = rest[room:], number + 1, 0
            shard[filled : filled + len(rest)] = rest
            filled += len(rest)
    np.save(f"{out}/train_{number:06d}.npy", shard[:filled])
    return number * SHARD_TOKENS + filled


def engine(files: list[str], tokenizer: str, _: str) -> tuple[int, float]:
    """Encode Arrow spans from memory on as many threads as cores; tokens, seconds."""
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow as pa
    import pyarrow.parquet as pq

    from tokenmill.encoding.gigatoken import GigatokenBackend
    from tokenmill.encoding.tokenizer import load_tokenizer
    from tokenmill.pipeline.allocator import keep_freed_memory
    from tokenmill.pipeline.driver import BATCH_NBYTES

    keep_freed_memory()
    fast = GigatokenBackend(load_tokenizer(tokenizer))
    spans = []
    for file in files:
        text = pq.read_table(file, columns=["text"])["text"].cast(pa.large_string()).combine_chunks()
        rows = -(-len(text) // max(1, round(text.nbytes / BATCH_NBYTES)))
        spans += [text.slice(at, rows) for at in range(0, len(text), rows)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tokens = sum(pool.map(lambda span: len(fast.encode(span)[0]), spans))
    return tokens, time.perf_counter() - begin


def measure(way: str, files: list[str], corpus: str, tokenizer: str) -> dict:
    """Run one way in a process of its own: tokens a second, peak memory."""
    with tempfile.TemporaryDirectory(dir=Path(corpus).parent) as out:
        if way == "tokenmill":
            line = [sys.executable, "-m", "tokenmill", "pretokenize", f"{out}/root", "--dataset", corpus]
            line += ["--tokenizer", tokenizer, "--shard-size", str(SHARD_TOKENS), "--json"]
        else:
            line = [sys.executable, __file__, "--only", way, "--tokenizer", tokenizer, "--out", out, *files]
        seconds, peak, printed = run_measured(line)
        result = json.loads(printed)
        seconds = result.get("engine_seconds", seconds)
        return {"rate": result["tokens"] / seconds / 1e6, "seconds": seconds, "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--usual-files", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--only", choices=WAYS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        result = globals()[arguments.only](arguments.corpus, arguments.tokenizer, arguments.out)
        tokens, seconds = result if isinstance(result, tuple) else (result, None)
        print(json.dumps({"tokens": tokens} | ({"engine_seconds": seconds} if seconds else {})))
        return
    corpus = str(Path(arguments.corpus[0]).absolute())
    files = sorted(map(str, Path(corpus).rglob("*.parquet")))
    rounds = []
    for number in range(arguments.rounds):
        measured = {}
        for way in arguments.ways:
            measured[way] = measure(
                way, files[: arguments.usual_files] if way == "usual" else files, corpus, arguments.tokenizer
            )
            m = measured[way]
            figures = f"{m['rate']:6.2f} M tokens/s {m['seconds']:7.2f} s {m['peak_gb']:5.2f} GB"
            print(f"round {number + 1} {way:<10} {figures}", flush=True)
        rounds.append(measured)
    print(f"\n{'way':<10} {'M tokens/s':>10} {'tokenmill is':>13} {'peak GB':>8}   (medians of {len(rounds)} rounds)")
    for way in arguments.ways:
        rate = statistics.median(r[way]["rate"] for r in rounds)
        ratio = statistics.median(r["tokenmill"]["rate"] / r[way]["rate"] for r in rounds)
        peak = max(r[way]["peak_gb"] for r in rounds)
        print(f"{way:<10} {rate:10.2f} {ratio:12.2f}x {peak:8.2f}")


if __name__ == "__main__":
    main()

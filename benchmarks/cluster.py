"""The Ray engine: speed against threads, what waits in its store, what the driver costs, and a model of large runs.

    python benchmarks/cluster.py CORPUS --tokenizer DIR [--rounds 3]

CORPUS is a directory of parquet files. Ray is started on this machine with as many processors as threads get; both
are warm (a first run is not counted), rounds in turns, the median counts. Then the corpus two and four times, for what
the object store holds; then the driver alone, on made-up lengths; last the arithmetic of 150 Gi tokens on 8 and 64
machines.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill import Recipe, pretokenize
from tokenmill.ray import RayEngine

SHARD_SIZE = 1 << 23

_IN_STORE = re.compile(r"([\d.]+) GB of tokens in its store")


def copies(corpus: Path, count: int, folder: Path) -> Path:
    """The corpus several times, as links."""
    target = folder / f"x{count}"
    target.mkdir()
    for copy in range(count):
        for path in sorted(corpus.glob("*.parquet")):
            (target / f"{copy}-{path.name}").symlink_to(path.resolve())
    return target


def nothing() -> None:
    pass


def throughput(corpus: Path, tokenizer: str, rounds: int) -> tuple[float, float]:
    """Tokens a second and core on Ray, and milliseconds a task."""
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=corpus.parent) as name, RayEngine("local") as engine:
        folder = Path(name)
        recipe = Recipe(dataset=str(corpus), tokenizer=tokenizer, buffer_size=2_000, shard_size=SHARD_SIZE)
        rates: dict[str, list[float]] = {"threads": [], "ray": []}
        for number in range(rounds + 1):
            for way, chosen in (("threads", None), ("ray", engine)):
                summary = pretokenize(recipe, folder / f"{way}-{number}", workers=workers, engine=chosen)
                if number:
                    rates[way].append(summary.tokens / summary.seconds / 1e6)
        ratios = [b / a for a, b in zip(rates["threads"], rates["ray"], strict=True)]
        for way, found in rates.items():
            print(f"{way:8} {statistics.median(found):6.1f} M tokens/s  {[round(rate, 1) for rate in found]}")
        print(f"ray is {statistics.median(ratios):.2f}x threads  {[round(ratio, 2) for ratio in ratios]}")
        for count in (1, 2, 4):
            larger = Recipe(
                dataset=str(copies(corpus, count, folder)),
                tokenizer=tokenizer,
                buffer_size=2_000,
                shard_size=SHARD_SIZE,
            )
            waiting: list[float] = [0.0]
            summary = pretokenize(
                larger,
                folder / f"store-{count}",
                engine=engine,
                on_progress=lambda progress, waiting=waiting: waiting.append(
                    float(_IN_STORE.search(progress.cluster)[1])
                ),
            )
            rate = summary.tokens / summary.seconds / 1e6
            used = shutil.disk_usage("/dev/shm").used / 1e6
            print(
                f"x{count}: {summary.tokens / 1e6:.0f} M tokens, {rate:.1f} M tokens/s; waited at most: "
                f"{max(waiting) * 1e3:.0f} MB; memory the store has ever touched: {used:.0f} MB"
            )
        began = time.perf_counter()
        for future in [engine.submit(nothing) for _ in range(2_000)]:
            future.result()
        task_ms = (time.perf_counter() - began) / 2_000 * 1e3
        print(f"a task that does nothing: {task_ms:.2f} ms")
    return statistics.median(rates["ray"]) * 1e6 / workers, task_ms


class NoEngine:
    """A cluster that does nothing: what is left is the driver."""

    workers, memory_nbytes = 64, 1 << 60

    def share(self, value: object) -> None:
        """Keep nothing."""

    def describe(self) -> str:
        return ""

    def drop(self) -> None:
        """Nothing is under way."""

    def submit(self, task: Any, /, *args: Any) -> Future[Any]:
        from tokenmill.dataroot.manifest import ShardRecord
        from tokenmill.pipeline.tasks import MadeShard, ShardPlan

        plan = next(arg for arg in args if isinstance(arg, ShardPlan))
        pickle.dumps(plan, protocol=5)  # as it would be sent
        record = ShardRecord(plan.shard, plan.tokens, "", 0, "", plan.next_cursor, 0, [])
        done: Future[Any] = Future()
        done.set_result(MadeShard(record, [], 0))
        return done


DRIVER = "import sys; sys.path.insert(0, sys.argv[1]); import cluster; cluster.drive(int(sys.argv[2]))"


def drive(documents: int) -> None:
    """The driver's loop over made-up spans: 1,000 tokens a document, shards of 1 Gi tokens, a buffer of 10,000 rows."""
    from tokenmill.corpus.corpus import Corpus
    from tokenmill.corpus.location import SourceFile
    from tokenmill.corpus.reader import Span
    from tokenmill.dataroot.manifest import FileRecord, Manifest, TokenizerRecord
    from tokenmill.encoding.encoder import EncodedBatch
    from tokenmill.options import StoreOptions
    from tokenmill.pipeline.cluster import ClusterExecutor, _PlannedFile
    from tokenmill.pipeline.driver import Driver
    from tokenmill.pipeline.executor import EncodingResult
    from tokenmill.pipeline.tasks import SPAN_TEXT_NBYTES, TaskContext
    from tokenmill.shards.pack import RemoteTokens
    from tokenmill.shards.recorder import Recorder

    rows = 10_000
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2_000, rows)
    recipe = Recipe(dataset="-", tokenizer="-", dtype="uint16", buffer_size=10_000, shard_size=1 << 30)
    files = documents // rows
    tokenizer = TokenizerRecord("", None, "", 32_000, 2, {})
    names = [f"part-{index:06d}.parquet" for index in range(files)]
    manifest = Manifest(
        recipe=recipe, fingerprint="", tokenizer=tokenizer, software={}, files=[FileRecord(n, 1) for n in names]
    )

    class Executor(ClusterExecutor):
        """Makes up what the tasks would return."""

        def open_files(self, files: Any) -> Iterator[Any]:
            for index in files:
                yield index, _PlannedFile(names[index], [Span(0, rows, 0, SPAN_TEXT_NBYTES)])

        def encode(self, batch: Any) -> Future[EncodingResult]:
            done: Future[EncodingResult] = Future()
            flags, hashes = np.zeros(rows, np.uint8), np.zeros(rows, np.uint64)
            encoded = EncodedBatch(np.empty(0, np.uint16), lengths.copy(), flags, hashes, 0, 0, {})
            done.set_result(EncodingResult(encoded, RemoteTokens(object(), int(lengths.sum()) * 2)))
            return done

    location = types.SimpleNamespace(name="-", retries=0)
    with tempfile.TemporaryDirectory() as root:
        corpus = Corpus(location, tuple(SourceFile(name, 1) for name in names), "text", None)
        encoder = types.SimpleNamespace(dtype=np.dtype("uint16"))
        context = TaskContext(
            corpus, encoder, "error", None, Path(root), 1 << 30, False, None, StoreOptions(), keep_local=False
        )
        executor = Executor(context, manifest, NoEngine(), Recorder(Path(root), manifest))
        driver = Driver(
            files, manifest, executor, first=0, end=None, batch_rows=rows, on_progress=lambda progress: None
        )
        began = time.process_time()
        driver.start()
        driver.run()
        executor.finish()
        spent = time.process_time() - began
        driver.close()
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    seconds = spent / documents * 1e6
    print(f"{documents / 1e6:.0f} M documents: {seconds:.2f} s a million, {peak / 1e3:.0f} MB of memory")


def model(core_rate: float, task_ms: float, document_us: float) -> None:
    """150 Gi tokens, by arithmetic from rates; nothing here is measured at that scale."""
    tokens, token_nbytes, source_nbytes, documents, span_rows = 161e9, 2, 1.7, 161e6, 1e4
    print(
        "model, not measured: 161e9 tokens, 1,000 a document, 1.7 bytes of parquet a token, machines of 32 cores "
        "with 10 Gbit/s"
    )
    for machines, storage in ((8, 5e9), (64, 20e9)):
        crossing = source_nbytes + token_nbytes * (machines - 1) / machines + token_nbytes
        minutes = {
            "encoding": tokens / (machines * 32 * core_rate) / 60,
            "the driver": (documents * document_us / 1e6 + documents / span_rows * 2 * task_ms / 1e3) / 60,
            "each machine's network": tokens * crossing / machines / (10e9 / 8) / 60,
            f"shared storage at {storage / 1e9:.0f} GB/s": tokens * (token_nbytes + source_nbytes) / storage / 60,
        }
        longest = max(minutes, key=lambda name: minutes[name])
        parts = ", ".join(f"{name} {each:.1f} min" for name, each in minutes.items())
        print(f"  {machines} machines: {parts}; first to saturate: {longest}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("tokenmill").setLevel(logging.ERROR)
    core_rate, task_ms = throughput(options.corpus, options.tokenizer, options.rounds)
    for documents in (1_000_000, 4_000_000):
        program = [sys.executable, "-c", DRIVER, Path(__file__).parent, str(documents)]
        line = subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip()
        print(f"driver: {line}")
    model(core_rate, task_ms, float(line.split()[3]))


if __name__ == "__main__":
    main()

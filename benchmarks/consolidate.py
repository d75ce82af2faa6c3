"""`tokenmill consolidate` against the original's way and against the floor, whole processes, side by side.

    python benchmarks/consolidate.py FOLDER [--gigabytes 2] [--shard-megabytes 256] [--rounds 3]

Makes shards of random tokens with a manifest in FOLDER, then runs every way once a round, in turn. With
more gigabytes than the machine has memory, nothing is in the cache when it is read.

    tokenmill   the command line as a user runs it, validation on
    original    load each shard, copy it into a memmap, ids in a Python loop, read all again for SHA-256
    cp          cp of the shards: no hash, no sync
    sha256sum   sha256sum of the shards: nothing written
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from tokenmill.dataroot import layout, manifest
from tokenmill.dataroot.manifest import Count, Cursor, FileLedger, FileRecord, Manifest, ShardRecord, TokenizerRecord
from tokenmill.recipe import Recipe

SEQ_LEN = 2048
WAYS = ("tokenmill", "original", "cp", "sha256sum")


def make_shards(root: Path, nbytes: int, shard_nbytes: int) -> None:
    """Shards of random tokens, and the manifest that tokenmill would have written with them."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    size = shard_nbytes // 2
    recipe = Recipe(dataset="random", tokenizer="random", dtype="uint16", eos_token="</s>", shard_size=size)
    records = []
    for index in range(nbytes // shard_nbytes):
        path = root / layout.shard_name(index)
        np.save(path, rng.integers(0, 32_000, size, dtype=np.uint16))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        cursor, count = Cursor(index + 1), Count(0, documents=1)
        records.append(ShardRecord(index, size, sha256, 1, "", cursor, path.stat().st_mtime_ns, [count]))
    shards = len(records)
    made = Manifest(
        complete=True,
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=TokenizerRecord("random", None, "", 32_000, 2, {}),
        software={},
        files=[FileRecord("random", 0, shards)],
        shards=records,
        tokens=shards * size,
        documents=shards,
        ledger=[FileLedger("random", shards, shards, 0, 0, 0, 0)],
    )
    manifest.save(root, made)


def original(root: Path, out: Path) -> None:
    """What the script it replaces does."""
    shards = sorted(root.glob("train_*.npy"))
    total = sum(np.load(path, mmap_mode="r").shape[0] for path in shards)
    tokens = np.memmap(out / "tokens.bin", np.uint16, "w+", shape=(total,))
    at = 0
    for path in shards:
        shard = np.load(path)
        tokens[at : at + len(shard)] = shard
        at += len(shard)
    tokens.flush()
    del tokens
    view = np.memmap(out / "tokens.bin", np.uint16, "r").view(np.uint32)
    ids = np.empty(total // SEQ_LEN, np.uint64)
    for i in range(len(ids)):
        window = view[i * SEQ_LEN : (i + 1) * SEQ_LEN].tobytes()
        ids[i] = struct.unpack("<Q", hashlib.blake2b(window, digest_size=8).digest())[0]
    ids.tofile(out / "sample_ids.bin")
    for name in ("tokens.bin", "sample_ids.bin"):
        sha256 = hashlib.sha256()
        with (out / name).open("rb") as file:
            while chunk := file.read(64 << 20):
                sha256.update(chunk)
        print(sha256.hexdigest())


def own_nbytes(pid: int) -> int:
    """Memory of a process and its children, without mapped files, which are not their own."""
    proc = Path(f"/proc/{pid}")
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", (proc / "status").read_text())
        children = " ".join(path.read_text() for path in proc.glob("task/*/children")).split()
    except OSError:  # it has ended
        return 0
    return (int(found[1]) * 1024 if found else 0) + sum(own_nbytes(int(child)) for child in children)


class Peak:
    """Most memory that a process and its children had at once, looked at rarely: looking costs a core's time."""

    def __init__(self, pid: int) -> None:
        self.nbytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.3):
            self.nbytes = max(self.nbytes, own_nbytes(self._pid))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.nbytes


def timed(line: list[str]) -> tuple[float, float]:
    """Seconds and peak gigabytes of a command."""
    os.sync()
    begin = time.perf_counter()
    run = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    peak = Peak(run.pid)
    code = run.wait()
    seconds = time.perf_counter() - begin
    nbytes = peak.stop()
    if code:
        raise SystemExit(f"{' '.join(line)} failed")
    return seconds, nbytes / 1e9


def measure(way: str, root: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of one way; what it wrote is removed."""
    out = root.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shards = sorted(map(str, root.glob("train_*.npy")))
    line = {
        "tokenmill": [sys.executable, "-m", "tokenmill", "consolidate", str(root), "--quiet"],
        "original": [sys.executable, __file__, "--only-original", str(out), str(root)],
        "cp": ["cp", *shards, str(out)],
        "sha256sum": ["sha256sum", *shards],
    }[way]
    measured = timed(line)
    shutil.rmtree(out)
    for name in (layout.TOKENS, layout.SAMPLE_IDS, layout.CONSOLIDATED):
        (root / name).unlink(missing_ok=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--shard-megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-original", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_original:
        original(arguments.folder, arguments.only_original)
        return
    root = arguments.folder / "consolidate-benchmark"
    make_shards(root, int(arguments.gigabytes * 1e9), arguments.shard_megabytes * 1_000_000)
    gigabytes = sum(path.stat().st_size for path in root.glob("train_*.npy")) / 1e9
    rounds = []
    try:
        for number in range(arguments.rounds):
            rounds.append({way: measure(way, root) for way in WAYS})
            figures = "  ".join(f"{way} {rounds[-1][way][0]:.1f} s" for way in WAYS)
            print(f"round {number + 1}: {figures}", flush=True)
    finally:
        shutil.rmtree(root)
    print(f"\n{gigabytes:.2f} GB in shards of {arguments.shard_megabytes} MB, medians of {len(rounds)} rounds")
    print(f"{'way':<10} {'GB/s':>6} {'tokenmill is':>13} {'peak GB':>8}")
    for way in WAYS:
        seconds = statistics.median(r[way][0] for r in rounds)
        ratio = statistics.median(r[way][0] / r["tokenmill"][0] for r in rounds)
        print(f"{way:<10} {gigabytes / seconds:6.2f} {ratio:12.2f}x {max(r[way][1] for r in rounds):8.2f}")
    floor = statistics.median(max(r["cp"][0], r["sha256sum"][0]) / r["tokenmill"][0] for r in rounds)
    print(f"against the slower of cp and sha256sum: {floor:.2f}x")


if __name__ == "__main__":
    main()

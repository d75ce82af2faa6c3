"""Exports: how long they take beside `cp` of the tokens, and beside the writers of other projects.

    python benchmarks/export.py FOLDER [--gigabytes 2] [--documents 2_000_000] [--peers PYTHON] [--rounds 3]

Makes up a data root below FOLDER, of random tokens and as many documents, by importing them, with `tokens.bin`. Exports
it as each format, in a process of its own, with `--copy` (nothing is linked), and as Megatron with a link, which is the
time of the `.idx`; beside each round `cp` copies `tokens.bin`. Each time ends with `sync`. With `--peers`, a Python
that has megatron-core, mosaicml-streaming and litdata (`make interop`), their writers write the same documents or
samples.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from processes import run_measured
from tokenmill import consolidate, import_data
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout

PEERS = {
    "megatron": """
import sys, numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
tokens, starts, out = np.memmap(sys.argv[1], np.uint16, "r"), np.load(sys.argv[2]), sys.argv[3]
builder = IndexedDatasetBuilder(out + ".bin", dtype=np.uint16)
for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
    builder.add_document(tokens[begin:end], [end - begin])
builder.finalize(out + ".idx")
""",
    "mds": """
import sys, warnings, numpy as np
warnings.simplefilter("ignore")
from streaming import MDSWriter
tokens, out = np.memmap(sys.argv[1], np.uint16, "r"), sys.argv[3]
with MDSWriter(out=out, columns={"tokens": "ndarray:uint16:2048"}, hashes=["sha256"]) as writer:
    for at in range(0, len(tokens) - 2047, 2048):
        writer.write({"tokens": tokens[at : at + 2048]})
""",
    "litdata": """
import sys, numpy as np
from litdata.streaming.item_loader import TokensLoader
from litdata.streaming.writer import BinaryWriter
tokens, starts, out = np.memmap(sys.argv[1], np.uint16, "r"), np.load(sys.argv[2]), sys.argv[3]
import os; os.makedirs(out)
writer = BinaryWriter(out, chunk_bytes=64_000_000, item_loader=TokensLoader(2048))
for number, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
    writer[number] = np.asarray(tokens[begin:end])
writer.done(); writer.merge()
""",
}


def make_up(folder: Path, root: Path, tokens: int, documents: int) -> None:
    """A data root of random tokens; each document ends with EOS."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 2 * tokens // documents, documents)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    stream = rng.integers(3, 4_096, bounds[-1], dtype=np.uint16)
    stream[bounds[1:] - 1] = 2
    stream.tofile(folder / "tokens.bin")
    np.save(folder / "document_offsets.npy", bounds)
    began = time.perf_counter()
    import_data(folder, root, "torchtitan", dtype="uint16", tokenizer=str(TOKENIZER))
    os.sync()
    print(f"imported: {tokens / (time.perf_counter() - began) / 1e6:.0f} M tokens/s")
    consolidate(root)
    shutil.rmtree(folder)


def timed(line: list[str], out: Path) -> tuple[float, float]:
    """Seconds until all is on the disk, and peak memory in GB."""
    for path in (out, out.with_suffix(".bin"), out.with_suffix(".idx")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    _, peak_gb, _ = run_measured(line)
    os.sync()
    return time.perf_counter() - began, peak_gb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    root, out = args.folder / "root", args.folder / "out"
    if not (root / layout.CONSOLIDATED).exists():
        how = args.folder / "made", root, round(args.gigabytes * 1e9 / 2), args.documents
        process = multiprocessing.get_context("spawn").Process(target=make_up, args=how)
        process.start()  # what is measured begins with the memory of this process
        process.join()
    tokens = root / layout.TOKENS
    export = [sys.executable, "-m", "tokenmill", "export", str(root), str(out), "-q", "--to"]
    ways = {"cp": ["cp", str(tokens), str(out)], "megatron, linked": [*export, "megatron"]}
    for name in ("megatron", "nanogpt", "llmc", "olmo", "datatrove", "mds", "litdata", "parquet"):
        ways[name] = [*export, name, "--copy"]
    if args.peers:
        starts = args.folder / "starts.npy"
        subprocess.run([sys.executable, "-c", STARTS, str(root), str(starts)], check=True)
        for name, program in PEERS.items():
            ways[f"their {name}"] = [str(args.peers), "-c", program, str(tokens), str(starts), str(out)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, line in ways.items():
            found[name].append(timed(line, out))
    for name, runs in found.items():
        ratios = [cp[0] / run[0] for cp, run in zip(found["cp"], runs, strict=True)]
        seconds = statistics.median(run[0] for run in runs)
        peak = max(run[1] for run in runs)
        print(f"{name:18} {seconds:7.2f} s  {statistics.median(ratios):5.2f} of cp's speed  {peak:5.2f} GB at most")


STARTS = """
import sys, numpy as np
from pathlib import Path
from tokenmill.loading.view import open_root
found = open_root(Path(sys.argv[1]))
tokens = found.tokens().tokens
np.save(sys.argv[2], np.append(found.documents().starts_between(0, tokens), tokens))
"""


if __name__ == "__main__":
    main()

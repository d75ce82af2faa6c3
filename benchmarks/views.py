"""Views at scale: how long it takes to build, open, read and write one, and how much memory.

    python benchmarks/views.py FOLDER [--documents 100_000_000] [--sources 100] [--write-gb 6]

Makes up data roots below FOLDER. First one with as many gigabytes of real tokens: a view of it that shuffles documents
is written out, once with documents read where they lie, once through files on disk, and beside both `cp` copies its
tokens. Before each, what the system caches of files is dropped, where this process may (as root on Linux). Then as many
documents in as many sources, as sidecars beside sparse files of tokens: a view of all of them is built, then opened,
and samples at random places are read, warm. Last, a hundredth of 100,000 documents is removed from a view. What is
measured is a process of its own, but for that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from processes import run_measured
from tokenmill import TokenDataset
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.dataroot.manifest import Consolidated, Count, Cursor, FileRecord, Manifest, ShardRecord, TokenizerRecord
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.loading.view import open_root
from tokenmill.recipe import Recipe
from tokenmill.shards.ledger import balance
from tokenmill.shards.shard import DOCUMENTS_ROW_GROUP, Documents
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

MEAN_TOKENS = 1_000
SHARD_DOCUMENTS = 1_000_000


def make_up(root: Path, documents: int, *, seed: int, sparse: bool) -> None:
    """A finished data root of documents with random lengths and hashes, its tokens in one file."""
    if (root / layout.MANIFEST).exists():
        return
    root.mkdir(parents=True)
    recipe = Recipe(
        dataset="made up", tokenizer=str(TOKENIZER), dtype="uint16", eos_token="</s>", shard_size=1 << 27, seq_len=2_048
    )
    tokenizer = TokenizerRecord(str(TOKENIZER), None, "0" * 64, 4_096, 2, {})
    files = [FileRecord("a.parquet", 1, documents)]
    record = Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=tokenizer,
        software={},
        files=files,
        documents_version=layout.DOCUMENTS_VERSION,
        documents=documents,
    )
    rng = np.random.default_rng(seed)
    shards: list[ShardRecord] = []
    position = 0
    sizes = [min(SHARD_DOCUMENTS, documents - at) for at in range(0, documents, SHARD_DOCUMENTS)]
    for index, count in enumerate(sizes):
        lengths = rng.integers(2, 2 * MEAN_TOKENS, count)
        lengths[-1] += -int(lengths.sum()) % 2
        starts = position + np.cumsum(lengths) - lengths
        writer = Documents(root / layout.documents_name(index), pa.array(["a.parquet"]), documents_schema(record))
        hashes = rng.integers(0, 1 << 63, count)
        rows = np.arange(count) + index * SHARD_DOCUMENTS
        for at in range(0, count, DOCUMENTS_ROW_GROUP):
            part = slice(at, at + DOCUMENTS_ROW_GROUP)
            columns = (starts[part], lengths[part], rows[part], hashes[part], np.zeros(len(rows[part]), np.int64))
            writer.append(np.stack(columns), None)
        sha256 = writer.publish()
        tokens = int(lengths.sum())
        position += tokens
        cursor = Cursor((index + 1) * SHARD_DOCUMENTS if index + 1 < len(sizes) else documents)
        shards.append(ShardRecord(index, tokens, f"{seed:064x}", count, sha256, cursor, 0, [Count(0, count)]))
    with (root / layout.TOKENS).open("wb") as file:
        if sparse:
            file.truncate(2 * position)
        else:
            for at in range(0, position, 1 << 24):
                rng.integers(0, 4_096, min(1 << 24, position - at), dtype=np.uint16).tofile(file)
    (root / layout.SAMPLE_IDS).write_bytes(b"")
    record.shards, record.tokens, record.complete = shards, position, True
    balance(root, record)
    manifest.save(root, record)
    joined = Consolidated(dtype="uint16", seq_len=2_048, id_scheme="blake2b-64", tokens=position, complete=True)
    manifest.save_consolidated(root, joined)


def apart(task: Callable[..., None], *arguments: object, **options: object) -> None:
    """Call a function in a process of its own: a process that is measured begins with the memory of this one."""
    process = multiprocessing.get_context("spawn").Process(target=task, args=arguments, kwargs=options)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{task.__name__} failed")


def spec(folder: Path, roots: list[Path]) -> Path:
    path = folder / "view.toml"
    sources = "".join(f'[[sources]]\nname = "{root.name}"\nroot = "{root.name}"\n\n' for root in roots)
    path.write_text(f"seq_len = 2048\nseed = 1\nholdout = 0.001\n\n{sources}")
    return path


def drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def scale(folder: Path, documents: int, sources: int) -> None:
    roots = [folder / f"source{number}" for number in range(sources)]
    for number, root in enumerate(roots):
        apart(make_up, root, documents // sources, seed=number, sparse=True)
    shutil.rmtree(folder / "view", ignore_errors=True)
    line = [sys.executable, "-m", "tokenmill", "view", "build", str(spec(folder, roots)), str(folder / "view"), "-q"]
    seconds, peak_gb, _ = run_measured(line)
    nbytes = sum((folder / "view" / name).stat().st_size for name in (layout.VIEW_BEGINS, layout.VIEW_PLACES))
    print(f"{documents:,} documents in {sources} sources: built in {seconds:.0f} s, {peak_gb:.2f} GB at most")
    print(f"the index takes {nbytes / documents:.1f} bytes a document")
    began = time.perf_counter()
    dataset = TokenDataset(folder / "view")
    print(f"opened in {1e3 * (time.perf_counter() - began):.0f} ms")
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(dataset), 2_000).tolist()
    for _ in range(3):  # what is read for the first time is not warm, nor what is mapped for the second
        began = time.perf_counter()
        for number in chosen:
            dataset[number]
        seconds = time.perf_counter() - began
    print(f"a random sample: {1e6 * seconds / len(chosen):.0f} us, warm")


def removal(folder: Path, documents: int) -> None:
    """A hundredth of the documents, by row, is taken out of a view."""
    root = folder / "removal"
    apart(make_up, root, documents, seed=2, sparse=True)
    rows = np.random.default_rng(0).choice(documents, documents // 100, replace=False).tolist()
    (folder / "takedown.txt").write_text("".join(f"a.parquet {row}\n" for row in rows))
    found = []
    for name, remove in (("all", None), ("rest", str(folder / "takedown.txt"))):
        shutil.rmtree(folder / name, ignore_errors=True)
        began = time.perf_counter()
        source = ViewSource(name="web", root=str(root), remove=remove)
        build_view(ViewSpec(sources=[source], seed=1), folder / name)
        found.append((len(open_root(folder / name).open_index().places), time.perf_counter() - began))
    (everything, seconds), (rest, seconds_removed) = found
    assert everything - rest == len(rows)
    print(f"a view of {everything:,} documents in {seconds:.2f} s; {len(rows):,} removed: {seconds_removed:.2f} s")


def written(folder: Path, gigabytes: float) -> None:
    root = folder / "real"
    apart(make_up, root, int(gigabytes * 1e9 / 2 / MEAN_TOKENS), seed=1, sparse=False)
    tokens = manifest.load(root).tokens
    shutil.rmtree(folder / "view", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "tokenmill", "view", "build", spec(folder, [root]), folder / "view", "-q"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    ways = {
        "cp": ["cp", str(root / layout.TOKENS), str(folder / "copy")],
        "view write, read where they lie": [sys.executable, "-c", WRITE, str(folder / "view"), str(folder / "out"), ""],
        "view write, through files": [sys.executable, "-c", WRITE, str(folder / "view"), str(folder / "out"), "x"],
    }
    for name, line in ways.items():
        shutil.rmtree(folder / "out", ignore_errors=True)
        drop_caches()
        began = time.monotonic()
        _, peak_gb, _ = run_measured(line)
        subprocess.run(["sync"], check=True)
        seconds = time.monotonic() - began
        print(f"{name:34} {seconds:6.1f} s {tokens / seconds / 1e6:6.0f} M tokens/s {peak_gb:6.2f} GB at most")
        (folder / "copy").unlink(missing_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


def larger(folder: Path, gigabytes: float) -> None:
    """Write a view of a source that takes no room on the disk itself, so that one larger than memory is soon tried."""
    root = folder / "real"
    documents = int(gigabytes * 1e9 / 2 / MEAN_TOKENS)
    apart(make_up, root, documents, seed=1, sparse=True)
    build = [sys.executable, "-m", "tokenmill", "view", "build", spec(folder, [root]), folder / "view", "-q"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    _, peak_gb, _ = run_measured([sys.executable, "-c", WRITE, str(folder / "view"), str(folder / "out"), "x"])
    rate = manifest.load(root).tokens / (time.monotonic() - began) / 1e6
    print(f"view write, {gigabytes} GB sparse, {documents:,} documents: {rate:.0f} M tokens/s {peak_gb:.2f} GB at most")
    shutil.rmtree(folder)


WRITE = """
import sys
from tokenmill.views.write import write_view
write_view(sys.argv[1], sys.argv[2], through_disk=bool(sys.argv[3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--sources", type=int, default=100)
    parser.add_argument("--write-gb", type=float, default=6.0)
    parser.add_argument("--sparse-gb", type=float, help="write a view of so large a source, a sparse file, and no more")
    options = parser.parse_args()
    if options.sparse_gb:
        larger(options.folder / "larger", options.sparse_gb)
        return
    written(options.folder / "write", options.write_gb)
    scale(options.folder / "scale", options.documents, options.sources)
    removal(options.folder / "scale", min(options.documents, 100_000))


if __name__ == "__main__":
    main()

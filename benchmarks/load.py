"""How fast samples reach a trainer: tokenmill against Templar's class, nanoGPT's way, LitData and MosaicML Streaming.

    python benchmarks/load.py FOLDER [--samples 200000] [--seconds 3]

Writes random tokens to FOLDER (0.8 GB for 200,000 samples of 2048, once for each format) and reads batches of
64 x 2048 as int64 tensors at random indices, warm cache, without and with two worker processes. All ways take turns,
three rounds; the median counts. `np.take` is one gather from a memmap into an array that is there already, of
the stored 16-bit type: the limit, in the mode that does not buffer its output, as by default it does. Peers that
are not installed are left out. They need

    pip install --no-deps litdata mosaicml-streaming
    pip install lightning-utilities boto3 tqdm Brotli "python-snappy<1" xxhash zstd catalogue "transformers<5" pillow
"""

from __future__ import annotations

import argparse
import importlib.machinery
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tokenmill import EpochSampler
from tokenmill import TokenDataset as NumPyDataset
from tokenmill.torch import TokenDataset
from tokenmill.torch import loader as our_loader

BATCH, SEQ_LEN, ROUNDS = 64, 2048, 3


def write(folder: Path, samples: int) -> None:
    """`tokens.bin` and `sample_ids.bin` as the original scripts leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokens.bin"
    if path.exists() and path.stat().st_size == samples * SEQ_LEN * 2:
        return
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(0, samples, 1000):
            rng.integers(0, 32_000, 1000 * SEQ_LEN, dtype=np.uint16).tofile(file)
    rng.integers(0, 1 << 63, samples, dtype=np.uint64).tofile(folder / "sample_ids.bin")


class TemplarWay(Dataset):
    """What Templar's own class does: the file as a tensor, a slice of it a sample; PyTorch collates."""

    def __init__(self, folder: Path) -> None:
        self.tokens = torch.from_numpy(np.memmap(folder / "tokens.bin", np.uint16, "c"))

    def __len__(self) -> int:
        return len(self.tokens) // SEQ_LEN

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN]


def widened(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As int64, where the data set gives the stored type."""
    for batch in batches:
        yield batch.long()


def nanogpt_batches(folder: Path, samples: int) -> Iterator[torch.Tensor]:
    """nanoGPT's get_batch: a memmap, a cast and a tensor for every sample, stacked; random places."""
    rng = np.random.default_rng(1)
    while True:
        data = np.memmap(folder / "tokens.bin", np.uint16, "r")  # anew each time, as it does against a memory leak
        places = rng.integers(0, samples, BATCH) * SEQ_LEN
        yield torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in places])


def take_batches(folder: Path, samples: int, mode: str) -> Iterator[np.ndarray]:
    rows = np.memmap(folder / "tokens.bin", np.uint16, "r").reshape(-1, SEQ_LEN)
    out = np.empty((BATCH, SEQ_LEN), np.uint16)
    rng = np.random.default_rng(1)
    while True:
        yield np.take(rows, rng.integers(0, samples, BATCH), axis=0, out=out, mode=mode)


def litdata_set(folder: Path, samples: int) -> Dataset | None:
    """A map-style view of its StreamingDataset; as many chunks stay open as it lets stay."""
    os.environ.setdefault("DATA_OPTIMIZER_CACHE_FOLDER", str(folder / "lit-cache"))
    os.environ.setdefault("DATA_OPTIMIZER_DATA_CACHE_FOLDER", str(folder / "lit-data"))
    try:
        import litdata
    except ImportError:
        return None
    out = folder / "litdata"
    if not out.exists():
        litdata.optimize(
            fn=_lit_rows,
            inputs=[(str(folder / "tokens.bin"), i, i + 1000) for i in range(0, samples, 1000)],
            output_dir=str(out),
            chunk_bytes="64MB",
            item_loader=litdata.TokensLoader(),
            num_workers=1,
            reorder_files=False,
            keep_data_ordered=True,
            verbose=False,
        )

    class MapStyle(Dataset):
        def __init__(self) -> None:
            loader = litdata.TokensLoader(block_size=SEQ_LEN)
            self.data = litdata.StreamingDataset(str(out), item_loader=loader, max_pre_download=1024)

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> np.ndarray:
            return self.data[int(index)]

    return MapStyle()


def _lit_rows(part: tuple[str, int, int]) -> Iterator[np.ndarray]:
    path, begin, end = part
    rows = np.memmap(path, np.uint16, "r").reshape(-1, SEQ_LEN)
    for i in range(begin, end):
        yield np.array(rows[i])


def mosaic_set(folder: Path, samples: int) -> Dataset | None:
    spec = importlib.machinery.PathFinder.find_spec("streaming")
    if spec is None:
        return None
    # Its __init__ imports torchvision for a part that is not used here.
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["streaming"] = package
    from streaming.base import LocalDataset, MDSWriter

    out = folder / "mosaic"
    if not out.exists():
        columns = {"tokens": f"ndarray:uint16:{SEQ_LEN}"}
        with MDSWriter(
            out=str(out), columns=columns, compression=None, size_limit=1 << 26, progress_bar=False
        ) as writer:
            for row in np.memmap(folder / "tokens.bin", np.uint16, "r").reshape(-1, SEQ_LEN):
                writer.write({"tokens": row})
    return LocalDataset(str(out))


def stack(rows: list[Any]) -> torch.Tensor:
    """One pass over what the peers give for a sample: stacked and widened."""
    return torch.from_numpy(np.stack([row["tokens"] if isinstance(row, dict) else row for row in rows], dtype=np.int64))


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Batches a second, once warm."""
    until = time.perf_counter() + seconds / 3
    for _ in batches:
        if time.perf_counter() > until:
            break
    began = time.perf_counter()
    for count, _ in enumerate(batches, start=1):
        if (spent := time.perf_counter() - began) > seconds:
            return count / spent
    raise AssertionError("the batches ended")


def endless(data: Dataset) -> RandomSampler:
    return RandomSampler(data, replacement=True, num_samples=1 << 40)


def loader(data: Dataset, workers: int, collate_fn: Callable[..., Any] | None = None) -> Iterator[torch.Tensor]:
    return iter(DataLoader(data, BATCH, sampler=endless(data), num_workers=workers, collate_fn=collate_fn))


def ways(folder: Path, samples: int) -> dict[tuple[str, int], Callable[[], Iterator[Any]]]:
    """Each way with each number of worker processes, as something that begins it."""
    ours = TokenDataset(folder, seq_len=SEQ_LEN, stored_dtype="uint16")
    stored = TokenDataset(folder, seq_len=SEQ_LEN, stored_dtype="uint16", dtype=None)
    rng = np.random.default_rng(2)
    found: dict[tuple[str, int], Callable[[], Iterator[Any]]] = {
        ("np.take, 16 bits", 0): lambda: take_batches(folder, samples, "clip"),
        ("np.take as it is by default", 0): lambda: take_batches(folder, samples, "raise"),
        ("tokenmill ds[indices]", 0): lambda: (ours[rng.integers(0, samples, BATCH).tolist()] for _ in iter(int, 1)),
        ("tokenmill ds[indices], 16 bits", 0): lambda: (
            stored[rng.integers(0, samples, BATCH).tolist()] for _ in iter(int, 1)
        ),
        ("nanoGPT", 0): lambda: nanogpt_batches(folder, samples),
    }
    peers = {"litdata": litdata_set(folder, samples), "mosaicml-streaming": mosaic_set(folder, samples)}
    for workers in (0, 2):
        found["tokenmill loader", workers] = lambda workers=workers: iter(
            our_loader(ours, endless(ours), batch_size=BATCH, num_workers=workers)
        )
        found["tokenmill, a plain DataLoader", workers] = lambda workers=workers: loader(ours, workers)
        found["Templar's class", workers] = lambda workers=workers: widened(loader(TemplarWay(folder), workers))
        for name, data in peers.items():
            if data is not None:
                found[name, workers] = lambda workers=workers, data=data: loader(data, workers, stack)
    return found


OPENING = """
import sys, time
import numpy as np
from tokenmill import TokenDataset
began = time.perf_counter()
dataset = TokenDataset(sys.argv[1], seq_len=2048, dtype="uint16")
opened = time.perf_counter()
batch = dataset[np.random.default_rng(0).integers(0, len(dataset), 64)]
print(len(dataset), 1e3 * (opened - began), 1e3 * (time.perf_counter() - began))
"""


def opening(folder: Path) -> None:
    """100 million samples in a sparse file: opened and the first batch there, in milliseconds; imports left out."""
    folder.mkdir(exist_ok=True)
    for name, nbytes in (("tokens.bin", 100_000_000 * SEQ_LEN * 2), ("sample_ids.bin", 100_000_000 * 8)):
        with (folder / name).open("wb") as file:
            file.truncate(nbytes)
    times = []
    for _ in range(5):
        line = subprocess.run(
            [sys.executable, "-c", OPENING, folder], capture_output=True, text=True, check=True
        ).stdout
        times.append([float(word) for word in line.split()[1:]])
    opened, batch = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"100,000,000 samples: open after {opened:.1f} ms, first batch after {batch:.1f} ms")


def sampling() -> None:
    for size in (10**7, 10**10):
        sampler = EpochSampler(size, 0)
        began = time.perf_counter()
        sampler.indices(0, 1 << 20)
        print(f"EpochSampler of {size:.0e}: {(time.perf_counter() - began) / (1 << 20) * 1e9:.0f} ns a sample")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(options.folder, options.samples)
    rows = NumPyDataset(options.folder, seq_len=SEQ_LEN, dtype="uint16")
    for begin in range(0, len(rows), 4096):  # into the cache
        rows[begin : begin + 4096][:, ::64].sum()
    rates: dict[tuple[str, int], list[float]] = {}
    begin_ways = ways(options.folder, options.samples)
    multiprocessing.set_start_method("fork", force=True)  # litdata makes "spawn" the default: all are measured alike
    for _ in range(ROUNDS):
        for way, begin in begin_ways.items():
            rates.setdefault(way, []).append(rate(begin(), options.seconds))
    medians = {way: statistics.median(found) for way, found in rates.items()}
    limit = medians["np.take, 16 bits", 0]
    print(f"{'':32} {'workers':>7} {'batches/s':>10} {'M tokens/s':>11} {'of np.take':>10} {'tokenmill is':>13}")
    for (name, workers), found in medians.items():
        ours = medians["tokenmill loader", workers] / found
        tokens = found * BATCH * SEQ_LEN / 1e6
        print(f"{name:32} {workers:7} {found:10,.0f} {tokens:11,.0f} {found / limit:9.0%} {ours:12.2f}x")
    sampling()
    with suppress(OSError):  # a file system without sparse files of that size
        opening(options.folder / "sparse")


if __name__ == "__main__":
    main()

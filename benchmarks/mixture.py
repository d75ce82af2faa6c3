"""Mixtures and packing: how fast batches with all fields come, beside others' mixtures, and what packing takes.

    make interop && .venv/bin/python benchmarks/mixture.py FOLDER [--documents 50_000] [--sources 1000] [--packed 1e8]

Makes up four data roots below FOLDER and mixes them by weight. Measured are batches of 64 x 2048 from a warm cache, in
this process: those of a mixture, cut and packed, with all seven fields; the tokens alone of a plain data root; and the
tokens alone of the same four sources, exported, as LitData's CombinedStreamingDataset, MosaicML's StreamingDataset with
proportions, and Megatron-core's BlendedDataset give them (from `.venv/interop`, where that is). All ways take turns,
three rounds, and the median counts. Then a mixture of as many sources is opened in a new process, and its first batch
is read. Last, documents of log-normal lengths are packed, one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from processes import run_measured
from tokenmill import ViewSource, ViewSpec, build_view, export
from views import make_up

SEQ_LEN = 2_048
WEIGHTS = {"web": 0.5, "code": 0.25, "wiki": 0.15, "books": 0.1}
REPOSITORY = Path(__file__).resolve().parents[1]
INTEROP = REPOSITORY / ".venv" / "interop" / "bin" / "python"

OURS = """
from tokenmill import SequentialSampler, EpochSampler
from tokenmill.torch import TokenDataset, loader
begin = time.perf_counter()
FIELDS = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen", "source")
dataset = TokenDataset(sys.argv[1], fields=FIELDS if {fields} else None)
is_mixture = len(dataset.sources) > 1
sampler = SequentialSampler(len(dataset)) if is_mixture else EpochSampler(len(dataset), seed=1)
batches = loader(dataset, sampler, batch_size=64)
"""

PEERS = {
    "litdata": """
import litdata
from torch.utils.data import DataLoader
begin = time.perf_counter()
weights, folder = json.loads(sys.argv[2]), f"{sys.argv[1]}/litdata"
parts = [
    litdata.StreamingDataset(f"{folder}/{name}/train", item_loader=litdata.TokensLoader(2048), shuffle=True)
    for name in weights
]
mixed = litdata.CombinedStreamingDataset(parts, weights=list(weights.values()), iterate_over_all=False, seed=1)
batches = litdata.StreamingDataLoader(mixed, batch_size=64)
""",
    "mosaicml-streaming": """
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader
begin = time.perf_counter()
weights = json.loads(sys.argv[2])
streams = [Stream(local=f"{sys.argv[1]}/mds/{name}/train", proportion=weight) for name, weight in weights.items()]
mixed = StreamingDataset(streams=streams, batch_size=64, shuffle=True)
batches = DataLoader(mixed, batch_size=64)
""",
    "megatron-core": """
import torch
from torch.utils.data import DataLoader
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
begin = time.perf_counter()
weights = json.loads(sys.argv[2])
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
class Tokenizer:
    vocab_size, eod, unique_identifiers = 4096, 2, {"made": "up"}
config = GPTDatasetConfig(
    random_seed=1, sequence_length=2048, split="1,0,0", tokenizer=Tokenizer(),
    path_to_cache=f"{sys.argv[1]}/megatron-cache",
    blend=([f"{sys.argv[1]}/megatron/{name}/train" for name in weights], list(weights.values())),
    reset_position_ids=True, reset_attention_mask=False, eod_mask_loss=True, create_attention_mask=False,
)
mixed = BlendedMegatronDatasetBuilder(GPTDataset, [20_000, 0, 0], lambda: True, config).build()[0]
batches = DataLoader(mixed, batch_size=64)
""",
}

TIMED = """
import json, sys, time
{setup}
coming = iter(batches)
next(coming)
first = time.perf_counter() - begin
def rate(seconds):
    global coming
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        try:
            next(coming)
        except StopIteration:
            coming = iter(batches)
        count += 1
    return 64 * 2048 * count / (time.perf_counter() - begin) / 1e6
rate(0.5)
print(json.dumps([first, rate(float(sys.argv[3]))]))
"""


def timed(python: Path | str, setup: str, target: Path, seconds: float) -> tuple[float, float] | str:
    """Seconds to the first batch, and millions of tokens a second; or why it could not be measured."""
    arguments = [str(target), json.dumps(WEIGHTS), str(seconds)]
    code = TIMED.replace("{setup}", setup)
    found = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    if found.returncode:
        return (found.stderr.strip().splitlines() or ["no reason"])[-1]
    first, rate = json.loads(found.stdout.strip().splitlines()[-1])
    return first, rate


def measure_batches(folder: Path, documents: int, seconds: float, rounds: int, interop: Path | None) -> None:
    roots = {name: folder / name for name in WEIGHTS}
    for number, root in enumerate(roots.values()):
        make_up(root, documents, seed=number, sparse=False)
    sources = [ViewSource(name=name, root=str(roots[name]), weight=WEIGHTS[name], max_epochs=9) for name in WEIGHTS]
    ways: dict[str, Callable[[], tuple[float, float] | str]] = {}

    def add(name: str, setup: str, target: Path, python: Path | str = sys.executable) -> None:
        ways[name] = lambda: timed(python, setup, target, seconds)

    for policy in ("concat", "best-fit"):
        view = folder / policy
        build_view(ViewSpec(sources=sources, seq_len=SEQ_LEN, seed=1, packing=policy), view)
        for what, fields in (("all fields", "True"), ("tokens", "False")):
            add(f"a mixture, {policy}, {what}", OURS.replace("{fields}", fields), view)
    add("one data root, all fields", OURS.replace("{fields}", "True"), roots["web"])
    add("one data root, tokens", OURS.replace("{fields}", "False"), roots["web"])
    if interop is not None:
        for peer, format_ in (("litdata", "litdata"), ("mosaicml-streaming", "mds"), ("megatron-core", "megatron")):
            for name, root in roots.items():
                if not (folder / format_ / name / "export.json").exists():
                    export(root, folder / format_ / name, format_)
            add(f"{peer}, tokens", PEERS[peer], folder, interop)
    found: dict[str, list[tuple[float, float] | str]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    print(f"{'':<34} {'M tokens/s':>10} {'first batch, s':>15}")
    for name, figures in found.items():
        known = [each for each in figures if not isinstance(each, str)]
        if not known:
            print(f"{name:<34} {figures[0]}")
            continue
        rate = statistics.median(rate for _, rate in known)
        print(f"{name:<34} {rate:>10.1f} {statistics.median(first for first, _ in known):>15.2f}")


OPENED = """
import sys, time
from tokenmill import TokenDataset
begin = time.perf_counter()
dataset = TokenDataset(sys.argv[1])
opened = time.perf_counter() - begin
batch = dataset[list(range(64))]
first = time.perf_counter() - begin
sources = set(dataset.source_of(list(range(64))).tolist())
print(f"opened in {opened:.2f} s, first batch, of {len(sources)} of them, after {first:.2f} s")
"""


def measure_opening(folder: Path, sources: int) -> None:
    roots = [folder / "many" / f"source-{number:04d}" for number in range(sources)]
    rng = np.random.default_rng(0)
    for number, root in enumerate(roots):
        make_up(root, 200, seed=number, sparse=True)
    mixed = [
        ViewSource(name=root.name, root=str(root), weight=0.2 + float(weight), max_epochs=4)
        for root, weight in zip(roots, rng.random(sources), strict=True)
    ]
    begin = time.perf_counter()
    build_view(ViewSpec(sources=mixed, seq_len=SEQ_LEN), folder / "many-view")
    print(f"{sources} sources: built in {time.perf_counter() - begin:.1f} s; ", end="", flush=True)
    subprocess.run([sys.executable, "-c", OPENED, str(folder / "many-view")], check=True)


PACKED = """
import sys, time
import numpy as np
from tokenmill.views.packing import pack
documents, seq_len = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
length = np.empty(documents, np.uint32)
for at in range(0, documents, 1 << 22):
    part = length[at : at + (1 << 22)]
    part[:] = rng.lognormal(6.2, 1.2, len(part)) + 1
place = np.cumsum(length, dtype=np.int64) - length
begin = time.perf_counter()
entries = [*pack(place, length, seq_len)]
seconds = time.perf_counter() - begin
padding = sum(int(each.length[each.place < 0].sum()) for each in entries)
tokens = int(length.sum(dtype=np.int64))
print(f"{documents:,} documents at {seq_len}: {seconds:.1f} s, {tokens / (tokens + padding):.5%} full", end="")
"""


def measure_packing(documents: int) -> None:
    for seq_len in (2_048, 8_192):
        _, peak_gb, printed = run_measured([sys.executable, "-c", PACKED, str(documents), str(seq_len)])
        print(f"{printed.decode()}, {peak_gb:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=50_000, help="of each of the four data roots")
    parser.add_argument("--sources", type=int, default=1_000, help="of the mixture that is opened")
    parser.add_argument("--packed", type=float, default=1e8, help="documents that are packed")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--without-peers", action="store_true", help="leave the others out")
    parser.add_argument("--seconds", type=float, default=3, help="for which batches are read")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    python = None if options.without_peers or not INTEROP.exists() else INTEROP
    measure_batches(options.folder, options.documents, options.seconds, options.rounds, python)
    measure_opening(options.folder, options.sources)
    measure_packing(int(options.packed))


if __name__ == "__main__":
    main()

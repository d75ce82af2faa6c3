"""Train a small Llama-style model on a data root, on this machine: the shortest way from tokens to a falling loss.

    make demo && tokenmill consolidate demo/tokens
    torchrun --nproc_per_node=2 examples/local_train.py demo/tokens
    torchrun --nproc_per_node=2 examples/local_train.py demo/tokens --steps 600   # continues where it stopped

Plain PyTorch and DDP, on GPUs where there are some. All that a larger trainer needs of tokenmill is here: the data
set, a sampler whose state is one integer, batches with targets and bounds of documents, and receipts of what each rank
consumed (`tokenmill receipts`). A view that mixes sources is read in its own order, and the loss is logged by source.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everyone calls it
from torch.nn.parallel import DistributedDataParallel

from tokenmill import EpochSampler, ReceiptWriter, SequentialSampler, TokenmillError
from tokenmill.torch import SharedShardedDataset, TokenDataset, loader


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v, attn_mask=allowed)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: pairs of features turned by `angles`, shape `(batch, 1, length, head_width / 2)`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), angles, allowed)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, vocab_size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.half_head = width // heads // 2
        nn.init.zeros_(self.head.weight)  # the first loss is that of a uniform guess

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each target, in nats, 0 where there is none; all of shape `(batch, length)`.

        Attention stays inside documents: they begin where `positions` do.
        """
        document = (positions == 0).cumsum(1)
        allowed = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        frequencies = 10_000.0 ** (-torch.arange(self.half_head, device=tokens.device) / self.half_head)
        angles = positions[:, None, :, None] * frequencies
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles, allowed)
        logits = self.head(self.norm(x))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return losses.view_as(labels)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data_root", nargs="?", help="default: $DATASET_BINS_PATH")
    parser.add_argument("--steps", type=int, default=500, help="in all, those of earlier runs included")
    parser.add_argument("--batch", type=int, default=2, help="samples per step, of all ranks together")
    parser.add_argument("--context", type=int, default=256, help="tokens the model sees at once; samples are cut so")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, help="default: the manifest's, or 65536")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"), help="directory")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--validation", metavar="DATA_ROOT", help="data set or view whose loss is told at the end")
    parser.add_argument("--drop-in", type=int, metavar="SEQ_LEN", help="use Templar's SharedShardedDataset instead")
    return parser.parse_args()


@dataclass
class State:
    """What a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    samples: int = 0
    """Consumed by all ranks together in all epochs: all there is to remember of the data."""
    data: str = ""
    """Digest of the data set that they are samples of; empty with Templar's class, which has none."""

    def load(self, folder: Path) -> None:
        """From a checkpoint, if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.pt").exists():
            saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
            if saved["data"] != self.data:
                raise SystemExit(f"{folder}: is of a run on other data; give another --checkpoint, or delete it")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.samples = saved["step"], saved["samples"]

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        partial = folder / "model.pt.partial"
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(saved | {"step": self.step, "samples": self.samples, "data": self.data}, partial)
        partial.replace(folder / "model.pt")


class World(NamedTuple):
    """Where this process stands among those that `torchrun` started."""

    rank: int
    size: int
    device: torch.device

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join_world() -> World:
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    on_gpu = torch.cuda.is_available()
    if size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return World(
        rank, size, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    )


def main() -> None:
    options, world = arguments(), join_world()
    if options.batch % world.size:
        raise SystemExit(f"--batch {options.batch} does not divide by {world.size} ranks")
    if options.data_root:
        os.environ["DATASET_BINS_PATH"] = options.data_root
    drop_in = options.drop_in and SharedShardedDataset(options.drop_in, world.rank, world.size)
    dataset = drop_in or open_data()
    if len(dataset) < options.batch:
        raise SystemExit(f"--batch {options.batch}: the data set has {len(dataset)} samples")
    torch.manual_seed(options.seed)  # the same initial model everywhere
    vocab_size = options.vocab_size or dataset.data.vocab_size or 1 << 16
    model = Llama(vocab_size, options.width, options.layers, options.heads).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.95), fused=True)
    state = State(model, optimizer, data="" if drop_in else dataset.data.samples_sha256)
    state.load(options.checkpoint)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    world.say(f"{dataset.data}: {millions:.1f} M parameters, {world.size} ranks, continues from step {state.step}")
    world.say(f"knowing no more than how frequent each token is would be loss {unigram_loss(dataset, vocab_size):.4f}")
    train(state, dataset, options, world)
    if options.validation:
        world.say(f"validation loss {validation_loss(model, open_data(options.validation), options, world):.4f}")
    if world.size > 1:
        dist.destroy_process_group()


def open_data(root: str | None = None) -> TokenDataset:
    fields = ("input_ids", "labels", "position_ids", "source")
    return TokenDataset(root, fields=fields, mask_across_documents=True)


@torch.no_grad()
def validation_loss(model: nn.Module, dataset: TokenDataset, options: argparse.Namespace, world: World) -> float:
    """Over the whole data set, each rank taking its share, in nats per target."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    sampler = SequentialSampler(len(dataset), world.rank, world.size)
    for batch in loader(dataset, sampler, batch_size=options.batch, drop_last=False):
        pieces = [part.to(world.device, torch.int64) for part in cut(batch, options.context)[:3]]
        sums += torch.stack([model(*pieces).sum(), (pieces[1] != -100).sum()]).double()
    loss, targets = world.sum(sums).tolist()
    return loss / targets


def train(state: State, dataset: TokenDataset, options: argparse.Namespace, world: World) -> None:
    trained = DistributedDataParallel(state.model) if world.size > 1 else state.model
    began, tokens = time.monotonic(), 0
    names = [""] if options.drop_in else dataset.sources
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=world.device)  # losses, and targets, by source
    coming = batches(dataset, state.samples, options, world)
    while state.step < options.steps:
        batch, samples = next(coming)
        for group in state.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (state.step + 1) / 20)
        *pieces, source = (part.to(world.device, torch.int64, non_blocking=True) for part in batch)
        targets = (pieces[1] != -100).sum(1)
        with torch.autocast("cuda", torch.bfloat16) if world.device.type == "cuda" else nullcontext():
            losses = trained(*pieces).sum(1)
        # DDP takes the mean of the ranks' gradients, so this is the mean over all targets of all ranks.
        loss = losses.sum() * world.size / world.sum(targets.sum())
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.step, state.samples = state.step + 1, samples
        sums.index_add_(1, source, torch.stack([losses.detach(), targets]).double())
        tokens += pieces[0].numel() * world.size
        if state.step % options.log_every == 0 or state.step == options.steps:
            rate = tokens / (time.monotonic() - began) / 1e3
            losses_, counts = world.sum(sums)
            mean = float(losses_.sum() / counts.sum())
            by_source = "".join(
                f"  {name} {loss / count:.4f}"
                for name, loss, count in zip(names, losses_.tolist(), counts.tolist(), strict=True)
                if count and len(names) > 1
            )
            world.say(f"step {state.step:5}  loss {mean:.4f}  {rate:6.1f} k tokens/s{by_source}")
            sums.zero_()
        if world.rank == 0 and (state.step % options.checkpoint_every == 0 or state.step == options.steps):
            state.save(options.checkpoint)
    coming.close()


def cut(batch: dict[str, torch.Tensor] | torch.Tensor, context: int) -> list[torch.Tensor]:
    """Pieces of `context` tokens: ids, labels and positions, each of shape `(pieces, context)`, and their sources."""
    if isinstance(batch, torch.Tensor):  # of Templar's class: ids alone
        pieces = batch.view(-1, context)
        places = torch.arange(context - 1).expand(len(pieces), -1)
        return [pieces[:, :-1], pieces[:, 1:], places, torch.zeros(len(pieces), dtype=torch.int64)]
    parts = [batch[name].view(-1, context) for name in ("input_ids", "labels", "position_ids")]
    return [*parts, batch["source"].repeat_interleave(len(parts[0]) // len(batch["source"]))]


def batches(
    dataset: TokenDataset, samples: int, options: argparse.Namespace, world: World
) -> Generator[tuple[list[torch.Tensor], int], None, None]:
    """This rank's batches from sample `samples` of all epochs on, each with what `samples` is after it.

    A mixture is read in its own order, all else in that of its epoch. What all ranks together would not fill a batch
    with, at the end, is left out. When an epoch or the run ends, a receipt of what this rank consumed of it is left
    beside the checkpoint.
    """
    is_mixture = not options.drop_in and dataset.data.is_mixture
    while True:
        epoch, start = divmod(samples, len(dataset))
        if is_mixture and epoch:
            raise SystemExit(f"--steps {options.steps}: the mixture ends after {len(dataset)} samples")
        place = (world.rank, world.size, start)
        sampler = (
            SequentialSampler(len(dataset), *place)
            if is_mixture
            else EpochSampler(len(dataset), options.seed, epoch, *place)
        )
        coming = loader(
            dataset,
            sampler,
            batch_size=options.batch // world.size,
            num_workers=1,
            pin_memory=world.device.type == "cuda",
        )
        steps = (len(dataset) - start) // options.batch  # not by len(coming): ranks may differ by one
        receipt = ReceiptWriter(dataset.data, sampler)
        try:
            for batch in itertools.islice(coming, steps):
                count = options.batch // world.size
                receipt.add(sampler.indices(receipt.samples, receipt.samples + count))
                yield cut(batch, options.context), samples + receipt.samples * world.size
        finally:
            receipt.receipt().save(options.checkpoint / f"receipt-epoch{epoch}-from{start}-rank{world.rank}.json")
        samples = (epoch + 1) * len(dataset)


def unigram_loss(dataset: TokenDataset, vocab_size: int) -> float:
    """Entropy of the tokens' frequencies in nats: what a model reaches that knows those and no more."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(0, min(len(dataset), 1 << 14), 1 << 10):
        counts += np.bincount(dataset.data[begin : begin + (1 << 10)].ravel(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


if __name__ == "__main__":
    try:
        main()
    except TokenmillError as error:
        raise SystemExit(str(error)) from None

"""Runs: digests of what they made, and ways to stop them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from conftest import shared
from tokenmill.pipeline.driver import Progress
from tokenmill.recipe import Recipe


def shard_digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.glob("train_*.npy"))}


def every_digest(root: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.iterdir() if p.suffix in (".npy", ".parquet")
    }


class StopError(Exception):
    """Raised in the middle of a run."""


def stop_after(tokens: int) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.tokens >= tokens:
            raise StopError

    return show


def golden_recipe(case: dict) -> Recipe:
    return Recipe(
        dataset=str(shared(case["corpus"])),
        tokenizer=str(shared("data/llama2-tokenizer")),
        dtype="uint16",
        **{field: case[field] for field in ("shard_size", "total_tokens", "seed", "buffer_size", "seq_len")},
    )


def jsonl(rows: list[str | None]) -> bytes:
    return "".join(json.dumps({"id": n, "text": row, "z": [1.5, {}]}) + "\n" for n, row in enumerate(rows)).encode()

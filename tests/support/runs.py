"""Runs: digests of what they made, and ways to stop them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from conftest import REPOSITORY, shared
from tokenmill.loading.dataset import TokenDataset
from tokenmill.progress import Progress
from tokenmill.recipe import Recipe
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec


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


def require_golden_views(root: Path, folder: Path, tokens_sha256: str) -> None:
    """Tokens and the SHA-256 of all samples of views of a golden data root are those in `golden/views.json`."""
    found = {}
    for shuffle, split in (("documents", "train"), ("samples", "train"), ("none", "validation")):
        spec = ViewSpec(sources=[ViewSource(name="golden", root=str(root))], seq_len=128, seed=1, holdout=0.1)
        build_view(msgspec.structs.replace(spec, shuffle=shuffle, split=split), folder / shuffle)
        dataset = TokenDataset(folder / shuffle)
        digest = hashlib.sha256(np.ascontiguousarray(dataset[:]).tobytes()).hexdigest()
        found[f"{shuffle} {split}"] = [dataset.tokens, digest]
    views = json.loads((REPOSITORY / "tests" / "golden" / "views.json").read_text())
    assert found == views[tokens_sha256]

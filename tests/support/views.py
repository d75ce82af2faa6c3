"""Data roots to make views of, and their documents by a slow reference: the rules of docs/format.md once more."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from conftest import text, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

MASK = 2**64 - 1


def make(folder: Path, name: str, texts: dict[str, list[str | None]], **changes: Any) -> Path:
    for path, rows in texts.items():
        write_parquet(folder / f"corpus-{name}" / path, rows)
    settings_ = {"buffer_size": 20, "shard_size": 1_500, "seq_len": 32} | changes
    recipe = Recipe(dataset=str(folder / f"corpus-{name}"), tokenizer=str(TOKENIZER), **settings_)
    pretokenize(recipe, folder / name)
    return folder / name


class Row(NamedTuple):
    name: str
    file: str
    row: int
    xxh3: int
    tokens: tuple[int, ...]


@functools.cache
def rows_of(root: Path, name: str) -> list[Row]:
    """Documents of a data root in stream order; those that its stream ends in are left out."""
    stream = [token for path in sorted(root.glob("train_*.npy")) for token in np.load(path).tolist()]
    found = []
    for path in sorted(root.glob("documents_*.parquet")):
        for row in pq.read_table(path).to_pylist():
            end = row["start"] + row["tokens"]
            tokens = stream[row["start"] : end]
            hashed = row.get("text_xxh3", xxhash.xxh3_64_intdigest(np.array(tokens, np.uint16).tobytes()))
            if end <= len(stream):
                found.append(Row(name, row["source"], row["row"], hashed, tuple(tokens)))
    return found


def key(row: Row, seed: int) -> int:
    named = f"{seed}\0{row.name}\0{row.file}".encode()
    state = int.from_bytes(hashlib.blake2b(named, digest_size=8, person=b"tokenmill view").digest(), "little")
    z = (state + (row.row + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


@pytest.fixture(scope="module")
def batch_roots(shards: Path, consolidated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data roots, and views of every kind, by what they are."""
    folder = tmp_path_factory.mktemp("views")
    web = make(folder, "web", {"a.parquet": [text(i, 2 + i % 50) for i in range(120)]}, seq_len=40)
    code = make(folder, "code", {"a.parquet": [text(i, 2 + i % 90) for i in range(500, 560)]}, seq_len=40)
    made = {"shards": shards, "consolidated": consolidated}
    for policy in ("concat", "best-fit"):
        for shuffle in ("documents", "none"):
            for weights in ((None, None), (2.0, 1.0)):
                name = f"{policy} {shuffle} {'mixture' if weights[0] else 'all'}"
                sources = [
                    ViewSource(name=source, root=str(root), weight=weight, max_epochs=3)
                    for source, root, weight in zip(("web", "code"), (web, code), weights, strict=True)
                ]
                spec = ViewSpec(sources=sources, seq_len=40, seed=4, shuffle=shuffle, packing=policy)
                build_view(spec, folder / name)
                made[name] = folder / name
    return made

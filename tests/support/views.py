"""Data roots to make views of, and their documents by a slow reference: the rules of docs/format.md once more."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import xxhash

from conftest import write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe

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

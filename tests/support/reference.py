"""The slow, obvious way, sharing nothing with the package: what the bytes must be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tokenizers


def reservoir(rows: Iterator, buffer_size: int, seed: int) -> Iterator:
    """HF datasets' buffer shuffle before 5.0, row by row."""
    rng = np.random.default_rng(seed)
    draws = (int(i) for _ in iter(int, 1) for i in rng.integers(0, buffer_size, size=1000))
    held: list = []
    for row in rows:
        if len(held) < buffer_size:
            held.append(row)
        else:
            slot = next(draws)
            yield held[slot]
            held[slot] = row
    rng.shuffle(held)
    yield from held


def rows_in_order(corpus: Path, *, order: str, buffer_size: int, seed: int) -> Iterator[tuple[str, int, str | None]]:
    """(file, row, text) in output order."""
    names = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*.parquet"))
    if order == "buffer":
        np.random.default_rng(seed).shuffle(names)
    rows = (
        (name, row, text) for name in names for row, text in enumerate(pq.read_table(corpus / name)["text"].to_pylist())
    )
    return reservoir(rows, buffer_size, seed) if order == "buffer" else rows


def documents(
    corpus: Path, tokenizer_json: Path, eos_id: int, special_as_text: bool, **order: object
) -> Iterator[tuple[str, int, list[int]]]:
    """(file, row, tokens with EOS) of every row with text, in output order."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    tokenizer.encode_special_tokens = special_as_text
    for name, row, text in rows_in_order(corpus, **order):
        if text:
            yield name, row, [*tokenizer.encode(text, add_special_tokens=False).ids, eos_id]


def sample_ids(tokens: np.ndarray, seq_len: int, scheme: str) -> bytes:
    """Sample ids as the formats page tells them; `templar-v1` as the original script made them."""
    count = len(tokens) // seq_len
    seen = tokens.view(np.uint32) if scheme == "templar-v1" else tokens
    windows = (seen[i * seq_len : (i + 1) * seq_len].tobytes() for i in range(count))
    return b"".join(hashlib.blake2b(window, digest_size=8).digest() for window in windows)

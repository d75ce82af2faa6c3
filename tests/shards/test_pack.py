"""Cutting the token stream into shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.encoding.encoder import EncodedBatch
from tokenmill.shards import pack
from tokenmill.shards.pack import EmittedRows, cut
from tokenmill.shards.reorder_buffer import ReorderBuffer

LENGTHS = st.lists(st.integers(0, 30), max_size=40)


@given(LENGTHS, st.integers(0, 100), st.integers(1, 25), st.none() | st.integers(1, 400))
def test_parts_tile_the_stream(lengths: list[int], position: int, shard_size: int, stop: int | None) -> None:
    length = np.array(lengths, np.int64)
    token_row = np.repeat(np.arange(len(length)), length)
    end = position + len(token_row) if stop is None else min(position + len(token_row), max(stop, position))
    at = position
    for part in cut(position, length, shard_size=shard_size, stop=stop):
        assert part.tokens > 0
        assert at // shard_size == (at + part.tokens - 1) // shard_size == part.shard
        rows = token_row[at - position : at - position + part.tokens]
        first_token_of_row = int(np.searchsorted(token_row, rows[0]))
        assert part.skip == at - position - first_token_of_row
        assert part.begin <= rows[0]
        assert length[part.begin : rows[0]].sum() == 0
        assert part.end == rows[-1] + 1
        row_end = int(np.searchsorted(token_row, rows[-1], side="right"))
        stops_inside = row_end > at - position + part.tokens
        row_start = int(np.searchsorted(token_row, rows[-1]))
        assert part.cut_at == (at - position + part.tokens - row_start if stops_inside else 0)
        at += part.tokens
    assert at == end


@pytest.mark.parametrize(("short", "at_once"), [(0, 1 << 19), (48, 1 << 19), (0, 3), (48, 7)])
@given(lengths=LENGTHS, shard_size=st.integers(1, 25), batches=st.integers(1, 4))
def test_what_is_gathered_are_the_tokens_of_the_parts(
    short: int, at_once: int, lengths: list[int], shard_size: int, batches: int
) -> None:
    """Row by row, and by an index for each token; at once, and in small arrays; out of one batch, and of several."""
    length = np.array(lengths, np.int64)
    tokens = np.arange(length.sum(), dtype=np.uint16)
    zeros, batch = np.zeros(len(length), np.int64), np.arange(len(length)) % batches
    block = EmittedRows(
        [tokens] * batches,
        batch,
        np.cumsum(length) - length,
        length,
        zeros.astype(np.uint8),
        zeros,
        zeros,
        zeros.astype(np.uint64),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "GATHER_TOKENS", at_once)
        patch.setattr(pack, "SHORT_ROW", short)
        found = [
            piece
            for part in cut(0, length, shard_size=shard_size, stop=None)
            for piece in block.rows(part.begin, part.end).gather(part.skip, part.tokens)
        ]
    assert np.array_equal(np.concatenate([*found, tokens[:0]]), tokens)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8), st.randoms())
def test_window_gives_back_every_row_and_lets_go_of_spans(spans: list[list[int]], random: object) -> None:
    window, expected, first_row = ReorderBuffer(), {}, 0
    for file, lengths in enumerate(spans):
        length = np.array(lengths, np.int64)
        tokens = np.arange(length.sum(), dtype=np.uint16) + 100 * file
        hashes = np.uint64(2**64 - 1) - np.arange(first_row, first_row + len(length), dtype=np.uint64)
        window.add(
            np.array([[first_row], [file], [5]]),
            EncodedBatch(tokens, length, np.zeros(len(length), np.uint8), hashes, 0, 0, {}),
            pending=len(length),
        )
        ends = np.cumsum(length)
        for row, end in enumerate(ends):
            expected[first_row + row] = (file, 5 + row, tokens[end - length[row] : end].tolist())
        first_row += len(length)
    rows = list(expected)
    random.shuffle(rows)
    for at in range(0, len(rows), 3):
        chunk = np.array(rows[at : at + 3], np.int64)
        block = window.take(chunk)
        for i, row in enumerate(chunk.tolist()):
            start, span = int(block.start[i]), block.batches[block.batch[i]]
            found = span[start : start + int(block.length[i])].tolist()
            assert (int(block.file[i]), int(block.row[i]), found) == expected[row]
            assert int(block.text_xxh3[i]) == 2**64 - 1 - row
    assert len(window) == 0
    assert window.nbytes == 0

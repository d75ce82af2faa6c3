"""The pinned order: golden digests, and the row-by-row shuffle it vectorises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import golden
from support.reference import reservoir
from tokenmill.corpus.order import BufferOrder, SequentialOrder, _Words, buffer_order, file_order


@pytest.mark.parametrize(
    "case", golden("order.json"), ids=lambda case: f"{len(case['rows'])}-files-seed-{case['seed']}"
)
@pytest.mark.parametrize("step", [1, 333, 10**9])
def test_golden(case: dict, step: int) -> None:
    starts = np.concatenate([[0], np.cumsum(case["rows"])])
    read = np.concatenate(
        [np.arange(starts[f], starts[f + 1]) for f in file_order(len(case["rows"]), kind="buffer", seed=case["seed"])]
    )
    order = BufferOrder(case["buffer_size"], case["seed"])
    blocks = [order.push(min(step, case["n"] - at)) for at in range(0, case["n"], step)]
    found = read[np.concatenate([*blocks, order.finish()])]
    assert found[:8].tolist() == case["head"]
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest() == case["sha256_le_int64"]


@given(st.lists(st.integers(0, 400), max_size=12), st.integers(1, 60), st.integers(0, 2**32))
def test_any_blocks_give_the_row_by_row_shuffle(pushes: list[int], buffer_size: int, seed: int) -> None:
    order = BufferOrder(buffer_size, seed)
    pushed = emitted = 0
    blocks = []
    for rows in pushes:
        blocks.append(order.push(rows))
        pushed, emitted = pushed + rows, emitted + len(blocks[-1])
        assert set(order.held()) == set(range(pushed)) - {row for block in blocks for row in block.tolist()}
        assert len(order.held()) == pushed - emitted
    blocks.append(order.finish())
    assert np.concatenate(blocks).tolist() == list(reservoir(iter(range(sum(pushes))), buffer_size, seed))


def test_whole_order_is_the_stream() -> None:
    assert buffer_order(5000, buffer_size=77, seed=1).tolist() == list(reservoir(iter(range(5000)), 77, 1))


def test_pinned_without_the_shared_data() -> None:
    """Two golden heads, so that the order is pinned wherever the tests run."""
    assert buffer_order(7, buffer_size=3, seed=0).tolist() == [2, 1, 4, 0, 5, 6, 3]
    read = file_order(5, kind="buffer", seed=1)
    assert read[buffer_order(5, buffer_size=2, seed=1)].tolist() == [4, 0, 2, 1, 3]


@given(st.integers(1, 2**32), st.integers(0, 2**63), st.lists(st.integers(0, 50), max_size=5))
def test_numbers_are_those_of_numpy(bound: int, seed: int, counts: list[int]) -> None:
    """Of the NumPy installed; should these ever differ, the golden digests say who is right."""
    ours, theirs = _Words(seed), np.random.default_rng(seed)
    for count in counts:
        assert ours.below(bound, count).tolist() == theirs.integers(0, bound, size=count).tolist()
        mine, other = np.arange(count), np.arange(count)
        ours.shuffle(mine)
        theirs.shuffle(other)
        assert mine.tolist() == other.tolist()


def test_sequential() -> None:
    order = SequentialOrder()
    assert order.push(3).tolist() == [0, 1, 2]
    assert order.push(2).tolist() == [3, 4]
    assert order.finish().tolist() == order.held().tolist() == []
    assert file_order(3, kind="sequential", seed=9).tolist() == [0, 1, 2]

"""Samplers: every sample once, any number of ranks, resumed anywhere; Templar's own schedule."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import golden
from tokenmill import EpochSampler, ValidatorSampler, WindowSampler
from tokenmill.loading import samplers


def digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("case", golden("samplers.json"), ids=lambda case: f"{case['uid']}-{case['window']}")
def test_windows_are_those_of_templar(case: dict) -> None:
    arguments = [case[name] for name in ("dataset_len", "uid", "window", "samples")]
    everyone = WindowSampler(*arguments)
    assert everyone.indices()[:6].tolist() == case["head"]
    assert digest(everyone.indices()) == case["global_sha256_le_int64"]
    for rank, expected in enumerate(case["rank_sha256"]):
        sampler = WindowSampler(*arguments, rank, case["world_size"])
        assert digest(sampler.indices()) == expected
        assert list(sampler) == sampler.indices().tolist()
        assert len(list(sampler)) == len(sampler)


def test_windows_without_the_golden_file() -> None:
    """NumPy itself is the rule."""
    expected = np.random.default_rng((5 * 1_000_003 ^ 9) & 0xFFFFFFFF).choice(500, 40, replace=False)
    assert WindowSampler(500, 5, 9, 40).indices().tolist() == expected.tolist()
    assert list(WindowSampler(500, 5, 9, 40, rank=1, world_size=3)) == expected[1::3].tolist()


def test_another_numpy_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: real(seed + 1))
    samplers.check_numpy.cache_clear()
    samplers.window_pool.cache_clear()
    with pytest.raises(RuntimeError, match="no longer draws"):
        WindowSampler(500, 5, 9, 40).indices()


def test_a_validator_judges_with_what_the_miner_trained_on() -> None:
    miner = WindowSampler(10_000, 3, 8, 512)
    validator = ValidatorSampler(10_000, 3, 8, 512, 32, seed=77)
    assert len(set(validator)) == len(validator) == 32
    assert set(validator) <= set(miner)
    assert list(validator) == np.random.default_rng(77).choice(miner.indices(), 32, replace=False).tolist()
    assert list(validator) == list(ValidatorSampler(10_000, 3, 8, 512, 32, seed=77))
    assert list(validator) != list(ValidatorSampler(10_000, 3, 8, 512, 32, seed=78))
    ranks = [ValidatorSampler(10_000, 3, 8, 512, 32, 77, rank, 5) for rank in range(5)]
    assert interleaved([list(rank) for rank in ranks]) == list(validator)


def interleaved(parts: list[list[int]]) -> list[int]:
    rounds = itertools.zip_longest(*parts)
    return [index for each in rounds for index in each if index is not None]


@given(
    size=st.integers(1, 3_000),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 10),
    world_size=st.integers(1, 20),
    data=st.data(),
)
def test_an_epoch_has_every_sample_once_and_is_resumed_anywhere_by_any_ranks(
    size: int, seed: int, epoch: int, world_size: int, data: st.DataObject
) -> None:
    whole = list(EpochSampler(size, seed, epoch))
    assert sorted(whole) == list(range(size))
    ranks = [list(EpochSampler(size, seed, epoch, rank, world_size)) for rank in range(world_size)]
    assert interleaved(ranks) == whole
    start = data.draw(st.integers(0, size))
    others = data.draw(st.integers(1, 20))
    rest = [EpochSampler(size, seed, epoch, rank, others, start) for rank in range(others)]
    assert interleaved([list(rank) for rank in rest]) == whole[start:]
    assert sum(map(len, rest)) == size - start
    one = rest[data.draw(st.integers(0, others - 1))]
    begin = data.draw(st.integers(0, len(one)))
    end = data.draw(st.integers(begin, len(one)))
    assert one.indices(begin, end).tolist() == list(one)[begin:end]


def test_the_order_is_pinned() -> None:
    """Whoever resumes with a later version must get the same samples."""
    small = "e7d50dd4751b1b5b64146a73c5a418d67212b91fbb23e14ea493f4f4745ab06a"
    large = "ac202305134c063cc500ed52390a70e063832ba9d61e4e30579b4b5237619d97"
    assert digest(EpochSampler(1_000, 42).indices()) == small
    assert digest(EpochSampler(78_643_200, 42, epoch=3).indices(0, 10_000)) == large


def test_orders_look_random() -> None:
    """Seeds and epochs give unrelated orders; neighbours are unrelated; no place prefers a sample."""
    size = 4_096
    orders = np.array([EpochSampler(size, seed, epoch).indices() for seed in range(8) for epoch in range(8)])
    for a, b in itertools.combinations(range(64), 2):
        assert (orders[a] == orders[b]).sum() < 12  # 1 expected
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.01
    quarters = np.stack([np.bincount(order[: size // 4] * 8 // size, minlength=8) for order in orders]).sum(0)
    expected = 64 * size / 4 / 8
    assert ((quarters - expected) ** 2 / expected).sum() < 30  # chi-square of 7 degrees
    small = np.bincount([EpochSampler(5, seed).indices()[0] for seed in range(5_000)], minlength=5)
    assert ((small - 1_000) ** 2 / 1_000).sum() < 25


def test_memory_does_not_grow_with_the_data_set() -> None:
    sampler = EpochSampler(10**10, 1, rank=3, world_size=7)
    tracemalloc.start()
    first = list(itertools.islice(sampler, 10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 10_000
    assert len(sampler) == -(-(10**10 - 3) // 7)
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: EpochSampler(0, 1), "dataset_len"),
        (lambda: EpochSampler(5, 1, rank=2, world_size=2), "rank: expected 0 to 1, found 2"),
        (lambda: EpochSampler(5, 1, world_size=0), "world_size"),
        (lambda: EpochSampler(5, 1, start=6), "start: expected 0 to 5, found 6"),
        (lambda: EpochSampler(5, 1, epoch=-1), "epoch: expected 0 or more"),
        (lambda: WindowSampler(5, 1, 1, 6), "samples: expected 1 to 5, found 6"),
        (lambda: WindowSampler(5, -1, 1, 6), "uid"),
        (lambda: ValidatorSampler(50, 1, 1, 6, 7, 0), "validation_samples"),
        (lambda: ValidatorSampler(50, 1, 1, 6, 5, -1), "seed"),
    ],
)
def test_arguments_out_of_range(make, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        make()


def test_arguments_are_integers() -> None:
    assert EpochSampler(np.int64(5), np.uint8(1)) == EpochSampler(5, 1)
    with pytest.raises(TypeError):
        EpochSampler(5.0, 1)
    with pytest.raises(IndexError):
        EpochSampler(5, 1).indices(2, 6)

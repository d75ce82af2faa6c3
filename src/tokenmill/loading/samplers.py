"""Samplers: which samples to train on, in which order. Pure NumPy; a sampler is data and does no I/O.

A sampler has a global order of samples, and rank `r` of `n` takes every `n`-th of it from the `r`-th on. So
the order depends neither on how many ranks there are nor on workers or batch sizes.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Iterator
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.encoding.splitmix import mix64

_CHUNK = 1 << 12
_ROUNDS = 8
_MOST_SAMPLES = 1 << 62
_POWERS = np.uint64(1) << np.arange(63, dtype=np.uint64)
"""As many are at most a number as it has bits."""

SampleIndices: TypeAlias = NDArray[np.int64]


class _Sampler(msgspec.Struct, frozen=True):
    """What samplers share: a rank's part of a global order of `_total` samples. All fields are integers."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:  # NumPy's integers too; a float is refused
            msgspec.structs.force_setattr(self, name, operator.index(getattr(self, name)))
        rank, world_size = self._ranks()
        _check_range("world_size", world_size, 1, None)
        _check_range("rank", rank, 0, world_size - 1)

    @property
    def _total(self) -> int:
        raise NotImplementedError

    def _at(self, begin: int, end: int, step: int) -> SampleIndices:
        """Return the samples at places `begin`, `begin + step`, ... before `end` of the global order."""
        raise NotImplementedError

    def _ranks(self) -> tuple[int, int]:
        return self.rank, self.world_size  # type: ignore[attr-defined]

    def __len__(self) -> int:
        rank, world_size = self._ranks()
        return max(0, -(-(self._total - rank) // world_size))

    def indices(self, begin: int = 0, end: int | None = None) -> SampleIndices:
        """Return what this rank takes from its `begin`-th to before its `end`-th sample, shape `(end - begin,)`.

        Raises:
            IndexError: it takes fewer.
        """
        end = len(self) if end is None else end
        if not 0 <= begin <= end <= len(self):
            raise IndexError(f"samples {begin} to {end}: rank takes {len(self)}")
        rank, world_size = self._ranks()
        return self._at(rank + begin * world_size, rank + end * world_size, world_size)

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, len(self), _CHUNK):
            yield from self.indices(begin, min(begin + _CHUNK, len(self))).tolist()


class _FromAnywhere(_Sampler, frozen=True):
    """What samplers of a whole data set share, which can leave out the first samples of their order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dataset_len, start = self._bounds()
        _check_range("dataset_len", dataset_len, 1, _MOST_SAMPLES)
        _check_range("start", start, 0, dataset_len)

    @property
    def _total(self) -> int:
        dataset_len, start = self._bounds()
        return dataset_len - start

    def _bounds(self) -> tuple[int, int]:
        return self.dataset_len, self.start  # type: ignore[attr-defined]


class EpochSampler(_FromAnywhere, frozen=True, tag="epoch"):
    """Every sample of a data set once, in an order drawn by `seed` and `epoch`, in memory that does not grow with it.

    The order is a pseudo-random permutation computed place by place: an alternating Feistel network of
    8 rounds on the bits of the index, walked along its cycle until it lands inside the data set (J. Black,
    P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Ranks differ in length by at most one.

    To resume, one integer is enough, the samples trained on so far by all ranks together:
    `epoch, start = divmod(samples, dataset_len)`. Count what was trained on, not what a loader asked for:
    it asks ahead. Where the end of an epoch fills no batch, count it as done: continue at
    `samples = (epoch + 1) * dataset_len`.

    Args:
        dataset_len: samples of the data set.
        seed: of all epochs.
        epoch: which one, from 0.
        rank: of this process, below `world_size`.
        world_size: ranks that share the epoch.
        start: samples of the epoch's global order to leave out: those trained on before, by any ranks.

    Raises:
        ValueError: an argument is out of range.
    """

    dataset_len: int
    seed: int
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("epoch", self.epoch, 0, None)

    def _at(self, begin: int, end: int, step: int) -> SampleIndices:
        places = np.arange(self.start + begin, self.start + end, step, dtype=np.int64).astype(np.uint64)
        return permute(places, self.dataset_len, f"{self.seed}/{self.epoch}").astype(np.int64)


class SequentialSampler(_FromAnywhere, frozen=True, tag="sequential"):
    """Every sample of a data set once, as they lie: what a mixture wants, whose order is its schedule.

    To resume, `start` is enough: the samples trained on so far by all ranks together.

    Args:
        dataset_len: samples of the data set.
        rank: of this process, below `world_size`.
        world_size: ranks that share the samples.
        start: samples to leave out: those trained on before, by any ranks.

    Raises:
        ValueError: an argument is out of range.
    """

    dataset_len: int
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def _at(self, begin: int, end: int, step: int) -> SampleIndices:
        return np.arange(self.start + begin, self.start + end, step, dtype=np.int64)


class WindowSampler(_Sampler, frozen=True, tag="window"):
    """The samples that a Templar miner trains on in a window.

    NumPy's `default_rng((uid * 1000003 ^ window) & 0xffffffff).choice(dataset_len, samples, replace=False)`.

    Args:
        dataset_len: samples of the data set.
        uid: of the miner.
        window: number of the window.
        samples: of all ranks together.
        rank: of this process, below `world_size`.
        world_size: ranks that share the window.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the installed NumPy draws otherwise.
    """

    dataset_len: int
    uid: int
    window: int
    samples: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("uid", self.uid, 0, None)
        _check_range("window", self.window, 0, None)
        _check_range("dataset_len", self.dataset_len, 1, _MOST_SAMPLES)
        _check_range("samples", self.samples, 1, self.dataset_len)

    @property
    def _total(self) -> int:
        return self.samples

    def _at(self, begin: int, end: int, step: int) -> SampleIndices:
        return window_pool(self.dataset_len, self.uid, self.window, self.samples)[begin:end:step]


class ValidatorSampler(_Sampler, frozen=True, tag="validator"):
    """The samples with which a Templar validator judges a miner's window: some of those the miner trained on.

    Templar's own draws by the clock or by a constant; here the seed is an argument, so that anyone can make
    the same choice (Templar's constant is the seed `((uid * 1000003 ^ window) & 0xffffffff) ^ 0xa5a5a5a5`).

    Args:
        dataset_len, uid, window, samples: of the miner's `WindowSampler`.
        validation_samples: how many of those, of all ranks together.
        seed: of the choice.
        rank: of this process, below `world_size`.
        world_size: ranks that share them.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the installed NumPy draws otherwise.
    """

    dataset_len: int
    uid: int
    window: int
    samples: int
    validation_samples: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._miner  # checks what is the miner's
        _check_range("validation_samples", self.validation_samples, 1, self.samples)
        _check_range("seed", self.seed, 0, None)

    @property
    def _miner(self) -> WindowSampler:
        return WindowSampler(self.dataset_len, self.uid, self.window, self.samples)

    @property
    def _total(self) -> int:
        return self.validation_samples

    def _at(self, begin: int, end: int, step: int) -> SampleIndices:
        pool = self._miner.indices()
        chosen = np.random.default_rng(self.seed).choice(pool, self.validation_samples, replace=False)
        return chosen[begin:end:step]


Sampler: TypeAlias = EpochSampler | SequentialSampler | WindowSampler | ValidatorSampler


@functools.lru_cache(maxsize=4)
def window_pool(dataset_len: int, uid: int, window: int, samples: int) -> SampleIndices:
    """Return all samples of a miner's window, in order, read-only, shape `(samples,)`."""
    check_numpy()
    rng = np.random.default_rng((uid * 1_000_003 ^ window) & 0xFFFF_FFFF)
    pool = rng.choice(dataset_len, samples, replace=False)
    pool.flags.writeable = False
    return pool


@functools.cache
def check_numpy() -> None:
    """NumPy may change what `choice` draws (NEP 19), and a schedule that others share must not."""
    known = {
        (1_951, 4): [182, 662, 213, 330],
        (20_000, 500): [5406, 6076, 13839, 6903],
    }  # one for each of its two algorithms
    for (population, size), expected in known.items():
        found = np.random.default_rng(1_000_004).choice(population, size, replace=False)[:4].tolist()
        if found != expected:
            raise RuntimeError(
                f"NumPy {np.__version__} no longer draws as Templar's schedule needs: expected {expected}, found "
                f"{found}; install numpy 2.4"
            )


def permute(places: NDArray[np.uint64], size: int, key: str, *, inverse: bool = False) -> NDArray[np.uint64]:
    """Return where each of `places` (all below `size`) goes in the permutation of `range(size)` that `key` names.

    With `inverse`, return what goes there.
    """
    return permute_each(places, np.uint64(size), permutation_keys(key), inverse=inverse)


def permutation_keys(key: str) -> NDArray[np.uint64]:
    """Return the keys of the rounds of the permutation that `key` names, shape `(8,)`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS, person=b"tokenmill epoch").digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute_each(
    places: NDArray[np.uint64],
    size: NDArray[np.uint64] | np.uint64,
    keys: NDArray[np.uint64],
    *,
    inverse: bool = False,
) -> NDArray[np.uint64]:
    """Do as `permute`, with a permutation for each place.

    Args:
        places: what to move, shape `(n,)`.
        size: of each permutation, shape `(n,)`, or one for all.
        keys: of the rounds of each, as of `permutation_keys`, shape `(8, n)`, or `(8,)` for all.
        inverse: return what goes there.
    """
    if len(places) == 0:
        return places.copy()  # of nothing there is no size
    moved = _feistel(places, size, keys, inverse=inverse)
    outside = np.flatnonzero(moved >= size)
    while len(outside):
        of_these = (
            size[outside] if isinstance(size, np.ndarray) else size,
            keys[:, outside] if keys.ndim > 1 else keys,
        )
        moved[outside] = _feistel(moved[outside], *of_these, inverse=inverse)
        outside = outside[moved[outside] >= of_these[0]]
    return moved


def _feistel(
    values: NDArray[np.uint64], size: NDArray[np.uint64] | np.uint64, keys: NDArray[np.uint64], *, inverse: bool
) -> NDArray[np.uint64]:
    """Permute the numbers of as many bits as `size - 1` has: each round mixes one half into the other."""
    one = np.uint64(1)
    bits = np.maximum(np.searchsorted(_POWERS, size - one, side="right"), 2).astype(np.uint64)
    low_bits = bits >> one
    high_bits = bits - low_bits
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    low, high = values & low_mask, values >> low_bits
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):  # each round undoes itself
        if number % 2:
            high = high ^ (mix64(low + keys[number]) & high_mask)
        else:
            low = low ^ (mix64(high + keys[number]) & low_mask)
    moved: NDArray[np.uint64] = high << low_bits | low
    return moved


def _check_range(name: str, value: int, lowest: int, highest: int | None) -> None:
    if value < lowest or (highest is not None and value > highest):
        upper = "or more" if highest is None else f"to {highest}"
        raise ValueError(f"{name}: expected {lowest} {upper}, found {value}")

"""Arrangement: the order in which a view's samples are drawn. Reads only.

A view's index lays its documents in a row, one source after the other where the view is a mixture. The row is cut into
samples, and they are drawn in an order of their own; those of a mixture once in every epoch of their source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot.layout import SCHEDULE_PERIOD
from tokenmill.loading.samplers import permutation_keys, permute, permute_each

_BLOCK = 1 << 12
"""Samples that are looked up at once, as a trainer asks for neighbours."""

Integers = NDArray[np.int64]


class Arrangement(Protocol):
    """The order of a view's samples."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        ...

    def begins(self, samples: Integers) -> Integers:
        """Return the first token of each sample, counted in the row of documents, shape `(len(samples),)`."""
        ...

    def samples_with(self, begin: int, end: int) -> Integers:
        """Return the samples that hold tokens `begin` to before `end` of the row of documents, ascending."""
        ...


class InOrder(NamedTuple):
    """Every sample once, as they lie."""

    samples: int
    seq_len: int

    def begins(self, samples: Integers) -> Integers:
        """Return the first token of each sample, shape `(len(samples),)`."""
        return samples * self.seq_len

    def samples_with(self, begin: int, end: int) -> Integers:
        """Return the samples that hold tokens `begin` to before `end`, ascending."""
        return np.arange(begin // self.seq_len, min(self.samples, -(-end // self.seq_len)), dtype=np.int64)


class Shuffled(NamedTuple):
    """Every sample once, in a random order (`samplers.permute`)."""

    samples: int
    seq_len: int
    key: str

    def begins(self, samples: Integers) -> Integers:
        """Return the first token of each sample, shape `(len(samples),)`."""
        return permute(samples.astype(np.uint64), self.samples, self.key).astype(np.int64) * self.seq_len

    def samples_with(self, begin: int, end: int) -> Integers:
        """Return the samples that hold tokens `begin` to before `end`, ascending."""
        places = InOrder(self.samples, self.seq_len).samples_with(begin, end).astype(np.uint64)
        if len(places) == 0:
            return places.astype(np.int64)
        return np.sort(permute(places, self.samples, self.key, inverse=True).astype(np.int64))


class MixedSource(NamedTuple):
    """A source of a mixture."""

    name: str
    begin: int
    """Its first token in the row of documents."""
    tokens: int
    """Its tokens in the row."""
    samples: int
    """Samples of one epoch."""


class MixedStage(NamedTuple):
    """A stage of a mixture."""

    samples: int
    shares: Integers
    """Samples of each source in a period, shape `(sources,)`."""
    source: NDArray[np.uint16]
    """Source of each place of a period, shape `(SCHEDULE_PERIOD,)`."""
    rank: NDArray[np.uint16]
    """How many of the same source come before it in the period."""

    def taken(self, samples: int) -> Integers:
        """Return how many samples of each source are among the first `samples`, shape `(sources,)`."""
        periods, rest = divmod(samples, SCHEDULE_PERIOD)
        taken: Integers = self.shares * periods + np.bincount(self.source[:rest], minlength=len(self.shares))
        return taken


class Mixture:
    """Samples of several sources by a schedule, stage after stage; each source continues where the last stage left it.

    Args:
        sources: in the order in which their documents lie.
        stages: in order.
        seq_len: tokens per sample.
        seed: of the order in which an epoch visits the samples of a source; None leaves them as they lie.
    """

    def __init__(
        self, sources: Sequence[MixedSource], stages: Sequence[MixedStage], *, seq_len: int, seed: int | None
    ) -> None:
        self.stages = stages
        self._sources = sources
        self._seed = seed
        self._seq_len = seq_len
        self.ends = np.cumsum([stage.samples for stage in stages])
        """Where each stage ends, in samples."""
        self._begins: Integers = self.ends - [stage.samples for stage in stages]
        self.samples = int(self.ends[-1])
        self._shares = np.array([stage.shares for stage in stages])
        of_stages = [stage.taken(stage.samples) for stage in stages]
        self.taken = np.cumsum([np.zeros(len(sources), np.int64), *of_stages], axis=0)
        """Samples of each source before each stage, and before the end, shape `(stages + 1, sources)`."""
        self._counts = np.array([source.samples for source in sources], np.int64)
        self._firsts = np.array([source.begin for source in sources], np.int64)
        self.row_ends = np.array([source.begin + source.tokens for source in sources], np.int64)
        """Where each source ends in the row of documents, in tokens; shape `(sources,)`."""
        self.parts = [(source.begin, source.samples) for source in sources]
        """First token, and samples, of each source in the row."""
        self._keys: dict[int, NDArray[np.uint64]] = {}
        self._block: tuple[int, Integers, Integers] = (-1, self._counts[:0], self._counts[:0])

    def begins(self, samples: Integers) -> Integers:
        """Return the first token of each sample, shape `(len(samples),)`."""
        return self.locate(samples)[1]

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return the source of each sample, and its first token; both of shape `(len(samples),)`."""
        blocks = samples // _BLOCK
        if len(samples) == 0 or int(blocks.min()) != int(blocks.max()):
            return self._locate(samples)
        number, *found = self._block
        if number != int(blocks[0]):
            number = int(blocks[0])
            found = [*self._locate(np.arange(number * _BLOCK, min(self.samples, (number + 1) * _BLOCK)))]
            self._block = (number, found[0], found[1])  # one assignment, as threads share it
        return found[0][samples - number * _BLOCK], found[1][samples - number * _BLOCK]

    def _locate(self, samples: Integers) -> tuple[Integers, Integers]:
        stage = np.searchsorted(self.ends, samples, side="right")
        period, place = np.divmod(samples - self._begins[stage], SCHEDULE_PERIOD)
        source, rank = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for number in np.unique(stage).tolist():
            here = stage == number
            source[here] = self.stages[number].source[place[here]]
            rank[here] = self.stages[number].rank[place[here]]
        drawn = self.taken[stage, source] + period * self._shares[stage, source] + rank
        epoch, visit = np.divmod(drawn, self._counts[source])
        if self._seed is not None and len(samples):
            visit = self._permuted(source, epoch, visit)
        return source, self._firsts[source] + visit * self._seq_len

    def _permuted(self, source: Integers, epoch: Integers, visit: Integers) -> Integers:
        orders, which = np.unique(source << 32 | epoch, return_inverse=True)
        keys = np.array([self._key(order >> 32, order & 0xFFFFFFFF) for order in orders.tolist()]).T[:, which]
        sizes = self._counts[source].astype(np.uint64)
        return permute_each(visit.astype(np.uint64), sizes, keys).astype(np.int64)

    def _key(self, source: int, epoch: int) -> NDArray[np.uint64]:
        order = source << 32 | epoch
        found = self._keys.get(order)
        if found is None:
            if len(self._keys) > _BLOCK:
                self._keys.clear()
            found = permutation_keys(f"view/{self._seed}/{self._sources[source].name}/{epoch}")
            self._keys[order] = found
        return found

    def samples_with(self, begin: int, end: int) -> Integers:
        """Return the samples that hold tokens `begin` to before `end`, ascending: those of every epoch."""
        source = int(np.searchsorted(self._firsts, begin, side="right")) - 1
        first, count, taken = int(self._firsts[source]), int(self._counts[source]), int(self.taken[-1, source])
        inside = InOrder(count, self._seq_len).samples_with(begin - first, end - first)
        epochs = np.arange(-(-taken // count) if count else 0, dtype=np.int64)
        epoch, visit = np.repeat(epochs, len(inside)), np.tile(inside, len(epochs))
        if self._seed is not None and len(visit):
            keys = np.array([self._key(source, each) for each in epochs.tolist()]).T.repeat(len(inside), axis=1)
            sizes = np.full(len(visit), count, np.uint64)
            visit = permute_each(visit.astype(np.uint64), sizes, keys, inverse=True).astype(np.int64)
        drawn = epoch * count + visit
        return np.sort(self.samples_drawn(source, drawn[drawn < taken]))

    def samples_drawn(self, source: int, drawn: Integers) -> Integers:
        """Return the samples that are the `drawn`-th of all that come from a source, shape `(len(drawn),)`."""
        stage = np.searchsorted(self.taken[1:, source], drawn, side="right")
        found = np.empty(len(drawn), np.int64)
        for number in np.unique(stage).tolist():
            here = stage == number
            share = int(self._shares[number, source])
            period, rank = np.divmod(drawn[here] - self.taken[number, source], share)
            places = np.flatnonzero(self.stages[number].source == source)
            found[here] = self._begins[number] + period * SCHEDULE_PERIOD + places[rank]
        return found

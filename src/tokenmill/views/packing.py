"""Packing: whole documents → samples, by best-fit decreasing, which cuts none that fits and pads what stays free.

Longest first, each goes to the sample with the least room that is enough; among such samples to the one that came to
that room first; to a new one where none has enough. As lengths are small integers, documents of one length are dealt
with at once, and ranges of samples stand in lines by their room, so that the work is per length and room and not per
document. Each window of `WINDOW` documents of the order is packed by itself. `docs/format.md` states the rule.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.loading.view import PADDING_PLACE

WINDOW = 1 << 22
"""Documents that are packed together."""


class Entries(NamedTuple):
    """Pieces of documents, sample after sample, and padding; arrays of shape `(entries,)`."""

    place: NDArray[np.int64]
    """First token, counted as in `ViewIndex.places`."""
    length: NDArray[np.int64]


class _Run(NamedTuple):
    """Pieces of one length that go to consecutive samples."""

    sample: int
    each: int
    """How many of them a sample takes; the last may take fewer."""
    pieces: int


class _Best(NamedTuple):
    runs: list[_Run]
    """For pieces from the longest to the shortest."""
    samples: int


def pack(place: NDArray[np.int64], length: NDArray[np.uint32], seq_len: int) -> Iterator[Entries]:
    """Yield the samples of each window of documents, which are given in the order of the view.

    A document that is longer than `seq_len` gives full samples, and what is left of it is packed as others are. In a
    window samples come in the order of the first documents in them, and in a sample documents in their order.
    """
    for begin in range(0, len(place), WINDOW):
        yield _pack_window(place[begin : begin + WINDOW], length[begin : begin + WINDOW], seq_len)


def count_samples(length: NDArray[np.uint32], seq_len: int) -> int:
    """Return how many samples `pack` makes of documents of these lengths."""
    found = 0
    for begin in range(0, len(length), WINDOW):
        some = length[begin : begin + WINDOW].astype(np.int64)
        longest = min(int(some.max()), seq_len)
        counts = np.bincount(some[some <= seq_len], minlength=longest + 1)
        longer = some[some > seq_len]
        if len(longer):
            counts += np.bincount(longer % seq_len, minlength=longest + 1)
            counts[seq_len] += int((longer // seq_len).sum())
        counts[0] = 0
        found += _best_fit(counts, seq_len).samples
    return found


def _pack_window(documents: NDArray[np.int64], lengths: NDArray[np.uint32], seq_len: int) -> Entries:
    place, length = _cut(documents, lengths.astype(np.int64), seq_len)
    longest = int(length.max())
    small: Any = np.uint16 if longest < 1 << 16 else np.int64  # sorted by their digits where they have 16 bits
    longest_first = np.argsort((longest - length).astype(small), kind="stable")
    best = _best_fit(np.bincount(length), seq_len)
    first, each, pieces = (np.array(column, np.int64) for column in zip(*best.runs, strict=True))
    in_run = np.arange(len(place)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    sample = np.empty(len(place), np.int64)
    sample[longest_first] = np.repeat(first, pieces) + in_run // np.repeat(each, pieces)
    del longest_first, in_run
    number = np.arange(len(place))
    earliest = np.empty(best.samples, np.int64)
    earliest[sample[::-1]] = number[::-1]  # the last of several assignments stays
    rank = np.empty(best.samples, np.int64)
    rank[np.argsort(earliest)] = np.arange(best.samples)
    sample = rank[sample]
    order = np.sort(sample << 32 | number) & 0xFFFFFFFF
    free = seq_len - np.bincount(sample, weights=length, minlength=best.samples).astype(np.int64)
    ends = np.cumsum(np.bincount(sample, minlength=best.samples))
    padded = np.flatnonzero(free)
    return Entries(
        np.insert(place[order], ends[padded], PADDING_PLACE), np.insert(length[order], ends[padded], free[padded])
    )


def _cut(place: NDArray[np.int64], length: NDArray[np.int64], seq_len: int) -> Entries:
    """Cut documents that are longer than a sample."""
    if len(length) == 0 or int(length.max()) <= seq_len:
        return Entries(place, length)
    pieces = -(-length // seq_len)
    of = np.repeat(np.arange(len(length)), pieces)
    offset = (np.arange(len(of)) - (np.cumsum(pieces) - pieces)[of]) * seq_len
    return Entries(place[of] + offset, np.minimum(length[of] - offset, seq_len))


def _best_fit(counts: NDArray[np.int64], seq_len: int) -> _Best:
    """Pack `counts[l]` pieces of each length `l`."""
    lines: dict[int, deque[tuple[int, int]]] = {}
    rooms: list[int] = []
    runs: list[_Run] = []
    samples = 0

    def stand(room: int, first: int, stop: int) -> None:
        if room == 0 or first == stop:
            return
        if room not in lines:
            lines[room] = deque()
            bisect.insort(rooms, room)
        line = lines[room]
        if line and line[-1][1] == first:
            first = line.pop()[0]
        line.append((first, stop))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                first, stop = lines[room].popleft()
                each = room // length
                used = min(stop - first, -(-left // each))
                if first + used < stop:
                    lines[room].appendleft((first + used, stop))
                elif not lines[room]:
                    del lines[room], rooms[at]
            else:
                room, first, each = seq_len, samples, seq_len // length
                used = -(-left // each)
                samples += used
            pieces = min(left, used * each)
            runs.append(_Run(first, each, pieces))
            left -= pieces
            full, rest = divmod(pieces, each)
            stand(room - each * length, first, first + full)
            if rest:
                stand(room - rest * length, first + full, first + full + 1)
    return _Best(runs, samples)

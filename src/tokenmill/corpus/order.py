"""Order, stage 2: row counts → the permutation from source rows to documents. Pure NumPy.

`buffer` is the shuffle HF `datasets` made before 5.0 for
`load_dataset(..., streaming=True).shuffle(seed, buffer_size)`: the list of files is shuffled, then
rows pass through a reservoir of `buffer_size` slots. It depends on row counts alone, so it runs
ahead of the text and in blocks: within a block, the row a draw emits is the one the previous draw
of the same slot put there, which a sort by (slot, position) finds without a Python loop.

Rows are numbered in reading order over all files, from 0.

The random numbers are those of NumPy's `Generator` over PCG64. NumPy keeps the bit generator's
stream for ever, but not what `Generator` makes of it (NEP 19), so that part stands here: bounded
integers by Lemire's rejection (https://arxiv.org/abs/1805.10941), shuffles by masked rejection.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_WORDS_AT_ONCE = 4096
_DRAWS = 1000
"""Slots are drawn this many at a time; a rest not used is dropped before the last shuffle."""


def file_order(files: int, *, kind: str, seed: int) -> NDArray[np.int64]:
    """Return the sequence in which files (sorted by path) are read, shape `(files,)`."""
    order = np.arange(files, dtype=np.int64)
    if kind == "buffer":
        _Words(seed).shuffle(order)
    return order


class _Words:
    """PCG64 as 32-bit words, the low half of each draw first."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)
        self._left: NDArray[np.uint32] = np.empty(0, np.uint32)

    def take(self, count: int) -> NDArray[np.uint32]:
        missing = count - len(self._left)
        if missing > 0:
            drawn = self._bits.random_raw(-(-missing // 2)).astype("<u8").view("<u4")
            self._left = np.concatenate([self._left, drawn])
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """`count` integers in `[0, bound)`, uniformly; `bound` is at most 2^32."""
        if bound == 1:  # takes no words
            return np.zeros(count, np.int64)
        threshold = ((1 << 32) - bound) % bound
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            product = self.take(count).astype(np.uint64) * np.uint64(bound)
            accepted = product[(product & np.uint64(0xFFFFFFFF)) >= threshold] >> np.uint64(32)
            parts.append(accepted.astype(np.int64))
            count -= len(accepted)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def shuffle(self, values: NDArray[np.int64]) -> None:
        """Shuffle in place: Fisher-Yates from the end."""
        words: list[int] = []
        used = 0
        shuffled = values.tolist()  # Python's list and integers are ten times as fast here as one-element arrays
        for i in range(len(shuffled) - 1, 0, -1):
            mask = (1 << i.bit_length()) - 1
            while True:
                if used == len(words):
                    words, used = self.take(_WORDS_AT_ONCE).tolist(), 0
                j = words[used] & mask
                used += 1
                if j <= i:
                    break
            shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
        values[:] = shuffled
        self._left = np.concatenate([np.array(words[used:], np.uint32), self._left])


class RowOrder(Protocol):
    """Rows in, in reading order; rows out, in output order."""

    def push(self, rows: int) -> Rows:
        """Take the next `rows` rows; the rows that are emitted meanwhile."""
        ...

    def finish(self) -> Rows:
        """Return the rows still held, after the last one was pushed."""
        ...

    def held(self) -> Rows:
        """Return the rows pushed but not emitted, in no particular order."""
        ...


class SequentialOrder:
    """Every row as it comes."""

    def __init__(self) -> None:
        self._pushed = 0

    def push(self, rows: int) -> Rows:
        self._pushed += rows
        return np.arange(self._pushed - rows, self._pushed, dtype=np.int64)

    def finish(self) -> Rows:
        return np.empty(0, np.int64)

    def held(self) -> Rows:
        return np.empty(0, np.int64)


class BufferOrder:
    """The reservoir shuffle, as a stream. Memory: `buffer_size` int64 plus a block."""

    def __init__(self, buffer_size: int, seed: int) -> None:
        self._words = _Words(seed)
        self._slots = np.empty(buffer_size, np.int64)
        self._filled = 0
        self._pushed = 0
        self._draws: NDArray[np.int64] = np.empty(0, np.int64)

    def push(self, rows: int) -> Rows:
        fill = min(rows, len(self._slots) - self._filled)
        incoming = np.arange(self._pushed, self._pushed + rows, dtype=np.int64)
        self._slots[self._filled : self._filled + fill] = incoming[:fill]
        self._filled += fill
        self._pushed += rows
        return self._exchange(incoming[fill:])

    def finish(self) -> Rows:
        rest = self.held()
        self._words.shuffle(rest)
        self._filled = 0
        return rest

    def held(self) -> Rows:
        return self._slots[: self._filled].copy()

    def _exchange(self, incoming: Rows) -> Rows:
        """Put each incoming row into its drawn slot; what each displaced."""
        count = len(incoming)
        if count == 0:
            return incoming
        position_bits = int(count).bit_length()
        # One sort of slot·2^k + position is a stable sort by slot, and faster than argsort.
        keys = (self._take_draws(count) << position_bits) | np.arange(count, dtype=np.int64)
        keys.sort()
        slot = keys >> position_bits
        position = keys & ((1 << position_bits) - 1)
        first = np.empty(count, np.bool_)
        first[0] = True
        np.not_equal(slot[1:], slot[:-1], out=first[1:])
        displaced = np.empty(count, np.int64)
        displaced[1:] = incoming[position[:-1]]
        displaced[first] = self._slots[slot[first]]
        last = np.append(first[1:], True)
        self._slots[slot[last]] = incoming[position[last]]
        emitted = np.empty(count, np.int64)
        emitted[position] = displaced
        return emitted

    def _take_draws(self, count: int) -> NDArray[np.int64]:
        missing = count - len(self._draws)
        if missing > 0:
            size = -(-missing // _DRAWS) * _DRAWS
            fresh = self._words.below(len(self._slots), size)
            self._draws = np.concatenate([self._draws, fresh])
        taken, self._draws = self._draws[:count], self._draws[count:]
        return taken


def row_order(kind: str, *, seed: int, buffer_size: int) -> RowOrder:
    """Return the order a recipe names."""
    return BufferOrder(buffer_size, seed) if kind == "buffer" else SequentialOrder()


def buffer_order(rows: int, *, buffer_size: int, seed: int) -> Rows:
    """Return the whole reservoir shuffle of `rows` rows at once, shape `(rows,)`."""
    order = BufferOrder(buffer_size, seed)
    return np.concatenate([order.push(rows), order.finish()])

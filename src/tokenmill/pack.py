"""Pack, stage 4: documents in output order → which tokens make which shard. Pure NumPy.

A `Window` holds encoded spans until the order has emitted their last row. A `Block` is a run of
emitted rows; `cut` says where shard ends fall in it. Nothing here costs Python time per document
but `Block.pieces`, which the writer calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.encode import EncodedSpan
from tokenmill.layout import TokenArray


class Block(NamedTuple):
    """Rows in output order; every array has shape `(rows,)`."""

    spans: list[TokenArray]
    """The token arrays that the rows point into."""
    span: NDArray[np.int64]
    """Index into `spans`."""
    start: NDArray[np.int64]
    """First token of the row in its span."""
    length: NDArray[np.int64]
    """Tokens, EOS included; 0 for a row that yields no document."""
    flags: NDArray[np.uint8]
    file: NDArray[np.int64]
    """Index of the source file in path order."""
    row: NDArray[np.int64]
    """Row in that file."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def rows(self, begin: int, end: int) -> Block:
        """Rows `begin` to `end`."""
        return Block(
            self.spans,
            self.span[begin:end],
            self.start[begin:end],
            self.length[begin:end],
            self.flags[begin:end],
            self.file[begin:end],
            self.row[begin:end],
        )

    def pieces(self, skip: int, tokens: int) -> list[TokenArray]:
        """Views of the rows' tokens, in order, from token `skip` on, `tokens` in all."""
        found = self.length > 0
        starts = self.start[found]
        ends = starts + self.length[found]
        if len(starts):
            ends[-1] -= int(self.length.sum()) - skip - tokens
            starts[0] += skip
        spans = self.spans
        return [
            spans[s][a:b] for s, a, b in zip(self.span[found].tolist(), starts.tolist(), ends.tolist(), strict=True)
        ]


class Part(NamedTuple):
    """The piece of a block that falls into one shard."""

    shard: int
    begin: int
    """First row of the block that belongs to the part."""
    end: int
    """One past the row that holds the part's last token."""
    skip: int
    """Tokens of row `begin` that the shard before has."""
    tokens: int
    cut_at: int
    """Tokens of row `end - 1` up to the part's end, if the row goes on behind it; else 0."""

    @property
    def first_start(self) -> int:
        """First row that starts in this part."""
        return self.begin + (self.skip > 0)


def cut(position: int, length: NDArray[np.int64], *, shard_size: int, stop: int | None) -> Iterator[Part]:
    """Where shard ends fall in rows of these token counts, the first at token `position` of the stream.

    Rows without tokens go with the next token; those behind the last one are in no part. The stream
    ends at token `stop`: rows from there on are in no part either.
    """
    ends = position + np.cumsum(length)
    limit = int(ends[-1]) if len(ends) else position
    if stop is not None:
        limit = min(limit, stop)
    row, row_start = 0, position
    while position < limit:
        shard = position // shard_size
        part_end = min((shard + 1) * shard_size, limit)
        last = int(np.searchsorted(ends, part_end, side="left"))
        last_start = int(ends[last] - length[last])
        is_cut = ends[last] > part_end
        yield Part(
            shard, row, last + 1, position - row_start, part_end - position, part_end - last_start if is_cut else 0
        )
        position = part_end
        row, row_start = (last, last_start) if is_cut else (last + 1, part_end)


class _Held(NamedTuple):
    first_row: int
    """In reading order over all files."""
    file: int
    row: int
    """Row in the file of `first_row`."""
    tokens: TokenArray


class Window:
    """Encoded spans whose rows the order still holds.

    Rows are numbered in reading order over all files. Spans are added in that order; those that no
    emitted row can come from any more may be left out.
    """

    def __init__(self) -> None:
        self._spans: list[_Held] = []
        self._left: list[int] = []
        self._first_rows = np.empty(0, np.int64)
        self._base = 0
        self._columns = _Columns.empty()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, first_row: int, file: int, row: int, encoded: EncodedSpan, *, pending: int) -> None:
        """Hold a span whose row 0 is `first_row` of all, and `row` of `file`, until `pending` rows are taken."""
        if not self._spans:
            self._base, self._columns = first_row, _Columns.empty()
        gap = first_row - self._base - len(self._columns.length)
        start = np.cumsum(encoded.lengths) - encoded.lengths
        self._columns = self._columns.extended(gap, start, encoded.lengths, encoded.flags)
        self._spans.append(_Held(first_row, file, row, encoded.tokens))
        self._left.append(pending)
        self._first_rows = np.append(self._first_rows, first_row)
        self.nbytes += encoded.tokens.nbytes

    def take(self, rows: NDArray[np.int64]) -> Block:
        """The block of these rows, shape `(n,)`; spans with no row left are let go (the block keeps what it needs)."""
        span = np.searchsorted(self._first_rows, rows, side="right") - 1
        local = rows - self._base
        used, compact = np.unique(span, return_inverse=True)
        held = [self._spans[i] for i in used]
        first = np.array([h.first_row for h in held], np.int64)
        block = Block(
            [h.tokens for h in held],
            compact,
            self._columns.start[local],
            self._columns.length[local],
            self._columns.flags[local],
            np.array([h.file for h in held], np.int64)[compact],
            rows - first[compact] + np.array([h.row for h in held], np.int64)[compact],
        )
        self._release(span)
        return block

    def _release(self, span: NDArray[np.int64]) -> None:
        counts = np.bincount(span, minlength=len(self._spans))
        for i in np.flatnonzero(counts):
            self._left[i] -= int(counts[i])
        keep = [i for i, left in enumerate(self._left) if left > 0]
        if len(keep) == len(self._spans):
            return
        self.nbytes -= sum(h.tokens.nbytes for h, left in zip(self._spans, self._left, strict=True) if left == 0)
        self._spans = [self._spans[i] for i in keep]
        self._left = [self._left[i] for i in keep]
        self._first_rows = self._first_rows[keep]
        oldest = self._spans[0].first_row if self._spans else self._base + len(self._columns.length)
        # Dropping rows copies the columns, so wait until at least half of them are dead.
        if oldest - self._base > len(self._columns.length) // 2:
            self._columns = self._columns.dropped(oldest - self._base)
            self._base = oldest


class _Columns(NamedTuple):
    """Per-row facts of the window, by row number from its base."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    flags: NDArray[np.uint8]

    @staticmethod
    def empty() -> _Columns:
        return _Columns(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))

    def extended(
        self, gap: int, start: NDArray[np.int64], length: NDArray[np.int64], flags: NDArray[np.uint8]
    ) -> _Columns:
        return _Columns(
            np.concatenate([self.start, np.zeros(gap, np.int64), start]),
            np.concatenate([self.length, np.zeros(gap, np.int64), length]),
            np.concatenate([self.flags, np.zeros(gap, np.uint8), flags]),
        )

    def dropped(self, rows: int) -> _Columns:
        return _Columns(self.start[rows:].copy(), self.length[rows:].copy(), self.flags[rows:].copy())

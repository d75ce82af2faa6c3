"""Pack, stage 4: documents in output order → which tokens make which shard. Pure NumPy.

A `Window` holds encoded spans until the order has emitted their last row. A `Block` is a run of
emitted rows; `cut` says where shard ends fall in it. Nothing here costs Python time per document
but `Block.pieces`, which the writer calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tokenmill.encode import EncodedSpan
from tokenmill.engine import Kept
from tokenmill.layout import TokenArray

Tokens: TypeAlias = TokenArray | Kept
"""Of a span: here, or where they were made."""


class Block(NamedTuple):
    """Rows in output order; every array has shape `(rows,)`."""

    spans: list[Tokens]
    """The tokens that the rows point into."""
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

    def pointing(self, spans: list[Tokens], span: NDArray[np.int64]) -> Block:
        """The same rows, pointing into other spans."""
        return Block(spans, span, self.start, self.length, self.flags, self.file, self.row)

    def pieces(self, skip: int, tokens: int) -> list[TokenArray]:
        """Views of the rows' tokens, in order, from token `skip` on, `tokens` in all; all spans are here."""
        found = self.length > 0
        starts = self.start[found]
        ends = starts + self.length[found]
        if len(starts):
            ends[-1] -= int(self.length.sum()) - skip - tokens
            starts[0] += skip
        spans = cast("list[TokenArray]", self.spans)
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


class Window:
    """Encoded spans whose rows the order still holds.

    Rows are numbered in reading order over all files. Spans are added in that order; those that no
    emitted row can come from any more may be left out.
    """

    def __init__(self) -> None:
        self._tokens: list[Tokens] = []
        # Of each span: first row (of all), source file, row there, rows not yet taken.
        self._spans = np.empty((4, 0), np.int64)
        # Of each row from `_base` on: start in its span, length, flags; with room for more.
        self._base = 0
        self._used = 0
        self._rows = np.empty((3, 1024), np.int64)
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self,
        first_row: int,
        file: int,
        row: int,
        encoded: EncodedSpan,
        *,
        pending: int,
        kept: Kept | None = None,
    ) -> None:
        """Hold a span whose row 0 is `first_row` of all, and `row` of `file`, until `pending` rows are taken.

        Its tokens are `kept` elsewhere, or those of `encoded`.
        """
        if not self._tokens:
            self._base = first_row
        begin = first_row - self._base
        end = begin + len(encoded.lengths)
        self._make_room(end)
        self._rows[0, begin:end] = np.cumsum(encoded.lengths) - encoded.lengths
        self._rows[1, begin:end] = encoded.lengths
        self._rows[2, begin:end] = encoded.flags
        self._used = end
        self._spans = np.hstack([self._spans, [[first_row], [file], [row], [pending]]])
        self._tokens.append(kept or encoded.tokens)
        self.nbytes += self._tokens[-1].nbytes

    def _make_room(self, rows: int) -> None:
        """Room for so many rows from the base on, and as many again."""
        if rows <= self._rows.shape[1]:
            return
        live = self._rows[:, : self._used]
        self._rows = np.empty((3, 2 * rows), np.int64)
        self._rows[:, : self._used] = live

    def take(self, rows: NDArray[np.int64]) -> Block:
        """The block of these rows, shape `(n,)`; spans with no row left are let go once it is."""
        first_rows, files, file_rows, left = self._spans
        span = np.searchsorted(first_rows, rows, side="right") - 1
        start, length, flags = self._rows[:, rows - self._base]
        file_row = rows - (first_rows - file_rows)[span]
        block = Block(self._tokens, span, start, length, flags.astype(np.uint8), files[span], file_row)
        left -= np.bincount(span, minlength=len(left))
        if not left.all():
            self._let_go(left > 0)
        return block

    def _let_go(self, keep: NDArray[np.bool_]) -> None:
        # A new list: blocks taken before share the old one.
        self._tokens = [tokens for tokens, kept in zip(self._tokens, keep.tolist(), strict=True) if kept]
        self._spans = self._spans[:, keep]
        self.nbytes = sum(tokens.nbytes for tokens in self._tokens)
        dead = int(self._spans[0, 0]) - self._base if self._tokens else 0
        # Dropping rows moves the others, so wait until half are dead.
        if dead > self._used // 2:
            self._used -= dead
            self._rows[:, : self._used] = self._rows[:, dead : dead + self._used]
            self._base += dead

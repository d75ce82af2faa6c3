"""Pack, stage 4: documents in output order → which tokens make which shard. Pure NumPy and Arrow.

`EmittedRows` are consecutive rows of the output; `cut` says where shard ends fall in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.dataroot.npy import TokenArray

GATHER_TOKENS = 1 << 19
SHORT_ROW = 48
"""Tokens of a row, on average, below which it is not sliced."""


class RemoteTokens(NamedTuple):
    """Tokens that stay on the machine that made them, until a task that gets `reference` needs them."""

    reference: object
    nbytes: int


Tokens: TypeAlias = TokenArray | RemoteTokens
"""Tokens of a batch: in this process, or where they were made."""


class EmittedRows(NamedTuple):
    """Rows in output order; every array has shape `(rows,)`."""

    batches: list[Tokens]
    """The tokens that the rows point into."""
    batch: NDArray[np.int64]
    """Index into `batches`."""
    start: NDArray[np.int64]
    """First token of the row in its batch."""
    length: NDArray[np.int64]
    """Tokens, EOS included; 0 for a row that yields no document."""
    flags: NDArray[np.uint8]
    file: NDArray[np.int64]
    """Index of the source file in path order."""
    row: NDArray[np.int64]
    """Row in that file."""
    text_xxh3: NDArray[np.uint64]
    """XXH3-64 of its text; 0 for a row that yields no document."""
    metadata: pa.Table | None = None
    """None where the recipe names no metadata columns."""

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def rows(self, begin: int, end: int) -> EmittedRows:
        """Return rows `begin` to `end`."""
        return EmittedRows(
            self.batches,
            self.batch[begin:end],
            self.start[begin:end],
            self.length[begin:end],
            self.flags[begin:end],
            self.file[begin:end],
            self.row[begin:end],
            self.text_xxh3[begin:end],
            None if self.metadata is None else self.metadata.slice(begin, end - begin),
        )

    def alone(self) -> EmittedRows:
        """Return the same rows without the memory of their neighbours, which would be pickled with them."""
        if self.metadata is None:
            return self
        return EmittedRows(*self[:-1], self.metadata.take(pa.array(np.arange(len(self)))))

    def pointing(self, batches: list[Tokens], batch: NDArray[np.int64]) -> EmittedRows:
        """Return the same rows, pointing into other batches."""
        return EmittedRows(batches, batch, *self[2:])

    def gather(self, skip: int, tokens: int) -> Iterator[TokenArray]:
        """Yield the rows' tokens, in order, from token `skip` on, `tokens` in all; all batches are here.

        They come in arrays of about `GATHER_TOKENS`, which are hashed and written while the processor's cache holds
        them; a row longer than that is not copied.
        """
        found = np.flatnonzero(self.length)
        if len(found) == 0:
            return
        batch, start, length = self.batch[found], self.start[found], self.length[found]
        length[-1] -= int(length.sum()) - skip - tokens
        start[0] += skip
        length[0] -= skip
        ends = np.cumsum(length)
        full = np.searchsorted(ends, np.arange(GATHER_TOKENS, tokens, GATHER_TOKENS)) + 1
        for first, end in itertools.pairwise(np.unique([0, *full.tolist(), len(ends)]).tolist()):
            yield self._gathered(batch[first:end], start[first:end], length[first:end])

    def _gathered(self, batch: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]) -> TokenArray:
        """Return the tokens that begin at `start` of a batch, `length` of each."""
        batches = cast("list[TokenArray]", self.batches)
        tokens = int(length.sum())
        ends = start + length
        if batch[0] == batch[-1] and np.array_equal(start[1:], ends[:-1]) and np.all(batch == batch[0]):
            return cast(TokenArray, batches[batch[0]][start[0] : ends[-1]])  # they lie one after the other
        if tokens >= SHORT_ROW * len(length):
            pieces = [batches[b][s:e] for b, s, e in zip(batch.tolist(), start.tolist(), ends.tolist(), strict=True)]
            return pieces[0] if len(pieces) == 1 else cast(TokenArray, np.concatenate(pieces))
        # A slice of each row would cost more than its tokens: an index for each token, batch by batch.
        index = np.repeat(start - (np.cumsum(length) - length), length)
        index += np.arange(tokens)
        if len(used := np.flatnonzero(np.bincount(batch))) == 1:
            return cast(TokenArray, batches[used[0]].take(index))
        gathered = np.empty(tokens, batches[used[0]].dtype)
        of_batch = np.repeat(batch, length)
        for number in used.tolist():
            at = np.flatnonzero(of_batch == number)
            gathered[at] = batches[number].take(index[at])
        return cast(TokenArray, gathered)


class ShardSlice(NamedTuple):
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
    """Tokens of row `end - 1` up to the part's end, if the row continues after it; else 0."""

    @property
    def first_start(self) -> int:
        """First row that starts in this part."""
        return self.begin + (self.skip > 0)


def cut(position: int, length: NDArray[np.int64], *, shard_size: int, stop: int | None) -> Iterator[ShardSlice]:
    """Yield where shard ends fall in rows of these token counts, the first at token `position` of the stream.

    Rows without tokens go with the next token; those after the last one are in no part. The stream
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
        yield ShardSlice(
            shard, row, last + 1, position - row_start, part_end - position, part_end - last_start if is_cut else 0
        )
        position = part_end
        row, row_start = (last, last_start) if is_cut else (last + 1, part_end)

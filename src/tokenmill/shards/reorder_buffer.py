"""Reorder buffer: encoded batches in reading order → their rows in output order. Pure NumPy and Arrow."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.corpus.metadata import take_rows
from tokenmill.encoding.encoder import EncodedBatch
from tokenmill.shards.pack import EmittedRows, RemoteTokens, Tokens


class ReorderBuffer:
    """Encoded batches whose rows the order still holds.

    Rows are numbered in reading order over all files. Batches are added in that order; spans that no
    emitted row can come from any more may be left out.
    """

    def __init__(self) -> None:
        self._tokens: list[Tokens] = []
        self._metadata: list[pa.Table | None] = []
        # Of each batch: first row (of all), rows not yet taken.
        self._batches = np.empty((2, 0), np.int64)
        # Of each span: first row (of all), source file, row there.
        self._spans = np.empty((3, 0), np.int64)
        # Of each row from `_base` on: start in its batch, length, flags, hash of its text; with room for more.
        self._base = 0
        self._used = 0
        self._rows = np.empty((1024, 4), np.int64)
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self,
        spans: NDArray[np.int64],
        encoded: EncodedBatch,
        *,
        pending: int,
        remote: RemoteTokens | None = None,
    ) -> None:
        """Hold a batch until `pending` of its rows are taken.

        Args:
            spans: of each of its spans the first row (of all), the source file, and the row there; shape `(3, spans)`.
            encoded: its rows, which have consecutive numbers.
            pending: how many of them will be taken.
            remote: its tokens, if they are not in `encoded`.
        """
        first_row = int(spans[0, 0])
        if not self._tokens:
            self._base = first_row
        begin = first_row - self._base
        end = begin + len(encoded.lengths)
        self._make_room(end)
        self._rows[begin:end, 0] = np.cumsum(encoded.lengths) - encoded.lengths
        self._rows[begin:end, 1] = encoded.lengths
        self._rows[begin:end, 2] = encoded.flags
        self._rows[begin:end, 3] = encoded.text_xxh3.view(np.int64)
        self._used = end
        self._batches = np.hstack([self._batches, [[first_row], [pending]]])
        self._spans = np.hstack([self._spans, spans])
        self._tokens.append(remote or encoded.tokens)
        self._metadata.append(encoded.metadata)
        self.nbytes += self._nbytes_of(-1)

    def _nbytes_of(self, batch: int) -> int:
        metadata = self._metadata[batch]
        return self._tokens[batch].nbytes + (0 if metadata is None else int(metadata.nbytes))

    def _make_room(self, rows: int) -> None:
        """Room for so many rows from the base on, and as many again."""
        if rows <= len(self._rows):
            return
        live = self._rows[: self._used]
        self._rows = np.empty((2 * rows, 4), np.int64)
        self._rows[: self._used] = live

    def take(self, rows: NDArray[np.int64]) -> EmittedRows:
        """Take these rows, shape `(n,)`, out of the buffer; batches with no row left are released."""
        batches, left = self._batches
        first_rows, files, file_rows = self._spans
        batch = np.searchsorted(batches, rows, side="right") - 1
        span = np.searchsorted(first_rows, rows, side="right") - 1
        start, length, flags, xxh3 = np.ascontiguousarray(self._rows.take(rows - self._base, axis=0).T)
        file_row = rows - (first_rows - file_rows)[span]
        metadata = None
        if len(rows) and self._metadata[0] is not None:
            metadata = take_rows(self._metadata, batch, rows - batches[batch])
        block = EmittedRows(
            self._tokens,
            batch,
            start,
            length,
            flags.astype(np.uint8),
            files[span],
            file_row,
            xxh3.view(np.uint64),
            metadata,
        )
        left -= np.bincount(batch, minlength=len(left))
        if not left.all():
            self._let_go(left > 0)
        return block

    def _let_go(self, keep: NDArray[np.bool_]) -> None:
        # A new list: blocks taken before share the old one.
        self._tokens = list(itertools.compress(self._tokens, keep.tolist()))
        self._metadata = list(itertools.compress(self._metadata, keep.tolist()))
        self._batches = self._batches[:, keep]
        self.nbytes = sum(map(self._nbytes_of, range(len(self._tokens))))
        oldest = int(self._batches[0, 0]) if self._tokens else self._base + self._used
        self._spans = self._spans[:, np.searchsorted(self._spans[0], oldest) :]
        dead = oldest - self._base
        # Dropping rows moves the others, so wait until half are dead.
        if dead > self._used // 2:
            self._used -= dead
            self._rows[: self._used] = self._rows[dead : dead + self._used]
            self._base += dead

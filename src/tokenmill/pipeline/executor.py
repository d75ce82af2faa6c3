"""Executor: encodes the spans of a run and writes its shards.

`local.ThreadExecutor` does both on threads of this process, `cluster.ClusterExecutor` by tasks on a cluster. The driver
decides what is encoded and written, and when; the executor decides where.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from tokenmill.corpus.reader import Span
from tokenmill.dataroot.manifest import Cursor
from tokenmill.encoding.encoder import EncodedBatch
from tokenmill.shards.pack import EmittedRows, RemoteTokens, ShardSlice


class SourceFilePlan(Protocol):
    """The spans of a source file, as the driver sees them; `corpus.reader.SpanReader` documents the methods."""

    name: str

    @property
    def rows(self) -> int | None: ...

    def spans(self) -> Iterator[Span]: ...

    def prefetch(self, span: Span) -> None: ...

    def keep_only(self, spans: Collection[Span]) -> None: ...

    def drop(self, span: Span) -> None: ...


class SpanToEncode(NamedTuple):
    """A span of a source file that `Executor.open_files` opened."""

    file: int
    source: SourceFilePlan
    span: Span


class EncodingResult(NamedTuple):
    """An encoded batch of spans."""

    encoded: EncodedBatch
    """Has no tokens if they are `remote`."""
    remote: RemoteTokens | None


def bad_rows(batch: Sequence[SpanToEncode], encoded: EncodedBatch) -> Iterator[tuple[int, int, str]]:
    """Yield the source file, the row there, and the reason of each row of a batch that is bad."""
    if not encoded.bad:
        return
    ends = list(itertools.accumulate(span.rows for _, _, span in batch))
    for row, reason in encoded.bad.items():
        file, _, span = batch[at := bisect.bisect_right(ends, row)]
        yield file, span.first_row + span.rows - (ends[at] - row), reason


class Executor(Protocol):
    """Encodes spans and writes shards for one run; called from the driver's thread only."""

    tokens: int
    """Number of tokens of the data set handed over so far, those of earlier runs included."""
    documents: int
    """The same for documents."""

    @property
    def workers(self) -> int:
        """Number of batches that are encoded at the same time."""
        ...

    @property
    def batches_at_once(self) -> int:
        """Number of batches that are encoded, or wait for it, at the same time."""
        ...

    @property
    def text_nbytes_at_once(self) -> float:
        """Size of their text beyond which no further batch is begun."""
        ...

    @property
    def retries(self) -> int:
        """Number of requests to a store that failed and were tried again."""
        ...

    def open_files(self, files: Iterable[int]) -> Iterator[tuple[int, SourceFilePlan]]:
        """Open files of the corpus, by index, one after the other."""
        ...

    def encode(self, batch: Sequence[SpanToEncode]) -> Future[EncodingResult]:
        """Encode a batch of spans."""
        ...

    def has_room(self, waiting_nbytes: int) -> bool:
        """Return whether more may be encoded while so many bytes of tokens wait for their turn in the order."""
        ...

    def await_room(self) -> bool:
        """Wait until a shard that takes room is finished. Return False if none is being written."""
        ...

    def describe(self, waiting_nbytes: int) -> str:
        """Describe what the cluster is doing; empty without a cluster."""
        ...

    def note_encoded(self, batch: Sequence[SpanToEncode], encoded: EncodedBatch) -> None:
        """Remember of a batch which rows are bad and why, and its retries."""
        ...

    def begin_shards(self) -> None:
        """Start a sequence of consecutive shards."""
        ...

    def write(self, rows: EmittedRows, part: ShardSlice, position: int, next_cursor: Cursor) -> None:
        """Write the tokens of `part`, the first of which is token `position` of the stream.

        A run that continues after them starts at `next_cursor`.
        """
        ...

    def count_rows(self, rows: EmittedRows) -> None:
        """Enter rows without text into the ledger of the shard that gets the next token."""
        ...

    def end_of_corpus(self, cursor: Cursor) -> None:
        """Finish the last shard, which may be short."""
        ...

    def finish(self) -> None:
        """Wait until every shard is written and recorded."""
        ...

    def abandon(self) -> None:
        """Stop after an error: keep and record the shards that are finished, and remove the others."""
        ...

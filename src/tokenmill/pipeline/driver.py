"""Driver: the loop of a run.

It keeps a bounded number of batches of spans encoding, gives their row counts to the shuffle and their lengths to the
reorder buffer, and hands rows in output order, cut at shard ends, to the executor.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from tokenmill.corpus.order import Rows, file_order, row_order
from tokenmill.corpus.reader import Span
from tokenmill.dataroot.manifest import Cursor, Manifest
from tokenmill.errors import SourceChangedError
from tokenmill.pipeline.executor import EncodingResult, Executor, SourceFilePlan, SpanToEncode
from tokenmill.progress import OnProgress, Progress
from tokenmill.shards.pack import cut
from tokenmill.shards.reorder_buffer import ReorderBuffer

T = TypeVar("T")

BATCH_NBYTES = 16 << 20
"""Text that is encoded in one call of the backend, which costs 5 ms and begins with cold caches."""
FIRST_BATCH_NBYTES = 1 << 20
"""The first batches are small, so that all workers begin early and a small corpus reaches each of them."""
BATCH_ROWS = 1 << 18
"""Rows of a batch, however short they are."""
BATCHES_AHEAD = 1
"""Batches whose spans are found ahead of their being encoded."""
BLOCK_ROWS = 16_384
"""Rows that are taken out of the reorder buffer at once."""


class Lookahead(Iterator[T]):
    """The items of an iterator, some of them taken ahead on a thread.

    An exception of the iterator is raised in the place of its item.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._coming = deque(self._pool.submit(self._next) for _ in range(depth))

    def _next(self) -> list[T]:
        """Return a list of the next item; an empty list at the end."""
        return list(itertools.islice(self._items, 1))

    def __next__(self) -> T:
        item = self._coming.popleft().result()
        if not item:
            self._coming.appendleft(self._pool.submit(self._next))  # the next call must end as well
            raise StopIteration
        self._coming.append(self._pool.submit(self._next))
        return item[0]

    def close(self) -> None:
        """Take no more items."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Reading(NamedTuple):
    """A span that is read and encoded."""

    first_row: int
    """In reading order over all files."""
    file: int
    span: Span
    source: SourceFilePlan


class _Batch(NamedTuple):
    """Spans after each other in reading order that are encoded together."""

    readings: list[_Reading]
    pending: int
    """How many of their rows will be emitted."""
    rows: int
    text_nbytes: int
    """About the size of their text."""

    @property
    def spans(self) -> list[SpanToEncode]:
        return [SpanToEncode(reading.file, reading.source, reading.span) for reading in self.readings]


class _Passed(NamedTuple):
    """A source file whose rows the order took without its being opened."""

    first_row: int
    """In reading order over all files; likewise `end`, one past its last."""
    end: int
    file: int


class Driver:
    """Makes the shards from `first` to before `end` (None: to the end of the stream).

    Args:
        file_count: number of source files.
        manifest: of the data set.
        executor: encodes and writes.
        batch_rows: largest number of rows that are encoded together; a span may have more.
        on_progress: called as rows are handed to the executor.
    """

    def __init__(
        self,
        file_count: int,
        manifest: Manifest,
        executor: Executor,
        *,
        first: int,
        end: int | None,
        batch_rows: int,
        on_progress: OnProgress,
    ) -> None:
        recipe = manifest.recipe
        self._recipe = recipe
        self._file_count = file_count
        self._manifest = manifest
        self._executor = executor
        self._on_progress = on_progress
        self._order = row_order(recipe.order, seed=recipe.seed, buffer_size=recipe.buffer_size)
        self._buffer = ReorderBuffer()
        self._first = first
        size, total = recipe.shard_size, recipe.total_tokens
        self._stop = min(filter(None, (total, end and end * size)), default=None)
        self._cursor = manifest.cursor(first)
        self._position = manifest.position(first) - self._cursor.offset
        """Token of the stream at which the next row starts."""
        self._emitted = self._cursor.position
        """Rows emitted before it."""
        self._work: Lookahead[_Batch] | None = None
        self._in_flight: deque[tuple[_Batch, Future[EncodingResult]]] = deque()
        self._in_flight_nbytes = 0
        self._batched = 0
        """Batches planned so far."""
        self._batch_rows = batch_rows
        self.audited = 0

    def start(self) -> None:
        """Replay the order up to the first shard and submit the first spans."""
        self._rest, again, readings = self._replay(self._cursor)
        self._again = len(again)
        batches = itertools.chain(
            self._batches(self._plan_again(again)), self._batches(self._plan_first_time(readings))
        )
        self._work = Lookahead(batches, BATCHES_AHEAD)
        self._submit_ahead()

    def close(self) -> None:
        """Read no more."""
        if self._work is not None:
            self._work.close()

    def run(self) -> None:
        """Make the shards, up to the last."""
        self._executor.begin_shards()
        encoded = self._encoded()
        again = self._again
        self._report_phase("reading documents that wait in the shuffle" if again else "reading the first documents")
        while self._again > 0:
            batch, result = next(encoded)
            self._hold(batch, result)
            self._again -= len(batch.readings)
            self._report_phase("reading documents that wait in the shuffle", again - self._again, again)
        self._emit(self._rest)
        for batch, result in encoded:
            self._hold(batch, result)
            rows = self._order.push(batch.rows)
            if not len(rows):
                held = len(self._order.held())
                self._report_phase("filling the shuffle", held, self._recipe.buffer_size)
            self._emit(rows)
            if self._at_stop():
                return
        self._emit(self._order.finish())
        if not self._at_stop():
            self._executor.end_of_corpus(Cursor(self._emitted))

    def _at_stop(self) -> bool:
        return self._stop is not None and self._position >= self._stop

    def _readings(self, files: Sequence[int], first_row: int = 0) -> Iterator[_Reading]:
        """Yield every span of some files in reading order; they are opened as they are reached."""
        for index, source in self._executor.open_files(files):
            self._count_rows(index, source)
            for span in source.spans():
                yield _Reading(first_row, index, span, source)
                first_row += span.rows
            self._count_rows(index, source)

    def _count_rows(self, index: int, source: SourceFilePlan) -> None:
        """A file's rows, once they are known, must be those an earlier run found."""
        record = self._manifest.files[index]
        if None not in (record.rows, source.rows) and record.rows != source.rows:
            raise SourceChangedError(
                f"{source.name}: the source changed since this data root was begun: expected {record.rows} rows, "
                f"found {source.rows}",
                next_step="restore the file, or start in another directory",
            )
        record.rows = source.rows if record.rows is None else record.rows

    def _pass_files(self, files: Sequence[int], cursor: Cursor) -> tuple[list[_Passed], int]:
        """Run the order over the first files without opening them, as far as their rows were counted before.

        Returns those files, all of whose emitted rows lie before `cursor`, and how many were emitted.
        """
        passed: list[_Passed] = []
        first_row = emitted = 0
        for index in files:
            rows = self._manifest.files[index].rows
            if rows is None or emitted + rows > cursor.position:
                break
            emitted += len(self._order.push(rows))
            passed.append(_Passed(first_row, first_row + rows, index))
            first_row += rows
        return passed, emitted

    def _replay(self, cursor: Cursor) -> tuple[Rows, list[tuple[_Reading, int]], Iterator[_Reading]]:
        """Run the order, without text, up to `cursor`.

        Returns the rows from the cursor on that are emitted already; the spans that hold those and the rows
        still in the order, each with how many of its rows that is; and the spans that come then.
        """
        files = file_order(self._file_count, kind=self._recipe.order, seed=self._recipe.seed).tolist()
        whole, emitted = self._pass_files(files, cursor)
        first_row = whole[-1].end if whole else 0
        readings = self._readings(files[len(whole) :], first_row)
        passed: list[_Reading] = []
        rest: Rows = np.empty(0, np.int64)
        while emitted <= cursor.position and cursor != Cursor():
            reading = next(readings, None)
            rows = self._order.finish() if reading is None else self._order.push(reading.span.rows)
            emitted += len(rows)
            rest = rows[max(0, len(rows) - (emitted - cursor.position)) :]
            if reading is None:
                break
            reading.source.drop(reading.span)
            passed.append(reading)
        wanted = np.concatenate([rest, self._order.held()])
        for begin, end, file in whole:
            if np.any((wanted >= begin) & (wanted < end)):
                passed += self._readings([file], begin)
        passed.sort(key=lambda reading: reading.first_row)
        if not passed:
            return rest, [], readings
        starts = np.array([reading.first_row for reading in passed], np.int64)
        pending = np.bincount(np.searchsorted(starts, wanted, side="right") - 1, minlength=len(passed))
        return rest, [(reading, int(pending[i])) for i, reading in enumerate(passed) if pending[i]], readings

    def _plan_again(self, again: list[tuple[_Reading, int]]) -> Iterator[tuple[_Reading, int]]:
        """Yield the spans that an earlier run encoded too, each with how many of its rows will be emitted."""
        groups = {file: list(group) for file, group in itertools.groupby(again, key=lambda work: work[0].file)}
        for (_, source), needed in zip(self._executor.open_files(groups), groups.values(), strict=True):
            source.keep_only([reading.span for reading, _ in needed])
            for reading, pending in needed:
                source.prefetch(reading.span)
                yield reading._replace(source=source), pending

    def _plan_first_time(self, readings: Iterator[_Reading]) -> Iterator[tuple[_Reading, int]]:
        """Yield the other spans likewise; all their rows will be."""
        for reading in readings:
            reading.source.prefetch(reading.span)
            yield reading, reading.span.rows

    def _batches(self, spans: Iterator[tuple[_Reading, int]]) -> Iterator[_Batch]:
        """Yield the spans in batches whose rows have consecutive numbers."""
        readings: list[_Reading] = []
        pending = rows = nbytes = 0
        for reading, needed in spans:
            span = reading.span
            is_next = not readings or reading.first_row == readings[0].first_row + rows
            fits = nbytes + span.text_nbytes <= self._batch_nbytes() and rows + span.rows <= self._batch_rows
            if readings and not (is_next and fits):
                yield _Batch(readings, pending, rows, nbytes)
                self._batched += 1
                readings, pending, rows, nbytes = [], 0, 0, 0
            readings.append(reading)
            pending, rows, nbytes = pending + needed, rows + span.rows, nbytes + span.text_nbytes
        if readings:
            yield _Batch(readings, pending, rows, nbytes)

    def _batch_nbytes(self) -> int:
        doublings = self._batched // max(1, self._executor.workers)  # a cluster may have lost all of them
        return min(BATCH_NBYTES, FIRST_BATCH_NBYTES << min(doublings, 16))

    def _submit_ahead(self) -> None:
        """Keep a bounded number of batches under way, and what waits for its turn within bounds."""
        assert self._work is not None
        most, most_nbytes = self._executor.batches_at_once, self._executor.text_nbytes_at_once
        while len(self._in_flight) < most and self._in_flight_nbytes < most_nbytes:
            if self._in_flight and not self._executor.has_room(self._buffer.nbytes):
                break
            batch = next(self._work, None)
            if batch is None:
                break
            self._in_flight_nbytes += batch.text_nbytes
            self._in_flight.append((batch, self._executor.encode(batch.spans)))

    def _encoded(self) -> Iterator[tuple[_Batch, EncodingResult]]:
        """Yield batches in reading order, as they are encoded."""
        while self._in_flight:
            batch, future = self._in_flight.popleft()
            result = future.result()
            self._in_flight_nbytes -= batch.text_nbytes
            while not self._executor.has_room(self._buffer.nbytes) and self._executor.await_room():
                pass
            self._submit_ahead()
            yield batch, result

    def _hold(self, batch: _Batch, result: EncodingResult) -> None:
        encoded, remote = result
        spans = np.array([[r.first_row, r.file, r.span.first_row] for r in batch.readings], np.int64).T
        self._buffer.add(spans, encoded, pending=batch.pending, remote=remote)
        self._executor.note_encoded(batch.spans, encoded)
        self.audited += encoded.audited

    def _emit(self, rows: Rows) -> None:
        """Hand rows to the executor in blocks, cut at shard ends."""
        for at in range(0, len(rows), BLOCK_ROWS):
            if self._at_stop():
                return
            block = self._buffer.take(rows[at : at + BLOCK_ROWS])
            token, row = self._position, 0
            for part in cut(token, block.length, shard_size=self._recipe.shard_size, stop=self._stop):
                row = part.end
                next_cursor = Cursor(self._emitted + part.end - (part.cut_at > 0), part.cut_at)
                if part.shard >= self._first:
                    self._executor.write(block, part, token, next_cursor)
                token += part.tokens
                self._report(token)
            self._position += block.tokens
            self._emitted += len(block)
            if not self._at_stop():
                self._executor.count_rows(block.rows(row, len(block)))

    def _report(self, position: int) -> None:
        self._on_progress(self._progress(position))

    def _report_phase(self, phase: str, done: int = 0, of: int = 0) -> None:
        self._on_progress(self._progress(self._position)._replace(phase=phase, done=done, of=of))

    def _progress(self, position: int) -> Progress:
        return Progress(
            self._executor.tokens,
            self._executor.documents,
            position // self._recipe.shard_size,
            self._buffer.nbytes,
            self._executor.retries,
            self._executor.describe(self._buffer.nbytes),
        )

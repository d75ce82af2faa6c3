"""Driver: keeps a bounded number of spans under way, feeds their row counts to the order and their lengths to the
window, and hands parts of shards to the writer. Where spans are encoded and shards are written is its site's affair.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from tokenmill.engine import Lookahead
from tokenmill.errors import SourceChangedError
from tokenmill.manifest import Cursor, Manifest
from tokenmill.order import Rows, file_order, row_order
from tokenmill.pack import Window, cut
from tokenmill.source import Corpus
from tokenmill.spans import Span
from tokenmill.supply import SourcePlan, Supplied, Supply
from tokenmill.task_writer import TaskWriter
from tokenmill.writer import Writer


class Progress(NamedTuple):
    """Where a run is, for whoever shows it."""

    tokens: int
    """Of the data set, earlier runs included."""
    documents: int
    shard: int
    """The one being written."""
    window_nbytes: int
    """Encoded tokens that wait for their turn in the order."""
    retries: int
    """Requests to a store that failed and were tried again."""
    cluster: str = ""
    """What the cluster is doing, if there is one."""


Show = Callable[[Progress], None]


class Site(NamedTuple):
    """Where a run's spans are encoded and its shards written."""

    supply: Supply
    writer: Writer | TaskWriter
    block_rows: int
    stop: Callable[[], None]
    """Drop what has not begun."""
    has_room: Callable[[int], bool]
    """Whether more may be encoded while so many bytes wait in the window."""
    make_room: Callable[[], bool]
    """Wait until something that takes room is done; False if nothing is under way."""
    describe: Callable[[int], str]
    """The cluster, if there is one, while so many bytes wait in the window."""


class _Reading(NamedTuple):
    """A span on its way through the run."""

    first_row: int
    """In reading order over all files."""
    file: int
    span: Span
    source: SourcePlan


class _Passed(NamedTuple):
    """A source file whose rows the order took without its being opened."""

    first_row: int
    """In reading order over all files; likewise `end`, one past its last."""
    end: int
    file: int


class Driver:
    """Makes shards `first` to `end` (None: to the end of the stream)."""

    def __init__(
        self, corpus: Corpus, manifest: Manifest, site: Site, *, first: int, end: int | None, show: Show
    ) -> None:
        recipe = manifest.recipe
        self._recipe = recipe
        self._corpus = corpus
        self._manifest = manifest
        self._site = site
        self._supply, self._writer = site.supply, site.writer
        self._show = show
        self._order = row_order(recipe.order, seed=recipe.seed, buffer_size=recipe.buffer_size)
        self._window = Window()
        self._first = first
        size, total = recipe.shard_size, recipe.total_tokens
        self._stop = min(filter(None, (total, end and end * size)), default=None)
        self._cursor = manifest.cursor(first)
        self._position = manifest.position(first) - self._cursor.offset
        """Token of the stream at which the next row starts."""
        self._emitted = self._cursor.position
        """Rows emitted before it."""
        self._work: Lookahead[tuple[_Reading, int]] | None = None
        self._in_flight: deque[tuple[_Reading, int, Future[Supplied]]] = deque()
        self.audited = 0

    def start(self) -> None:
        """Replay the order up to the first shard and submit the first spans."""
        self._rest, again, readings = self._replay(self._cursor)
        self._again = len(again)
        self._work = Lookahead(self._plan_work(again, readings), 2 * self._supply.workers)
        self._submit_ahead()

    def close(self) -> None:
        """Read no more."""
        if self._work is not None:
            self._work.close()

    def run(self) -> None:
        """Go on to the end, handing parts to the writer."""
        self._writer.begin()
        encoded = self._encoded()
        for reading, pending, supplied in itertools.islice(encoded, self._again):
            self._hold(reading, pending, supplied)
        self._emit(self._rest)
        for reading, pending, supplied in encoded:
            self._hold(reading, pending, supplied)
            self._emit(self._order.push(reading.span.rows))
            if self._at_stop():
                return
        self._emit(self._order.finish())
        if not self._at_stop():
            self._writer.end_of_corpus(Cursor(self._emitted))

    def _at_stop(self) -> bool:
        return self._stop is not None and self._position >= self._stop

    def _readings(self, files: Sequence[int], first_row: int = 0) -> Iterator[_Reading]:
        """Every span of some files in reading order; they are opened as they are reached."""
        for index, source in self._supply.open(files):
            self._count_rows(index, source)
            for span in source.spans():
                yield _Reading(first_row, index, span, source)
                first_row += span.rows
            self._count_rows(index, source)

    def _count_rows(self, index: int, source: SourcePlan) -> None:
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
        files = file_order(len(self._corpus.files), kind=self._recipe.order, seed=self._recipe.seed).tolist()
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

    def _plan_work(
        self, again: list[tuple[_Reading, int]], readings: Iterator[_Reading]
    ) -> Iterator[tuple[_Reading, int]]:
        """What to encode, in reading order: a span, and how many of its rows will be emitted."""
        groups = {file: list(group) for file, group in itertools.groupby(again, key=lambda work: work[0].file)}
        for (_, source), needed in zip(self._supply.open(groups), groups.values(), strict=True):
            source.keep_only([reading.span for reading, _ in needed])
            for reading, pending in needed:
                source.prefetch(reading.span)
                yield reading._replace(source=source), pending
        for reading in readings:
            reading.source.prefetch(reading.span)
            yield reading, reading.span.rows

    def _submit_ahead(self) -> None:
        """Keep a bounded number of spans under way, and what waits for its turn within bounds."""
        assert self._work is not None
        while len(self._in_flight) <= 2 * self._supply.workers:
            if self._in_flight and not self._site.has_room(self._window.nbytes):
                break
            work = next(self._work, None)
            if work is None:
                break
            reading, pending = work
            future = self._supply.submit(reading.file, reading.source, reading.span)
            self._in_flight.append((reading, pending, future))

    def _encoded(self) -> Iterator[tuple[_Reading, int, Supplied]]:
        """Spans in reading order, as they are encoded."""
        while self._in_flight:
            reading, pending, future = self._in_flight.popleft()
            supplied = future.result()
            while not self._site.has_room(self._window.nbytes) and self._site.make_room():
                pass
            self._submit_ahead()
            yield reading, pending, supplied

    def _hold(self, reading: _Reading, pending: int, supplied: Supplied) -> None:
        encoded, kept = supplied
        first_row = reading.span.first_row
        self._window.add(reading.first_row, reading.file, first_row, encoded, pending=pending, kept=kept)
        self._writer.skipped.learn(reading.file, first_row, encoded.bad)
        self._corpus.location.retrier.count += encoded.retries
        self.audited += encoded.audited

    def _emit(self, rows: Rows) -> None:
        """Hand rows to the writer in blocks, cut into parts."""
        for at in range(0, len(rows), self._site.block_rows):
            if self._at_stop():
                return
            block = self._window.take(rows[at : at + self._site.block_rows])
            token, row = self._position, 0
            for part in cut(token, block.length, shard_size=self._recipe.shard_size, stop=self._stop):
                row = part.end
                next_cursor = Cursor(self._emitted + part.end - (part.cut_at > 0), part.cut_at)
                if part.shard >= self._first:
                    self._writer.append(block, part, token, next_cursor)
                token += part.tokens
            self._position += block.tokens
            self._emitted += len(block)
            if not self._at_stop():
                self._writer.append_idle(block.rows(row, len(block)))
            self._show(
                Progress(
                    self._writer.tokens,
                    self._writer.documents,
                    token // self._recipe.shard_size,
                    self._window.nbytes,
                    self._corpus.location.retrier.count,
                    self._site.describe(self._window.nbytes),
                )
            )

"""Supply: where encoded spans come from: this process and its threads, or tasks of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, Protocol, cast

from tokenmill import tasks
from tokenmill.encode import EncodedSpan, Encoder
from tokenmill.engine import ClusterEngine, Kept, TaskEngine, mapped
from tokenmill.options import OnBadRows
from tokenmill.source import Corpus
from tokenmill.spans import Span, SpanReader


class SourcePlan(Protocol):
    """A source file as the driver sees it: see `spans.SpanReader` for what these mean."""

    name: str

    @property
    def rows(self) -> int | None: ...

    def spans(self) -> Iterator[Span]: ...

    def prefetch(self, span: Span) -> None: ...

    def keep_only(self, spans: Collection[Span]) -> None: ...

    def drop(self, span: Span) -> None: ...


class Supplied(NamedTuple):
    """An encoded span."""

    encoded: EncodedSpan
    """Without its tokens if they are `kept`."""
    kept: Kept | None


class Supply(Protocol):
    """Opens the files of a corpus and encodes their spans."""

    @property
    def workers(self) -> int:
        """Spans that are encoded at once."""
        ...

    def open(self, files: Iterable[int]) -> Iterator[tuple[int, SourcePlan]]:
        """Files of the corpus, by index, one after the other."""
        ...

    def submit(self, file: int, source: SourcePlan, span: Span) -> Future[Supplied]:
        """Encode a span of a file that was opened."""
        ...


class ThreadSupply:
    """Reads and encodes in this process."""

    def __init__(
        self, corpus: Corpus, encoder: Encoder, engine: TaskEngine, *, on_bad_rows: OnBadRows, span_rows: int | None
    ) -> None:
        self._corpus, self._encoder, self._engine = corpus, encoder, engine
        self._on_bad_rows: OnBadRows = on_bad_rows
        self._span_rows = span_rows

    @property
    def workers(self) -> int:
        return self._engine.workers

    def open(self, files: Iterable[int]) -> Iterator[tuple[int, SpanReader]]:
        for index in files:
            yield index, self._corpus.open(index, span_rows=self._span_rows)

    def submit(self, file: int, source: SourcePlan, span: Span) -> Future[Supplied]:
        return self._engine.submit(self._encode, cast(SpanReader, source), span)

    def _encode(self, source: SpanReader, span: Span) -> Supplied:
        encoded = self._encoder.encode(
            source.read(span), where=source.name, first_row=span.first_row, on_bad_rows=self._on_bad_rows
        )
        return Supplied(encoded, None)


class TaskSupply:
    """Has tasks read and encode; of a file only its spans come here, of a span only the lengths of its rows."""

    def __init__(self, work: tasks.Work, shared: object, engine: ClusterEngine) -> None:
        self._work, self._shared, self._engine = work, shared, engine
        self._itemsize = work.encoder.dtype.itemsize

    @property
    def workers(self) -> int:
        return self._engine.workers

    def open(self, files: Iterable[int]) -> Iterator[tuple[int, _PlannedFile]]:
        """As many files are planned ahead as there are workers."""
        coming: deque[tuple[int, Future[list[Span]]]] = deque()
        rest = iter(files)
        while True:
            while len(coming) <= self.workers and (index := next(rest, None)) is not None:
                coming.append((index, self._engine.submit(tasks.plan_file, self._shared, index)))
            if not coming:
                return
            index, planned = coming.popleft()
            name = self._work.corpus.name_of(self._work.corpus.files[index].path)
            yield index, _PlannedFile(name, planned.result())

    def submit(self, file: int, source: SourcePlan, span: Span) -> Future[Supplied]:
        return mapped(self._engine.submit_split(tasks.encode_span, self._shared, file, span), self._supplied)

    def _supplied(self, made: tuple[object, EncodedSpan]) -> Supplied:
        reference, encoded = made
        return Supplied(encoded, Kept(reference, int(encoded.lengths.sum()) * self._itemsize))


class _PlannedFile:
    """A file that tasks read; nothing of it is here."""

    def __init__(self, name: str, spans: list[Span]) -> None:
        self.name = name
        self.rows = sum(span.rows for span in spans)
        self._spans = spans

    def spans(self) -> Iterator[Span]:
        return iter(self._spans)

    def prefetch(self, span: Span) -> None:
        """Nothing: whoever encodes it reads it."""

    def keep_only(self, spans: Collection[Span]) -> None:
        """Nothing."""

    def drop(self, span: Span) -> None:
        """Nothing."""

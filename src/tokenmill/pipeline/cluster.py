"""Tasks on a cluster encode the spans of a run and write its shards; the manifest after each shard is written here.

Of a source file only its spans come here, and of a span only the lengths of its rows. The parts of a shard are
collected, without tokens, until it is whole; then a task gets them, and references to the spans they point into.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import numpy as np

from tokenmill.corpus.reader import Span
from tokenmill.dataroot import atomic, layout, npy
from tokenmill.dataroot.manifest import Count, Cursor, Manifest, ShardRecord
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.dataroot.tokens_file import TokensFile
from tokenmill.encoding.encoder import EncodedBatch
from tokenmill.errors import DataRootError, TokenmillError
from tokenmill.pipeline import tasks
from tokenmill.pipeline.cluster_engine import ClusterEngine, map_future
from tokenmill.pipeline.executor import EncodingResult, SpanToEncode, bad_rows
from tokenmill.pipeline.tasks import MadeShard, ShardPlan, TaskContext
from tokenmill.shards.pack import EmittedRows, RemoteTokens, ShardSlice
from tokenmill.shards.recorder import Recorder
from tokenmill.shards.shard import tally
from tokenmill.transfer.upload import Sender

VISIBLE_SECONDS = 15.0

_PLANNED_FILES = 64
_PLANNED_NBYTES = 4 << 20
"""Files that are planned by one task: so many, or so large together."""


class _PlannedFile:
    """A source file that tasks read; nothing of it is on this machine."""

    def __init__(self, name: str, spans: list[Span]) -> None:
        self.name = name
        self.rows = sum(span.rows for span in spans)
        self._spans = spans

    def spans(self) -> Iterator[Span]:
        return iter(self._spans)

    def prefetch(self, span: Span) -> None:
        """Do nothing: the task that encodes the span reads it."""

    def keep_only(self, spans: Collection[Span]) -> None:
        """Do nothing."""

    def drop(self, span: Span) -> None:
        """Do nothing."""


class _ShardTask(NamedTuple):
    made: Future[MadeShard]
    nbytes: int
    """Size of the tokens that the task gets."""


class ClusterExecutor:
    """An `executor.Executor` that has tasks do the work.

    Args:
        context: what all tasks of the run share.
        manifest: of the data set; shards are entered into it as they are finished.
        engine: runs the tasks.
        recorder: enters finished shards.
        tokens_file: takes over at the end what the tasks wrote to `tokens.bin`; None where shards are files.
        sender: takes note of what the tasks sent to a bucket; None where they send nothing.
    """

    def __init__(
        self,
        context: TaskContext,
        manifest: Manifest,
        engine: ClusterEngine,
        recorder: Recorder,
        *,
        tokens_file: TokensFile | None = None,
        sender: Sender | None = None,
    ) -> None:
        self.tokens = manifest.tokens
        self.documents = manifest.documents
        self._context = context._replace(run=uuid.uuid4().hex)
        self._manifest = manifest
        self._engine = engine
        self._recorder = recorder
        self._tokens_file = tokens_file
        self._sender = sender
        atomic.write_whole(context.root / layout.RUN, self._context.run.encode())
        self._shared = engine.share(self._context.pack())
        self._remote_retries = 0
        self._parts: list[tuple[EmittedRows, ShardSlice, int]] = []
        self._sources: dict[int, tuple[int, RemoteTokens]] = {}
        """The batches that the parts point into, by identity, each with its place among the arguments of the task."""
        self._counts: list[Count] = []
        self._shard_tasks: list[_ShardTask] = []

    @property
    def workers(self) -> int:
        return self._engine.workers

    @property
    def batches_at_once(self) -> int:
        return 2 * self.workers + 1

    @property
    def text_nbytes_at_once(self) -> float:
        return math.inf  # none of it is on this machine

    @property
    def retries(self) -> int:
        return self._context.corpus.retries + self._remote_retries

    def open_files(self, files: Iterable[int]) -> Iterator[tuple[int, _PlannedFile]]:
        """Plan as many groups of files ahead as there are workers."""
        corpus = self._context.corpus
        coming: deque[tuple[list[int], Future[list[list[Span]]]]] = deque()
        rest = self._groups(files)
        while True:
            while len(coming) <= self.workers and (group := next(rest, None)) is not None:
                coming.append((group, self._engine.submit(tasks.plan_files, self._shared, group)))
            if not coming:
                return
            group, planned = coming.popleft()
            for index, spans in zip(group, planned.result(), strict=True):
                yield index, _PlannedFile(corpus.name_of(corpus.files[index].path), spans)

    def _groups(self, files: Iterable[int]) -> Iterator[list[int]]:
        """Yield the files in groups that a task plans: many if they are small, as a task costs milliseconds."""
        group: list[int] = []
        nbytes = 0
        for index in files:
            group.append(index)
            nbytes += self._context.corpus.files[index].nbytes
            if nbytes >= _PLANNED_NBYTES or len(group) == _PLANNED_FILES:
                yield group
                group, nbytes = [], 0
        if group:
            yield group

    def encode(self, batch: Sequence[SpanToEncode]) -> Future[EncodingResult]:
        spans = [(file, span) for file, _, span in batch]
        made = self._engine.submit_split(tasks.encode_spans, self._shared, spans)
        return map_future(made, self._encoding_result)

    def _encoding_result(self, made: tuple[object, EncodedBatch]) -> EncodingResult:
        reference, encoded = made
        nbytes = int(encoded.lengths.sum()) * self._context.encoder.dtype.itemsize
        return EncodingResult(encoded, RemoteTokens(reference, nbytes))

    @property
    def _writing_nbytes(self) -> int:
        """Size of the tokens that unfinished shard tasks hold, without the shard whose parts are being collected."""
        return sum(task.nbytes for task in self._shard_tasks)

    def has_room(self, waiting_nbytes: int) -> bool:
        return waiting_nbytes + self._writing_nbytes <= self._engine.memory_nbytes

    def await_room(self) -> bool:
        if not self._shard_tasks:
            return False
        wait([task.made for task in self._shard_tasks], return_when=FIRST_COMPLETED)
        self._collect()
        return True

    def describe(self, waiting_nbytes: int) -> str:
        stored = (waiting_nbytes + self._writing_nbytes) / 1e9
        return f"{self._engine.describe()}, {stored:.2f} GB of tokens in its store"

    def note_encoded(self, batch: Sequence[SpanToEncode], encoded: EncodedBatch) -> None:
        self._recorder.skipped.learn(bad_rows(batch, encoded))
        self._remote_retries += encoded.retries

    def begin_shards(self) -> None:
        self._counts = []

    def write(self, rows: EmittedRows, part: ShardSlice, position: int, next_cursor: Cursor) -> None:
        self._collect()
        taken = rows.rows(part.begin, part.end).alone()
        used, batch = np.unique(taken.batch, return_inverse=True)
        places = np.array([self._place(rows.batches[index]) for index in used.tolist()], np.int64)
        moved = part._replace(begin=0, end=part.end - part.begin)
        self._parts.append((taken.pointing([], places[batch]), moved, position))
        started = rows.rows(part.first_start, part.end)
        self._recorder.skipped.note(started)
        self.tokens += part.tokens
        self.documents += int(np.count_nonzero(started.length))
        recipe = self._manifest.recipe
        if position + part.tokens == part.shard * recipe.shard_size + recipe.shard_tokens(part.shard):
            self._submit(part.shard, next_cursor)

    def _place(self, tokens: object) -> int:
        assert isinstance(tokens, RemoteTokens)
        return self._sources.setdefault(id(tokens), (len(self._sources), tokens))[0]

    def count_rows(self, rows: EmittedRows) -> None:
        self._recorder.skipped.note(rows)
        self._counts += tally(rows)

    def end_of_corpus(self, cursor: Cursor) -> None:
        if self._parts:
            self._submit(self._parts[0][1].shard, cursor)
        self._manifest.tail = self._counts

    def _submit(self, index: int, next_cursor: Cursor) -> None:
        tokens = self._manifest.recipe.shard_tokens(index)
        expected = self._manifest.expected(index)
        schema = documents_schema(self._manifest)
        plan = ShardPlan(index, tokens, self._parts, self._counts, next_cursor, expected, schema)
        sources = [source for _, source in self._sources.values()]
        made = self._engine.submit(tasks.write_shard, self._shared, plan, *(source.reference for source in sources))
        self._shard_tasks.append(_ShardTask(made, sum(source.nbytes for source in sources)))
        self._parts, self._sources, self._counts = [], {}, []

    def _collect(self) -> None:
        """Record the shards that are finished, then raise what the first one that failed raised."""
        failed: list[Future[MadeShard]] = []
        for task in [task for task in self._shard_tasks if task.made.done()]:
            self._shard_tasks.remove(task)
            if _is_made(task.made):
                self._record(task.made.result())
            else:
                failed.append(task.made)
        for made_not in failed:
            made_not.result()

    def _record(self, made: MadeShard) -> None:
        self._require_visible(made.record)
        self._recorder.record(made.record)
        self._remote_retries += made.retries
        for file in made.sent:
            assert self._sender is not None
            self._sender.adopt(file)

    def _require_visible(self, record: ShardRecord) -> None:
        """Require that this machine sees what another one says it wrote; its file system may take a moment."""
        if not self._context.keep_local or self._context.is_one_file:
            return
        path = self._context.root / layout.shard_name(record.index)
        expected = npy.shard_nbytes(self._context.encoder.dtype, record.tokens)
        patience = time.monotonic() + VISIBLE_SECONDS
        while not path.is_file() or path.stat().st_size != expected:
            if time.monotonic() > patience:
                raise DataRootError(
                    f"{path}: expected {expected} bytes, written by another machine, found "
                    f"{path.stat().st_size if path.is_file() else 'no such file'}",
                    next_step="use storage that all machines share, or a bucket: --upload-to s3://... --keep-local no",
                )
            time.sleep(0.1)

    def finish(self) -> None:
        while self.await_room():
            pass
        if self._tokens_file is not None:
            self._take_over(self._tokens_file)
        self._leave()

    def _take_over(self, file: TokensFile) -> None:
        """Read what the tasks wrote; every range must be what its task recorded."""
        itemsize = self._manifest.itemsize
        for record in self._manifest.shards:
            if record.index * self._manifest.recipe.shard_size * itemsize < file.nbytes:
                continue  # an earlier run took it over
            header = npy.npy_header(self._context.encoder.dtype, record.tokens)
            found = file.adopt(record.tokens * itemsize, header)
            if found != record.sha256:
                raise DataRootError(
                    f"{file.partial}: shard {record.index} is not what was written there: expected sha256 "
                    f"{record.sha256}, found {found}",
                    next_step="make sure that all machines see the same file, then run the same command again",
                )

    def abandon(self) -> None:
        self._leave()
        self._shard_tasks = [task for task in self._shard_tasks if _is_made(task.made)]
        with contextlib.suppress(TokenmillError):  # the user is told the error that ended the run, not this one
            self._collect()
        self._recorder.abandon()

    def _leave(self) -> None:
        """Tasks that begin from now on find that the data root is not this run's."""
        self._engine.drop()
        atomic.remove(self._context.root, layout.RUN)


def _is_made(made: Future[MadeShard]) -> bool:
    return made.done() and not made.cancelled() and made.exception() is None

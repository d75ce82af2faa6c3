"""Threads of this process encode the spans of a run and write its shards, and the manifest after each shard.

Encoding releases the GIL, so a pool of threads uses all cores. One more thread gathers, hashes and writes the current
shard; a second makes the previous shard durable and records it, so that nothing waits for the disk; a third sends
finished shards to a bucket. Only these threads touch the files of a data root.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from tokenmill.corpus.corpus import Corpus
from tokenmill.corpus.reader import SpanReader
from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.manifest import Count, Cursor, Manifest, ShardRecord
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.dataroot.tokens_file import TokensFile
from tokenmill.encoding.encoder import EncodedBatch, Encoder, SpanTexts
from tokenmill.options import OnBadRows
from tokenmill.pipeline.driver import BATCH_NBYTES
from tokenmill.pipeline.executor import EncodingResult, SpanToEncode, bad_rows
from tokenmill.shards.pack import EmittedRows, ShardSlice
from tokenmill.shards.recorder import Recorder
from tokenmill.shards.shard import ShardWriter, tally
from tokenmill.shards.token_sink import AppendSink, FileSink, TokenSink

BATCHES_QUEUED = 2
"""Batches that wait to be encoded, beyond one for each worker."""
_WAITING_PARTS = 16


class _SerialThread:
    """Runs tasks one after the other on a thread; after an error it begins no more.

    The next `submit` or `drain` raises the error. `submit` waits while more than `waiting` tasks are not done.
    """

    def __init__(self, name: str, *, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._futures: deque[Future[None]] = deque()
        self._limit = waiting
        self._failed = False

    def submit(self, task: Callable[..., None], *args: object) -> None:
        self._futures.append(self._pool.submit(self._run, task, *args))
        while self._futures and (self._futures[0].done() or len(self._futures) > self._limit):
            self._futures.popleft().result()

    def _run(self, task: Callable[..., None], *args: object) -> None:
        if self._failed:
            return
        self._failed = True
        task(*args)
        self._failed = False

    def drain(self) -> None:
        while self._futures:
            self._futures.popleft().result()

    def shutdown(self) -> None:
        self._pool.shutdown()


class ThreadExecutor:
    """An `executor.Executor` on threads of this process.

    Args:
        root: the data root.
        manifest: of the data set; shards are entered into it as they are finished.
        corpus: the source files.
        encoder: encodes them, on `workers` threads.
        recorder: enters finished shards.
        on_bad_rows: what to do about rows that are not what their format says.
        span_rows: rows of a span; None lets the text decide.
        tokens_file: takes the tokens of all shards; None gives each shard a file of its own.
        on_recorded: called, on a thread of its own, with each shard that is finished and recorded.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        corpus: Corpus,
        encoder: Encoder,
        recorder: Recorder,
        *,
        workers: int,
        on_bad_rows: OnBadRows,
        span_rows: int | None,
        tokens_file: TokensFile | None = None,
        on_recorded: Callable[[ShardRecord], None] | None = None,
    ) -> None:
        self.workers = workers
        self.tokens = manifest.tokens
        self.documents = manifest.documents
        self._root = root
        self._manifest = manifest
        self._corpus = corpus
        self._encoder = encoder
        self._recorder = recorder
        self._on_bad_rows: OnBadRows = on_bad_rows
        self._span_rows = span_rows
        self._tokens_file = tokens_file
        self._on_recorded = on_recorded
        self._paths = pa.array([file.path for file in manifest.files], pa.string())
        self._encoding = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._pieces = ThreadPoolExecutor(workers, thread_name_prefix="piece")
        self._writing = _SerialThread("write", waiting=_WAITING_PARTS)
        self._publishing = _SerialThread("publish", waiting=1)
        self._sending = _SerialThread("send", waiting=1)  # no more shards than that wait on a disk that may be small
        self._shard: ShardWriter | None = None
        self._unfinished: list[ShardWriter] = []
        self._counts: list[Count] = []
        """Counts of rows without text that no shard has yet."""

    @property
    def batches_at_once(self) -> int:
        return self.workers + BATCHES_QUEUED

    @property
    def text_nbytes_at_once(self) -> float:
        return self.batches_at_once * BATCH_NBYTES

    @property
    def retries(self) -> int:
        return self._corpus.retries

    def open_files(self, files: Iterable[int]) -> Iterator[tuple[int, SpanReader]]:
        at_once = self._corpus.location.opens_at_once
        if at_once == 1:
            yield from ((index, self._corpus.open(index, span_rows=self._span_rows)) for index in files)
            return
        rest = iter(files)
        with ThreadPoolExecutor(at_once, thread_name_prefix="open") as pool:
            coming: deque[tuple[int, Future[SpanReader]]] = deque()
            while True:
                for index in itertools.islice(rest, at_once - len(coming)):
                    coming.append((index, pool.submit(self._open, index)))
                if not coming:
                    return
                index, opening = coming.popleft()
                yield index, opening.result()

    def _open(self, index: int) -> SpanReader:
        opened = self._corpus.open(index, span_rows=self._span_rows)
        opened.start()
        return opened

    def encode(self, batch: Sequence[SpanToEncode]) -> Future[EncodingResult]:
        return self._encoding.submit(self._encode, batch)

    def _encode(self, batch: Sequence[SpanToEncode]) -> EncodingResult:
        texts = [
            SpanTexts(cast(SpanReader, source).read(span), source.name, span.first_row) for _, source, span in batch
        ]
        encoded = self._encoder.encode_batch(texts, on_bad_rows=self._on_bad_rows, pool=self._pieces)
        return EncodingResult(encoded, None)

    def has_room(self, waiting_nbytes: int) -> bool:
        return True

    def await_room(self) -> bool:
        return False

    def describe(self, waiting_nbytes: int) -> str:
        return ""

    def note_encoded(self, batch: Sequence[SpanToEncode], encoded: EncodedBatch) -> None:
        self._recorder.skipped.learn(bad_rows(batch, encoded))

    def begin_shards(self) -> None:
        self._writing.submit(self._counts.clear)

    def write(self, rows: EmittedRows, part: ShardSlice, position: int, next_cursor: Cursor) -> None:
        self._writing.submit(self._write, rows, part, position, next_cursor)
        self.tokens += part.tokens
        self.documents += int(np.count_nonzero(rows.length[part.first_start : part.end]))

    def count_rows(self, rows: EmittedRows) -> None:
        if len(rows):
            self._writing.submit(self._count, rows)

    def end_of_corpus(self, cursor: Cursor) -> None:
        self._writing.submit(self._end, cursor)

    def finish(self) -> None:
        for thread in (self._writing, self._publishing, self._sending):
            thread.drain()
        self._shutdown()

    def abandon(self) -> None:
        self._shutdown()
        for shard in self._unfinished:
            shard.discard()
        self._recorder.abandon()

    def _shutdown(self) -> None:
        for pool in (self._pieces, self._encoding):
            pool.shutdown(wait=True, cancel_futures=True)
        for thread in (self._writing, self._publishing, self._sending):
            thread.shutdown()

    def _write(self, rows: EmittedRows, part: ShardSlice, position: int, next_cursor: Cursor) -> None:
        if self._shard is None:
            self._shard = self._open_shard(part.shard)
        self._shard.append(rows, part, position)
        self._recorder.skipped.note(rows.rows(part.first_start, part.end))
        if self._shard.is_full:
            self._publish_shard(self._shard, next_cursor)

    def _open_shard(self, index: int) -> ShardWriter:
        tokens = self._manifest.recipe.shard_tokens(index)
        sink: TokenSink
        if self._tokens_file is not None:
            sink = AppendSink(self._tokens_file)
        else:
            header = npy.npy_header(self._encoder.dtype, tokens)
            sink = FileSink(self._root / layout.shard_name(index), header)
        shard = ShardWriter(
            self._root,
            index,
            sink,
            tokens=tokens,
            dtype=self._encoder.dtype,
            paths=self._paths,
            schema=documents_schema(self._manifest),
        )
        self._unfinished.append(shard)
        shard.count(self._counts)
        self._counts.clear()
        return shard

    def _count(self, rows: EmittedRows) -> None:
        counts = tally(rows)
        self._recorder.skipped.note(rows)
        if self._shard is None:
            self._counts.extend(counts)
        else:
            self._shard.count(counts)

    def _end(self, cursor: Cursor) -> None:
        if self._shard is not None:
            self._publish_shard(self._shard, cursor)
        self._manifest.tail = list(self._counts)

    def _publish_shard(self, shard: ShardWriter, next_cursor: Cursor) -> None:
        self._shard = None
        self._publishing.submit(self._publish, shard, next_cursor)

    def _publish(self, shard: ShardWriter, next_cursor: Cursor) -> None:
        record = shard.finish(next_cursor, self._manifest.expected(shard.index))
        self._unfinished.remove(shard)
        self._recorder.record(record)
        if self._on_recorded is not None:
            self._sending.submit(self._on_recorded, record)

"""Writer: the sequence of shards of a run, on threads of its own, and the manifest after each.

One thread gathers, hashes and writes the shard in the making; a second makes the one before durable
and records it, so that waiting for the disk stops nobody. Only these touch the files of a data root.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenmill import layout
from tokenmill import manifest as manifests
from tokenmill.errors import StorageError
from tokenmill.manifest import Count, Cursor, Manifest, ShardRecord
from tokenmill.pack import Block, Part
from tokenmill.shard import Place, ShardFile, ShardStretch, ShardWriter, tally
from tokenmill.skipped import SkippedRows
from tokenmill.tokens_file import TokensFile

log = logging.getLogger("tokenmill")

_WAITING_PARTS = 64
_SAVE_SECONDS = 1.0
"""Between manifests, where shards are finished faster than that: what a kill then costs."""


class _Lane:
    """Tasks one after the other on a thread; after an error none is begun any more.

    The error is raised by the next `submit` or by `drain`; so is the wait for a place.
    """

    def __init__(self, name: str, *, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._futures: deque[Future[None]] = deque()
        self._limit = waiting
        self._failed = False

    def submit(self, task: Callable[..., None], *args: object) -> None:
        self._futures.append(self._pool.submit(self._unless_failed, task, *args))
        while self._futures and (self._futures[0].done() or len(self._futures) > self._limit):
            self._futures.popleft().result()

    def _unless_failed(self, task: Callable[..., None], *args: object) -> None:
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


class Recorder:
    """Enters finished shards into the manifest, and rows that were left out into `skipped.jsonl`.

    Args:
        root: the data root.
        manifest: of the data set.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self._manifest = manifest
        self.skipped = SkippedRows(root, [file.path for file in manifest.files])
        self._has_recorded = False
        self._save_due = 0.0

    def record(self, record: ShardRecord) -> None:
        """Enter a shard that is durable."""
        self.skipped.flush()
        self._manifest.add(record)
        self._has_recorded = True
        if time.monotonic() >= self._save_due:
            self._save()
        name = layout.shard_name(record.index)
        log.info("%s: %d tokens, %d documents, sha256 %s", name, record.tokens, record.documents, record.sha256)

    def abandon(self) -> None:
        """Save what was entered, in a run that ends with an error."""
        # On a full disk this fails as well: the error that brought us here is the one to tell, and
        # a shard without a record is made again.
        if self._has_recorded:
            with contextlib.suppress(StorageError):
                self._save()

    def _save(self) -> None:
        begin = time.monotonic()
        manifests.save(self._root, self._manifest)
        self._save_due = time.monotonic() + max(_SAVE_SECONDS, 10 * (time.monotonic() - begin))


class Writer:
    """Writes the shards it is handed the parts of, in order; keeps the manifest.

    Args:
        root: the data root.
        manifest: of the data set, entered into as shards are finished.
        dtype: of a token.
        recorder: enters them.
        tokens_file: takes the tokens of all shards; None gives each a file of its own.
        published: called, on a thread of its own, with each shard that is finished and recorded.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        dtype: layout.TokenDType,
        recorder: Recorder,
        *,
        tokens_file: TokensFile | None = None,
        published: Callable[[ShardRecord], None] | None = None,
    ) -> None:
        self._root = root
        self._tokens_file = tokens_file
        self._on_published = published
        self._manifest = manifest
        self._dtype = dtype
        self._recorder = recorder
        self._paths = pa.array([file.path for file in manifest.files], pa.string())
        self.skipped = recorder.skipped
        self._writing = _Lane("write", waiting=_WAITING_PARTS)
        self._publishing = _Lane("publish", waiting=1)
        self._sending = _Lane("send", waiting=1)  # no more shards than that wait on a disk that may be small
        self._shard: ShardWriter | None = None
        self._unfinished: list[ShardWriter] = []
        self._idle: list[Count] = []
        self.tokens = manifest.tokens
        """Of the data set, handed over so far; likewise `documents`."""
        self.documents = manifest.documents

    def begin(self) -> None:
        """Start a run of consecutive shards."""
        self._writing.submit(self._idle.clear)

    def append(self, block: Block, part: Part, position: int, next_cursor: Cursor) -> None:
        """Write a part whose first token is at `position` and whose end is `next_cursor`."""
        self._writing.submit(self._append, block, part, position, next_cursor)
        self.tokens += part.tokens
        self.documents += int(np.count_nonzero(block.length[part.first_start : part.end]))

    def append_idle(self, rows: Block) -> None:
        """Enter rows without text into the ledger of the shard that the next token goes to."""
        if len(rows):
            self._writing.submit(self._append_idle, rows)

    def end_of_corpus(self, cursor: Cursor) -> None:
        """Finish the last shard, short as it may be."""
        self._writing.submit(self._end, cursor)

    def close(self) -> None:
        """Wait until all is written and recorded."""
        self._writing.drain()
        self._publishing.drain()
        self._sending.drain()
        self._shutdown()

    def abandon(self) -> None:
        """Write what was handed over, for the sake of shards it completes; remove those it does not."""
        self._shutdown()
        for shard in self._unfinished:
            shard.discard()
        self._recorder.abandon()

    def _shutdown(self) -> None:
        self._writing.shutdown()
        self._publishing.shutdown()
        self._sending.shutdown()

    def _append(self, block: Block, part: Part, position: int, next_cursor: Cursor) -> None:
        if self._shard is None:
            self._shard = self._open(part.shard)
        self._shard.append(block, part, position)
        self.skipped.note(block.rows(part.first_start, part.end))
        if self._shard.is_full:
            self._finish(self._shard, next_cursor)

    def _open(self, index: int) -> ShardWriter:
        size, total = self._manifest.recipe.shard_size, self._manifest.recipe.total_tokens
        tokens = size if total is None else min(size, total - index * size)
        place: Place
        if self._tokens_file is not None:
            place = ShardStretch(self._tokens_file)
        else:
            place = ShardFile(self._root / layout.shard_name(index), layout.npy_header(self._dtype, tokens))
        shard = ShardWriter(self._root, index, place, tokens=tokens, dtype=self._dtype, paths=self._paths)
        self._unfinished.append(shard)
        shard.count(self._idle)
        self._idle.clear()
        return shard

    def _append_idle(self, rows: Block) -> None:
        counts = tally(rows)
        self.skipped.note(rows)
        if self._shard is None:
            self._idle.extend(counts)
        else:
            self._shard.count(counts)

    def _end(self, cursor: Cursor) -> None:
        if self._shard is not None:
            self._finish(self._shard, cursor)
        self._manifest.tail = list(self._idle)

    def _finish(self, shard: ShardWriter, next_cursor: Cursor) -> None:
        self._shard = None
        self._publishing.submit(self._publish, shard, next_cursor)

    def _publish(self, shard: ShardWriter, next_cursor: Cursor) -> None:
        record = shard.finish(next_cursor, self._manifest.expected(shard.index))
        self._unfinished.remove(shard)
        self._recorder.record(record)
        if self._on_published is not None:
            self._sending.submit(self._on_published, record)

"""Task writer: the sequence of shards of a run, each made by a task elsewhere, and the manifest after each.

Collects the parts of a shard, without tokens, until it is whole; then a task gets them and references to the
spans they point into.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import numpy as np

from tokenmill import layout
from tokenmill.engine import ClusterEngine, Kept
from tokenmill.errors import DataRootError, TokenmillError
from tokenmill.manifest import Count, Cursor, Manifest, ShardRecord
from tokenmill.pack import Block, Part
from tokenmill.shard import tally
from tokenmill.tasks import MadeShard, ShardPlan, Target, write_shard
from tokenmill.tokens_file import TokensFile
from tokenmill.writer import Recorder

_VISIBLE_SECONDS = 15.0


class _Making(NamedTuple):
    made: Future[MadeShard]
    nbytes: int
    """Of the tokens it takes."""


class TaskWriter:
    """Has shards made from the parts it is handed, in order; keeps the manifest. For one thread.

    Args:
        manifest: of the data set, entered into as shards are finished.
        engine: runs the tasks.
        shared: the run's `tasks.PackedWork`, as the engine shares it.
        target: where shards go.
        recorder: enters them.
        tokens_file: takes over what the tasks wrote to `tokens.bin`, at the end; None where shards are files.
        made: called with each shard that is recorded.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: ClusterEngine,
        shared: object,
        target: Target,
        recorder: Recorder,
        *,
        tokens_file: TokensFile | None,
        made: Callable[[MadeShard], None],
    ) -> None:
        self._manifest = manifest
        self._engine, self._shared, self._target = engine, shared, target
        self._recorder = recorder
        self.skipped = recorder.skipped
        self._tokens_file = tokens_file
        self._on_made = made
        self._parts: list[tuple[Block, Part, int]] = []
        self._kept: dict[int, tuple[int, Kept]] = {}
        """By the identity of what is kept: its place among the arguments of the shard's task."""
        self._counts: list[Count] = []
        self._making: list[_Making] = []
        self.tokens = manifest.tokens
        self.documents = manifest.documents

    @property
    def nbytes(self) -> int:
        """Of the tokens that shards in the making need; not of the one whose parts are being collected."""
        return sum(making.nbytes for making in self._making)

    def begin(self) -> None:
        """Start a run of consecutive shards."""
        self._counts = []

    def append(self, block: Block, part: Part, position: int, next_cursor: Cursor) -> None:
        """Take a part whose first token is at `position` and whose end is `next_cursor`."""
        self.collect()
        rows = block.rows(part.begin, part.end)
        used, span = np.unique(rows.span, return_inverse=True)
        places = np.array([self._place(block.spans[index]) for index in used.tolist()], np.int64)
        moved = part._replace(begin=0, end=part.end - part.begin)
        self._parts.append((rows.pointing([], places[span]), moved, position))
        started = block.rows(part.first_start, part.end)
        self.skipped.note(started)
        self.tokens += part.tokens
        self.documents += int(np.count_nonzero(started.length))
        size, total = self._target.shard_size, self._manifest.recipe.total_tokens
        end = (part.shard + 1) * size if total is None else min((part.shard + 1) * size, total)
        if position + part.tokens == end:
            self._submit(part.shard, next_cursor)

    def _place(self, tokens: object) -> int:
        assert isinstance(tokens, Kept)
        return self._kept.setdefault(id(tokens), (len(self._kept), tokens))[0]

    def append_idle(self, rows: Block) -> None:
        """Enter rows without text into the ledger of the shard that the next token goes to."""
        self.skipped.note(rows)
        self._counts += tally(rows)

    def end_of_corpus(self, cursor: Cursor) -> None:
        """Finish the last shard, short as it may be."""
        if self._parts:
            self._submit(self._parts[0][1].shard, cursor)
        self._manifest.tail = self._counts

    def _submit(self, index: int, next_cursor: Cursor) -> None:
        size, total = self._target.shard_size, self._manifest.recipe.total_tokens
        tokens = size if total is None else min(size, total - index * size)
        expected = self._manifest.expected(index)
        plan = ShardPlan(index, tokens, self._parts, self._counts, next_cursor, expected)
        references = [kept.reference for _, kept in self._kept.values()]
        nbytes = sum(kept.nbytes for _, kept in self._kept.values())
        made = self._engine.submit(write_shard, self._shared, plan, *references)
        self._making.append(_Making(made, nbytes))
        self._parts, self._kept, self._counts = [], {}, []

    def collect(self) -> None:
        """Record the shards that are finished; what the first that failed raised, once the others are recorded."""
        failed: list[Future[MadeShard]] = []
        for making in [making for making in self._making if making.made.done()]:
            self._making.remove(making)
            if _is_made(making.made):
                made = making.made.result()
                self._require_here(made.record)
                self._recorder.record(made.record)
                self._on_made(made)
            else:
                failed.append(making.made)
        for made_not in failed:
            made_not.result()

    def _require_here(self, record: ShardRecord) -> None:
        """What another machine says it wrote must be seen here; its file system may take a moment."""
        if not self._target.keep_local or self._target.is_one_file:
            return
        path = self._target.root / layout.shard_name(record.index)
        expected = layout.shard_nbytes(layout.token_dtype(self._target.dtype), record.tokens)
        patience = time.monotonic() + _VISIBLE_SECONDS
        while not path.is_file() or path.stat().st_size != expected:
            if time.monotonic() > patience:
                raise DataRootError(
                    f"{path}: expected {expected} bytes, written by another machine, found "
                    f"{path.stat().st_size if path.is_file() else 'no such file'}",
                    next_step="use storage that all machines share, or a bucket: --upload-to s3://... --keep-local no",
                )
            time.sleep(0.1)

    def await_one(self) -> bool:
        """Wait until a shard in the making is finished; False if there is none."""
        if not self._making:
            return False
        wait([making.made for making in self._making], return_when=FIRST_COMPLETED)
        self.collect()
        return True

    def close(self) -> None:
        """Wait until all is written and recorded."""
        while self.await_one():
            pass
        if self._tokens_file is not None:
            self._take_over(self._tokens_file)

    def _take_over(self, file: TokensFile) -> None:
        """Read what the tasks wrote; every range must be what its task said it is."""
        for record in self._manifest.shards:
            if record.index * self._target.shard_size * self._manifest.itemsize < file.nbytes:
                continue  # taken over from an earlier run
            header = layout.npy_header(layout.token_dtype(self._target.dtype), record.tokens)
            found = file.adopt(record.tokens * self._manifest.itemsize, header)
            if found != record.sha256:
                raise DataRootError(
                    f"{file.partial}: shard {record.index} is not what was written there: expected sha256 "
                    f"{record.sha256}, found {found}",
                    next_step="make sure that all machines see the same file, then run the same command again",
                )

    def abandon(self) -> None:
        """Record what is finished."""
        self._making = [making for making in self._making if _is_made(making.made)]
        with contextlib.suppress(TokenmillError):  # the error that brought us here is the one to tell
            self.collect()
        self._recorder.abandon()


def _is_made(made: Future[MadeShard]) -> bool:
    return made.done() and not made.cancelled() and made.exception() is None

"""Tasks: what a run does in other processes: plan a file, encode a span, write a shard. Functions of their arguments.

A task may be run again, elsewhere and at the same time, and gives the same.
"""

from __future__ import annotations

import itertools
import os
import pickle
import platform
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenmill.corpus.corpus import Corpus
from tokenmill.corpus.reader import Span, SpanReader, Texts, concatenate
from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.manifest import Count, Cursor, ShardRecord
from tokenmill.dataroot.npy import TokenArray
from tokenmill.encoding.encoder import EncodedBatch, Encoder, SpanTexts
from tokenmill.errors import DataRootError, EngineError, SourceChangedError
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.pipeline.leftovers import PREFIX, process_space, remove_leftovers
from tokenmill.shards.pack import EmittedRows, ShardSlice
from tokenmill.shards.shard import ShardWriter
from tokenmill.shards.token_sink import FileSink, RangeSink, TokenSink
from tokenmill.transfer.selection import Records
from tokenmill.transfer.stores import BucketStore, FolderStore, StoredFile
from tokenmill.transfer.upload import Sender

_SPAN_ROWS = 10_000
"""A task costs a few milliseconds, and an object in the cluster's store, so spans are larger than for threads."""
SPAN_TEXT_NBYTES = 64 << 20
_NO_TOKENS = np.empty(0, np.uint16)
_LIBRARIES = ("tokenmill", "numpy", "pyarrow", "tokenizers", "gigatoken")


class TaskContext(NamedTuple):
    """What all tasks of a run share."""

    corpus: Corpus
    encoder: Encoder
    on_bad_rows: OnBadRows
    span_rows: int | None
    """Rows of a span; None: about 10,000, fewer where they are long."""
    root: Path
    """The data root. All machines see it, unless shards do not stay in it."""
    shard_size: int
    is_one_file: bool
    """Whether shards are ranges of `tokens.bin`."""
    upload_to: str | None
    store: StoreOptions
    keep_local: bool
    run: str = ""
    """A random name of the run, which a file in the data root repeats."""

    def pack(self) -> PackedContext:
        """Prepare the context for other processes."""
        return PackedContext(self.run, pickle.dumps(self), installed_software())


class PackedContext(NamedTuple):
    """A `TaskContext` as bytes, unpacked once per process."""

    key: str
    data: bytes
    software: dict[str, str]
    """Versions, on the machine where the run was started, of what decides how text is encoded and stored."""

    def unpack(self) -> TaskContext:
        """Return the context.

        Raises:
            EngineError: other versions are installed on this machine.
        """
        if self.key not in unpacked:
            here = installed_software()
            different = next((name for name, expected in self.software.items() if here[name] != expected), None)
            if different is not None:
                raise EngineError(
                    f"{socket.gethostname()}: expected {different} {self.software[different]} as where the run was "
                    f"started, found {here[different]}",
                    next_step="install the same versions on every machine",
                )
            from tokenmill.pipeline.allocator import keep_freed_memory

            keep_freed_memory()
            unpacked.clear()  # of earlier runs
            unpacked[self.key] = pickle.loads(self.data)
        return unpacked[self.key]


unpacked: dict[str, TaskContext] = {}


def installed_software() -> dict[str, str]:
    """Return what decides how text is encoded and stored."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def plan_files(shared: PackedContext, files: Sequence[int]) -> list[list[Span]]:
    """Return how the rows of source files are cut for tasks, in row order.

    Columnar files are cut as `SpanReader.spans` does. Others can only be read front to back: they are one span,
    whose rows are counted now.

    Raises:
        SourceError: it cannot be read, or (`SourceChangedError`) is another than was listed.
    """
    context = shared.unpack()
    return [_plan_file(_open_unchanged(context, index)) for index in files]


def _plan_file(source: SpanReader) -> list[Span]:
    if source.rows is not None:
        return list(source.spans())
    rows = nbytes = 0
    for span in source.spans():
        source.drop(span)
        rows += span.rows
        nbytes += span.text_nbytes
    return [Span(0, rows, 0, nbytes)] if rows else []


def encode_spans(shared: PackedContext, spans: Sequence[tuple[int, Span]]) -> tuple[TokenArray, EncodedBatch]:
    """Return the tokens of spans that `plan_files` named, and their lengths and counts; raise what that raises."""
    context = shared.unpack()
    before = context.corpus.retries
    texts: list[SpanTexts] = []
    for index, group in itertools.groupby(spans, key=lambda each: each[0]):
        texts += _read_spans(_open_unchanged(context, index), [span for _, span in group])
    encoded = context.encoder.encode_batch(texts, on_bad_rows=context.on_bad_rows)
    return encoded.tokens, encoded._replace(tokens=_NO_TOKENS, retries=context.corpus.retries - before)


def _read_spans(source: SpanReader, spans: Sequence[Span]) -> Iterator[SpanTexts]:
    if source.rows is not None:
        source.keep_only(spans)
    for span in spans:
        texts = _read_whole(source) if source.rows is None else source.read(span)
        if len(texts.array) != span.rows:
            raise _changed_error(source.name, f"{span.rows} rows", str(len(texts.array)))
        yield SpanTexts(texts, source.name, span.first_row)


def _open_unchanged(context: TaskContext, index: int) -> SpanReader:
    """Return a file of the corpus, which must be the one that was listed where the run was started."""
    file = context.corpus.files[index]
    context.corpus.location.require_unchanged(file)
    source = context.corpus.open(index, span_rows=context.span_rows or _SPAN_ROWS)
    if context.span_rows is None and source.rows:
        fitting = max(1, SPAN_TEXT_NBYTES * source.rows // max(1, source.figures().text_nbytes))
        if fitting < _SPAN_ROWS:
            return context.corpus.open(index, span_rows=fitting)
    return source


def _changed_error(name: str, expected: str, found: str) -> SourceChangedError:
    return SourceChangedError(
        f"{name}: on {socket.gethostname()} it is not the file that was planned: expected {expected}, found {found}",
        next_step="every machine must see the same files, and nothing may change them during the run",
    )


def _read_whole(source: SpanReader) -> Texts:
    pieces: list[pa.Array] = []
    tables: list[pa.Table] = []
    bad: dict[int, str] = {}
    for span in source.spans():
        texts = source.read(span)
        pieces.append(texts.array)
        if texts.metadata is not None:
            tables.append(texts.metadata)
        bad.update({span.first_row + row: reason for row, reason in texts.bad.items()})
    return Texts(concatenate(pieces), bad, pa.concat_tables(tables) if tables else None)


class ShardPlan(NamedTuple):
    """All that makes a shard but the tokens themselves."""

    shard: int
    tokens: int
    """Number of tokens of a full shard; the last one may have fewer."""
    parts: list[tuple[EmittedRows, ShardSlice, int]]
    """Rows, which of their tokens, and where in the stream; `EmittedRows.batches` is empty."""
    counts: list[Count]
    """Rows without text that belong to no part."""
    next_cursor: Cursor
    expected: ShardRecord | None
    """What the shard was when it was made before."""
    schema: pa.Schema
    """Schema of the shard's sidecar."""


class MadeShard(NamedTuple):
    """A shard that is durable."""

    record: ShardRecord
    sent: list[StoredFile]
    """Its files as the bucket has them."""
    retries: int


def write_shard(shared: PackedContext, plan: ShardPlan, *tokens: TokenArray) -> MadeShard:
    """Make a shard from the batches that its rows point into, and send it where it is to go.

    Raises:
        DataRootError: the data root is not there on this machine.
        SourceChangedError: it was made before and is another now.
        StorageError: it cannot be written, or the bucket refuses it.
    """
    context = shared.unpack()
    with _shard_folder(context) as root:
        writer = ShardWriter(
            root,
            plan.shard,
            _open_sink(context, root, plan, temp_suffix := f".{uuid.uuid4().hex[:12]}"),
            tokens=plan.tokens,
            dtype=context.encoder.dtype,
            paths=pa.array([file.path for file in context.corpus.files], pa.string()),
            schema=plan.schema,
            temp_suffix=temp_suffix,
        )
        try:
            writer.count(plan.counts)
            for block, part, position in plan.parts:
                writer.append(block.pointing(list(tokens), block.batch), part, position)
            record = writer.finish(plan.next_cursor, plan.expected)
        except BaseException:
            writer.discard()
            raise
        if context.upload_to is None:
            return MadeShard(record, [], 0)
        return _send(context, root, record)


def _open_sink(context: TaskContext, root: Path, plan: ShardPlan, temp_suffix: str) -> TokenSink:
    dtype = context.encoder.dtype
    if context.is_one_file:
        path = root / (layout.TOKENS + layout.PARTIAL_SUFFIX)
        return RangeSink(path, plan.shard * context.shard_size * dtype.itemsize)
    return FileSink(root / layout.shard_name(plan.shard), npy.npy_header(dtype, plan.tokens), temp_suffix)


@contextmanager
def _shard_folder(context: TaskContext) -> Iterator[Path]:
    """The data root, or where shards do not stay in it a folder of this machine for the time being."""
    if not context.keep_local:
        remove_leftovers()
        with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{process_space()}-{os.getpid()}-") as folder:
            yield Path(folder)
        return
    try:
        found = (context.root / layout.RUN).read_text()
    except OSError:
        found = ""
    if found != context.run:
        raise DataRootError(
            f"{context.root}: is not there on {socket.gethostname()}, or is another one: every machine must see it",
            next_step="use storage that all machines share, or a bucket: --upload-to s3://... --keep-local no",
        )
    yield context.root


def _send(context: TaskContext, root: Path, record: ShardRecord) -> MadeShard:
    assert context.upload_to is not None
    store = BucketStore(context.upload_to, context.store)
    sender = Sender(root, store, Records(), remembers=False)
    here = FolderStore(root)
    names = {
        layout.documents_name(record.index): record.documents_sha256,
        layout.shard_name(record.index): record.sha256,
    }
    try:
        for name, sha256 in names.items():
            sender.send_file(here.file(name), sha256)
    finally:
        sender.close()
    return MadeShard(record, [sender.sent(name) for name in names], store.retrier.count)

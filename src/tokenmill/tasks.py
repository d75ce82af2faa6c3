"""Tasks: what a run does in other processes: plan a file, encode a span, write a shard. Functions of their arguments.

A task may be run again, elsewhere and at the same time, and gives the same. What a whole run shares (`Work`) is
unpacked once per process.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenmill import layout
from tokenmill.encode import EncodedSpan, Encoder
from tokenmill.errors import DataRootError, EngineError
from tokenmill.layout import TokenArray
from tokenmill.manifest import Count, Cursor, ShardRecord
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.pack import Block, Part
from tokenmill.shard import Place, ShardFile, ShardRange, ShardWriter
from tokenmill.source import Corpus
from tokenmill.spans import Span, SpanReader, Texts, joined
from tokenmill.stores import BucketStore, FolderStore, StoredFile
from tokenmill.uploads import Sender

_NO_TOKENS = np.empty(0, np.uint16)
_LIBRARIES = ("tokenmill", "numpy", "pyarrow", "tokenizers", "gigatoken")


class Target(NamedTuple):
    """Where shards go."""

    root: Path
    """The data root; all machines see it, unless shards do not stay in it."""
    dtype: str
    paths: tuple[str, ...]
    """Names of the source files."""
    shard_size: int
    is_one_file: bool
    """Whether shards are ranges of `tokens.bin`."""
    upload_to: str | None
    store: StoreOptions
    keep_local: bool


class Work:
    """What all tasks of a run share. Pickled, it is unpacked once per process, where the same software must run."""

    def __init__(
        self, corpus: Corpus, encoder: Encoder, on_bad_rows: OnBadRows, span_rows: int | None, target: Target
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.on_bad_rows: OnBadRows = on_bad_rows
        self.span_rows = span_rows
        self.target = target
        self._key = uuid.uuid4().hex
        self._packed: bytes | None = None

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self._packed is None:
            state = self.corpus, self.encoder, self.on_bad_rows, self.span_rows, self.target
            self._packed = pickle.dumps(state)
        return _unpacked, (self._key, self._packed, _software())


_unpacked_work: dict[str, Work] = {}


def _unpacked(key: str, packed: bytes, software: Mapping[str, str]) -> Work:
    if key not in _unpacked_work:
        found = _software()
        different = next((name for name, expected in software.items() if found[name] != expected), None)
        if different is not None:
            raise EngineError(
                f"{socket.gethostname()}: expected {different} {software[different]} as where the run was started, "
                f"found {found[different]}",
                next_step="install the same versions on every machine",
            )
        from tokenmill.allocator import keep_freed_memory

        keep_freed_memory()
        _unpacked_work.clear()  # of earlier runs
        _unpacked_work[key] = Work(*pickle.loads(packed))
    return _unpacked_work[key]


def _software() -> dict[str, str]:
    """What decides how text is encoded and stored."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def plan_file(work: Work, index: int) -> list[Span]:
    """How the rows of a source file are cut for tasks, in row order.

    Columnar files are cut as `SpanReader.spans` does. Others can only be read front to back: they are one span,
    whose rows are counted now.
    """
    source = work.corpus.open(index, span_rows=work.span_rows)
    if source.rows is not None:
        return list(source.spans())
    rows = 0
    for span in source.spans():
        source.drop(span)
        rows += span.rows
    return [Span(0, rows, 0)] if rows else []


def encode_span(work: Work, index: int, span: Span) -> tuple[TokenArray, EncodedSpan]:
    """The tokens of a span that `plan_file` named, and all else there is to know of it."""
    retrier = work.corpus.location.retrier
    before = retrier.count
    source = work.corpus.open(index, span_rows=work.span_rows)
    if source.rows is not None:
        source.keep_only([span])
        texts = source.read(span)
    else:
        texts = _whole(source)
    encoded = work.encoder.encode(texts, where=source.name, first_row=span.first_row, on_bad_rows=work.on_bad_rows)
    return encoded.tokens, encoded._replace(tokens=_NO_TOKENS, retries=retrier.count - before)


def _whole(source: SpanReader) -> Texts:
    pieces: list[pa.Array] = []
    bad: dict[int, str] = {}
    for span in source.spans():
        texts = source.read(span)
        pieces.append(texts.array)
        bad.update({span.first_row + row: reason for row, reason in texts.bad.items()})
    return Texts(joined(pieces), bad)


class ShardPlan(NamedTuple):
    """All that makes a shard but the tokens themselves."""

    shard: int
    tokens: int
    """Of a full shard; the last one may have fewer."""
    parts: list[tuple[Block, Part, int]]
    """Rows, which of their tokens, and where in the stream; `Block.spans` is empty."""
    counts: list[Count]
    """Rows without text that belong to no part."""
    next_cursor: Cursor
    expected: ShardRecord | None
    """What the shard was when it was made before."""


class MadeShard(NamedTuple):
    """A shard that is durable."""

    record: ShardRecord
    sent: list[StoredFile]
    """Its files as the bucket has them."""
    retries: int


def write_shard(work: Work, plan: ShardPlan, *tokens: TokenArray) -> MadeShard:
    """Make a shard from the spans that its blocks point into, and send it where it is to go.

    Raises:
        DataRootError: the data root is not there on this machine.
        SourceChangedError: it was made before and is another now.
        StorageError: it cannot be written, or the bucket refuses it.
    """
    target = work.target
    with _folder(target) as root:
        writer = ShardWriter(
            root,
            plan.shard,
            _place(target, root, plan, tag := f".{uuid.uuid4().hex[:12]}"),
            tokens=plan.tokens,
            dtype=layout.token_dtype(target.dtype),
            paths=pa.array(target.paths, pa.string()),
            tag=tag,
        )
        try:
            writer.count(plan.counts)
            for block, part, position in plan.parts:
                writer.append(block.pointing(list(tokens), block.span), part, position)
            record = writer.finish(plan.next_cursor, plan.expected)
        except BaseException:
            writer.discard()
            raise
        if target.upload_to is None:
            return MadeShard(record, [], 0)
        return _sent(target, root, record)


def _place(target: Target, root: Path, plan: ShardPlan, tag: str) -> Place:
    dtype = layout.token_dtype(target.dtype)
    if target.is_one_file:
        path = root / (layout.TOKENS + layout.PARTIAL_SUFFIX)
        return ShardRange(path, plan.shard * target.shard_size * dtype.itemsize)
    return ShardFile(root / layout.shard_name(plan.shard), layout.npy_header(dtype, plan.tokens), tag)


@contextmanager
def _folder(target: Target) -> Iterator[Path]:
    """The data root, or where shards do not stay in it a folder of this machine for the time being."""
    if not target.keep_local:
        with tempfile.TemporaryDirectory(prefix="tokenmill-") as folder:
            yield Path(folder)
        return
    if not (target.root / layout.MANIFEST).is_file():
        raise DataRootError(
            f"{target.root}: is not there on {socket.gethostname()} (pid {os.getpid()}): every machine must see it",
            next_step="use storage that all machines share, or a bucket: --upload-to s3://... --keep-local no",
        )
    yield target.root


def _sent(target: Target, root: Path, record: ShardRecord) -> MadeShard:
    assert target.upload_to is not None
    store = BucketStore(target.upload_to, target.store)
    sender = Sender(root, store, None, remembers=False)
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

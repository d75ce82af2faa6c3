"""Tasks: what a run does in other processes: plan a file, encode a span, write a shard. Functions of their arguments.

A task may be run again, elsewhere and at the same time, and gives the same.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenmill import layout
from tokenmill.encode import EncodedSpan, Encoder
from tokenmill.errors import DataRootError, EngineError, SourceChangedError
from tokenmill.layout import TokenArray
from tokenmill.manifest import Count, Cursor, ShardRecord
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.pack import Block, Part
from tokenmill.shard import Place, ShardFile, ShardRange, ShardWriter
from tokenmill.source import Corpus
from tokenmill.spans import Span, SpanReader, Texts, joined
from tokenmill.stores import BucketStore, FolderStore, StoredFile
from tokenmill.uploads import Sender

_SPAN_ROWS = 10_000
"""A task costs a few milliseconds, and an object in the cluster's store, so spans are larger than for threads."""
_SPAN_TEXT_NBYTES = 64 << 20
_PASSING = "tokenmill-task-"
"""Begins the names of folders that shards only pass through."""

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
    run: str
    """Of this run alone; a file in the data root holds it."""


class Work(NamedTuple):
    """What all tasks of a run share."""

    corpus: Corpus
    encoder: Encoder
    on_bad_rows: OnBadRows
    span_rows: int | None
    """Of a task; None: about 10,000, fewer where they are long."""
    target: Target

    def packed(self) -> PackedWork:
        """To be brought to other processes."""
        return PackedWork(self.target.run, pickle.dumps(self), _software())


class PackedWork(NamedTuple):
    """The same as bytes, unpacked once per process."""

    key: str
    data: bytes
    software: dict[str, str]
    """That decides how text is encoded and stored, where the run was started."""

    def unpacked(self) -> Work:
        """The work.

        Raises:
            EngineError: other software is installed here.
        """
        if self.key not in _unpacked:
            here = _software()
            different = next((name for name, expected in self.software.items() if here[name] != expected), None)
            if different is not None:
                raise EngineError(
                    f"{socket.gethostname()}: expected {different} {self.software[different]} as where the run was "
                    f"started, found {here[different]}",
                    next_step="install the same versions on every machine",
                )
            from tokenmill.allocator import keep_freed_memory

            keep_freed_memory()
            _unpacked.clear()  # of earlier runs
            _unpacked[self.key] = pickle.loads(self.data)
        return _unpacked[self.key]


_unpacked: dict[str, Work] = {}


def _software() -> dict[str, str]:
    """What decides how text is encoded and stored."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def plan_file(shared: PackedWork, index: int) -> list[Span]:
    """How the rows of a source file are cut for tasks, in row order.

    Columnar files are cut as `SpanReader.spans` does. Others can only be read front to back: they are one span,
    whose rows are counted now.

    Raises:
        SourceError: it cannot be read, or (`SourceChangedError`) is another than was listed.
    """
    source = _opened(shared.unpacked(), index)
    if source.rows is not None:
        return list(source.spans())
    rows = 0
    for span in source.spans():
        source.drop(span)
        rows += span.rows
    return [Span(0, rows, 0)] if rows else []


def encode_span(shared: PackedWork, index: int, span: Span) -> tuple[TokenArray, EncodedSpan]:
    """The tokens of a span that `plan_file` named, and all else there is to know of it; raises what that does."""
    work = shared.unpacked()
    retrier = work.corpus.location.retrier
    before = retrier.count
    source = _opened(work, index)
    if source.rows is not None:
        source.keep_only([span])
        texts = source.read(span)
    else:
        texts = _whole(source)
    if len(texts.array) != span.rows:
        raise _changed(source.name, f"{span.rows} rows", str(len(texts.array)))
    encoded = work.encoder.encode(texts, where=source.name, first_row=span.first_row, on_bad_rows=work.on_bad_rows)
    return encoded.tokens, encoded._replace(tokens=_NO_TOKENS, retries=retrier.count - before)


def _opened(work: Work, index: int) -> SpanReader:
    """A file of the corpus, which must be the one that was listed where the run was started."""
    file = work.corpus.files[index]
    work.corpus.location.require_unchanged(file)
    source = work.corpus.open(index, span_rows=work.span_rows or _SPAN_ROWS)
    if work.span_rows is None and source.rows:
        fitting = max(1, _SPAN_TEXT_NBYTES * source.rows // max(1, source.figures().text_nbytes))
        if fitting < _SPAN_ROWS:
            return work.corpus.open(index, span_rows=fitting)
    return source


def _changed(name: str, expected: str, found: str) -> SourceChangedError:
    return SourceChangedError(
        f"{name}: on {socket.gethostname()} it is not the file that was planned: expected {expected}, found {found}",
        next_step="every machine must see the same files, and nothing may change them while the run goes on",
    )


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


def write_shard(shared: PackedWork, plan: ShardPlan, *tokens: TokenArray) -> MadeShard:
    """Make a shard from the spans that its blocks point into, and send it where it is to go.

    Raises:
        DataRootError: the data root is not there on this machine.
        SourceChangedError: it was made before and is another now.
        StorageError: it cannot be written, or the bucket refuses it.
    """
    target = shared.unpacked().target
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
        _sweep()
        with tempfile.TemporaryDirectory(prefix=f"{_PASSING}{_process_space()}-{os.getpid()}-") as folder:
            yield Path(folder)
        return
    try:
        found = (target.root / layout.RUN).read_text()
    except OSError:
        found = ""
    if found != target.run:
        raise DataRootError(
            f"{target.root}: is not there on {socket.gethostname()}, or is another one: every machine must see it",
            next_step="use storage that all machines share, or a bucket: --upload-to s3://... --keep-local no",
        )
    yield target.root


def _process_space() -> str:
    """What tells apart machines, and containers of one machine that share its temporary folder: process ids of one
    say nothing in another."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # no file, but Linux's way to ask
    except OSError:
        namespace = 0
    return f"{hashlib.sha256(f'{socket.gethostname()} {_boot()}'.encode()).hexdigest()[:8]}.{namespace}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def _sweep() -> None:
    """Remove what tasks left on this machine that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PASSING}*"):
        space, _, rest = path.name.removeprefix(_PASSING).partition("-")
        pid = rest.partition("-")[0]
        if os.name == "posix" and space == _process_space() and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:  # alive, and another user's
                continue


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

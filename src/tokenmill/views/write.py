"""Write: a view → a data root of its own, shard by shard. What is finished survives a kill; the bytes are the same."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout, npy
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.earlier_run import refuse_foreign, set_damaged_aside
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import Cursor, FileRecord, Manifest, ShardRecord, ViewOrigin
from tokenmill.dataroot.sidecar import documents_schema, metadata_schema
from tokenmill.dataroot.view_record import load_view
from tokenmill.errors import DataRootError, StorageError
from tokenmill.loading.view import OpenView, ViewIndex, check_index, open_view
from tokenmill.options import available_cores
from tokenmill.recipe import Recipe
from tokenmill.shards.ledger import balance, complete
from tokenmill.shards.pack import EmittedRows, ShardSlice
from tokenmill.shards.recorder import Recorder
from tokenmill.shards.shard import ShardWriter
from tokenmill.shards.token_sink import FileSink
from tokenmill.views.catalogue import Catalogue, documents_at, open_sources
from tokenmill.views.gather import Buckets, Gatherer, Places, available_memory_nbytes
from tokenmill.views.metadata import GatheredMetadata, metadata_columns

BLOCK_TOKENS = 1 << 21
"""Tokens of documents that are read and written at once."""
_BUCKETS = ".buckets"
_METADATA = "metadata.arrow" + layout.PARTIAL_SUFFIX

OnTokens = Callable[[int, int], None]
"""Called with tokens that are written and tokens to write."""


class WriteReport(msgspec.Struct, kw_only=True):
    """What writing a view did."""

    root: str
    status: str
    """`complete`, or `already complete`."""
    tokens: int
    documents: int
    shards: int
    new_tokens: int
    """Tokens that this run wrote."""
    through_disk: bool
    """Whether documents were put into buckets on disk first, as the sources do not fit in memory."""
    seconds: float


class _Rows(NamedTuple):
    """The origin of each document, in the order of the view; arrays of shape `(documents,)`."""

    file: NDArray[np.int64]
    """Index among the files of all sources."""
    row: NDArray[np.int64]
    identity: NDArray[np.uint64]


def write_view(
    view: Path | str,
    root: Path | str,
    *,
    shard_size: int | None = None,
    workers: int | None = None,
    through_disk: bool | None = None,
    on_progress: OnTokens = lambda done, total: None,
) -> WriteReport:
    """Make a data root of a view, or continue an earlier run.

    Args:
        view: the view; its samples must not be shuffled, as that cuts documents.
        root: the data root; made if it does not exist.
        shard_size: tokens per shard; None takes that of the first source.
        workers: threads, a shard each; None takes every core.
        through_disk: whether documents are put into buckets on disk first; None: if the sources take more than half of
            the memory that is free. The bytes are the same.
        on_progress: called as tokens are written.

    Raises:
        DataRootError: no view, or not one that can be written; the directory holds something else.
        StorageError: the disk is full or cannot be written. Finished shards stay, and the same call continues.
    """
    started = time.monotonic()
    root = Path(root)
    opened = open_view(Path(view)) if Path(view).is_dir() else None
    if opened is None:
        raise DataRootError(f"{view}: expected a view, found none", next_step="give what tokenmill view build made")
    if opened.view.shuffle == "samples":
        raise DataRootError(
            f"{view}: its samples are shuffled, which cuts documents, so it cannot be written as documents",
            next_step='build a view with shuffle = "documents" or "none"; EpochSampler shuffles samples for a trainer',
        )
    if opened.view.documents == 0:
        raise DataRootError(f"{view}: has no documents", next_step="build a view that takes some")
    check_index(opened.root, opened.view)
    if Path(root).is_dir() and load_view(Path(root)) is not None:
        raise DataRootError(f"{root}: is a view", next_step="choose another directory")
    fresh = _new_manifest(opened, str(view), shard_size)
    atomic.make_root(root)
    with lock_data_root(root):
        manifest = _agreeing(root, fresh, opened)
        atomic.remove_partials(root)
        set_damaged_aside(root, manifest)
        wanted = -(-opened.view.tokens // manifest.recipe.shard_size)
        missing = sorted(set(range(wanted)) - {shard.index for shard in manifest.shards})
        before = manifest.tokens
        is_through_disk = False
        if missing:
            manifest.complete = False
            manifests.save(root, manifest)
            is_through_disk = _write_shards(
                root,
                manifest,
                opened,
                missing,
                workers=workers,
                through_disk=through_disk,
                on_progress=on_progress,
            )
        if missing or not manifest.complete:
            balance(root, manifest)
            complete(root, manifest)
        shutil.rmtree(root / _BUCKETS, ignore_errors=True)
        (root / _METADATA).unlink(missing_ok=True)
    return WriteReport(
        root=str(root),
        status="complete" if missing else "already complete",
        tokens=manifest.tokens,
        documents=manifest.documents,
        shards=len(manifest.shards),
        new_tokens=manifest.tokens - before,
        through_disk=is_through_disk,
        seconds=round(time.monotonic() - started, 3),
    )


def _new_manifest(opened: OpenView, view: str, shard_size: int | None) -> Manifest:
    sources = [source.manifest for source in opened.sources if source.manifest is not None]
    first, record = sources[0], opened.view
    special = {manifest.recipe.special_in_text for manifest in sources}
    recipe = Recipe(
        dataset=view,
        tokenizer=first.tokenizer.name,
        order="sequential",
        shard_size=shard_size or first.recipe.shard_size,
        seq_len=record.seq_len,
        dtype=first.recipe.dtype,
        eos_token=first.recipe.eos_token,
        special_in_text=special.pop() if len(special) == 1 else "parse",
        metadata_columns=metadata_columns(opened),
    )
    return Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=first.tokenizer,
        software=first.software,
        files=[],
        source_rules=first.source_rules,
        documents_version=layout.DOCUMENTS_VERSION,
        view=ViewOrigin(
            seed=record.seed,
            shuffle=record.shuffle,
            holdout=record.holdout,
            split=record.split,
            duplicates=record.duplicates,
            begins_sha256=record.begins_sha256,
            places_sha256=record.places_sha256,
            sources={source.name: source.pin for source in record.sources},
        ),
    )


def _files(opened: OpenView) -> list[FileRecord]:
    """Return the files of all sources; their rows are the documents that the view takes."""
    found: list[FileRecord] = []
    for catalogue, _, documents in documents_at(_open_sources(opened), opened.open_index().places):
        counts = np.bincount(documents.file, minlength=len(catalogue.manifest.files)).tolist()
        for file, count in zip(catalogue.manifest.files, counts, strict=True):
            found.append(FileRecord(f"{catalogue.name}/{file.path}", file.nbytes, count, file.etag))
    return found


def _open_sources(opened: OpenView) -> Iterator[Catalogue]:
    return open_sources(opened.root, opened.view.sources)


def _agreeing(root: Path, fresh: Manifest, opened: OpenView) -> Manifest:
    """Return the manifest of an earlier run, which must be of the same view; the fresh one if there was none."""
    found = manifests.load(root)
    if found is None:
        refuse_foreign(root)
        fresh.files = _files(opened)
        return fresh
    if found.view is None:
        raise DataRootError(
            f"{root}: is a data root that tokenmill pretokenize made", next_step="choose another directory"
        )
    if found.view != fresh.view or found.recipe.difference(fresh.recipe):
        what = found.recipe.difference(fresh.recipe) or "another view"
        raise DataRootError(f"{root}: was written from something else: {what}", next_step="choose another directory")
    return found


def _write_shards(
    root: Path,
    manifest: Manifest,
    opened: OpenView,
    missing: list[int],
    *,
    workers: int | None,
    through_disk: bool | None,
    on_progress: OnTokens,
) -> bool:
    """Write the shards that are missing; whether documents went through buckets on disk."""
    index = opened.open_index()
    places = Places([source.tokens() for source in opened.sources], index)
    nbytes = opened.view.tokens * manifest.itemsize
    if through_disk is None:
        memory = available_memory_nbytes()
        through_disk = (
            memory is not None
            and sum(source.tokens for source in opened.view.sources) * manifest.itemsize > memory // 2
        )
    left = len(missing) * manifest.recipe.shard_size * manifest.itemsize
    needed = min(nbytes, left) + (nbytes if through_disk and not (root / _BUCKETS).exists() else 0)
    if (free := shutil.disk_usage(root).free) < needed:
        raise StorageError(
            f"{root}: the disk cannot hold it: {needed / 1e9:.2f} GB needed"
            f"{', buckets included,' if through_disk else ''} {free / 1e9:.2f} GB free",
            next_step="make room, and run the same command again",
        )
    done, total = 0, opened.view.tokens * (2 if through_disk else 1)

    def progressed(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_progress(done, total)

    gatherer: Gatherer = places
    if through_disk:
        buckets = Buckets(root / _BUCKETS, places, opened.view.places_sha256)
        buckets.fill(progressed)
        gatherer = buckets
    rows = _origins(opened, index)
    metadata = None
    if columns := manifest.recipe.metadata:
        metadata = GatheredMetadata(root / _METADATA, opened, index, metadata_schema(columns))
    recorder = Recorder(root, manifest)
    writer = _Writer(root, manifest, index, gatherer, rows, metadata=metadata)
    pool = ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="shard")
    try:
        waiting = {pool.submit(writer.write, shard) for shard in missing}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                record = future.result()
                recorder.record(record)
                progressed(record.tokens)
    except BaseException:
        writer.stopped = True
        pool.shutdown(cancel_futures=True)
        recorder.abandon()
        raise
    pool.shutdown()
    return through_disk


def _origins(opened: OpenView, index: ViewIndex) -> _Rows:
    count = len(index.places)
    rows = _Rows(np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.uint64))
    files = 0
    for catalogue, here, documents in documents_at(_open_sources(opened), index.places):
        rows.file[here], rows.row[here] = documents.file + files, documents.row
        rows.identity[here] = documents.identity
        files += len(catalogue.manifest.files)
    return rows


class _StoppedError(Exception):
    """Another shard failed."""


class _Writer:
    """Writes shards of a view; threads share it."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        index: ViewIndex,
        gatherer: Gatherer,
        rows: _Rows,
        *,
        metadata: GatheredMetadata | None,
    ) -> None:
        self.stopped = False
        self._root = root
        self._manifest = manifest
        self._index = index
        self._gatherer = gatherer
        self._rows = rows
        self._metadata = metadata
        self._dtype = npy.token_dtype(manifest.recipe.dtype)
        self._paths = pa.array([file.path for file in manifest.files], pa.string())

    def write(self, shard: int) -> ShardRecord:
        """Make a shard durable; its record."""
        begins, size = self._index.begins, self._manifest.recipe.shard_size
        begin = shard * size
        end = min(begin + size, int(begins[-1]))
        header = npy.npy_header(self._dtype, end - begin)
        writer = ShardWriter(
            self._root,
            shard,
            FileSink(self._root / layout.shard_name(shard), header),
            tokens=end - begin,
            dtype=self._dtype,
            paths=self._paths,
            schema=documents_schema(self._manifest),
        )
        try:
            first = int(np.searchsorted(begins, begin, side="right")) - 1
            last = int(np.searchsorted(begins, end, side="left"))
            while first < last:
                stop = int(np.searchsorted(begins, int(begins[first]) + BLOCK_TOKENS, side="right")) - 1
                stop = min(last, max(first + 1, stop))
                self._append(writer, shard, (first, stop), (begin, end))
                first = stop
            at = int(np.searchsorted(begins, end, side="right")) - 1
            cursor = Cursor(at, end - int(begins[at])) if end < int(begins[-1]) else Cursor(len(begins) - 1, 0)
            return writer.finish(cursor, self._manifest.expected(shard))
        except BaseException:
            writer.discard()
            raise

    def _append(self, writer: ShardWriter, shard: int, documents: tuple[int, int], tokens: tuple[int, int]) -> None:
        """Append the tokens of some documents that lie in the shard."""
        if self.stopped:
            raise _StoppedError
        first, stop = documents
        begins = self._index.begins[first : stop + 1]
        lengths = np.diff(begins)
        data: NDArray[Any] = self._gatherer.read(first, stop)
        count = stop - first
        block = EmittedRows(
            [data],
            np.zeros(count, np.int64),
            begins[:-1] - begins[0],
            lengths,
            np.zeros(count, np.uint8),
            self._rows.file[first:stop],
            self._rows.row[first:stop],
            self._rows.identity[first:stop],
            None if self._metadata is None else self._metadata.read(first, stop),
        )
        begin, end = max(tokens[0], int(begins[0])), min(tokens[1], int(begins[-1]))
        cut_at = end - int(begins[-2]) if end < int(begins[-1]) else 0
        part = ShardSlice(shard, 0, count, begin - int(begins[0]), end - begin, cut_at)
        writer.append(block, part, begin)

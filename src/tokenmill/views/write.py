"""Write: a view → a data root of its own, shard by shard. What is finished survives a kill; the bytes are the same."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.earlier_run import refuse_foreign, set_damaged_aside
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import FileRecord, Manifest, ShardRecord, ViewOrigin
from tokenmill.dataroot.view_record import load_view
from tokenmill.errors import DataRootError, StorageError
from tokenmill.loading.view import OpenView, check_index, open_view
from tokenmill.options import available_cores
from tokenmill.recipe import Recipe
from tokenmill.redact import escape_surrogates
from tokenmill.shards.ledger import balance, complete
from tokenmill.shards.recorder import Recorder
from tokenmill.views.catalogue import documents_at, open_sources
from tokenmill.views.gather import Buckets, Places, available_memory_nbytes
from tokenmill.views.origins import Origins, first_file_of, metadata_columns
from tokenmill.views.shards import BUCKETS, ORIGINS, ShardTask, ViewShards, write_shard

_ORIGIN_NBYTES = 32
"""Disk space of a document's origin while its shard is written; without its metadata."""

OnTokens = Callable[[int, int], None]
"""Called with tokens that are written and tokens to write."""


class Cluster(Protocol):
    """What a cluster must offer: a part of `pipeline.cluster_engine.ClusterEngine`."""

    def share(self, value: object) -> object: ...

    def submit(self, task: Callable[..., ShardRecord], /, *args: object) -> Future[ShardRecord]: ...

    def hold(self, target: str) -> contextlib.AbstractContextManager[None]: ...

    def drop(self) -> None: ...


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


def write_view(
    view: Path | str,
    root: Path | str,
    *,
    shard_size: int | None = None,
    workers: int | None = None,
    through_disk: bool | None = None,
    engine: Cluster | None = None,
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
        engine: a cluster that writes the shards (`tokenmill.ray.RayEngine`), all of whose machines see the view, its
            sources and `root`; None uses threads of this process.
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
    if opened.cuts_documents:
        why = "shuffled"
        if opened.view.stages or opened.view.packing != "concat":
            why = "drawn by weight" if opened.view.stages else "packed"
        raise DataRootError(
            f"{view}: its samples are {why}, which cuts documents, so it cannot be written as documents",
            next_step='build a view without weights or packing, with shuffle = "documents" or "none"; trainers read '
            "this one as it is",
        )
    if opened.view.documents == 0:
        raise DataRootError(f"{view}: has no documents", next_step="build a view that takes some")
    check_index(opened.root, opened.view)
    if Path(root).is_dir() and load_view(Path(root)) is not None:
        raise DataRootError(f"{root}: is a view", next_step="choose another directory")
    fresh = _new_manifest(opened, escape_surrogates(view), shard_size)
    atomic.make_root(root)
    with lock_data_root(root), contextlib.nullcontext() if engine is None else engine.hold(str(root.resolve())):
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
                engine=engine,
                on_progress=on_progress,
            )
        if missing or not manifest.complete:
            balance(root, manifest)
            complete(root, manifest)
        for folder in (BUCKETS, ORIGINS):
            shutil.rmtree(root / folder, ignore_errors=True)
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
    apart = max(sources, key=lambda manifest: manifest.recipe.fim_rate)  # sources may differ in that
    special = {manifest.recipe.special_in_text for manifest in sources}
    recipe = Recipe(
        dataset=view,
        tokenizer=first.tokenizer.name,
        order="sequential",
        shard_size=shard_size or first.recipe.shard_size,
        seq_len=record.seq_len,
        dtype=first.recipe.dtype,
        eos_token=first.recipe.eos_token,
        bos=first.recipe.bos,
        bos_token=first.recipe.bos_token,
        fim_rate=apart.recipe.fim_rate,
        fim_spm_rate=apart.recipe.fim_spm_rate,
        fim_tokens=apart.recipe.fim_tokens,
        special_in_text=special.pop() if len(special) == 1 else "parse",
        metadata_columns=metadata_columns(opened),
    )
    return Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=apart.tokenizer,
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
    files, first_files = opened.files, first_file_of(opened)
    counts = np.zeros(len(files), np.int64)
    sources = open_sources(opened.root, opened.view.sources)
    for catalogue, _, documents in documents_at(sources, opened.open_index().places):
        counts += np.bincount(documents.file + first_files[catalogue.name], minlength=len(files))
    return [
        FileRecord(file.path, file.nbytes, count, file.etag) for file, count in zip(files, counts.tolist(), strict=True)
    ]


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
    engine: Cluster | None,
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
    origins = opened.view.documents * _ORIGIN_NBYTES
    left = len(missing) * manifest.recipe.shard_size * manifest.itemsize
    needed = min(nbytes, left) + origins + (nbytes if through_disk and not (root / BUCKETS).exists() else 0)
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

    if through_disk:
        Buckets(root / BUCKETS, places, opened.view.places_sha256).fill(progressed)
    Origins.write(root / ORIGINS, opened, index, manifest.recipe.metadata)
    recorder = Recorder(root, manifest)
    with contextlib.ExitStack() as stack:
        if engine is None:
            submit = stack.enter_context(_on_threads(opened, root, manifest, workers, through_disk=through_disk))
        else:
            submit = stack.enter_context(_on_cluster(engine, opened, root, manifest, through_disk=through_disk))
        try:
            waiting = {submit(shard) for shard in missing}
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    record = future.result()
                    recorder.record(record)
                    progressed(record.tokens)
        except BaseException:
            recorder.abandon()
            raise
    return through_disk


Submit = Callable[[int], "Future[ShardRecord]"]


@contextlib.contextmanager
def _on_threads(
    opened: OpenView, root: Path, manifest: Manifest, workers: int | None, *, through_disk: bool
) -> Iterator[Submit]:
    shards = ViewShards(opened, root, manifest, through_disk=through_disk)
    pool = ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="shard")
    try:
        yield lambda shard: pool.submit(shards.write, shard)
    finally:
        shards.stopped = True  # nothing, if all are done
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _on_cluster(
    engine: Cluster, opened: OpenView, root: Path, manifest: Manifest, *, through_disk: bool
) -> Iterator[Submit]:
    task = ShardTask(uuid.uuid4().hex, opened.root.resolve(), root.resolve(), manifest, through_disk)
    atomic.write_whole(root / layout.RUN, task.run.encode())
    shared = engine.share(task)
    try:
        yield lambda shard: engine.submit(write_shard, shared, shard)
    finally:  # tasks that begin from now on find that the data root is not this run's
        engine.drop()
        atomic.remove(root, layout.RUN)

"""Download: files of a store → a directory, many files and many ranges of each at once.

A file is fetched in parts, which are hashed and written in order, so that what a killed run left is a
prefix: the next one reads that back and continues after it. The file gets its name when its digest is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import Consolidated, Manifest, Record
from tokenmill.dataroot.view_record import ViewRecord, load_view
from tokenmill.errors import DataRootError, StorageError
from tokenmill.options import OnBytes, StoreOptions
from tokenmill.progress import also_shown
from tokenmill.remote.etag import ETagHasher
from tokenmill.transfer.journal import Journal
from tokenmill.transfer.selection import (
    EVERYTHING,
    RECORDS,
    Records,
    Selection,
    Sha256,
    TransferredFile,
    TransferReport,
    digests,
    missing,
)
from tokenmill.transfer.stores import BucketStore, FolderStore, Store, StoredFile, checked_path, open_store

PART_NBYTES = 16 << 20
FILES_AT_ONCE = 4
T = TypeVar("T", bound=Record)

_PARTS_AHEAD = 1
"""Per file; memory is FILES_AT_ONCE × (_PARTS_AHEAD + 2) × PART_NBYTES."""

_RECORD_NBYTES = 1 << 31
"""A manifest is read into memory whole; one of a million shards has 300 MB."""

_TRIES = 3
"""For a file whose bytes arrive wrong."""


def download(
    source: str,
    root: Path | str,
    selection: Selection = EVERYTHING,
    *,
    store: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
    dry_run: bool = False,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> TransferReport:
    """Bring the files at `source` that are missing or different in `root`.

    Args:
        source: `s3://BUCKET/PREFIX`, `file://` or a path.
        root: a directory; made if it does not exist.
        selection: which files are meant.
        store: how to reach the bucket.
        dry_run: only say what would travel.
        on_progress: called with bytes that travelled and bytes that are to.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        StorageError: a file cannot be had, or its bytes are wrong.
        DataRootError: `root` holds another data set, or is in use.
    """
    with also_shown(on_progress, wanted=progress) as tell:
        return bring(open_store(source, store), Path(root), selection, dry_run=dry_run, on_progress=tell)


def bring(
    store: FolderStore | BucketStore,
    root: Path,
    selection: Selection = EVERYTHING,
    *,
    dry_run: bool = False,
    on_progress: OnBytes = lambda done, total: None,
) -> TransferReport:
    """Download from a store that is open; as `download`.

    Raises:
        StorageError: a file cannot be had, or its bytes are wrong.
        DataRootError: `root` holds another data set, or is in use.
    """
    started = time.monotonic()
    listed = store.files()
    records = {name: _read_record(store, listed[name]) for name in RECORDS if name in listed}
    known = _decoded(store.name, records)
    if selection.is_whole and (lost := missing(known, listed)):
        raise StorageError(
            f"{store.name}: {lost[0]} is not there, but its records speak of it ({len(lost)} such files)",
            next_step="upload the data set again, or name the files you want with --include",
        )
    wanted = {path: file for path, file in listed.items() if selection.takes(path) or selection.takes_record(path)}
    for path in wanted:
        checked_path(path, store.name)
    if not wanted:
        what = f"none of the {len(listed)} files there is meant" if listed else "no files there"
        raise StorageError(f"{store.name}: {what}", next_step="check the URL and the patterns")
    refuse_other(root, local_records(root) if root.is_dir() else Records(), known)
    if dry_run:
        journal = Journal(root, store.name)
        moved = [
            TransferredFile(
                file.path, file.nbytes, journal.has(file), 0 if journal.has(file) else file.nbytes, "not yet"
            )
            for file in wanted.values()
        ]
        return _report(store, root, moved, started, dry_run=True)
    atomic.make_root(root)
    with lock_data_root(root):
        run = Download(store, root, wanted, digests(known), on_progress)
        moved = run.fetch({name: data for name, data in records.items() if name in wanted})
        if not selection.is_whole:
            run.note_elsewhere(file for path, file in listed.items() if path not in wanted)
    return _report(store, root, moved, started)


def _report(
    store: Store, root: Path, moved: list[TransferredFile], started: float, *, dry_run: bool = False
) -> TransferReport:
    return TransferReport(
        source=store.name,
        target=str(root),
        files=moved,
        seconds=round(time.monotonic() - started, 3),
        retries=store.retrier.count,
        dry_run=dry_run,
    )


def _read_record(store: Store, file: StoredFile) -> bytes:
    """Return a small file whole, read until it is what its ETag says, or twice the same."""
    if file.nbytes > _RECORD_NBYTES:
        raise StorageError(
            f"{store.name}/{file.path}: expected a record of at most {_RECORD_NBYTES} bytes, found {file.nbytes}",
            next_step="it is not tokenmill's: check the URL, or leave it out with --exclude",
        )
    before: bytes | None = None
    for _ in range(_TRIES + 1):
        data = bytes(store.read(file, 0, file.nbytes))
        tag = ETagHasher(file.etag, store.part_sizes(file))
        tag.update(data)
        if tag.found == file.etag or data == before:
            return data
        before = data
    raise StorageError(f"{store.name}/{file.path}: arrives differently each time", next_step="check the network")


def local_records(root: Path) -> Records:
    """Return the records of a directory; None where it has none."""
    return Records(manifests.load(root), manifests.load_consolidated(root), load_view(root))


def stored_records(store: Store, listed: dict[str, StoredFile]) -> Records:
    """Return the records of a store; None where it has none."""
    return _decoded(store.name, {name: _read_record(store, listed[name]) for name in RECORDS if name in listed})


def _decoded(name: str, records: dict[str, bytes]) -> Records:
    """Return the records, if they are tokenmill's."""

    def decode(file: str, kind: type[T]) -> T | None:
        return manifests.decode(records[file], kind, name) if file in records else None

    try:
        return Records(
            decode(layout.MANIFEST, Manifest),
            decode(layout.CONSOLIDATED, Consolidated),
            decode(layout.VIEW, ViewRecord),
        )
    except DataRootError as error:
        raise StorageError(error.message, next_step="leave it out: --exclude '*.json'") from None


def refuse_other(place: Path | str, there: Records, coming: Records) -> None:
    """What a place holds already must be of the data set that comes to it.

    Raises:
        DataRootError: otherwise.
    """
    step = "choose another place, or delete what is there"
    one, other = there.manifest, coming.manifest
    if one is not None and other is not None and not one.is_of(other):
        raise DataRootError(
            f"{place}: holds another data set: its manifest is of another recipe (fingerprint {one.fingerprint} "
            f"there, {other.fingerprint} here), tokenizer or corpus",
            next_step=step,
        )
    if None not in (there.view, coming.view) and there.view != coming.view:
        raise DataRootError(f"{place}: holds another view, which trainers may rely on", next_step=step)


class _Fetched(NamedTuple):
    """A file on its way."""

    digest: str
    """SHA-256 where that is known, else the ETag of the bytes."""
    moved_nbytes: int


class Download:
    """One run, whose lock is held."""

    def __init__(
        self, store: Store, root: Path, wanted: dict[str, StoredFile], known: dict[str, str], on_progress: OnBytes
    ) -> None:
        self._store = store
        self._root = root
        self._wanted = wanted
        self._known = known
        self._on_progress = on_progress
        self._journal = Journal(root, store.name)
        self._lock = threading.Lock()
        self._done_nbytes = 0
        self._total_nbytes = 0
        self._files = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file")
        self._parts = ThreadPoolExecutor(FILES_AT_ONCE * (_PARTS_AHEAD + 1), thread_name_prefix="part")
        self._free: deque[bytearray] = deque()
        """Memory of parts that were written, for others."""
        self._stopped = False

    def fetch(self, records: dict[str, bytes]) -> list[TransferredFile]:
        """Return all files, then the records."""
        data = [file for path, file in self._wanted.items() if path not in records]
        there = [file for file in data if self._journal.has(file)]
        todo = [file for file in data if not self._journal.has(file)]
        self._total_nbytes = sum(file.nbytes for file in todo)
        self._check_disk(todo)
        moved = [TransferredFile(file.path, file.nbytes, True, 0, self._journal.checked(file.path)) for file in there]
        try:
            futures = [self._files.submit(self._bring, file) for file in todo]
            for future in futures:
                moved.append(future.result())
        except BaseException:
            self._stopped = True
            self._store.retrier.stop()
            raise
        finally:
            self._files.shutdown(cancel_futures=True)
            self._parts.shutdown(cancel_futures=True)
            self._journal.flush()
        for name in RECORDS:
            if name in records:
                moved.append(self._put_record(self._wanted[name], records[name]))
        self._journal.flush()
        return sorted(moved, key=lambda file: file.path)

    def _put_record(self, file: StoredFile, data: bytes) -> TransferredFile:
        path = self._root / file.path
        is_new = not path.is_file() or path.read_bytes() != data
        if is_new:
            atomic.write_whole(path, data)
        self._journal.note(file, "twice")
        return TransferredFile(file.path, file.nbytes, not is_new, len(data) if is_new else 0, "twice")

    def note_elsewhere(self, files: Iterable[StoredFile]) -> None:
        """Remember that files are in the store and not here."""
        self._journal.note_all([file for file in files if not (self._root / file.path).exists()], "")
        self._journal.flush()

    def _check_disk(self, todo: list[StoredFile]) -> None:
        needed = sum(max(0, file.nbytes - self._begun_nbytes(file)) for file in todo)
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise StorageError(
                f"{self._root}: the disk cannot hold the files: {needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free",
                next_step="make room, or take fewer with --shards or --include",
            )

    def partial_path(self, file: StoredFile) -> Path:
        """Its name holds what it is a beginning of."""
        mark = hashlib.sha256(f"{self._store.name} {file.etag} {file.nbytes}".encode()).hexdigest()[:12]
        path = self._root / file.path
        return path.with_name(f"{path.name}.{mark}{layout.PARTIAL_SUFFIX}")

    def _begun_nbytes(self, file: StoredFile) -> int:
        partial = self.partial_path(file)
        return partial.stat().st_size if partial.is_file() else 0

    def _bring(self, file: StoredFile) -> TransferredFile:
        """Make the file here the one there."""
        path = self._root / file.path
        with atomic.translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size == file.nbytes and self._is_same(path, file):
            checked = "sha256" if file.path in self._known else "etag"
            self._journal.note(file, checked)
            self._note_progress(file.nbytes)
            return TransferredFile(file.path, file.nbytes, True, 0, checked)
        partial = self.partial_path(file)
        pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}" + re.escape(layout.PARTIAL_SUFFIX))
        for other in path.parent.glob(f"*{layout.PARTIAL_SUFFIX}"):
            if other != partial and pattern.fullmatch(other.name):
                with atomic.translate_write_errors(other):
                    other.unlink()
        before: str | None = None
        for _ in range(_TRIES):
            fetched = self._fetch(file, partial)
            proof = self._check(file, fetched.digest, before)
            if proof is not None:
                atomic.publish(partial, path)
                self._journal.note(file, proof)
                return TransferredFile(file.path, file.nbytes, False, fetched.moved_nbytes, proof)
            before = fetched.digest
            with atomic.translate_write_errors(partial):
                partial.unlink()
            self._note_progress(-file.nbytes)
        expected = f"sha256 {self._known[file.path]}" if file.path in self._known else f"ETag {file.etag}"
        raise StorageError(
            f"{self._store.name}/{file.path}: arrived wrong {_TRIES} times: expected {expected}, found {before}",
            next_step="if it is damaged in the store, upload it again; else check the network",
        )

    def _check(self, file: StoredFile, found: str, before: str | None) -> str | None:
        """Return what proves the bytes; None if they are not those wanted."""
        if file.path in self._known:
            return "sha256" if found == self._known[file.path] else None
        if found == file.etag:
            return "etag"
        # The same bytes twice: the store makes its ETags of something else, or of parts whose size it does not tell.
        return "twice" if found == before else None

    def _is_same(self, path: Path, file: StoredFile) -> bool:
        """Return whether a file that is here, and of that size, has the bytes of the one there."""
        digest = self._digest(file)
        with atomic.translate_read_errors(path), path.open("rb", buffering=0) as opened:
            while data := opened.read(PART_NBYTES):
                digest.update(data)
        return digest.found == self._known.get(file.path, file.etag)

    def _digest(self, file: StoredFile) -> Sha256 | ETagHasher:
        """Return what is to be compared with what is known of the file."""
        if file.path in self._known:
            return Sha256()
        hasher = ETagHasher(file.etag, self._store.part_sizes(file))
        return hasher if hasher.is_known else Sha256()

    def _fetch(self, file: StoredFile, partial: Path) -> _Fetched:
        """Bring what the partial file lacks; it is durable then."""
        digest = self._digest(file)
        if self._begun_nbytes(file) > file.nbytes:
            with atomic.translate_write_errors(partial):
                partial.unlink()
        with atomic.translate_write_errors(partial), partial.open("r+b" if partial.is_file() else "w+b") as opened:
            begun = 0

            def take(data: bytes | bytearray) -> None:
                digest.update(data)
                self._note_progress(len(data))

            while data := opened.read(PART_NBYTES):
                begun += len(data)
                take(data)
            for part in self._parts_from(file, begun):
                opened.write(part)
                take(part)
                if isinstance(part, bytearray) and len(part) == PART_NBYTES:
                    self._free.append(part)
            opened.flush()
            os.fsync(opened.fileno())
        return _Fetched(digest.found, file.nbytes - begun)

    def _parts_from(self, file: StoredFile, offset: int) -> Iterator[bytes | bytearray]:
        """Yield the rest of a file in order, a few parts fetched ahead."""
        begins = iter(range(offset, file.nbytes, PART_NBYTES))
        coming: deque[Future[bytes | bytearray]] = deque()

        def fetch_ahead() -> None:
            while len(coming) <= _PARTS_AHEAD and (at := next(begins, None)) is not None:
                coming.append(self._parts.submit(self._read, file, at, min(PART_NBYTES, file.nbytes - at)))

        fetch_ahead()
        while coming:
            data = coming.popleft().result()
            fetch_ahead()
            yield data

    def _read(self, file: StoredFile, offset: int, nbytes: int) -> bytes | bytearray:
        if self._stopped:
            raise StorageError(f"{file.path}: stopped", next_step="run the same command again")
        into = None
        if nbytes == PART_NBYTES:
            with contextlib.suppress(IndexError):
                into = self._free.pop()
        return self._store.read(file, offset, nbytes, into)

    def _note_progress(self, nbytes: int) -> None:
        with self._lock:
            self._done_nbytes += nbytes
            self._on_progress(self._done_nbytes, self._total_nbytes)

"""Upload: the files of a data root → a bucket, or another directory; the manifest last.

A large file goes in equal parts, several at once. Parts of an upload that was interrupted are kept where
they are those of the file, and uploads that cannot be continued are aborted. What the store says it
received is compared with what was sent, and what was read with the manifest, in the same pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tokenmill.dataroot import layout
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.errors import DataRootError, StorageError
from tokenmill.options import OnBytes, StoreOptions
from tokenmill.progress import also_shown
from tokenmill.remote.etag import ETagHasher, md5_etag, parts_etag
from tokenmill.remote.retry import AnswerError, ChangedError, TransientError
from tokenmill.remote.s3 import S3Object, UploadedPart
from tokenmill.transfer.download import bring, local_records, refuse_other, stored_records
from tokenmill.transfer.journal import Journal
from tokenmill.transfer.selection import (
    EVERYTHING,
    RECORDS,
    Records,
    Selection,
    TransferredFile,
    TransferReport,
    digests,
    missing,
)
from tokenmill.transfer.stores import BucketStore, FolderStore, StoredFile, checked_path, open_store

PART_NBYTES = 32 << 20
WHOLE_NBYTES = 64 << 20
"""Files up to this size go in one piece: a store that puts parts together copies them once more."""
MAX_PARTS = 10_000
"""S3's limit, and R2's, which also wants all parts but the last of one size."""

FILES_AT_ONCE = 4
IN_FLIGHT_NBYTES = 256 << 20
_PARTS_AT_ONCE = 2
"""Parts of one file that are sent at the same time."""


def part_nbytes(nbytes: int) -> int:
    """Size of the parts a file is sent in: the same for the same file, and never more than `MAX_PARTS` of them."""
    if nbytes <= PART_NBYTES * MAX_PARTS:
        return PART_NBYTES
    least = -(-nbytes // MAX_PARTS)
    return -(-least // (1 << 20)) << 20


def upload(
    root: Path | str,
    target: str,
    selection: Selection = EVERYTHING,
    *,
    store: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
    dry_run: bool = False,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> TransferReport:
    """Bring the files of the data root that are missing or different at `target` there.

    Args:
        root: the data root.
        target: `s3://BUCKET/PREFIX`, `file://` or a path.
        selection: which files are meant.
        store: how to reach the bucket.
        dry_run: only say what would travel.
        on_progress: called with bytes that travelled and bytes that are to.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        StorageError: the store refuses, or says it received other bytes.
        DataRootError: a file is not the one the manifest records, is missing, or the root is in use.
    """
    with also_shown(on_progress, wanted=progress) as tell:
        return send(Path(root), open_store(target, store), selection, dry_run=dry_run, on_progress=tell)


def send(
    root: Path,
    store: FolderStore | BucketStore,
    selection: Selection = EVERYTHING,
    *,
    dry_run: bool = False,
    on_progress: OnBytes = lambda done, total: None,
) -> TransferReport:
    """Upload to a store that is open; as `upload`."""
    here = FolderStore(root)
    if isinstance(store, FolderStore):
        return bring(here, store.root, selection, dry_run=dry_run, on_progress=on_progress)
    started = time.monotonic()
    wanted = {path: file for path, file in here.files().items() if selection.takes(path)}
    if not wanted:
        raise DataRootError(f"{root}: no file there that is meant", next_step="check the directory and the patterns")
    for path in wanted:
        checked_path(path, str(root))  # what could never be downloaded again is not uploaded
    sender = Sender(root, store, local_records(root), on_progress)
    if dry_run:
        there = {path: sender.is_there(file) for path, file in wanted.items()}
        moved = [
            TransferredFile(path, file.nbytes, there[path], 0 if there[path] else file.nbytes, "not yet")
            for path, file in wanted.items()
        ]
    else:
        with lock_data_root(root):
            moved = sender.send(wanted)
    return TransferReport(
        source=str(root),
        target=store.name,
        files=moved,
        seconds=round(time.monotonic() - started, 3),
        retries=store.retrier.count,
        dry_run=dry_run,
    )


class Sender:
    """Sends files of a data root, whose lock is held, to a bucket.

    Args:
        root: the data root.
        store: where to; listed once, now.
        coming: the records of what is to be sent, which must be of the same data set as those that are there, if any.
        on_progress: called with bytes that travelled and bytes that are to.
        remembers: whether `transfers.json` of the data root is kept; False where others send from it, too.
    """

    def __init__(
        self,
        root: Path,
        store: BucketStore,
        coming: Records,
        on_progress: OnBytes = lambda done, total: None,
        *,
        remembers: bool = True,
    ) -> None:
        self._root = root
        self._here = FolderStore(root)
        self._store = store
        self._on_progress = on_progress
        self._there = store.files()
        refuse_other(store.name, stored_records(store, self._there), coming)
        self._journal = Journal(root, store.name) if remembers else None
        self._lock = threading.Lock()
        self._done_nbytes = 0
        self._total_nbytes = 0
        self._stopped = False
        self._pool = ThreadPoolExecutor(FILES_AT_ONCE * _PARTS_AT_ONCE, thread_name_prefix="part")

    def is_there(self, file: StoredFile) -> bool:
        """Return whether the store is known to hold that file."""
        there = self._there.get(file.path)
        return there is not None and self._journal is not None and self._journal.has(there)

    def was_sent(self, path: str) -> bool:
        """Return whether an earlier run sent the file of that name, which may be gone here, and it is there still."""
        there = self._there.get(path)
        return there is not None and self._journal is not None and self._journal.sent(there)

    def sent(self, path: str) -> StoredFile:
        """Return a file as it is there, once it is."""
        return self._there[path]

    def adopt(self, file: StoredFile, checked: str = "sha256") -> None:
        """Take note of a file that is there, sent from here or by another machine, and of what proved it."""
        self._there[file.path] = file
        if self._journal is not None:
            self._journal.note(file, checked)

    def note_gone(self, *paths: str) -> None:
        """Take note that files which are there are no longer here."""
        if self._journal is not None:
            self._journal.note_all([self._there[path] for path in paths if path in self._there], "sha256")

    def send(self, wanted: dict[str, StoredFile]) -> list[TransferredFile]:
        """Send files, the records last, and look whether all arrived."""
        records = local_records(self._root)
        known = digests(records)
        if layout.MANIFEST in wanted or layout.VIEW in wanted:
            lost = missing(records, {*wanted, *self._there})
            if lost:
                raise DataRootError(
                    f"{self._root}: {lost[0]} is missing, and the store has none ({len(lost)} such files)",
                    next_step="restore it, or make it again with tokenmill pretokenize",
                )
        data = [file for path, file in wanted.items() if path not in RECORDS]
        self._total_nbytes = sum(file.nbytes for file in wanted.values() if not self.is_there(file))
        try:
            with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file") as files:
                try:
                    futures = [files.submit(self.send_file, file, known.get(file.path)) for file in data]
                    moved = [future.result() for future in futures]
                except BaseException:
                    self.stop()
                    files.shutdown(cancel_futures=True)
                    raise
            for name in RECORDS:
                if name in (
                    layout.MANIFEST,
                    layout.VIEW,
                ):  # all that it speaks of must be there as it should before it goes
                    self._look([file.path for file in moved] + [each for each in known if each in self._there])
                if name in wanted:
                    moved.append(self.send_file(wanted[name], None))
            self._look([file.path for file in moved])
            self.flush()
        except BaseException:
            self.stop()
            raise
        finally:
            self._pool.shutdown(cancel_futures=True)
        return sorted(moved, key=lambda file: file.path)

    @property
    def name(self) -> str:
        """Name of the store."""
        return self._store.name

    def close(self) -> None:
        """Let go of the threads, once all is sent."""
        self._pool.shutdown()

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True
        self._store.retrier.stop()
        # Where the disk is full this fails as well. The user is told the error that ended the run.
        with contextlib.suppress(StorageError):
            self.flush()

    def flush(self) -> None:
        """Store what is known to be there."""
        if self._journal is not None:
            self._journal.flush()

    def _withdraw_manifest(self) -> None:
        """A manifest there must not speak of a file that is about to become another."""
        with self._lock:
            if layout.MANIFEST in self._there:
                self._store.ask(layout.MANIFEST, lambda: self._store.bucket.delete(self._store.key(layout.MANIFEST)))
                del self._there[layout.MANIFEST]

    def _look(self, paths: list[str]) -> None:
        """What the store lists must be what was sent."""
        listed = self._store.files()
        for path in paths:
            expected, found = self._there[path], listed.get(path)
            if found is None or (found.nbytes, found.etag) != (expected.nbytes, expected.etag):
                raise StorageError(
                    f"{self._store.name}/{path}: expected {expected.nbytes} bytes with ETag {expected.etag}, found "
                    f"{'no such object' if found is None else f'{found.nbytes} bytes with ETag {found.etag}'}",
                    next_step="if nothing else writes there, run the same command again",
                )

    def send_file(self, file: StoredFile, sha256: str | None) -> TransferredFile:
        """Make the file there the one here.

        Args:
            file: of the data root.
            sha256: what its bytes must be, if it is known.
        """
        if self.is_there(file):
            assert self._journal is not None
            return TransferredFile(file.path, file.nbytes, True, 0, self._journal.checked(file.path))
        if self._equals(file):
            self.adopt(self._there[file.path], "etag")
            self._note_progress(file.nbytes)
            return TransferredFile(file.path, file.nbytes, True, 0, "etag")
        if file.path in self._there and file.path not in RECORDS:
            self._withdraw_manifest()
        if file.nbytes <= WHOLE_NBYTES:
            etag, moved = self._send_whole(file, sha256)
        else:
            etag, moved = self._send_parts(file, sha256)
        if self._here.file(file.path) != file:
            raise DataRootError(
                f"{self._root / file.path}: changed while it was sent",
                next_step="wait until nothing writes to it, then run the same command again",
            )
        checked = "etag" if sha256 is None else "sha256"
        self.adopt(StoredFile(file.path, file.nbytes, etag), checked)
        return TransferredFile(file.path, file.nbytes, False, moved, checked)

    def _equals(self, file: StoredFile) -> bool:
        """Return whether what is there has the bytes of the file, by its ETag."""
        there = self._there.get(file.path)
        if there is None or there.nbytes != file.nbytes:
            return False
        tag = ETagHasher(there.etag, [part_nbytes(file.nbytes)])
        for at in range(0, file.nbytes, PART_NBYTES):
            tag.update(self._read(file, at, min(PART_NBYTES, file.nbytes - at)))
        return tag.found == there.etag

    def _read(self, file: StoredFile, offset: int, nbytes: int) -> bytes:
        if self._stopped:
            raise StorageError(f"{file.path}: stopped", next_step="run the same command again")
        return self._here.read(file, offset, nbytes)

    def _refuse_damaged(self, file: StoredFile, expected: str | None, found: str) -> None:
        if expected is not None and found != expected:
            raise DataRootError(
                f"{self._root / file.path}: expected sha256 {expected}, found {found}: not the file that was made",
                next_step="tokenmill verify says more; tokenmill pretokenize makes a damaged shard again",
            )

    def _send_whole(self, file: StoredFile, sha256: str | None) -> tuple[str, int]:
        data = self._read(file, 0, file.nbytes)
        self._refuse_damaged(file, sha256, hashlib.sha256(data).hexdigest())
        key, md5 = self._store.key(file.path), md5_etag(data)

        def put() -> str:
            etag = self._store.bucket.put(key, data, md5)
            if etag != md5 and not self._holds(S3Object(key, len(data), etag), data):
                raise TransientError("other bytes arrived than were sent")
            return etag

        etag = self._store.ask(file.path, put)
        self._note_progress(len(data))
        return etag, len(data)

    def _holds(self, there: S3Object, data: bytes) -> bool:
        """Return whether an object whose ETag says nothing of its bytes has these."""
        try:
            return self._store.bucket.read(there, 0, len(data)) == data
        except (AnswerError, ChangedError):
            return False

    def _send_parts(self, file: StoredFile, sha256: str | None) -> tuple[str, int]:
        key, size = self._store.key(file.path), part_nbytes(file.nbytes)
        upload, begun = self._resumed(file, key, size)
        digest = hashlib.sha256()
        parts: list[UploadedPart] = []
        sums: list[str] = []
        moved = 0
        coming: deque[Future[UploadedPart]] = deque()
        for number, at in enumerate(range(0, file.nbytes, size), start=1):
            while len(coming) >= max(1, min(_PARTS_AT_ONCE, IN_FLIGHT_NBYTES // FILES_AT_ONCE // size)):
                parts.append(coming.popleft().result())
            data = self._read(file, at, min(size, file.nbytes - at))
            digest.update(data)
            sums.append(md5_etag(data))
            held = begun.get(number)
            if held is not None and (held.nbytes, held.etag) == (len(data), sums[-1]):
                done: Future[UploadedPart] = Future()
                done.set_result(held)
                coming.append(done)
                self._note_progress(len(data))
            else:
                coming.append(self._pool.submit(self._send_part, file.path, upload, number, data, sums[-1]))
                moved += len(data)
        parts += [future.result() for future in coming]
        if sha256 is not None and digest.hexdigest() != sha256:
            self._abort(file.path, upload)
            self._refuse_damaged(file, sha256, digest.hexdigest())
        etag = self._complete(file, upload, parts)
        self._abort_others(file)
        if etag != parts_etag(sums):
            self._compare(file, etag, digest.hexdigest())
        return etag, moved

    def _resumed(self, file: StoredFile, key: str, size: int) -> tuple[str, dict[int, UploadedPart]]:
        """Return the upload to continue and the parts it has; other uploads of the same file are aborted."""
        ask, bucket = self._store.ask, self._store.bucket
        count = -(-file.nbytes // size)
        last = file.nbytes - (count - 1) * size
        chosen: tuple[str, dict[int, UploadedPart]] | None = None
        for upload in reversed(ask(file.path, lambda: bucket.uploads(key))):
            listed = ask(file.path, lambda upload=upload: bucket.parts(key, upload))  # type: ignore[misc]
            held = {part.number: part for part in listed}
            ours = all(part.nbytes == (size if part.number < count else last) for part in listed)
            if chosen is None and held and ours and max(held) <= count:
                chosen = upload, held
            else:
                self._abort(file.path, upload)
        return chosen or (ask(file.path, lambda: bucket.begin_upload(key)), {})

    def _abort_others(self, file: StoredFile) -> None:
        """Abort uploads begun by a request whose answer was lost: they cost money and are listed nowhere else."""
        for upload in self._store.ask(file.path, lambda: self._store.bucket.uploads(self._store.key(file.path))):
            self._abort(file.path, upload)

    def _abort(self, path: str, upload: str) -> None:
        def abort() -> None:
            try:
                self._store.bucket.abort_upload(self._store.key(path), upload)
            except AnswerError as error:
                if error.status != 404:  # it ended by itself
                    raise

        self._store.ask(path, abort)

    def _send_part(self, path: str, upload: str, number: int, data: bytes, md5: str) -> UploadedPart:
        key = self._store.key(path)
        others: list[str] = []

        def put() -> str:
            if self._stopped:
                raise StorageError(f"{path}: stopped", next_step="run the same command again")
            etag = self._store.bucket.put_part(key, upload, number, data, md5)
            # Twice: the store makes its ETags of something else, and the whole is read back at the end.
            if etag != md5 and not others:
                others.append(etag)
                raise TransientError("other bytes arrived than were sent")
            return etag

        etag = self._store.ask(path, put)
        self._note_progress(len(data))
        return UploadedPart(number, len(data), etag)

    def _complete(self, file: StoredFile, upload: str, parts: list[UploadedPart]) -> str:
        key, bucket = self._store.key(file.path), self._store.bucket

        def complete() -> str:
            try:
                return bucket.complete_upload(key, upload, parts)
            except AnswerError:
                # An answer that was lost: the first try did it. What is there is compared, whatever its ETag.
                found = bucket.head(key)
                if found is not None and found.nbytes == file.nbytes:
                    return found.etag
                raise

        return self._store.ask(file.path, complete)

    def _compare(self, file: StoredFile, etag: str, expected: str) -> None:
        """Read back what is there: its ETag says nothing of the bytes."""
        there, found = StoredFile(file.path, file.nbytes, etag), hashlib.sha256()
        for at in range(0, file.nbytes, PART_NBYTES):
            found.update(self._store.read(there, at, min(PART_NBYTES, file.nbytes - at)))
        if found.hexdigest() != expected:
            self._store.ask(file.path, lambda: self._store.bucket.delete(self._store.key(file.path)))
            raise StorageError(
                f"{self._store.name}/{file.path}: expected sha256 {expected}, found {found.hexdigest()}: deleted there",
                next_step="run the same command again",
            )

    def _note_progress(self, nbytes: int) -> None:
        with self._lock:
            self._done_nbytes += nbytes
            self._on_progress(self._done_nbytes, self._total_nbytes)

"""Transfer: which files of a data set travel, what proves them, and what is remembered of it.

Pure but for `Journal`. `downloads.py` and `uploads.py` move the bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenmill import layout, storage
from tokenmill.errors import StorageError
from tokenmill.manifest import Consolidated, Manifest
from tokenmill.stores import StoredFile

RECORDS = (layout.CONSOLIDATED, layout.MANIFEST)
"""Travel last, in this order: who finds the manifest finds all it speaks of."""

Show = Callable[[int, int], None]


class Selection(NamedTuple):
    """Which files are meant."""

    include: tuple[str, ...] = ()
    """Patterns of paths; none: every file."""
    exclude: tuple[str, ...] = ()
    shards: range | None = None
    """Only these shards and their documents."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self == Selection()

    def takes(self, path: str) -> bool:
        """Whether the file at `path` is meant."""
        if self.shards is not None and path not in {
            name for index in self.shards for name in (layout.shard_name(index), layout.documents_name(index))
        }:
            return False
        if self.include and not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.include):
            return False
        return not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.exclude)

    def takes_record(self, path: str) -> bool:
        """Whether it is a record that some shards need to be known by, on their own too."""
        return self.shards is not None and path in RECORDS and self._replace(shards=None).takes(path)


EVERYTHING = Selection()


class Moved(msgspec.Struct, frozen=True):
    """What became of a file."""

    path: str
    nbytes: int
    was_there: bool
    """Whether nothing had to be done."""
    moved_nbytes: int
    """That travelled; less than `nbytes` where an earlier run had begun."""
    checked: str
    """What proves it: `sha256` of the manifest, the store's `etag`, or that the same bytes came `twice`."""


class Report(msgspec.Struct, kw_only=True):
    """What a transfer did, or would do."""

    source: str
    target: str
    files: list[Moved]
    seconds: float
    retries: int
    dry_run: bool = False

    @property
    def moved(self) -> list[Moved]:
        """The files that were not there."""
        return [file for file in self.files if not file.was_there]


class Entry(msgspec.Struct, frozen=True):
    """A file that is the same here and there."""

    etag: str
    """There."""
    nbytes: int
    mtime_ns: int
    """Here; 0 where the file is not to be here."""
    checked: str = ""
    """What proved that both are the same, as in `Moved`; empty: nothing that is known."""


class Journal:
    """`transfers.json` of a directory: which of its files are known to be in which store.

    A file of another size or modification time, here or there, is not the one remembered.
    """

    def __init__(self, root: Path, store: str) -> None:
        self._root = root
        self._store = store
        self._lock = threading.Lock()
        self._stores = _stored_entries(root)
        self._entries = self._stores.setdefault(store, {})

    def has(self, file: StoredFile) -> bool:
        """Whether the file here is the one of that store."""
        entry = self._entries.get(file.path)
        try:
            stat = (self._root / file.path).stat()
        except OSError:
            return False
        known = entry is not None and (entry.etag, entry.nbytes, entry.mtime_ns, entry.checked != "")
        return known == (file.etag, file.nbytes, stat.st_mtime_ns, True) and stat.st_size == file.nbytes

    def checked(self, path: str) -> str:
        """What proved that a file is the same here and there."""
        return self._entries[path].checked

    def sent(self, file: StoredFile) -> bool:
        """Whether a file was sent to that store, is there still, and need not be here any more."""
        entry = self._entries.get(file.path)
        return entry is not None and (entry.etag, entry.nbytes) == (file.etag, file.nbytes)

    def note(self, file: StoredFile, checked: str) -> None:
        """Remember that the file here, if there is one, is the one there, and what proved it."""
        self.note_all([file], checked)

    def note_all(self, files: Iterable[StoredFile], checked: str) -> None:
        """The same of several."""
        with self._lock:
            for file in files:
                path = self._root / file.path
                mtime_ns = path.stat().st_mtime_ns if path.exists() else 0
                self._entries[file.path] = Entry(file.etag, file.nbytes, mtime_ns, checked)
            storage.write_whole(self._root / layout.TRANSFERS, msgspec.json.encode(self._stores))


def elsewhere(root: Path) -> dict[str, str]:
    """The stores that hold files of a data root which are not here because they were sent away or not fetched."""
    return {
        path: store
        for store, entries in _stored_entries(root).items()
        for path, entry in entries.items()
        if entry.mtime_ns == 0 and not (root / path).exists()
    }


def _stored_entries(root: Path) -> dict[str, dict[str, Entry]]:
    try:
        data = (root / layout.TRANSFERS).read_bytes()
        return msgspec.json.decode(data, type=dict[str, dict[str, Entry]])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}  # what is not remembered is compared


def digests(manifest: Manifest | None, record: Consolidated | None) -> dict[str, str]:
    """SHA-256 by path of all that the records speak of."""
    known: dict[str, str] = {}
    if record is not None:
        for index, copied in enumerate(record.shards):
            known[layout.shard_name(index)] = copied.sha256
        if record.complete:
            known[layout.TOKENS], known[layout.SAMPLE_IDS] = record.tokens_sha256, record.sample_ids_sha256
    if manifest is not None:
        for shard in manifest.shards:
            known[layout.shard_name(shard.index)] = shard.sha256
            known[layout.documents_name(shard.index)] = shard.documents_sha256
    return known


def missing(manifest: Manifest | None, record: Consolidated | None, present: Iterable[str]) -> list[str]:
    """Names that the records speak of and nobody has."""
    there = set(present)
    joined = record is not None and record.complete
    wanted = [layout.TOKENS, layout.SAMPLE_IDS] if joined else []
    if manifest is not None:
        wanted += [layout.documents_name(shard.index) for shard in manifest.shards]
        if not joined:
            wanted += [layout.shard_name(shard.index) for shard in manifest.shards]
    return [name for name in wanted if name not in there]


class Sha256:
    """SHA-256 of bytes as they pass."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.update = self._sha256.update

    @property
    def found(self) -> str:
        """In hexadecimal digits."""
        return self._sha256.hexdigest()


def shard_range(text: str) -> range:
    """`3` or `0-3` (both ends meant).

    Raises:
        StorageError: neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise StorageError(f"--shards {text}: expected a number or a range like 0-3", next_step="correct --shards")
    return range(int(match[1]), int(match[2] or match[1]) + 1)

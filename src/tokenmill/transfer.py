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
    """What proves it: `sha256`, `etag`, `size`."""


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
    """Here."""


class Journal:
    """`transfers.json` of a directory: which of its files are known to be in which store.

    A file of another size or modification time, here or there, is not the one remembered.
    """

    def __init__(self, root: Path, store: str) -> None:
        self._root = root
        self._store = store
        self._lock = threading.Lock()
        self._stores = self._load()
        self._entries = self._stores.setdefault(store, {})

    def _load(self) -> dict[str, dict[str, Entry]]:
        try:
            data = (self._root / layout.TRANSFERS).read_bytes()
            return msgspec.json.decode(data, type=dict[str, dict[str, Entry]])
        except (FileNotFoundError, msgspec.DecodeError):
            return {}  # what is not remembered is compared

    def has(self, file: StoredFile) -> bool:
        """Whether the file here is the one of that store."""
        entry = self._entries.get(file.path)
        try:
            stat = (self._root / file.path).stat()
        except OSError:
            return False
        return entry == Entry(file.etag, file.nbytes, stat.st_mtime_ns) and stat.st_size == file.nbytes

    def sent(self, file: StoredFile) -> bool:
        """Whether a file was sent to that store, is there still, and need not be here any more."""
        entry = self._entries.get(file.path)
        return entry is not None and (entry.etag, entry.nbytes) == (file.etag, file.nbytes)

    def note(self, file: StoredFile) -> None:
        """Remember that the file here, if there is one, is the one there."""
        path = self._root / file.path
        mtime_ns = path.stat().st_mtime_ns if path.exists() else 0
        with self._lock:
            self._entries[file.path] = Entry(file.etag, file.nbytes, mtime_ns)
            storage.write_whole(self._root / layout.TRANSFERS, msgspec.json.encode(self._stores))


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


class Tag:
    """An ETag that was made of the bytes: of the whole (MD5), or of its parts (MD5 of their MD5s, and a count).

    Most stores make them so; of those that do not, some look as if they did.

    Args:
        etag: as the store lists it.
        part_nbytes: size of the parts, where it was made of parts and that is known.
    """

    def __init__(self, etag: str, part_nbytes: int | None) -> None:
        match = re.fullmatch(r'"[0-9a-f]{32}(-\d+)?"', etag)
        self._is_known = match is not None and (match[1] is None or part_nbytes is not None)
        self._part_nbytes = part_nbytes if match is not None and match[1] else None
        self._done: list[bytes] = []
        self._part = hashlib.md5(usedforsecurity=False)
        self._in_part = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Go on with the next bytes."""
        view = memoryview(data) if self._is_known else memoryview(b"")
        while view:
            room = len(view) if self._part_nbytes is None else self._part_nbytes - self._in_part
            self._part.update(view[:room])
            self._in_part += len(view[:room])
            view = view[room:]
            if self._in_part == self._part_nbytes:
                self._end_part()

    def _end_part(self) -> None:
        self._done.append(self._part.digest())
        self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0

    @property
    def found(self) -> str:
        """The ETag of the bytes seen; empty where ETags are made otherwise."""
        if not self._is_known:
            return ""
        if self._part_nbytes is None:
            return f'"{self._part.hexdigest()}"'
        parts = [*self._done, *([self._part.digest()] if self._in_part else [])]
        return f'"{hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"'


def shard_range(text: str) -> range:
    """`3` or `0-3` (both ends meant).

    Raises:
        StorageError: neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise StorageError(f"--shards {text}: expected a number or a range like 0-3", next_step="correct --shards")
    return range(int(match[1]), int(match[2] or match[1]) + 1)

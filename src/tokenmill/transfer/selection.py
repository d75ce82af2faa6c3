"""Transfer: which files of a data set travel, what proves them, and what is remembered of it.

Pure. `download.py` and `upload.py` move the bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Consolidated, Manifest
from tokenmill.dataroot.view_record import ViewRecord
from tokenmill.errors import StorageError

RECORDS = (layout.CONSOLIDATED, layout.MANIFEST, layout.VIEW)
"""Travel last, in this order: who finds the manifest finds all it speaks of."""


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
        """Return whether the file at `path` is meant."""
        if self.shards is not None and path not in {
            name for index in self.shards for name in (layout.shard_name(index), layout.documents_name(index))
        }:
            return False
        if self.include and not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.include):
            return False
        return not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.exclude)

    def takes_record(self, path: str) -> bool:
        """Return whether it is a record that some shards need to be known by, on their own too."""
        return self.shards is not None and path in RECORDS and self._replace(shards=None).takes(path)


EVERYTHING = Selection()


class TransferredFile(msgspec.Struct, frozen=True):
    """What became of a file."""

    path: str
    nbytes: int
    was_there: bool
    """Whether nothing had to be done."""
    moved_nbytes: int
    """That travelled; less than `nbytes` where an earlier run had begun."""
    checked: str
    """What proves it: `sha256` of the manifest, the store's `etag`, or that the same bytes came `twice`."""


class TransferReport(msgspec.Struct, kw_only=True):
    """What a transfer did, or would do."""

    source: str
    target: str
    files: list[TransferredFile]
    seconds: float
    retries: int
    dry_run: bool = False

    @property
    def moved(self) -> list[TransferredFile]:
        """The files that were not there."""
        return [file for file in self.files if not file.was_there]


class Records(NamedTuple):
    """What is recorded of a data root or a view; None where there is no such record."""

    manifest: Manifest | None = None
    record: Consolidated | None = None
    view: ViewRecord | None = None


def digests(records: Records) -> dict[str, str]:
    """SHA-256 by path of all that the records speak of."""
    manifest, record, view = records
    known: dict[str, str] = {}
    if view is not None:
        known |= view.index_sha256
    if record is not None:
        for index, copied in enumerate(record.shards):
            known[layout.shard_name(index)] = copied.sha256
        if record.complete:
            known[layout.TOKENS], known[layout.SAMPLE_IDS] = record.tokens_sha256, record.sample_ids_sha256
    if manifest is not None:
        for shard in manifest.shards:
            known[layout.shard_name(shard.index)] = shard.sha256
            known[layout.documents_name(shard.index)] = shard.documents_sha256
        if manifest.skipped_sha256 is not None:
            known[layout.SKIPPED] = manifest.skipped_sha256
    return known


def missing(records: Records, present: Iterable[str]) -> list[str]:
    """Return the names of files that the records name and that are in neither place."""
    manifest, record, view = records
    there = set(present)
    joined = record is not None and record.complete
    wanted = [layout.TOKENS, layout.SAMPLE_IDS] if joined else []
    wanted += list(view.index_sha256) if view is not None else []
    if manifest is not None:
        wanted += [layout.documents_name(shard.index) for shard in manifest.shards]
        wanted += [layout.SKIPPED] if manifest.skipped_sha256 is not None else []
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

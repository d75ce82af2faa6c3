"""Recorder: enters finished shards into the manifest, and rows that were left out for being bad into `skipped.jsonl`.

`skipped.jsonl` has a line of JSON for each such row: `file`, `row`, `reason`. The lines are durable before the record
of the shard that counts them. When the data set is complete the file is sorted, and each row is in it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.manifest import UNREADABLE, Manifest, ShardRecord
from tokenmill.encoding.encoder import BAD
from tokenmill.errors import LedgerError, StorageError
from tokenmill.shards.pack import EmittedRows

log = logging.getLogger("tokenmill")

_SAVE_SECONDS = 1.0
"""Time between manifests where shards are finished faster than that: the work that a kill then costs."""


class SkippedRow(msgspec.Struct, frozen=True, order=True):
    """A row that became no document because it is not what its format says."""

    file: str
    row: int
    reason: str


class SkippedRows:
    """The rows of `skipped.jsonl`, until the file is complete.

    Args:
        root: the data root.
        paths: names of the source files, by index.
    """

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._path = root / layout.SKIPPED
        self._paths = paths
        self._reasons: dict[tuple[int, int], str] = {}
        self._waiting: list[SkippedRow] = []
        self._lock = threading.Lock()

    def learn(self, bad: Iterable[tuple[int, int, str]]) -> None:
        """Remember why rows are bad until the order emits them: of each its file, its row there, and the reason."""
        for file, row, reason in bad:
            self._reasons[file, row] = reason

    def note(self, rows: EmittedRows) -> None:
        """Enter the bad ones of some emitted rows."""
        for at in np.flatnonzero(rows.flags & BAD).tolist():
            file, row = int(rows.file[at]), int(rows.row[at])
            with self._lock:
                self._waiting.append(SkippedRow(self._paths[file], row, self._reasons.pop((file, row))))

    def flush(self) -> None:
        """Make durable what was entered."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if waiting:
            with atomic.translate_write_errors(self._path), self._path.open("ab") as file:
                # A line that was cut off by a crash is ended first.
                file.write((b"\n" if file.tell() else b"") + msgspec.json.Encoder().encode_lines(waiting))
                file.flush()
                os.fsync(file.fileno())

    def settle(self, expected: int) -> str | None:
        """Sort the file, each row once; its SHA-256, or None if there is none.

        Raises:
            LedgerError: it does not hold the `expected` number of rows.
        """
        self.flush()
        rows = sorted(set(_read(self._path)))
        if len(rows) != expected:
            raise LedgerError(
                f"{self._path}: {expected} bad rows counted, {len(rows)} recorded",
                next_step="report this with manifest.json; do not train on this data root",
            )
        if not rows:
            return None
        data = msgspec.json.Encoder().encode_lines(rows)
        atomic.write_whole(self._path, data)
        return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> list[SkippedRow]:
    """Return the rows of an unfinished file. A line that a crash cut off is ignored: its row is entered again."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(msgspec.json.decode(line, type=SkippedRow))
        except UNREADABLE:
            continue
    return rows


class Recorder:
    """Enters finished shards into the manifest of a data root.

    Args:
        root: the data root.
        manifest: of the data set.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self._manifest = manifest
        self.skipped = SkippedRows(root, [file.path for file in manifest.files])
        self._has_recorded = False
        self._save_due = 0.0

    def record(self, record: ShardRecord) -> None:
        """Enter a shard that is durable."""
        self.skipped.flush()
        self._manifest.add(record)
        self._has_recorded = True
        if time.monotonic() >= self._save_due:
            self._save()
        name = layout.shard_name(record.index)
        log.info("%s: %d tokens, %d documents, sha256 %s", name, record.tokens, record.documents, record.sha256)

    def abandon(self) -> None:
        """Save what was entered, in a run that ends with an error."""
        # On a full disk this fails as well. The user is told the error that ended the run, and a shard
        # without a record is made again.
        if self._has_recorded:
            with contextlib.suppress(StorageError):
                self._save()

    def _save(self) -> None:
        begin = time.monotonic()
        manifests.save(self._root, self._manifest)
        self._save_due = time.monotonic() + max(_SAVE_SECONDS, 10 * (time.monotonic() - begin))

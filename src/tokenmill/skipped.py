"""Skipped rows: `skipped.jsonl` says which rows were left out for being bad, and why.

A line a row, as JSON: `file`, `row`, `reason`. Lines are durable before the record of the shard that
counts them; when the data set is complete the file is sorted, and each row is in it once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tokenmill import layout, storage
from tokenmill.encode import BAD
from tokenmill.errors import LedgerError
from tokenmill.manifest import UNREADABLE
from tokenmill.pack import Block


class SkippedRow(msgspec.Struct, frozen=True, order=True):
    """A row that became no document because it is not what its format says."""

    file: str
    row: int
    reason: str


class SkippedRows:
    """The file in the making.

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

    def learn(self, file: int, first_row: int, bad: Mapping[int, str]) -> None:
        """Remember why rows of a span are bad until the order emits them."""
        for row, reason in bad.items():
            self._reasons[file, first_row + row] = reason

    def note(self, rows: Block) -> None:
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
            with storage.reported(self._path), self._path.open("ab") as file:
                # A line that was cut off by a crash is ended first.
                file.write((b"\n" if file.tell() else b"") + msgspec.json.Encoder().encode_lines(waiting))
                file.flush()
                os.fsync(file.fileno())

    def settle(self, expected: int) -> None:
        """Sort the file, each row once.

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
        if rows:
            storage.write_whole(self._path, msgspec.json.Encoder().encode_lines(rows))


def _read(path: Path) -> list[SkippedRow]:
    """The rows of a file in the making; a line that a crash cut off is none, its row comes again."""
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

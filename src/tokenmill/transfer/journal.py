"""Journal: `transfers.json` of a directory: which of its files are in which store, and which are only there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tokenmill.dataroot import atomic, layout

if TYPE_CHECKING:
    from tokenmill.transfer.stores import StoredFile


_STORE_SECONDS = 1.0


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
        self._is_stored = True
        self._store_due = 0.0

    def has(self, file: StoredFile) -> bool:
        """Return whether the file here is the one of that store."""
        entry = self._entries.get(file.path)
        try:
            stat = (self._root / file.path).stat()
        except OSError:
            return False
        known = entry is not None and (entry.etag, entry.nbytes, entry.mtime_ns, entry.checked != "")
        return known == (file.etag, file.nbytes, stat.st_mtime_ns, True) and stat.st_size == file.nbytes

    def checked(self, path: str) -> str:
        """Return what proved that a file is the same here and there."""
        return self._entries[path].checked

    def sent(self, file: StoredFile) -> bool:
        """Return whether a file was sent to that store, is there still, and need not be here any more."""
        entry = self._entries.get(file.path)
        return entry is not None and (entry.etag, entry.nbytes) == (file.etag, file.nbytes)

    def note(self, file: StoredFile, checked: str) -> None:
        """Remember that the file here, if there is one, is the one there, and what proved it.

        That is stored within a second or so, or by `flush`: a file that is forgotten is compared again.
        """
        self.note_all([file], checked)

    def note_all(self, files: Iterable[StoredFile], checked: str) -> None:
        """Do as `note` for several files."""
        with self._lock:
            for file in files:
                path = self._root / file.path
                mtime_ns = path.stat().st_mtime_ns if path.exists() else 0
                self._entries[file.path] = Entry(file.etag, file.nbytes, mtime_ns, checked)
                self._is_stored = False
            if time.monotonic() >= self._store_due:
                self._store_all()

    def flush(self) -> None:
        """Store what was noted."""
        with self._lock:
            if not self._is_stored:
                self._store_all()

    def _store_all(self) -> None:
        begin = time.monotonic()
        atomic.write_whole(self._root / layout.TRANSFERS, msgspec.json.encode(self._stores))
        self._is_stored = True
        # All entries are written each time, so where there are many it happens less often.
        self._store_due = time.monotonic() + max(_STORE_SECONDS, 10 * (time.monotonic() - begin))


def elsewhere(root: Path) -> dict[str, str]:
    """Return the stores of files that are not here because they were sent away or not fetched, by file name."""
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

"""Removal: a list of documents that a view must not have."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import RecipeError
from tokenmill.views.catalogue import Catalogue, Documents

_HASH = re.compile(r"[0-9a-fA-F]{16}")
_ROW = re.compile(r"(.+?)\s+(?:row\s+)?(\d[\d,]{0,22})")
"""As `show` and `where` print it, too."""


class RemovalList:
    """Which documents of a data root are to be left out.

    Args:
        hashes: of documents, by the entries that give them.
        rows: of documents, as source file (its index) and row, likewise.
    """

    def __init__(self, hashes: dict[int, str], rows: dict[tuple[int, int], str]) -> None:
        self.entries = sorted({*hashes.values(), *rows.values()})
        """Each as `FILE ROW`, or as 16 hexadecimal digits."""
        self._hashes = dict(sorted(hashes.items()))
        self._hash_array = np.array(list(self._hashes), np.uint64)
        self._by_file: dict[int, NDArray[np.int64]] = {}
        for file in {file for file, _ in rows}:
            self._by_file[file] = np.array(sorted(row for each, row in rows if each == file), np.int64)
        self._rows = rows
        self._found: set[str] = set()
        self._texts: list[NDArray[np.uint64]] = []

    def matches(self, documents: Documents) -> NDArray[np.bool_]:
        """Return which documents are named, and remember by which entries."""
        # NumPy 2.0 has no table of unsigned integers of 64 bits.
        named = np.isin(documents.identity, self._hash_array, kind="sort")
        self._found.update(self._hashes[value] for value in np.unique(documents.identity[named]).tolist())
        for file, rows in self._by_file.items():
            here = np.flatnonzero(documents.file == file)
            here = here[np.isin(documents.row[here], rows)]
            self._found.update(self._rows[file, row] for row in documents.row[here].tolist())
            named[here] = True
        self._texts.append(documents.identity[named])
        return named

    @property
    def unmatched(self) -> list[str]:
        """Entries that name no document, once all documents were looked at."""
        return [entry for entry in self.entries if entry not in self._found]

    def copies(self, identity: NDArray[np.uint64]) -> int:
        """Return how many of these documents have the text of one that was named."""
        texts = np.unique(np.concatenate([*self._texts, np.empty(0, np.uint64)]))
        return int(np.count_nonzero(np.isin(identity, texts, kind="sort")))


def load_removals(path: Path | None, catalogue: Catalogue) -> RemovalList:
    """Load a removal list: each line names a document by `FILE ROW`, or by the 16 hexadecimal digits of its hash.

    The file may stand after the name of the source, as `show` prints it: `NAME/FILE row ROW`.

    Blank lines and lines that begin with `#` say nothing.

    Raises:
        RecipeError: it cannot be read, or a line is neither, or names a file that the data root does not have.
    """
    if path is None:
        return parse_removals([], catalogue, "")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"removal list {path}: cannot be read: {error}", next_step="give a text file") from None
    return parse_removals(lines, catalogue, f"removal list {path}")


def parse_removals(lines: list[str], catalogue: Catalogue, name: str) -> RemovalList:
    """Parse the lines of a removal list; as `load_removals`."""
    numbers = {file.path: number for number, file in enumerate(catalogue.manifest.files)}
    hashes: dict[int, str] = {}
    rows: dict[tuple[int, int], str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        named = _ROW.fullmatch(line)
        if not line or (line.startswith("#") and (named is None or named[1] not in numbers)):
            continue
        path = named[1].removeprefix(f"{catalogue.name}/") if named and named[1] not in numbers else named and named[1]
        if _HASH.fullmatch(line):
            hashes[int(line, 16)] = line.lower()
        elif named and path in numbers:
            row = int(named[2].replace(",", ""))
            rows[numbers[path], row] = f"{path} {row}"
        else:
            what = f"no source file is called {path!r}" if named else "expected FILE ROW, or 16 hexadecimal digits"
            raise RecipeError(
                f"{name}, line {number}: {line:.200}: {what}",
                next_step="name files as the manifest lists them, such as "
                + (catalogue.manifest.files[0].path if catalogue.manifest.files else "none"),
            )
    return RemovalList(hashes, rows)

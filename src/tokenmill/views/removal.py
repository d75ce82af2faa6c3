"""Removal: a list of documents that a view must not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import RecipeError
from tokenmill.views.catalogue import Catalogue, Documents

_HASH = re.compile(r"[0-9a-fA-F]{16}")
_ROW = re.compile(r"(.+?)\s+(\d{1,18})")


class RemovalList(NamedTuple):
    """Which documents of a data root are to be left out."""

    entries: list[str]
    """As written, without blanks and comments."""
    hashes: NDArray[np.uint64]
    """Ascending."""
    rows: dict[int, NDArray[np.int64]]
    """By index of the source file, ascending."""

    def matches(self, documents: Documents) -> NDArray[np.bool_]:
        """Return which documents are named."""
        named = np.isin(documents.identity, self.hashes, kind="sort")  # NumPy 2.0 has no table of uint64
        for file, rows in self.rows.items():
            here = np.flatnonzero(documents.file == file)
            named[here[np.isin(documents.row[here], rows)]] = True
        return named


def load_removals(path: Path | None, catalogue: Catalogue) -> RemovalList:
    """Load a removal list: each line names a document by `FILE ROW`, or by the 16 hexadecimal digits of its hash.

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
    entries: list[str] = []
    hashes: list[int] = []
    rows: dict[int, list[int]] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        named = _ROW.fullmatch(line)
        if _HASH.fullmatch(line):
            hashes.append(int(line, 16))
        elif named and named[1] in numbers:
            rows.setdefault(numbers[named[1]], []).append(int(named[2]))
        else:
            what = f"no source file is called {named[1]!r}" if named else "expected FILE ROW, or 16 hexadecimal digits"
            raise RecipeError(
                f"{name}, line {number}: {line:.200}: {what}",
                next_step="name files as the manifest lists them, such as "
                + (catalogue.manifest.files[0].path if catalogue.manifest.files else "none"),
            )
        entries.append(line)
    return RemovalList(
        entries,
        np.sort(np.array(hashes, np.uint64)),
        {file: np.sort(np.array(found, np.int64)) for file, found in rows.items()},
    )

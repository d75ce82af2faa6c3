"""Local listing: folders and globs of this machine → files, each once, whatever links lead to it. Reads only.

The same tree gives the same paths on any file system: nothing depends on the order in which folders list their
entries. A folder that cannot be listed is an error, never an empty one.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = re.compile(r"[*?[]")


class Listing(NamedTuple):
    """What is below a folder."""

    files: list[str]
    """Paths relative to it, with `/`, sorted; a link that leads nowhere is among them."""
    repeated: list[str]
    """Links left out because what they lead to is listed already."""
    hidden: list[str]
    """Files and folders whose name begins with a dot, left out; folders end with `/`."""


def walk(root: Path) -> Listing:
    """Return every file below `root`, links followed.

    A folder or file to which several ways lead is listed once: by the way without links if there is one, else by the
    link whose path sorts first.

    Raises:
        OSError: a folder cannot be listed; `filename` says which.
    """
    walking = _Walk(root)
    walking.visit("")
    while walking.links:
        links, walking.links = sorted(walking.links), []
        for link in links:
            walking.visit(link)
    plain = os.path.realpath(root).rstrip("/")
    files, repeated = _once(walking.files, plain)
    return Listing(sorted(files), sorted([*walking.repeated, *repeated]), sorted(walking.hidden))


class _Walk:
    """Names are relative to the root, with `/`: objects for paths would cost more than listing does."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: set[str] = set()
        self.files: dict[str, str] = {}
        """Names of files, each with its path without links."""
        self.links: list[str] = []
        """To folders, not followed yet."""
        self.repeated: list[str] = []
        self.hidden: list[str] = []

    def visit(self, folder: str) -> None:
        """A folder and those in it, but for what links lead to."""
        path = self._root / folder
        real = os.path.realpath(path).rstrip("/")
        if real in self._seen:
            self.repeated.append(folder)
            return
        self._seen.add(real)
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                self.hidden.append(f"{name}/" if entry.is_dir(follow_symlinks=False) else name)
            elif entry.is_dir(follow_symlinks=False):
                self.visit(name)
            elif entry.is_dir():
                self.links.append(name)
            else:
                self.files[name] = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"


def once(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return paths of different files, and those that lead to one of these again.

    Where several lead to one file, the one is kept that has no link in it, else the one that sorts first.
    """
    files, repeated = _once({str(path).lstrip("/"): os.path.realpath(path) for path in paths}, "")
    return sorted(Path("/", name) for name in files), [Path("/", name) for name in repeated]


def _once(files: dict[str, str], root: str) -> tuple[list[str], list[str]]:
    """Do as `once` says of names below `root`, each given with its path without links."""
    by_file: dict[str, list[str]] = {}
    for name, real in files.items():
        by_file.setdefault(real, []).append(name)
    kept, repeated = [], []
    for real, names in by_file.items():
        if len(names) > 1:
            names.sort(key=lambda name: (f"{root}/{name}" != real, name.split("/")))
        kept.append(names[0])
        repeated += names[1:]
    return kept, repeated


def expand(pattern: str) -> list[Path]:
    """Return the files that a glob means. `**` crosses folders; a leading dot must be in the pattern.

    Raises:
        OSError: a folder cannot be listed.
    """
    path = Path(pattern).absolute()
    fixed = next(i for i, part in enumerate(path.parts) if MAGIC.search(part))
    return [found for found in _expanded(Path(*path.parts[:fixed]), path.parts[fixed:]) if not found.is_dir()]


def _expanded(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        files = [
            file for file in walk(folder).files if not any(part.startswith("__") for part in Path(file).parts[:-1])
        ]
        if not rest:
            yield from (folder / name for name in files)
            return
        for name in dict.fromkeys(["", *(parent.as_posix() for file in files for parent in Path(file).parents)]):
            yield from _expanded(folder / name, rest)
    elif not MAGIC.search(part):
        if os.path.lexists(folder / part):
            yield from _expanded(folder / part, rest)
    elif folder.is_dir():
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            hidden = name.startswith(".") or (name.startswith("__") and bool(rest))
            if fnmatch.fnmatchcase(name, part) and (not hidden or part[0] == name[0]):
                yield from _expanded(folder / name, rest)

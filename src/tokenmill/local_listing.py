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
    """Every file below `root`, links followed.

    A folder or file to which several ways lead is listed once: by the way without links if there is one, else by the
    link whose path sorts first.

    Raises:
        OSError: a folder cannot be listed; `filename` says which.
    """
    walking = _Walk(root)
    walking.visit(root)
    while walking.links:
        links, walking.links = sorted(walking.links), []
        for link in links:
            walking.follow(link)
    files, repeated = once((root / name for name in walking.files), root)
    left_out = [*walking.repeated, *(path.relative_to(root).as_posix() for path in repeated)]
    return Listing(
        sorted(path.relative_to(root).as_posix() for path in files), sorted(left_out), sorted(walking.hidden)
    )


class _Walk:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: set[str] = set()
        self.files: list[str] = []
        self.links: list[str] = []
        """To folders, not followed yet."""
        self.repeated: list[str] = []
        self.hidden: list[str] = []

    def visit(self, folder: Path) -> None:
        """A folder and those in it, but for what links lead to."""
        real = os.path.realpath(folder)
        if real in self._seen:
            self.repeated.append(self._relative(folder))
            return
        self._seen.add(real)
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = self._relative(Path(entry.path))
            if entry.name.startswith("."):
                self.hidden.append(f"{name}/" if entry.is_dir(follow_symlinks=False) else name)
            elif entry.is_dir(follow_symlinks=False):
                self.visit(Path(entry.path))
            elif entry.is_dir():
                self.links.append(name)
            else:
                self.files.append(name)

    def follow(self, link: str) -> None:
        self.visit(self._root / link)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def once(paths: Iterable[Path], root: Path = Path("/")) -> tuple[list[Path], list[Path]]:
    """Paths of different files, and those that lead to one of these again.

    Where several lead to one file, the one is kept that has no link in it below `root`, else the one that sorts first.
    """
    plain = os.path.realpath(root).rstrip("/") + "/"
    folders: dict[Path, str] = {}
    by_file: dict[str, list[Path]] = {}
    for path in sorted(set(paths)):
        folder = folders.get(path.parent) or folders.setdefault(path.parent, os.path.realpath(path.parent))
        real = os.path.realpath(path) if path.is_symlink() else f"{folder}/{path.name}"
        by_file.setdefault(real, []).append(path)
    kept = [
        min(ways, key=lambda path: (f"{plain}{path.relative_to(root).as_posix()}" != real, path))
        for real, ways in by_file.items()
    ]
    chosen = set(kept)
    return sorted(kept), [path for ways in by_file.values() for path in ways if path not in chosen]


def expand(pattern: str) -> list[Path]:
    """The files that a glob means: `**` crosses folders; names that begin with a dot only where the pattern has it.

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

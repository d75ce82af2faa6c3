"""Files of this machine: directories (searched recursively, links followed), globs, files."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tokenmill.corpus.choice import choose, format_names, refuse_unknown
from tokenmill.corpus.local_listing import MAGIC, expand, once, walk
from tokenmill.corpus.location import HUB_NAME, MEND, SourceFile, file_gone_error
from tokenmill.errors import SourceChangedError, SourceError


class LocalFiles:
    """Files of this machine: directories (searched recursively, links followed), globs, files."""

    revision: str | None = None
    retries = 0
    opens_at_once = 1

    def __init__(self, patterns: list[str]) -> None:
        self.notes: list[str] = []
        self._mtimes: dict[str, int] = {}
        """In ns, as listed."""
        self.root, self._names = self._expand(patterns)
        self.name = _shown(str(self.root))

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        names = self._names if only is None else [name for name in only if (self.root / name).is_file()]
        root = str(self.root)
        found = []
        for name in sorted(names):
            try:
                status = os.stat(f"{root}/{name}")  # noqa: PTH116  # objects for paths would cost more than the call
            except OSError as error:
                raise SourceError(f"{self.root / name}: {error.strerror}", next_step=MEND) from None
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{self.root / name}: expected a file, found something else", next_step=MEND)
            found.append(SourceFile(name, status.st_size))
            self._mtimes[name] = status.st_mtime_ns
        return found

    def require_unchanged(self, file: SourceFile) -> None:
        path, expected = self.root / file.path, (file.nbytes, self._mtimes[file.path])
        try:
            status = path.stat()
        except OSError:
            raise file_gone_error(str(path)) from None
        if (status.st_size, status.st_mtime_ns) != expected:
            raise SourceChangedError(
                f"{path}: on {socket.gethostname()} it is not the file that was listed: expected {expected[0]} bytes "
                f"of time {expected[1]}, found {status.st_size} of {status.st_mtime_ns}",
                next_step="every machine must see the same files, and nothing may change them during the run",
            )

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> Path:
        return self.root / file.path

    def close(self) -> None:
        """Nothing is kept."""

    def _expand(self, patterns: list[str]) -> tuple[Path, list[str]]:
        """Return the folder names are relative to, and the names of the files, each once."""
        try:
            if len(patterns) == 1 and Path(patterns[0]).is_dir():
                root = Path(patterns[0]).absolute()
                return root, self._below(root)
            paths: list[Path] = []
            for pattern in patterns:
                if Path(pattern).is_dir():
                    folder = Path(pattern).absolute()
                    paths.extend(folder / name for name in self._below(folder))
                else:
                    named = _named(pattern)
                    refuse_unknown(map(str, named))
                    paths.extend(named)
        except OSError as error:
            raise SourceError(
                f"{error.filename}: cannot be listed: {error.strerror}",
                next_step="make the folder readable, or name the files that are meant with --dataset",
            ) from None
        paths, repeated = once(paths)
        self._note_repeated([str(path) for path in repeated])
        root = Path(os.path.commonpath([path.parent for path in paths]))
        return root, [_name(path.relative_to(root)) for path in paths]

    def _below(self, root: Path) -> list[str]:
        listing = walk(root)
        readme = root / "README.md"
        card = _card(readme) if "README.md" in listing.files else None
        chosen, notes = choose(_name(root), map(_checked_name, [*listing.files, *listing.hidden]), card)
        self.notes += notes
        self._note_repeated(listing.repeated)
        return chosen

    def _note_repeated(self, links: list[str]) -> None:
        if links:
            self.notes.append(f"left out are links to what is read already, {len(links):,}: {format_names(links)}")


def _named(pattern: str) -> list[Path]:
    """Return the file of that name, else those that a glob means."""
    if Path(pattern).is_file():
        return [Path(pattern).absolute()]
    found = expand(pattern) if MAGIC.search(pattern) else []
    if not found:
        hub = f"; for the data set of the hub, give hf://datasets/{pattern}" if HUB_NAME.fullmatch(pattern) else ""
        raise SourceError(
            f"{_shown(pattern)}: no such file or directory, and no file matches it",
            next_step=f"check the path given with --dataset{hub}",
        )
    return found


def _name(path: Path) -> str:
    return _checked_name(path.as_posix())


def _checked_name(name: str) -> str:
    """Return a file's name, which records can hold.

    Raises:
        SourceError: it is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(
            f"{_shown(name)}: the name is not UTF-8", next_step="rename the file or folder, or leave it out with a glob"
        ) from None
    return name


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _card(readme: Path) -> dict[str, Any]:
    """Return what a repository's `README.md` says of its files; empty if it has no YAML."""
    try:
        text = readme.read_text("utf-8", "replace")
    except OSError:
        return {}
    if not text.startswith("---"):
        return {}
    from tokenmill.remote.hub import card_of  # loads what few corpora need

    return card_of(text)

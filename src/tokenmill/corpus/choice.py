"""Choice: which of the files in a folder, a prefix or a repository are the corpus, and what is left out. Pure.

One rule for all places, so that a copy of a repository gives the bytes that the repository gives: hidden files never
count; of files named for splits, those of the split train do; files of all known formats are read, by path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tokenmill.corpus.train_split import is_hidden, train_files
from tokenmill.errors import SourceError

RULES = 2
"""Version of the rules in this module. Data roots begun under other rules read the files that their manifest names."""

FORMATS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
"""Suffixes by format. `.json` alone may be anything, and is JSON Lines only where it is named."""

_FORMAT_BY_SUFFIX = {suffix[1:]: kind for kind, suffixes in FORMATS.items() for suffix in suffixes}

_ABOUT = {"authors", "changelog", "copying", "licence", "license", "notice", "readme", "requirements", "version"}
"""Text files of these names tell about data; beside data of other formats they are none."""
_EXAMPLES = 3


class Choice(NamedTuple):
    """The files of a corpus."""

    paths: list[str]
    """Sorted."""
    notes: list[str]
    """What was left out, in words."""


def format_of(path: str) -> str | None:
    """Return the format a file's name says; None if none of ours."""
    rest, _, last = path.rpartition("/")[2].lower().rpartition(".")
    if last == "json":
        return "jsonl"
    return _FORMAT_BY_SUFFIX.get(last) or _FORMAT_BY_SUFFIX.get(f"{rest.rpartition('.')[2]}.{last}")


def choose(name: str, paths: Iterable[str], card: Mapping[str, Any] | None = None) -> Choice:
    """Return what is read of a folder, a prefix or a repository.

    Args:
        name: of it, for messages.
        paths: of all files in it, relative to it.
        card: the YAML of its `README.md`, which may say which files are which split.

    Raises:
        SourceError: no file of a known format; no split train among several; or plain text beside other formats.
    """
    every = sorted(paths)
    hidden = [path for path in every if is_hidden(path)]
    is_not_visible = set(hidden)
    visible = [path for path in every if path not in is_not_visible]
    known = [path for path in visible if not path.lower().endswith(".json") and format_of(path) is not None]
    named = visible if card and card.get("configs") else known  # a card may name files of any kind
    train = set(train_files(name, card or {}, named)) if named else set()
    chosen = [path for path in known if path in train]
    others = [path for path in known if path not in train]
    is_known = set(known)
    unknown = [path for path in visible if path not in is_known]
    kinds = {format_of(path) for path in chosen}
    if "text" in kinds and len(kinds) > 1:
        about = {path for path in chosen if _tells_about_data(path)}
        chosen, unknown = [path for path in chosen if path not in about], sorted([*unknown, *about])
        _refuse_text_beside_others(name, chosen)
    if not chosen:
        suffixes = " ".join(f"*{suffix}" for suffix in itertools.chain(*FORMATS.values()))
        found = f"; found {format_names(visible)}" if visible else ""
        raise SourceError(
            f"{name}: no file of a known format in it (looked for {suffixes}{found})",
            next_step="give the directory that holds them; .json files that are JSON Lines must be named: '*.json'",
        )
    notes = []
    if others:
        notes.append(
            f"{name}: the split train is read, {format_count(len(chosen))}; left out are {format_count(len(others))} "
            f"of other splits: {format_names(others)}"
        )
    if unknown:
        notes.append(f"{name}: left out are {format_count(len(unknown))} of no known format: {format_names(unknown)}")
    if data := [path for path in hidden if format_of(path) is not None or path.endswith("/")]:
        notes.append(f"{name}: left out are hidden files and folders, {len(data):,}: {format_names(data)}")
    return Choice(chosen, notes)


def _tells_about_data(path: str) -> bool:
    return format_of(path) == "text" and PurePosixPath(path).name.lower().partition(".")[0] in _ABOUT


def _refuse_text_beside_others(name: str, chosen: Sequence[str]) -> None:
    texts = [path for path in chosen if format_of(path) == "text"]
    if not texts or len(texts) == len(chosen):
        return
    data = [path for path in chosen if format_of(path) != "text"]
    raise SourceError(
        f"{name}: plain text files ({len(texts):,}: {format_names(texts)}) lie beside files of other formats "
        f"({len(data):,}: {format_names(data)}): whether they are documents cannot be told",
        next_step="name the files that are meant with globs, for example --dataset 'corpus/**/*.jsonl' (and "
        "--dataset 'corpus/**/*.txt' for both)",
    )


def refuse_unknown(paths: Iterable[str]) -> None:
    """Files that are named must be of a known format."""
    unknown = next((path for path in paths if format_of(path) is None), None)
    if unknown is not None:
        raise SourceError(
            f"{unknown}: expected one of {', '.join(itertools.chain(*FORMATS.values()))}, found "
            f"{PurePosixPath(unknown).suffix or 'no suffix'}",
            next_step="name files of these formats only, for example with the glob '*.parquet'",
        )


def format_names(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")


def format_count(number: int) -> str:
    """So many files."""
    return "1 file" if number == 1 else f"{number:,} files"

"""Source, stage 1: corpus → files → spans → Arrow text.

A corpus is a list of files in path order, each read by the reader of its format.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tokenmill.choice import format_of
from tokenmill.crash import note_opened
from tokenmill.errors import SourceError
from tokenmill.locations import Location, SourceFile, locate
from tokenmill.options import StoreOptions
from tokenmill.source_parquet import ParquetFile
from tokenmill.source_stream import ArrowFile, JsonLinesFile, TextFile
from tokenmill.spans import SpanReader


class Corpus(NamedTuple):
    """The files of a data set, in path order."""

    location: Location
    files: tuple[SourceFile, ...]
    text_column: str
    text_separator: str | None

    @property
    def notes(self) -> list[str]:
        """What was left out of it, in words."""
        return self.location.notes

    def open(self, index: int, *, span_rows: int | None = None) -> SpanReader:
        """Open a file of the corpus to plan and read its spans.

        Raises:
            SourceError: it is not what its name says.
        """
        file = self.files[index]
        name = self.name_of(file.path)
        note_opened(name, self.text_column)
        opener = functools.partial(self.location.open, file)
        kind = format_of(file.path)
        if kind == "parquet":
            return ParquetFile(name, opener, self.text_column, span_rows)
        if kind == "jsonl":
            return JsonLinesFile(name, opener, file.nbytes, self.text_column, span_rows)
        if kind == "arrow":
            return ArrowFile(name, opener, file.nbytes, self.text_column, span_rows)
        return TextFile(name, opener, file.nbytes, self.text_separator, span_rows)

    def name_of(self, path: str) -> str:
        """What messages call a file."""
        return f"{self.location.name}/{path}"


def find_corpus(
    dataset: str | Sequence[str],
    text_column: str = "text",
    text_separator: str | None = None,
    options: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
    *,
    only: Collection[str] | None = None,
) -> Corpus:
    """The files that `dataset` means (see `locations.locate`); or, of these, those of the paths in `only`.

    Raises:
        SourceError: nothing there, or nothing in it.
    """
    location = locate([dataset] if isinstance(dataset, str) else list(dataset), options)
    files = tuple(location.files(only))
    if not files:
        raise SourceError(f"{location.name}: no files in it", next_step="check --dataset")
    return Corpus(location, files, text_column, text_separator)

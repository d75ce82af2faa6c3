"""Source, stage 1: corpus → files → spans → Arrow text.

A corpus is a list of files in path order, each read by the reader of its format.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tokenmill.corpus.choice import format_of
from tokenmill.corpus.crash import note_opened
from tokenmill.corpus.location import Location, SourceFile, locate
from tokenmill.corpus.parquet import ParquetFile
from tokenmill.corpus.reader import SpanReader
from tokenmill.corpus.streamed import ArrowFile, JsonLinesFile, TextFile
from tokenmill.corpus.whole_file import WholeFile
from tokenmill.errors import SourceError
from tokenmill.options import StoreOptions
from tokenmill.recipe import MetadataColumn


class Corpus(NamedTuple):
    """The files of a data set, in path order."""

    location: Location
    files: tuple[SourceFile, ...]
    text_column: str
    text_separator: str | None
    max_document_nbytes: int = StoreOptions().max_document_nbytes
    metadata: tuple[MetadataColumn, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What was left out of it, in words."""
        return self.location.notes

    @property
    def retries(self) -> int:
        """Number of requests that failed and were tried again."""
        return self.location.retries

    def close(self) -> None:
        """Close connections; callers that wait for a request get an error."""
        self.location.close()

    def open(self, index: int, *, span_rows: int | None = None) -> SpanReader:
        """Open a file of the corpus to plan and read its spans.

        Raises:
            SourceError: it is not what its name says.
        """
        file = self.files[index]
        name = self.name_of(file.path)
        note_opened(name, self.text_column, *map(str, self.metadata))
        opener = functools.partial(self.location.open, file)
        kind, limit, metadata = format_of(file.path), self.max_document_nbytes, self.metadata
        if kind == "parquet":
            return ParquetFile(name, opener, self.text_column, span_rows, metadata=metadata, limit=limit)
        if kind in ("jsonl", "arrow"):
            reader = JsonLinesFile if kind == "jsonl" else ArrowFile
            return reader(name, opener, file.nbytes, self.text_column, span_rows, metadata=metadata, limit=limit)
        if metadata:
            raise SourceError(
                f"{name}: plain text has no metadata columns ({', '.join(column.name for column in metadata)})",
                next_step="leave metadata_columns (--metadata-column) out of the recipe",
            )
        if self.text_separator is None:
            return WholeFile(name, opener, file.nbytes, limit=limit)
        return TextFile(name, opener, file.nbytes, self.text_separator, span_rows, limit=limit)

    def name_of(self, path: str) -> str:
        """Return what messages call a file."""
        return f"{self.location.name}/{path}"


def find_corpus(
    dataset: str | Sequence[str],
    text_column: str = "text",
    text_separator: str | None = None,
    options: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
    *,
    only: Collection[str] | None = None,
    metadata: tuple[MetadataColumn, ...] = (),
) -> Corpus:
    """Find the files that `dataset` means (see `location.locate`), or those among them whose paths are in `only`.

    Raises:
        SourceError: nothing there, or nothing in it.
    """
    location = locate([dataset] if isinstance(dataset, str) else list(dataset), options)
    files = tuple(location.files(only))
    if not files:
        raise SourceError(f"{location.name}: no files in it", next_step="check --dataset")
    return Corpus(location, files, text_column, text_separator, options.max_document_nbytes, metadata)

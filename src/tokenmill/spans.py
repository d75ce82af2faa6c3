"""Spans: what the readers of all formats have in common.

A span is a contiguous run of rows of one file, the unit of reading and encoding. Readers of columnar
files know all spans at once; readers of line by line formats find them as they go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa

from tokenmill.errors import SourceError
from tokenmill.ranges import RemoteFile

TEXT_NBYTES = 4 << 20
"""Text per span: enough that gigatoken's per-call caches pay, little enough to stay in memory."""

MAX_ROWS = 8192
"""Per span, however short they are."""


class Span(NamedTuple):
    """A contiguous run of rows of one file, inside one unit of reading."""

    first_row: int
    rows: int
    unit: int
    """Which run of row groups, or which stretch of the file, holds it."""


class Texts(NamedTuple):
    """The rows of a span."""

    array: pa.Array
    """Strings or binary, nulls allowed, shape `(rows,)`."""
    bad: Mapping[int, str] = {}
    """Rows (of the span) that are not what the format says, null in `array`, and why."""


class Figures(NamedTuple):
    """How much a file holds."""

    rows: int
    text_nbytes: int
    exact: bool
    """Whether the rows were counted; else both are estimates."""


class Opener(Protocol):
    """Opens a file for Arrow: its path, or a remote file that fetches the planned stretches ahead."""

    def __call__(self, planned: Iterable[tuple[int, int]] = ()) -> Path | RemoteFile: ...


class SpanReader(Protocol):
    """A file of the corpus, to plan and read its spans. Threads may read different spans at once."""

    name: str
    """What messages call it."""

    @property
    def rows(self) -> int | None:
        """None until they were counted."""
        ...

    def figures(self) -> Figures:
        """Rows and text, for estimates; the reader may be of no other use then than for `sample`."""
        ...

    def sample(self) -> pa.Array:
        """A few rows, shape `(rows,)`; after `figures`, of a file that has rows."""
        ...

    def spans(self) -> Iterator[Span]:
        """All rows of the file, cut into spans, in row order.

        Raises:
            SourceError: the file is damaged.
        """
        ...

    def prefetch(self, span: Span) -> None:
        """Say that `span` will be read soon."""
        ...

    def read(self, span: Span) -> Texts:
        """The text of a span; each is read once.

        Raises:
            SourceError: the file is damaged there.
        """
        ...

    def keep_only(self, spans: Collection[Span]) -> None:
        """Say which spans will be read, so that none is kept for nobody."""
        ...

    def drop(self, span: Span) -> None:
        """Say that a span that was found will not be read."""
        ...


def check_text_column(name: str, schema: pa.Schema, column: str) -> None:
    """`column` must be there, once, and hold strings.

    Raises:
        SourceError: otherwise.
    """
    if column not in schema.names:
        raise SourceError(
            f"{name}: no column {column!r}: found the columns {', '.join(schema.names)}",
            next_step="name the text column with --text-column",
        )
    if schema.names.count(column) > 1:
        raise SourceError(
            f"{name}: two columns are called {column!r}",
            next_step="mend, replace or exclude the file, then run the same command again",
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text_kinds = (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.null(),  # what some writers make of a column without any value
    )
    if kind not in text_kinds:
        raise SourceError(
            f"{name}: column {column!r}: expected strings, found {kind}",
            next_step="name the text column with --text-column",
        )


def gone(name: str) -> SourceError:
    """A file that was there and no longer is."""
    return SourceError(f"{name}: the file is gone", next_step="restore it, then run the same command again")


def first_line(error: Exception) -> str:
    """Of an error's message: Arrow appends its call stack."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def native(opened: Path | RemoteFile) -> str | pa.NativeFile:
    """As Arrow opens it."""
    return pa.PythonFile(opened, "r") if isinstance(opened, RemoteFile) else str(opened)


def joined(pieces: list[pa.Array]) -> pa.Array:
    """Texts one after the other; with 64-bit offsets if there are several: together they may pass 2 GB."""
    return pieces[0] if len(pieces) == 1 else pa.concat_arrays([_large(piece) for piece in pieces])


def _large(texts: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return texts.cast(large.get(texts.type, texts.type))

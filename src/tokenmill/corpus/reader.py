"""Spans: what the readers of all formats have in common.

A span is a contiguous run of rows of one file, the unit of reading and encoding. Readers of columnar
files know all spans at once; readers of line by line formats find them as they go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from tokenmill.errors import SourceError
from tokenmill.remote.remote_file import RemoteFile

TEXT_NBYTES = 4 << 20
"""Text per span. Several spans are encoded together, see `pipeline.driver.BATCH_NBYTES`."""

MAX_ROWS = 8192
"""Rows per span, however short they are."""


class Span(NamedTuple):
    """A contiguous run of rows of one file, inside one unit of reading."""

    first_row: int
    rows: int
    unit: int
    """Which run of row groups, or which stretch of the file, holds it."""
    text_nbytes: int = 0
    """About the size of its text, and of its metadata."""


class Texts(NamedTuple):
    """The rows of a span."""

    array: pa.Array
    """Strings or binary, nulls allowed, shape `(rows,)`."""
    bad: Mapping[int, str] = {}
    """Rows (of the span) that are not what the format says, or whose metadata cannot be stored, and why."""
    metadata: pa.Table | None = None
    """A row for each; None where the recipe names no metadata columns."""


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
        """Return rows and text, for estimates; the reader may be of no other use then than for `sample`."""
        ...

    def sample(self) -> Texts:
        """Return a few rows; after `figures`, of a file that has rows."""
        ...

    def spans(self) -> Iterator[Span]:
        """Return all rows of the file, cut into spans, in row order.

        Raises:
            SourceError: the file is damaged.
        """
        ...

    def start(self) -> None:
        """Fetch the beginning of the file, where it is far away and its rows are found as it is read."""
        ...

    def prefetch(self, span: Span) -> None:
        """Say that `span` will be read soon."""
        ...

    def read(self, span: Span) -> Texts:
        """Return the text of a span; each is read once.

        Raises:
            SourceError: the file is damaged there.
        """
        ...

    def keep_only(self, spans: Collection[Span]) -> None:
        """Declare the spans that will be read; others are not cached."""
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


def too_large(name: str, row: int, found: str, limit: int, what: str = "a document") -> SourceError:
    """Return a document that is larger than `max_document_nbytes`."""
    return SourceError(
        f"{name}: row {row}: expected {what} of at most {limit} bytes, found {found}",
        next_step="mend or exclude the file, or raise the limit with --max-document-size",
    )


def refuse_large(name: str, texts: Texts, first_row: int, limit: int) -> None:
    """No document of `texts`, and no value of its metadata, may be larger than `limit` bytes.

    Raises:
        SourceError: one is.
    """
    _refuse_large(name, texts.array, first_row, limit, "a document")
    if texts.metadata is not None:
        for column_name, column in zip(texts.metadata.column_names, texts.metadata.columns, strict=True):
            row = first_row
            for chunk in column.chunks if pa.types.is_large_string(column.type) else ():
                _refuse_large(name, chunk, row, limit, f"a value of {column_name!r}")
                row += len(chunk)


def _refuse_large(name: str, texts: pa.Array, first_row: int, limit: int, what: str) -> None:
    if texts.nbytes <= limit and not pa.types.is_dictionary(texts.type) and not pa.types.is_null(texts.type):
        return
    held = texts.dictionary if pa.types.is_dictionary(texts.type) else texts
    if pa.types.is_null(held.type) or held.nbytes <= limit:
        return
    if held.type in (pa.string_view(), pa.binary_view()):
        held = held.view(pa.binary_view()).cast(pa.large_binary())
    sizes = pc.binary_length(held)
    largest = pc.max(sizes).as_py() or 0
    if largest > limit:
        at = pc.index(sizes, largest).as_py()
        if pa.types.is_dictionary(texts.type):
            at = pc.index(texts.indices, at).as_py()
        raise too_large(name, first_row + max(0, at), f"{largest} bytes", limit, what)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: Arrow appends its call stack."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def native(opened: Path | RemoteFile) -> str | pa.NativeFile:
    """As Arrow opens it."""
    return pa.PythonFile(opened, "r") if isinstance(opened, RemoteFile) else str(opened)


def concatenate(pieces: list[pa.Array]) -> pa.Array:
    """Return texts one after the other; with 64-bit offsets if there are several: together they may pass 2 GB."""
    return pieces[0] if len(pieces) == 1 else pa.concat_arrays([_large(piece) for piece in pieces])


_LARGE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
_LARGE |= {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


def _large(texts: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    large = _LARGE.get(texts.type)
    return texts if large is None else texts.cast(large)

"""Source, parquet: a file's text column and metadata columns, span by span.

A file is cut into spans along its row groups; large row groups are streamed, so memory follows the
span and not the row group. Of a remote file only the column chunks of these columns are read, ahead of
their use.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.corpus.crash import note_opened
from tokenmill.corpus.location import MEND, file_gone_error
from tokenmill.corpus.metadata import ArrowMetadata
from tokenmill.corpus.page_sizes import BoundedPages, check_pages
from tokenmill.corpus.reader import (
    MAX_ROWS,
    TEXT_NBYTES,
    Figures,
    Opener,
    Span,
    Texts,
    check_text_column,
    concatenate,
    first_line,
    native,
    refuse_large,
)
from tokenmill.errors import SourceError
from tokenmill.recipe import MetadataColumn
from tokenmill.remote.remote_file import RemoteFile

_PAGE_NBYTES = 1 << 30
"""A page of that size is read, whatever the limit of a document is."""

_SMALL_NBYTES = 1 << 20
"""Files up to that size are read whole."""

_INDEX_NBYTES = 5
"""At most that many bytes of a data page tell which entry of the dictionary a row is; a length alone takes four."""

_READ_NBYTES = 1 << 20
"""Read at once from a column chunk, which may be as large as the file."""


_UNREADABLE = (pa.ArrowException, OSError, ValueError, NotImplementedError, OverflowError, MemoryError, KeyError)
"""What the library raises for damaged files; errors of Unicode and of Arrow are ValueErrors."""


class ParquetFile:
    """One parquet file: its rows, its spans, and their text (a `reader.SpanReader`).

    Args:
        name: of the file, for messages.
        opener: opens it.
        text_column: the column that holds the documents.
        span_rows: rows per span; None chooses about `TEXT_NBYTES` of text.
        metadata: other columns that are read.
        limit: of a document, in bytes.

    Raises:
        SourceError: not readable, not parquet, or no such column of text.
    """

    def __init__(
        self,
        name: str,
        opener: Opener,
        text_column: str,
        span_rows: int | None = None,
        *,
        metadata: Sequence[MetadataColumn] = (),
        limit: int,
    ) -> None:
        self.name = name
        self._limit = limit
        self.column = text_column
        self._opener = opener
        self._span_rows = span_rows
        self._small: tuple[bytes, pq.ParquetFile] | None = None
        """The content of a small file, and what reads it: its footer is read once."""
        try:
            opened = opener()
            if isinstance(opened, Path) and opened.stat().st_size <= _SMALL_NBYTES:
                data = opened.read_bytes()
                self._small = data, pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
                file = self._small[1]
                self._metadata, self._schema = file.metadata, file.schema_arrow
            else:
                with pq.ParquetFile(native(opened)) as file:
                    self._metadata, self._schema = file.metadata, file.schema_arrow
        except FileNotFoundError:
            raise file_gone_error(name) from None
        except _UNREADABLE as error:
            raise SourceError(f"{name}: not a readable parquet file: {first_line(error)}", next_step=MEND) from None
        check_text_column(name, self._schema, text_column)
        self.wants_metadata = bool(metadata)
        self.metadata = ArrowMetadata(name, self._schema, metadata)
        self._specs = [str(column) for column in metadata]
        self.rows = int(self._metadata.num_rows)
        try:
            self._units = list(self._plan_units())
        except _UNREADABLE as error:
            raise SourceError(f"{name}: its footer cannot be read: {first_line(error)}", next_step=MEND) from None
        if len(self._units) > 1:  # several threads would share what reads it
            self._small = None
        self.wanted: frozenset[Span] | None = None
        """The spans that will be read; None: all but those dropped."""
        self.dropped: set[Span] = set()
        self._readers: dict[int, _UnitReader] = {}
        self._coming: dict[int, RemoteFile] = {}
        self._lock = threading.Lock()

    def figures(self) -> Figures:
        """Exact rows; the size of the text is what the column holds less a length per row."""
        column = sum(
            self._chunk(group, self.column).total_uncompressed_size for group in range(self._metadata.num_row_groups)
        )
        return Figures(self.rows, max(0, column - 4 * self.rows), exact=True)

    def sample(self) -> Texts:
        """Return the first span."""
        return self.read(self._unit_spans(0)[0])

    def _chunk(self, group: int, path: str) -> pq.ColumnChunkMetaData:
        metadata = self._metadata.row_group(group)
        index = max(0, self._schema.get_field_index(path))
        # Nested neighbours shift leaf columns, so look a column up by its path.
        for leaf in range(index, metadata.num_columns):
            column = metadata.column(leaf)
            if column.path_in_schema == path:
                return column
        raise ValueError(f"row group {group} has no column {path!r}")

    @property
    def paths(self) -> list[str]:
        """The columns that are read."""
        return [self.column, *self.metadata.paths]

    def _plan_units(self) -> Iterator[_Unit]:
        """Neighbouring row groups, joined until they hold a span."""
        first_row, rows, nbytes = 0, 0, 0
        groups: list[int] = []
        for group in range(self._metadata.num_row_groups):
            groups.append(group)
            rows += self._metadata.row_group(group).num_rows
            nbytes += sum(self._chunk(group, path).total_uncompressed_size for path in self.paths)
            enough = rows >= self._span_rows if self._span_rows else nbytes >= TEXT_NBYTES
            enough = enough or self.metadata.is_nested  # Arrow cannot join nested dictionaries of several row groups
            if enough or group == self._metadata.num_row_groups - 1:
                if rows:
                    spans = max(1, round(nbytes / TEXT_NBYTES), -(-rows // MAX_ROWS))
                    if any(map(self._is_only_dictionary, groups)):
                        nbytes = spans * TEXT_NBYTES  # how often each text occurs is not known
                    yield _Unit(first_row, rows, tuple(groups), self._span_rows or -(-rows // spans), nbytes)
                first_row, rows, nbytes, groups = first_row + rows, 0, 0, []

    def _is_only_dictionary(self, group: int) -> bool:
        """Whether a row group holds each text once: its data pages are too small for more than an index per row."""
        chunk = self._chunk(group, self.column)
        if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
            return False
        data = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
        share = data / max(1, chunk.total_compressed_size)
        return bool(share * chunk.total_uncompressed_size <= _INDEX_NBYTES * self._metadata.row_group(group).num_rows)

    def spans(self) -> Iterator[Span]:
        """Yield all rows of the file, cut into spans, in row order."""
        for index in range(len(self._units)):
            yield from self._unit_spans(index)

    def _unit_spans(self, index: int) -> list[Span]:
        unit = self._units[index]
        return [
            Span(
                unit.first_row + offset,
                rows := min(unit.span_rows, unit.rows - offset),
                index,
                unit.text_nbytes * rows // unit.rows,
            )
            for offset in range(0, unit.rows, unit.span_rows)
        ]

    def start(self) -> None:
        """Do nothing: the footer was read."""

    def prefetch(self, span: Span) -> None:
        """Begin to fetch the column chunks that hold `span`, if the file is remote."""
        if self._small is not None:
            return
        with self._lock:
            if span.unit not in self._coming and span.unit not in self._readers:
                opened = self._opener(list(self._stretches(self._units[span.unit])))
                if isinstance(opened, RemoteFile):
                    self._coming[span.unit] = opened

    def _stretches(self, unit: _Unit) -> Iterator[tuple[int, int]]:
        """Yield where the file holds the columns of a unit, as `(begin, end)`."""
        for group, path in itertools.product(unit.groups, self.paths):
            chunk = self._chunk(group, path)
            begin = chunk.data_page_offset
            if chunk.dictionary_page_offset is not None:
                begin = min(begin, chunk.dictionary_page_offset)
            yield begin, begin + chunk.total_compressed_size

    def read(self, span: Span) -> Texts:
        """Return the text column and the metadata of a span, nulls kept.

        Each span is read once. Spans of one unit are decoded in sequence: the first caller decodes
        up to its own and keeps what came before for its callers (see `keep_only`).

        Raises:
            SourceError: the row group is damaged.
        """
        unit = self._units[span.unit]
        note_opened(self.name, self.column, *self._specs)
        with self._lock:
            reader = self._readers.get(span.unit)
            if reader is None:
                spans = self._unit_spans(span.unit)
                reader = _UnitReader(self, self._batches(unit, self._coming.pop(span.unit, None)), unit.groups, spans)
                self._readers[span.unit] = reader
        texts = reader.take(span)
        refuse_large(self.name, texts, span.first_row, self._limit)
        if reader.exhausted:
            with self._lock:
                self._readers.pop(span.unit, None)
        return texts

    def keep_only(self, spans: Collection[Span]) -> None:
        """Declare the spans that will be read; others are not cached."""
        self.wanted = frozenset(spans)

    def drop(self, span: Span) -> None:
        """Say that a span will not be read."""
        self.dropped.add(span)

    def _batches(self, unit: _Unit, coming: RemoteFile | None) -> Iterator[pa.RecordBatch]:
        # A reader of its own: Arrow does not promise that threads may share one. Our own reading ahead
        # makes pre_buffer needless; Arrow's threads would fight the encoders for the cores.
        stretches = list(self._stretches(unit))
        if self._small is not None:
            (data, file), self._small = self._small, None
            for begin, end in stretches:
                check_pages(data, begin, end, self._page_nbytes)
            yield from self._iter_batches(file, unit)
            return
        with (
            self._bounded(coming or self._opener(stretches), stretches) as source,
            pq.ParquetFile(
                source,
                metadata=self._metadata,
                buffer_size=_READ_NBYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as file,
        ):
            yield from self._iter_batches(file, unit)

    def _iter_batches(self, file: pq.ParquetFile, unit: _Unit) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] = file.iter_batches(
            unit.span_rows, row_groups=list(unit.groups), columns=self.paths, use_threads=False
        )
        return batches

    @property
    def _page_nbytes(self) -> int:
        """Largest page that is read. Pages of small documents may be large."""
        return max(self._limit, _PAGE_NBYTES)

    def _bounded(self, opened: Path | RemoteFile, stretches: list[tuple[int, int]]) -> pa.NativeFile:
        """Open the file; its pages are held to the limit as they are read."""
        file = opened if isinstance(opened, RemoteFile) else opened.open("rb", buffering=0)
        nbytes = opened.size() if isinstance(opened, RemoteFile) else opened.stat().st_size
        return pa.PythonFile(BoundedPages(file, nbytes, stretches, self._page_nbytes), "r")

    def damaged_groups(self, groups: tuple[int, ...]) -> str:
        """Return which of these row groups cannot be read, as words."""
        for group in groups:
            try:
                stretches = list(self._stretches(_Unit(0, 0, (group,), 0, 0)))
                with (
                    self._bounded(self._opener(), stretches) as source,
                    pq.ParquetFile(source, metadata=self._metadata, page_checksum_verification=True) as file,
                ):
                    file.read_row_group(group, columns=self.paths, use_threads=False)
            except _UNREADABLE:
                return f"row group {group}"
        return f"row groups {groups[0]} to {groups[-1]}"


class _Unit(NamedTuple):
    """A run of row groups that is decoded front to back."""

    first_row: int
    rows: int
    groups: tuple[int, ...]
    span_rows: int
    text_nbytes: int


class _UnitReader:
    """Hands out the spans of a unit in any order near their own while decoding it once."""

    def __init__(
        self, file: ParquetFile, batches: Iterator[pa.RecordBatch], groups: tuple[int, ...], spans: list[Span]
    ) -> None:
        self._file = file
        self._batches = batches
        self._groups = groups
        self._to_decode = deque(spans)
        self._ready: dict[Span, Texts] = {}
        self._error: SourceError | None = None
        self._lock = threading.Lock()

    @property
    def exhausted(self) -> bool:
        return not self._to_decode and not self._ready

    def take(self, span: Span) -> Texts:
        with self._lock:
            if self._error is not None:
                raise self._error
            while span not in self._ready:
                decoded = self._to_decode.popleft()
                try:
                    text = self._decode(decoded.rows)
                except SourceError as error:
                    self._error = error  # for those who wait for later spans
                    raise
                wanted = self._file.wanted is None or decoded in self._file.wanted
                if wanted and decoded not in self._file.dropped:
                    self._ready[decoded] = text
            return self._ready.pop(span)

    def _decode(self, rows: int) -> Texts:
        """Return the next `rows` rows; Arrow may return them in several batches."""
        pieces: list[pa.Array] = []
        tables: list[pa.Table] = []
        bad: dict[int, str] = {}
        missing = rows
        while missing > 0:
            try:
                batch = next(self._batches)
                if self._file.wants_metadata:
                    table, reasons = self._file.metadata.read(batch)
                    tables.append(table)
                    bad.update({rows - missing + row: reason for row, reason in reasons.items()})
            except StopIteration:
                raise self._damaged(f"expected {rows} more rows, found {rows - missing}") from None
            except FileNotFoundError:
                raise file_gone_error(self._file.name) from None
            except _UNREADABLE as error:
                raise self._damaged(first_line(error)) from None
            pieces.append(batch.column(batch.schema.get_field_index(self._file.column)))
            missing -= len(batch)
        return Texts(concatenate(pieces), bad, pa.concat_tables(tables) if tables else None)

    def _damaged(self, what: str) -> SourceError:
        where = self._file.damaged_groups(self._groups)
        return SourceError(f"{self._file.name}: {where}: cannot be read: {what}", next_step=MEND)

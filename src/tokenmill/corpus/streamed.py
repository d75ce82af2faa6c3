"""Source, streamed: JSON Lines, plain text, Arrow and Feather, whose rows are counted as they are read.

One thread at a time goes through a file front to back (decompressing it, finding row ends) and cuts it
into spans; the caller of `read` parses a span.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import pyarrow as pa

from tokenmill.corpus.metadata import ArrowMetadata, from_object, require_sound, tabulate
from tokenmill.corpus.opening import (
    BYTE_ORDER_MARK,
    READ_NBYTES,
    compression_of,
    open_content,
    translate_source_errors,
)
from tokenmill.corpus.reader import (
    MAX_ROWS,
    TEXT_NBYTES,
    Figures,
    Opener,
    Span,
    Texts,
    check_text_column,
    first_line,
    native,
    refuse_large,
    too_large,
)
from tokenmill.errors import SourceError
from tokenmill.recipe import MetadataColumn

_LONG_ROW_NBYTES = 4 << 20
_MOST_DIGITS = 400
"""Digits of the longest integer that is read as one; the largest floating-point number of 64 bits has 309."""

C = TypeVar("C")


class StreamedFile(ABC, Generic[C]):
    """What the formats share (a `reader.SpanReader`): `C` is what a span is until it is parsed."""

    def __init__(self, name: str, opener: Opener, nbytes: int, span_rows: int | None, *, limit: int) -> None:
        self.name = name
        self._limit = limit
        self.rows: int | None = None
        self._opener = opener
        self._nbytes = nbytes
        self._span_rows = min(span_rows or MAX_ROWS, MAX_ROWS)
        self._pieces = self._read_through()
        self._found: dict[Span, C] = {}
        self._wanted: frozenset[Span] | None = None
        self._started: Span | None = None
        """A span that was found, and not yielded yet."""
        self._next_row = 0
        self._next_unit = 0
        self._sample: Texts | None = None
        self._error: SourceError | None = None
        self._advancing = threading.Lock()
        self._lock = threading.Lock()

    def spans(self) -> Iterator[Span]:
        """Yield all rows that were not passed yet, cut into spans as they are found."""
        while (span := self._started or self._advance()) is not None:
            self._started = None
            yield span

    def start(self) -> None:
        """Find the first rows; what is wrong with them is raised by `spans`."""
        with contextlib.suppress(SourceError):
            self._started = self._advance()

    def prefetch(self, span: Span) -> None:
        """Nothing: a span that was found was read."""

    def read(self, span: Span) -> Texts:
        """Return the texts of a span, reading the file up to it if needed."""
        piece = self._take(span)
        if piece is None:
            with self._advancing:  # the thread that held the lock may have read the span
                while (piece := self._take(span)) is None:
                    if self._next_row > span.first_row or self._find_next() is None:
                        raise SourceError(
                            f"{self.name}: the source changed: rows {span.first_row} and after are no longer where "
                            "they were",
                            next_step="restore the file, or start in another directory",
                        )
        return self._parse(piece, span)

    def _take(self, span: Span) -> C | None:
        with self._lock:
            return self._found.pop(span, None)

    def keep_only(self, spans: Collection[Span]) -> None:
        """Declare the spans that will be read; others are not cached."""
        self._wanted = frozenset(spans)
        with self._lock:
            self._found = {span: piece for span, piece in self._found.items() if span in self._wanted}

    def drop(self, span: Span) -> None:
        """Say that a span that was found will not be read."""
        with self._lock:
            self._found.pop(span, None)

    def figures(self) -> Figures:
        """From what is read at first, by its share of the file; the reader is of no other use then."""
        first = span = self._advance()
        if first is None:
            return Figures(0, 0, exact=True)
        self._sample = self.read(first)
        read, rows = self._passed(), 0
        while span is not None and self._passed() == read:
            rows += span.rows
            self.drop(span)
            span = self._advance()
        scale = 1.0 if span is None else self._nbytes / max(1, read)
        text_nbytes = self._sample.array.nbytes / first.rows * rows
        return Figures(round(rows * scale), round(text_nbytes * scale), exact=span is None)

    def sample(self) -> Texts:
        """Return the first rows, after `figures`."""
        assert self._sample is not None
        return self._sample

    def _advance(self) -> Span | None:
        """Find the next span; None at the end of the file."""
        with self._advancing:
            return self._find_next()

    def _find_next(self) -> Span | None:
        if self._error is not None:
            raise self._error
        try:
            with translate_source_errors(self.name, self._where):
                rows, nbytes, piece = next(self._pieces)
        except StopIteration:
            self.rows = self._next_row
            self._at_end()
            return None
        except SourceError as error:
            self._error = error  # for those who ask after this
            raise
        span = Span(self._next_row, rows, self._next_unit, nbytes)
        if self._wanted is None or span in self._wanted:
            with self._lock:
                self._found[span] = piece
        self._next_row += rows
        self._next_unit += 1
        return span

    def _where(self) -> str:
        return f"after row {self._next_row}" if self._next_row else "at its beginning"

    def _at_end(self) -> None:
        """Called when all rows were found; may raise what is wrong with the file as a whole."""

    @abstractmethod
    def _read_through(self) -> Any:
        """Return a generator of numbers of rows, the size of their text, and what they are in, in row order."""

    @abstractmethod
    def _parse(self, piece: C, span: Span) -> Texts: ...

    @abstractmethod
    def _passed(self) -> int:
        """Return bytes of the file that were read so far."""


class _Delimited(StreamedFile[list[bytes]]):
    """Rows that end with a delimiter; what follows the last one is a row unless it is empty."""

    delimiter: bytes

    def _read_through(self) -> Iterator[tuple[int, int, list[bytes]]]:
        whole = [(0, self._nbytes)]
        with open_content(self._opener(whole), self.name, self._nbytes) as (self._raw, stream):
            kept = bytearray()
            first = True
            size = READ_NBYTES
            if compression_of(self.name) is None:
                size = min(size, max(self._nbytes, 1 << 12))
            while data := stream.read(size):
                if first:
                    data = data.removeprefix(BYTE_ORDER_MARK)
                    first = False
                fresh = max(0, len(kept) - len(self.delimiter))
                kept += data
                if len(kept) >= TEXT_NBYTES and kept.find(self.delimiter, fresh) >= 0:
                    data = bytes(kept)
                    kept.clear()  # a row may be large: no more copies of it than needed
                    rows = data.split(self.delimiter)
                    del data
                    kept += rows.pop()
                    yield from self._cut(rows)
                    del rows
                if len(kept) > max(self._limit, TEXT_NBYTES):  # one row
                    raise too_large(self.name, self._next_row, "more", self._limit)
            data = bytes(kept)
            kept.clear()
            rows = data.split(self.delimiter)
            del data
            if not rows[-1]:
                rows.pop()
            yield from self._cut(rows)

    def figures(self) -> Figures:
        """Do as all files do, but read no long row for an estimate."""
        opened = self._opener()
        if isinstance(opened, Path) and self._nbytes > _LONG_ROW_NBYTES and compression_of(self.name) is None:
            with translate_source_errors(self.name, self._where), opened.open("rb") as file:
                head = file.read(_LONG_ROW_NBYTES)
            if self.delimiter not in head:
                self._sample = Texts(pa.array([head], pa.large_binary()))
                return Figures(1, self._nbytes, exact=False)
        return super().figures()

    def _cut(self, rows: list[bytes]) -> Iterator[tuple[int, int, list[bytes]]]:
        for at in range(0, len(rows), self._span_rows):
            piece = rows[at : at + self._span_rows]
            sizes = list(map(len, piece))
            largest = max(sizes)
            if largest > self._limit:
                row = sizes.index(largest)
                raise too_large(self.name, self._next_row + row, f"{largest} bytes", self._limit)
            yield len(piece), sum(sizes), piece

    def _passed(self) -> int:
        return int(self._raw.tell())


class JsonLinesFile(_Delimited):
    """One JSON object a line, the text in one of its fields; a line is a row, an empty one has no text.

    A field that is missing or null is a row without text. What is no JSON object, or has no string in
    that field, is bad. A file that has the field in no line at all is refused.
    """

    delimiter = b"\n"

    def __init__(
        self,
        name: str,
        opener: Opener,
        nbytes: int,
        text_column: str,
        span_rows: int | None = None,
        *,
        metadata: Sequence[MetadataColumn] = (),
        limit: int,
    ) -> None:
        self._decode = _line_decoder(text_column)
        self._field = text_column
        self._metadata = metadata
        self._parsed_rows = self._rows_with_field = 0
        self._other_fields: list[str] = []
        """Number of the first line that lacks the field."""
        super().__init__(name, opener, nbytes, span_rows, limit=limit)

    def _parse(self, piece: list[bytes], span: Span) -> Texts:
        texts: list[str | None] = []
        metadata: list[list[object]] = []
        nothing: list[object] = [None] * len(self._metadata)
        bad: dict[int, str] = {}
        lacking = blank = 0
        for row, line in enumerate(piece):
            text: str | msgspec.UnsetType | None = ""
            kept = nothing
            try:
                if line and not line.isspace():
                    if self._metadata:
                        text, kept = self._text_and_metadata_of(line)
                    else:
                        text = self._text_of(line)
                else:
                    blank += 1
            except (ValueError, msgspec.DecodeError, RecursionError) as error:
                text = None
                bad[row] = f"line {span.first_row + row + 1}: {first_line(error)}"
            if text is msgspec.UNSET:
                lacking += 1
                self._other_fields = self._other_fields or _fields_of(line)
                text = None
            texts.append(text)
            metadata.append(kept)
        with self._lock:
            self._parsed_rows += len(piece)
            self._rows_with_field += len(piece) - lacking - blank
        if self.rows is not None:
            self._at_end()
        table = self._tabulate(metadata) if self._metadata else None
        return Texts(pa.array(texts, pa.large_string()), bad, table)

    def _tabulate(self, rows: list[list[object]]) -> pa.Table:
        columns = zip(self._metadata, zip(*rows, strict=True), strict=True)
        return tabulate(
            self._metadata,
            [pa.array(values, pa.type_for_alias(column.arrow_type)) for column, values in columns],
        )

    def _text_and_metadata_of(self, line: bytes) -> tuple[str | msgspec.UnsetType | None, list[object]]:
        """Return the values of the fields; raises as `_text_of`."""
        try:
            found = _decode_any(line)
        except (msgspec.DecodeError, UnicodeError):
            found = _leniently(line)
            if not isinstance(found, dict):
                raise
        if not isinstance(found, dict) or not isinstance(found.get(self._field), str | None):
            return self._text_of(line), []  # says what is wrong
        text = found.get(self._field, msgspec.UNSET)
        if isinstance(text, str):
            _refuse_surrogates(text)
        return text, from_object(found, self._metadata)

    def _text_of(self, line: bytes) -> str | msgspec.UnsetType | None:
        """Return the value of the field; UNSET if it is missing.

        Raises:
            ValueError: not a JSON object, or no string in that field.
        """
        try:
            text: str | msgspec.UnsetType | None = self._decode(line).text
        except (msgspec.DecodeError, UnicodeError):
            # What is wrong may be in another field: NaN, half of a surrogate pair, bytes that are not UTF-8.
            value = _leniently(line)
            if not isinstance(value, dict) or not isinstance(value.get(self._field), str | None):
                raise
            text = value.get(self._field, msgspec.UNSET)
            if isinstance(text, str):
                _refuse_surrogates(text)
        return text

    def _at_end(self) -> None:
        with self._lock:
            all_parsed = self._parsed_rows == self.rows
            is_lacking = all_parsed and self._other_fields and not self._rows_with_field
        if is_lacking:
            raise SourceError(
                f"{self.name}: no line has the field {self._field!r}: found the fields {', '.join(self._other_fields)}",
                next_step="name the field that holds the text with --text-column, or leave the file out",
            )


_decode_any = msgspec.json.Decoder().decode


@functools.cache
def _line_decoder(text_column: str) -> Callable[[bytes], Any]:
    """Return what decodes a line to an object that has the text."""
    kind: Any = str | None | msgspec.UnsetType
    line = msgspec.defstruct("Line", [("text", kind, msgspec.UNSET)], rename={"text": text_column})
    return msgspec.json.Decoder(line).decode


def _leniently(line: bytes) -> Any:
    """Return a line as Python reads JSON: NaN, halves of surrogate pairs, and as such halves what is not UTF-8."""
    text = line.decode("utf-8", "surrogateescape")
    try:
        return json.loads(text, parse_int=_number, parse_float=float)
    except (ValueError, RecursionError):
        return None


class _LongInteger:
    """An integer of more digits than any type has, and than Python converts at once; no value of metadata."""


def _number(digits: str) -> object:
    return int(digits) if len(digits) < _MOST_DIGITS else _LongInteger()


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        if 0xDC80 <= half <= 0xDCFF:
            raise ValueError(f"the text is not valid UTF-8: byte 0x{half - 0xDC00:02x}") from None
        raise ValueError(f"the text has half of a surrogate pair, \\u{half:04x}, alone") from None


def _fields_of(line: bytes) -> list[str]:
    value = _leniently(line)
    return [repr(str(name)) for name in value][:20] if isinstance(value, dict) else []


class TextFile(_Delimited):
    """Plain text: a row is what ends with `separator`."""

    def __init__(
        self,
        name: str,
        opener: Opener,
        nbytes: int,
        separator: str,
        span_rows: int | None = None,
        *,
        limit: int,
    ) -> None:
        self.delimiter = separator.encode()
        super().__init__(name, opener, nbytes, span_rows, limit=limit)

    def _parse(self, piece: list[bytes], span: Span) -> Texts:
        return Texts(pa.array(piece, pa.large_binary()))


_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_END_OF_OLD_STREAM = b"\0\0\0\0"
"""Before version 0.15 of the format (https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format)."""


class ArrowFile(StreamedFile[Texts]):
    """Arrow IPC, as a file (Feather 2 is that) or as a stream."""

    def __init__(
        self,
        name: str,
        opener: Opener,
        nbytes: int,
        text_column: str,
        span_rows: int | None = None,
        *,
        metadata: Sequence[MetadataColumn] = (),
        limit: int,
    ) -> None:
        self._column = text_column
        self._metadata = metadata
        super().__init__(name, opener, nbytes, span_rows, limit=limit)

    def _read_through(self) -> Iterator[tuple[int, int, Texts]]:
        whole = [(0, self._nbytes)]
        opened = native(self._opener(whole))
        with pa.memory_map(opened) if isinstance(opened, str) else opened as self._raw:
            self._read_share = 0.0
            metadata: ArrowMetadata | None = None
            for batch in self._batches():
                texts = batch.column(batch.schema.get_field_index(self._column))
                require_sound(texts)
                table: pa.Table | None = None
                bad: dict[int, str] = {}
                if self._metadata:
                    metadata = metadata or ArrowMetadata(self.name, batch.schema, self._metadata)
                    table, bad = metadata.read(batch)
                refuse_large(self.name, Texts(texts, bad, table), self._next_row, self._limit)
                rows = max(1, len(texts) * TEXT_NBYTES // max(TEXT_NBYTES, texts.nbytes))
                for at in range(0, len(texts), min(rows, self._span_rows)):
                    piece = texts.slice(at, min(rows, self._span_rows))
                    end = at + len(piece)
                    reasons = {row - at: reason for row, reason in bad.items() if at <= row < end}
                    of_piece = None if table is None else table.slice(at, len(piece))
                    nbytes = piece.nbytes + (0 if of_piece is None else of_piece.nbytes)
                    yield len(piece), nbytes, Texts(piece, reasons, of_piece)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        is_file = self._raw.read(6) == b"ARROW1"
        self._raw.seek(0)
        if not is_file:
            with pa.ipc.open_stream(self._raw) as stream:
                check_text_column(self.name, stream.schema, self._column)
                for batch in stream:
                    self._read_share = self._raw.tell() / self._nbytes
                    yield batch
                self._require_end()
            return
        with pa.ipc.open_file(self._raw) as file:
            check_text_column(self.name, file.schema, self._column)
            for index in range(file.num_record_batches):
                self._read_share = (index + 1) / file.num_record_batches
                yield file.get_batch(index)

    def _require_end(self) -> None:
        """A stream that was cut off between two batches reads as if it were whole, but for its last bytes."""
        end = self._raw.tell()
        self._raw.seek(max(0, end - len(_END_OF_STREAM)))
        last = self._raw.read(len(_END_OF_STREAM))
        if last != _END_OF_STREAM and last[-4:] != _END_OF_OLD_STREAM:
            raise pa.ArrowInvalid("the stream has no end: it was cut off, or its writer was not closed")

    def _parse(self, piece: Texts, span: Span) -> Texts:
        return piece

    def _passed(self) -> int:
        return round(self._read_share * self._nbytes)

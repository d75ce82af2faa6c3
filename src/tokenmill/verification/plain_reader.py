"""Plain reader: the texts and metadata of a source file, read in the slow and obvious way, by no code of `corpus/`."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenmill.corpus.choice import format_of
from tokenmill.corpus.corpus import Corpus
from tokenmill.recipe import MetadataColumn

_ORDER_ROWS = 1 << 20
_ENDLESS = 1 << 40
"""Rows of a file that were not counted."""


class PlainRow(NamedTuple):
    """A row of a source file."""

    text: str | None
    values: Mapping[str, object] = {}
    """What the file has in the columns or fields of a wanted row."""

    def value(self, path: str) -> object:
        """Return what is at a metadata column's path, None if nothing is."""
        if path in self.values:
            return self.values[path]
        found: object = self.values
        for part in path.split("."):
            if found is not None and not isinstance(found, Mapping):
                return _UNREADABLE
            found = found.get(part) if found else None
        return found

    def can_be_stored(self, column: MetadataColumn) -> bool:
        """Whether a metadata column can hold what is there."""
        value = self.value(column.path)
        if isinstance(value, str):
            return column.kind == "string" and not any("\ud800" <= character <= "\udfff" for character in value)
        if isinstance(value, bool):
            return column.kind == "bool"
        if isinstance(value, int):
            fits = -(1 << 63) <= value < 1 << 63 if column.kind == "int64" else int(_as_float(value)) == value
            return column.kind in ("int64", "float64") and fits
        return value is None or (isinstance(value, float) and column.kind == "float64")


class _Unreadable:
    def __repr__(self) -> str:
        return "a value that cannot be stored"


_UNREADABLE = _Unreadable()


def _as_float(value: int) -> float:
    return float(value) if abs(value) < 1 << 1023 else 0.0


def read_rows(data: pa.NativeFile, path: str, corpus: Corpus, wanted: set[int]) -> Iterator[PlainRow]:
    """Return all rows of a file, bad ones as null; rows that are not wanted may be null as well."""
    kind, column = format_of(path), corpus.text_column
    paths = [each.path for each in corpus.metadata]
    if kind == "parquet":
        with pq.ParquetFile(data, page_checksum_verification=True) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(first, first + rows)):
                    yield from itertools.repeat(PlainRow(None), rows)
                    first += rows
                    continue
                roots = {root for path in paths for root in (path, path.split(".")[0])}
                there = [column, *sorted(roots & set(file.schema_arrow.names))]
                for batch in file.iter_batches(8192, row_groups=[group], columns=there):
                    yield from _rows_of(batch, column, paths, wanted, first)
                    first += len(batch)
        return
    if kind == "arrow":
        is_file = data.read(6) == b"ARROW1"
        data.seek(0)
        table = (pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)).read_all()
        first = 0
        for batch in table.to_batches():
            chunk = batch.column(column)
            binary = chunk if pa.types.is_dictionary(chunk.type) else chunk.view(_AS_BYTES.get(chunk.type, chunk.type))
            binary.validate(full=True)
            yield from _rows_of(batch, column, paths, wanted, first)
            first += len(batch)
        return
    packed = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    raw = (
        gzip.decompress(data.read())
        if packed == "gzip"
        else pa.CompressedInputStream(data, packed).read()
        if packed
        else data.read()
    )
    content = raw.removeprefix(b"\xef\xbb\xbf")
    separator = "\n" if kind == "jsonl" else corpus.text_separator
    rows_found = [content] if separator is None else content.split(separator.encode())
    if separator is not None and not rows_found[-1]:
        rows_found.pop()
    for row in rows_found:
        yield _json_row(row, column) if kind == "jsonl" else PlainRow(_decoded(row))


_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _rows_of(batch: pa.RecordBatch, column: str, paths: list[str], wanted: set[int], first: int) -> Iterator[PlainRow]:
    """Yield the rows of a batch whose first one is row `first` of the file."""
    leaves = {path: _leaf(batch, path) for path in paths}
    for at, text in enumerate(_texts_of(batch.column(batch.schema.get_field_index(column)))):
        is_wanted = first + at in wanted
        yield PlainRow(text, {path: _value(leaf[at]) for path, leaf in leaves.items()} if is_wanted else {})


def _leaf(batch: pa.RecordBatch, path: str) -> pa.Array:
    """Return the values at a path, all null if there are none."""
    names = [path] if path in batch.schema.names else path.split(".")
    if names[0] not in batch.schema.names:
        return pa.nulls(len(batch))
    found = batch.column(names[0])
    for name in names[1:]:
        if found.type.get_field_index(name) < 0:
            return pa.nulls(len(batch))
        found = pc.struct_field(found, [name])
    return found


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _UNREADABLE


def _texts_of(column: pa.Array) -> Iterator[str | None]:
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    for value in values.cast(pa.large_binary()).to_pylist():
        yield None if value is None else _decoded(value)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _json_row(line: bytes, field: str) -> PlainRow:
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"), parse_int=_integer)
        text = value.get(field) if isinstance(value, dict) else None
        return PlainRow(_decoded(text.encode()), value) if isinstance(text, str) else PlainRow(None)
    except (ValueError, RecursionError):
        return PlainRow(None)


def _integer(digits: str) -> object:
    return int(digits) if len(digits) < 400 else _UNREADABLE  # Python converts no more than 4,300

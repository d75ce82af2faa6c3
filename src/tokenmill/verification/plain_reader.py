"""Plain reader: the texts of a source file, read in the slow and obvious way, by no code of `corpus/`."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.corpus.choice import format_of
from tokenmill.corpus.corpus import Corpus

_ORDER_ROWS = 1 << 20
_ENDLESS = 1 << 40
"""Rows of a file that were not counted."""


def read_values(data: pa.NativeFile, path: str, corpus: Corpus, wanted: set[int]) -> Iterator[str | None]:
    """Return all rows of a file, bad ones as null; rows that are not wanted may be null as well."""
    kind, column = format_of(path), corpus.text_column
    if kind == "parquet":
        with pq.ParquetFile(data, page_checksum_verification=True) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(first, first + rows)):
                    yield from itertools.repeat(None, rows)
                else:
                    for batch in file.iter_batches(8192, row_groups=[group], columns=[column]):
                        yield from _texts_of(batch.column(0))
                first += rows
        return
    if kind == "arrow":
        is_file = data.read(6) == b"ARROW1"
        data.seek(0)
        table = (pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)).read_all()
        for chunk in table.column(column).chunks:
            binary = chunk if pa.types.is_dictionary(chunk.type) else chunk.view(_AS_BYTES.get(chunk.type, chunk.type))
            binary.validate(full=True)
            yield from _texts_of(chunk)
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
        yield _json_text(row, column) if kind == "jsonl" else _decoded(row)


_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _texts_of(column: pa.Array) -> Iterator[str | None]:
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    for value in values.cast(pa.large_binary()).to_pylist():
        yield None if value is None else _decoded(value)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _json_text(line: bytes, field: str) -> str | None:
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"), parse_int=len, parse_float=len)
        text = value.get(field) if isinstance(value, dict) else None
        return _decoded(text.encode()) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None

"""Metadata: the values beside the text that a recipe keeps of each row (`recipe.MetadataColumn`).

A column or field is looked up by its whole name first, then, after dots, one inside another. What is not there, or
null, is null. A column of another type is refused; a single value of one makes its row bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.errors import SourceError
from tokenmill.recipe import MetadataColumn

_NEXT_STEP = "correct metadata_columns (--metadata-column) of the recipe"
_INT64 = range(-(1 << 63), 1 << 63)


class _Kind(NamedTuple):
    """A type that metadata is stored in, and what is taken for it."""

    python: tuple[type, ...]
    is_arrow: Callable[[pa.DataType], bool]


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


_KINDS = {
    "string": _Kind((str,), _is_string),
    "int64": _Kind((int,), pa.types.is_integer),
    "float64": _Kind((float, int), lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind)),
    "bool": _Kind((bool,), pa.types.is_boolean),
}


def tabulate(columns: Sequence[MetadataColumn], values: Sequence[pa.Array]) -> pa.Table:
    """Return a table of metadata columns."""
    arrays = [array.cast(pa.type_for_alias(column.arrow_type)) for column, array in zip(columns, values, strict=True)]
    return pa.Table.from_arrays(arrays, [column.name for column in columns])


def take_rows(tables: Sequence[pa.Table], table: NDArray[np.int64], row: NDArray[np.int64]) -> pa.Table:
    """Return row `row[i]` of table `table[i]`, for each i of the two arrays of shape `(rows,)`."""
    order = np.argsort(table, kind="stable")
    used, begins = np.unique(table[order], return_index=True)
    ends = [*begins[1:].tolist(), len(order)]
    pieces = [
        tables[number].take(pa.array(row[order[begin:end]]))
        for number, begin, end in zip(used.tolist(), begins.tolist(), ends, strict=True)
    ]
    if len(pieces) == 1:
        return pieces[0]
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return pa.concat_tables(pieces).combine_chunks().take(pa.array(places))


class ArrowMetadata:
    """Metadata of a columnar file.

    Args:
        name: of the file, for messages.
        schema: of the file.
        columns: what is wanted.

    Raises:
        SourceError: a column is of another type, or there are two of its name.
    """

    def __init__(self, name: str, schema: pa.Schema, columns: Sequence[MetadataColumn]) -> None:
        self._columns = columns
        self._paths = [_find(name, schema, column) for column in columns]
        self.paths = [".".join(path) for path in self._paths if path]
        """The columns that are there, as parquet names its leaves."""
        self.is_nested = any(len(path) > 1 for path in self._paths)

    def read(self, batch: pa.RecordBatch) -> tuple[pa.Table, dict[int, str]]:
        """Return the metadata of some rows, and which of them have a value that cannot be stored, and why.

        Raises:
            pa.ArrowInvalid: what a value says of itself lies outside of its buffer.
        """
        bad: dict[int, str] = {}
        arrays = []
        for column, path in zip(self._columns, self._paths, strict=True):
            values = pa.nulls(len(batch))
            if path:
                values = batch.column(batch.schema.get_field_index(path[0]))
                values.validate()
                for part in path[1:]:
                    values = pc.struct_field(values, [part])
                require_sound(values)
                values, reasons = _stored(values, column)
                bad.update(reasons)
            arrays.append(values)
        return tabulate(self._columns, arrays), bad


def _find(name: str, schema: pa.Schema, column: MetadataColumn) -> list[str]:
    """Return the names that lead to a column; none if it is not there."""
    path = [column.path] if column.path in schema.names else column.parts
    if path[0] not in schema.names:
        return []
    if schema.names.count(path[0]) > 1:
        raise SourceError(f"{name}: two columns are called {path[0]!r}", next_step=_NEXT_STEP)
    kind = schema.field(path[0]).type
    for depth, part in enumerate(path[1:], 1):
        if not pa.types.is_struct(kind):
            raise _wrong_type(name, ".".join(path[:depth]), "a struct", kind)
        indices = kind.get_all_field_indices(part)
        if len(indices) > 1:
            inside = ".".join(path[:depth])
            raise SourceError(f"{name}: two fields of {inside!r} are called {part!r}", next_step=_NEXT_STEP)
        if not indices:
            return []
        kind = kind.field(indices[0]).type
    if not (pa.types.is_null(kind) or _KINDS[column.kind].is_arrow(kind)):
        raise _wrong_type(name, column.path, column.kind, kind)
    return path


def _wrong_type(name: str, path: str, expected: str, found: pa.DataType) -> SourceError:
    return SourceError(f"{name}: metadata column {path!r}: expected {expected}, found {found}", next_step=_NEXT_STEP)


def require_sound(values: pa.Array) -> None:
    """Offsets and indices must lie inside their buffers: what is read beyond them is another column, or nothing.

    Whether text is UTF-8 is another question, with an answer for each row.

    Raises:
        pa.ArrowInvalid: they do not.
    """
    if pa.types.is_dictionary(values.type):
        values.indices.validate(full=True)
        indices = values.indices.drop_null()
        if len(indices) and not 0 <= pc.min(indices).as_py() <= pc.max(indices).as_py() < len(values.dictionary):
            raise pa.ArrowInvalid("dictionary index out of range")
        values = values.dictionary
    values.view(_AS_BYTES.get(values.type, values.type)).validate(full=True)


_LARGE = {pa.string(): pa.large_string(), pa.string_view(): pa.large_string()}
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _stored(values: pa.Array, column: MetadataColumn) -> tuple[pa.Array, dict[int, str]]:
    """Return values in the type they are stored in; those that it cannot hold are null, and named."""
    if pa.types.is_dictionary(values.type):  # together the values may have more than 2 GB
        large = values.dictionary.cast(_LARGE.get(values.dictionary.type, values.dictionary.type))
        values = pa.DictionaryArray.from_arrays(values.indices, large).dictionary_decode()
    try:
        cast = values.cast(pa.type_for_alias(column.arrow_type))
        cast.validate(full=True)
    except pa.ArrowInvalid:
        if column.kind == "string":
            values = values.cast(pa.large_string()).view(pa.large_binary())
        kept: list[object] = []
        bad: dict[int, str] = {}
        for row, value in enumerate(values.to_pylist()):
            try:
                kept.append(_checked(_decoded(value) if isinstance(value, bytes) else value, column))
            except ValueError as error:
                kept.append(None)
                bad[row] = f"metadata column {column.path!r}: {error}"
        return pa.array(kept, pa.type_for_alias(column.arrow_type)), bad
    return cast, {}


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: byte 0x{value[error.start]:02x}") from None


def _checked(value: object, column: MetadataColumn) -> object:
    """Return a value that its column can hold.

    Raises:
        ValueError: it cannot.
    """
    kind = _KINDS[column.kind]
    if value is None:
        return None
    if not isinstance(value, kind.python) or (isinstance(value, bool) and column.kind != "bool"):
        raise ValueError(f"expected {column.kind}, found {type(value).__name__}")
    if isinstance(value, str) and (half := next((c for c in value if "\ud800" <= c <= "\udfff"), None)):
        if half >= "\udc80" and half <= "\udcff":  # a byte, as Python reads text that is not UTF-8
            raise ValueError(f"not valid UTF-8: byte 0x{ord(half) - 0xDC00:02x}")
        raise ValueError(f"half of a surrogate pair, \\u{ord(half):04x}, alone")
    if column.kind == "int64" and value not in _INT64:
        raise ValueError(f"expected {column.kind}, found {value}")
    if column.kind == "float64":
        assert isinstance(value, int | float)
        number = float(value) if isinstance(value, float) or abs(value) < 1 << 1023 else math.inf
        if number != value and not math.isnan(number):
            raise ValueError(f"expected {column.kind}, found {value}, which it would round")
        return number
    return value


def from_object(line: Mapping[str, object], columns: Sequence[MetadataColumn]) -> list[object]:
    """Return the metadata of a line of JSON.

    Raises:
        ValueError: a value of it cannot be stored.
    """
    values: list[object] = []
    for column in columns:
        try:
            values.append(_checked(_look_up(line, column), column))
        except ValueError as error:
            raise ValueError(f"metadata column {column.path!r}: {error}") from None
    return values


def _look_up(line: Mapping[str, object], column: MetadataColumn) -> object:
    if column.path in line:
        return line[column.path]
    value: object = line
    for part in column.parts:
        if value is None:
            break
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, found {type(value).__name__}")  # noqa: TRY004  # of the data
        value = value.get(part)
    return value

"""Sidecar: the columns of `documents_NNNNNN.parquet`, which says where a shard's documents come from."""

from __future__ import annotations

import pyarrow as pa

_COLUMNS = (
    pa.field("start", pa.int64(), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),
    pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
)
_TEXT_XXH3 = pa.field("text_xxh3", pa.uint64(), nullable=False)


def documents_schema(version: int) -> pa.Schema:
    """Return the schema of the sidecars of a data root whose manifest has that `documents_version`."""
    return pa.schema([*_COLUMNS, _TEXT_XXH3] if version > 1 else _COLUMNS)

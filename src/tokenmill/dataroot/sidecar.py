"""Sidecar: the columns of `documents_NNNNNN.parquet`, which says where a shard's documents come from."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from tokenmill.dataroot.manifest import Manifest
from tokenmill.recipe import MetadataColumn

_COLUMNS = (
    pa.field("start", pa.int64(), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),
    pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
)
_TEXT_XXH3 = pa.field("text_xxh3", pa.uint64(), nullable=False)


def documents_schema(manifest: Manifest) -> pa.Schema:
    """Return the schema of the sidecars of a data root."""
    fields = [*_COLUMNS, _TEXT_XXH3] if manifest.documents_version > 1 else list(_COLUMNS)
    return pa.schema([*fields, *metadata_schema(manifest.recipe.metadata)])


def metadata_schema(columns: Sequence[MetadataColumn]) -> pa.Schema:
    """Return the schema of metadata columns alone; every value may be null."""
    return pa.schema([pa.field(column.name, pa.type_for_alias(column.arrow_type)) for column in columns])

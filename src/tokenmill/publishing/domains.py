"""Domains: the hosts in a column of URLs, by the documents and tokens that come from each. Reads sidecars only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tokenmill.loading.data_root import DataRoot

URL_COLUMN = "url"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:\[\]@]+)(?:[:/?#]|$)"
_LEAST = 20
_MERGED_ROWS = 1 << 20
"""Rows of sums that are merged at once."""


class Domain(NamedTuple):
    """A host, and what comes from it."""

    host: str
    documents: int
    tokens: int


class Domains(NamedTuple):
    """Hosts by tokens, the largest first."""

    top: list[Domain]
    """The largest tenth of all, at least 20, but no more than were asked for."""
    hosts: int
    documents: int
    """With a URL that names a host."""
    tokens: int
    without: int
    """Documents without one."""


def count_domains(found: DataRoot, *, most: int) -> Domains:
    """Count documents and tokens by host.

    Memory is that of a row for each different host, 60 bytes or so.

    Raises:
        DataRootError: a sidecar is missing or damaged.
    """
    total = documents = 0
    sums: list[pa.Table] = []
    for table in _tables(found):
        total += len(table)
        sums.append(_summed(table))
        if sum(map(len, sums)) > _MERGED_ROWS:
            sums = [_summed(pa.concat_tables(sums))]
    every = _summed(pa.concat_tables(sums))
    every = every.filter(pc.is_valid(every["host"])).sort_by([("tokens", "descending"), ("host", "ascending")])
    documents = pc.sum(every["documents"]).as_py() or 0
    top = every.slice(0, min(most, max(_LEAST, -(-len(every) // 10))))
    columns = (top[name].to_pylist() for name in ("host", "documents", "tokens"))
    return Domains(
        [Domain(*row) for row in zip(*columns, strict=True)],
        len(every),
        documents,
        pc.sum(every["tokens"]).as_py() or 0,
        total - documents,
    )


def _tables(found: DataRoot) -> Iterator[pa.Table]:
    for table in found.documents().tables():
        host = pc.struct_field(pc.extract_regex(table[URL_COLUMN], _HOST), "host")
        ones = pa.array([1]).take(pa.array([0] * len(table), pa.int32())) if len(table) else pa.array([], pa.int64())
        host = pc.replace_substring_regex(pc.utf8_lower(host), r"^www\.", "")
        yield pa.table({"host": host, "documents": ones, "tokens": table["tokens"]})


def _summed(table: pa.Table) -> pa.Table:
    sums = table.group_by("host").aggregate([("documents", "sum"), ("tokens", "sum")])
    return sums.select(["host", "documents_sum", "tokens_sum"]).rename_columns(["host", "documents", "tokens"])

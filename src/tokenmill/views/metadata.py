"""Metadata: the metadata columns of a view's documents, gathered from the sidecars of its sources."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.corpus.metadata import take_rows
from tokenmill.dataroot import atomic
from tokenmill.errors import DataRootError
from tokenmill.loading.view import OpenView, ViewIndex
from tokenmill.views.catalogue import open_sources, taken_metadata


def metadata_columns(opened: OpenView) -> tuple[str, ...]:
    """Return the metadata columns of all sources, as a recipe has them; a source that lacks one has nulls there.

    Raises:
        DataRootError: sources have columns of the same name and of different types.
    """
    kinds: dict[str, str] = {}
    for source, root in zip(opened.view.sources, opened.sources, strict=True):
        for column in root.manifest.recipe.metadata if root.manifest is not None else ():
            if kinds.setdefault(column.name, column.kind) != column.kind:
                raise DataRootError(
                    f"{opened.root}: metadata column {column.name!r} is {kinds[column.name]} in one source and "
                    f"{column.kind} in {source.name!r}",
                    next_step="make one of the data roots again with another name or type for it",
                )
    return tuple(f"{name}={name}:{kind}" for name, kind in kinds.items())


class GatheredMetadata:
    """The metadata of a view's documents: in a file, as it may be larger than memory. Threads may share one.

    Args:
        path: where it goes, in the order of the sources.
        opened: the view.
        index: of the view.
        schema: of the metadata.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """

    def __init__(self, path: Path, opened: OpenView, index: ViewIndex, schema: pa.Schema) -> None:
        order = np.argsort(index.places, kind="stable")
        self._rank: NDArray[np.int64] = np.empty(len(order), np.int64)
        """Of each document, how many lie before it in the sources."""
        self._rank[order] = np.arange(len(order))
        places, base = index.places[order], 0
        with atomic.translate_write_errors(path), path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for catalogue in open_sources(opened.root, opened.view.sources):
                end = base + catalogue.stream.tokens
                here = slice(*np.searchsorted(places, [base, end]).tolist())
                for table in taken_metadata(catalogue, places[here] - base, schema):
                    if len(table):
                        writer.write_table(table)
                base = end
        with path.open("rb") as written:
            stored = pa.ipc.open_file(pa.py_buffer(mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ)))
        self._tables = [pa.Table.from_batches([stored.get_batch(n)]) for n in range(stored.num_record_batches)]
        sizes = np.array([len(table) for table in self._tables], np.int64)
        self._ends: NDArray[np.int64] = np.cumsum(sizes)
        self._begins: NDArray[np.int64] = self._ends - sizes

    def read(self, first: int, stop: int) -> pa.Table:
        """Return the metadata of documents `first` to before `stop` of the view."""
        rank = self._rank[first:stop]
        table = np.searchsorted(self._ends, rank, side="right")
        return take_rows(self._tables, table, rank - self._begins[table])

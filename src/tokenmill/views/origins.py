"""Origins: what sidecars say of a view's documents, gathered from its sources: file, row, identity and metadata."""

from __future__ import annotations

import itertools
import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.corpus.metadata import take_rows
from tokenmill.dataroot import atomic
from tokenmill.dataroot.sidecar import metadata_schema
from tokenmill.errors import DataRootError
from tokenmill.loading.data_root import release_pages
from tokenmill.loading.view import OpenView, ViewIndex
from tokenmill.recipe import MetadataColumn
from tokenmill.views.catalogue import Catalogue, documents_at, open_sources, taken_metadata

_NUMBERS, _METADATA = "numbers.npy", "metadata.arrow"


class Origin(NamedTuple):
    """What documents come from; arrays of shape `(documents,)`."""

    file: NDArray[np.int64]
    """Index among the files of all sources."""
    row: NDArray[np.int64]
    identity: NDArray[np.uint64]
    metadata: pa.Table | None
    """A row for each; None where no source has metadata columns."""


def metadata_columns(opened: OpenView) -> tuple[str, ...]:
    """Return the metadata columns of all sources, as a recipe has them; a source that lacks one has nulls there.

    Raises:
        DataRootError: sources have columns of the same name and of different types.
    """
    kinds: dict[str, str] = {}
    named: dict[str, tuple[str, str]] = {}
    for source, root in zip(opened.view.sources, opened.sources, strict=True):
        for column in root.manifest.recipe.metadata if root.manifest is not None else ():
            kinds.setdefault(column.name, column.kind)
            name, first = named.setdefault(column.name.lower(), (column.name, source.name))
            if (name, kinds[name]) != (column.name, column.kind):
                raise DataRootError(
                    f"{opened.root}: metadata column {name!r} is {kinds[name]} in the source {first!r}, and "
                    f"{column.name!r} is {column.kind} in {source.name!r}",
                    next_step="make one of the data roots again with the same name and type, or with another name",
                )
    return tuple(f"{name}={name}:{kind}" for name, kind in kinds.items())


def first_file_of(opened: OpenView) -> dict[str, int]:
    """Return the index of the first file of each source among the files of all."""
    counts = [len(root.files) for root in opened.sources]
    firsts = itertools.accumulate(counts, initial=0)
    return {source.name: first for source, first in zip(opened.view.sources, firsts, strict=False)}


class Origins:
    """What the sidecars of the sources say of a view's documents, in its order, mapped from files that `write` made.

    Args:
        folder: of the files.

    They may be larger than memory, and threads and processes share them.
    """

    def __init__(self, folder: Path) -> None:
        self._numbers: NDArray[np.int64] = np.load(folder / _NUMBERS, mmap_mode="r")
        self._tables: list[pa.Table] = []
        if (folder / _METADATA).exists():
            with (folder / _METADATA).open("rb") as written:
                stored = pa.ipc.open_file(pa.py_buffer(mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ)))
            self._tables = [pa.Table.from_batches([stored.get_batch(n)]) for n in range(stored.num_record_batches)]
        sizes = np.array([len(table) for table in self._tables], np.int64)
        self._ends: NDArray[np.int64] = np.cumsum(sizes)
        self._begins: NDArray[np.int64] = self._ends - sizes

    @staticmethod
    def write(folder: Path, opened: OpenView, index: ViewIndex, columns: Sequence[MetadataColumn]) -> None:
        """Make the files, in place of those of an earlier run.

        Raises:
            StorageError: the disk is full, or cannot be written.
        """
        shutil.rmtree(folder, ignore_errors=True)
        with atomic.translate_write_errors(folder):
            folder.mkdir()
            shape = (3 + bool(columns), len(index.places))
            numbers = np.lib.format.open_memmap(folder / _NUMBERS, "w+", np.dtype("<i8"), shape)
            rank = 0
            first_files = first_file_of(opened)
            for catalogue, here, documents in documents_at(_sources(opened), index.places):
                numbers[0, here], numbers[1, here] = documents.file + first_files[catalogue.name], documents.row
                numbers[2, here] = documents.identity.view(np.int64)
                if columns:
                    numbers[3, here] = np.arange(rank, rank + len(here))
                    rank += len(here)
            numbers.flush()
            if columns:
                _write_metadata(folder / _METADATA, opened, np.sort(index.places), metadata_schema(columns))

    def release(self) -> None:
        """Release the mapped pages of the numbers; they are mapped again as they are read."""
        release_pages(self._numbers)

    def read(self, first: int, stop: int) -> Origin:
        """Return those of documents `first` to before `stop` of the view."""
        file, row, identity, *ranks = np.array(self._numbers[:, first:stop])
        metadata = None
        if ranks:
            (rank,) = ranks
            table = np.searchsorted(self._ends, rank, side="right")
            metadata = take_rows(self._tables, table, rank - self._begins[table])
        return Origin(file, row, identity.view(np.uint64), metadata)


def _write_metadata(path: Path, opened: OpenView, places: NDArray[np.int64], schema: pa.Schema) -> None:
    """Write metadata in the order of the sources."""
    base = 0
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for catalogue in _sources(opened):
            end = base + catalogue.stream.tokens
            here = slice(*np.searchsorted(places, [base, end]).tolist())
            for table in taken_metadata(catalogue, places[here] - base, schema):
                if len(table):
                    writer.write_table(table)
            base = end


def _sources(opened: OpenView) -> Iterator[Catalogue]:
    return open_sources(opened.root, opened.view.sources)

"""Catalogue: the documents of a data root as arrays, and their identities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.manifest import Manifest
from tokenmill.dataroot.view_record import Identity, SourceRecord
from tokenmill.encoding.text_hash import bytes_hash
from tokenmill.errors import DataRootError
from tokenmill.loading.data_root import DataRoot, TokenStream
from tokenmill.loading.documents import file_numbers
from tokenmill.loading.view import open_view


class Documents(NamedTuple):
    """Documents of a data root, those of one shard or some of them; every array has shape `(documents,)`."""

    start: NDArray[np.int64]
    """First token, counted in the stream of the data root."""
    length: NDArray[np.int64]
    """Tokens, EOS included."""
    file: NDArray[np.int64]
    """Index of the source file in the manifest."""
    row: NDArray[np.int64]
    identity: NDArray[np.uint64]
    """Hash of the text, or of the tokens."""

    def chosen(self, mask: NDArray[np.bool_]) -> Documents:
        """Return those for which the mask is true."""
        return Documents._make(column[mask] for column in self)


class Catalogue:
    """The documents of a finished data root.

    Args:
        root: the data root.
        name: what the view calls it.

    Raises:
        DataRootError: it is no finished data root of `tokenmill pretokenize`, or a part of one.
    """

    def __init__(self, root: Path, name: str) -> None:
        if not root.is_dir():
            raise DataRootError(f"{root}: source {name!r}: no such directory", next_step="give a data root")
        if open_view(root) is not None:
            raise DataRootError(
                f"{root}: source {name!r}: expected a data root, found a view",
                next_step="name the data roots that it is made from",
            )
        manifest = manifests.load(root)
        if manifest is None or not manifest.complete:
            raise DataRootError(
                f"{root}: source {name!r}: expected a finished data root with documents, found "
                f"{'an unfinished one' if manifest else 'no manifest'}",
                next_step="make it with tokenmill pretokenize, to its end",
            )
        self.name, self.root = name, root
        self.manifest: Manifest = manifest
        self.opened = DataRoot(root, manifest, manifests.load_consolidated(root))
        self.stream: TokenStream = self.opened.tokens()
        self.identity: Identity = "text" if manifest.documents_version > 1 else "tokens"
        self._numbers = {file.path: number for number, file in enumerate(manifest.files)}

    def tables(self) -> Iterator[tuple[pa.Table, Documents]]:
        """Yield the sidecar of each shard, and what it says."""
        for table in self.opened.documents().tables():
            yield table, self._documents(table)

    def _documents(self, table: pa.Table) -> Documents:
        start, length, row = (table[name].to_numpy() for name in ("start", "tokens", "row"))
        file = file_numbers(table, self._numbers)
        if len(file) and int(file.min()) < 0:
            unknown = table["source"][int(np.argmin(file))].as_py()
            raise DataRootError(
                f"{self.root}: a documents sidecar names {unknown}, which the manifest does not list",
                next_step="run tokenmill verify on the data root",
            )
        if len(start) and (int(start[0]) < 0 or int(start[-1]) >= self.stream.tokens or int(length.min()) < 1):
            raise DataRootError(
                f"{self.root}: a documents sidecar names tokens that the stream does not have",
                next_step="run tokenmill verify on the data root",
            )
        if self.identity == "text":
            identity = table["text_xxh3"].to_numpy()
        else:
            ends = np.minimum(start + length, self.stream.tokens)
            bounds = zip(start.tolist(), ends.tolist(), strict=True)
            hashes = (bytes_hash(self._tokens(begin, end)) for begin, end in bounds)
            identity = np.fromiter(hashes, np.uint64, len(start))
        return Documents(start, length, file, row, identity)

    def _tokens(self, begin: int, end: int) -> bytes:
        data: bytes = self.stream.read(begin, end).tobytes()
        return data

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Return the tokens of a document."""
        return self.stream.read(start, start + length)


def taken_metadata(catalogue: Catalogue, places: NDArray[np.int64], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the metadata of the documents that begin at `places`, which ascend; what is not there is null."""
    for table, documents in catalogue.tables():
        at = np.searchsorted(places, documents.start)
        taken = table.filter(pa.array(at < np.searchsorted(places, documents.start, side="right")))
        nothing = pa.nulls(len(taken))
        columns = [taken[name] if name in taken.column_names else nothing for name in schema.names]
        yield pa.table(columns, schema.names).cast(schema).combine_chunks()


def documents_at(
    catalogues: Iterable[Catalogue], places: NDArray[np.int64]
) -> Iterator[tuple[Catalogue, NDArray[np.int64], Documents]]:
    """Yield, for each sidecar of each data root, which of `places` lie in it, in its order, and their documents.

    Places are counted over the streams of all data roots one after the other.

    Raises:
        DataRootError: no document begins at one of them.
    """
    order = np.argsort(places, kind="stable")
    base = at = 0
    for catalogue in catalogues:
        end = base + catalogue.stream.tokens
        stop = int(np.searchsorted(places, end, sorter=order))
        for _, documents in catalogue.tables() if at < stop else ():
            here = order[at : min(stop, at + len(documents.start))]
            wanted = places[here] - base
            found = np.searchsorted(documents.start, wanted)
            found = found[found < len(documents.start)]
            is_there = documents.start[found] == wanted[: len(found)]
            count = len(found) if is_there.all() else int(np.argmin(is_there))
            mask = np.zeros(len(documents.start), np.bool_)
            mask[found[:count]] = True
            yield catalogue, here[:count], documents.chosen(mask)
            at += count
        if at < stop:
            raise DataRootError(
                f"{catalogue.root}: no document begins at token {int(places[order[at]]) - base}, as the view says",
                next_step="run tokenmill verify on the data root; if it passes, build the view again",
            )
        base = end


def open_sources(folder: Path, sources: list[SourceRecord]) -> Iterator[Catalogue]:
    """Open the data roots of a view that is built."""
    for source in sources:
        yield Catalogue(folder / source.root, source.name)

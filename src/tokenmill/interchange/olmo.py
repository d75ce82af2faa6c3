"""OLMo-core and dolma: `part-00000.npy` and `part-00000.csv.gz`."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from tokenmill.errors import ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import (
    Bounds,
    require_whole_documents,
    running,
    smallest_unsigned,
    write_tokens,
)
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import ByteSink, Output


class Olmo:
    """Writes `SPLIT/part-00000.npy`, which has no header in spite of its name, and `SPLIT/part-00000.csv.gz`.

    As `dolma tokens` does (https://github.com/allenai/dolma, `python/dolma/tokenizer/`): the smallest unsigned type
    that holds all ids; a line `start,end,id,src,loc` for each document, `loc` counted from 1. Most readers find
    documents by their EOS alone.
    """

    name = "olmo"
    reader = "OLMo-core: NumpyFSLDataset(paths of OUT/train/*.npy)"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_whole_documents(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        nbytes = dataset.tokens * smallest_unsigned(dataset.tokenizer.vocab_size).itemsize
        return {f"{split}/part-00000.npy": nbytes, f"{split}/part-00000.csv.gz": 20 * dataset.documents}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        stem = f"{split}/part-00000"
        write_tokens(dataset, f"{stem}.npy", output, smallest_unsigned(dataset.tokenizer.vocab_size))
        if output.is_done(f"{stem}.csv.gz"):
            return
        bare = pa.csv.WriteOptions(include_header=False)
        with (
            output.file(f"{stem}.csv.gz") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=ByteSink(file), compresslevel=4, mtime=0) as packed,
        ):
            for table in _rows(dataset, output.folder / ".origins"):
                pa.csv.write_csv(table, packed, bare)

    def open(self, source: Path, hints: Hints) -> Incoming:
        paths = find_files(source, hints.split, "{split}/*.npy", "*.npy")
        dtype = hints.dtype
        if dtype is None and hints.record is not None:
            dtype = smallest_unsigned(hints.record.vocab_size)
        if dtype is None:
            dtype = np.dtype(f"<u{hints.itemsize(paths[0])}")
        pieces = whole_pieces(paths, dtype.itemsize)
        lists = [path.with_name(path.name.removesuffix(".npy") + ".csv.gz") for path in paths]
        if not all(path.is_file() for path in lists):
            return Tokens(pieces, dtype)
        return Tokens(pieces, dtype, [_listed(path) for path in lists])


def _listed(path: Path) -> NDArray[np.int64]:
    """Return the lengths of the documents of a `csv.gz`."""
    with gzip.open(path) as packed:
        read = pa.csv.ReadOptions(autogenerate_column_names=True)
        table = pa.csv.read_csv(packed, read)
    starts, ends = (table[name].to_numpy() for name in table.column_names[:2])
    if len(starts) and (starts[0] != 0 or not np.array_equal(starts[1:], ends[:-1])):
        raise ImportDataError(f"{path}: documents do not follow one another", next_step="get the file again")
    return np.asarray(ends - starts, np.int64)


def _rows(dataset: ExportedDataset, scratch: Path) -> Iterator[pa.Table]:
    """Yield start, end, id, source and row of each document."""
    bounds = Bounds(running(dataset.lengths()))
    for table in dataset.origins(scratch):
        starts, ends = bounds.take(len(table))
        source = table["source"].cast(pa.string())
        row = table["row"].cast(pa.string())
        name = pc.binary_join_element_wise(source, row, ":")
        yield pa.table({"start": starts, "end": ends, "id": name, "src": source, "loc": pc.add(table["row"], 1)})

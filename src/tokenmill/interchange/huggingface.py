"""Hugging Face datasets: parquet files with a row for each document, and a dataset card."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill.errors import ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import Bounds, require_short_documents, require_whole_documents, running
from tokenmill.interchange.incoming import DocumentBlock, Hints, Incoming, find_files
from tokenmill.interchange.output import ByteSink, Output, OutputFile

FILE_NBYTES = 1 << 30
"""Tokens of a file, in bytes."""
GROUP_NBYTES = 64 << 20
"""Likewise of a row group."""
_TYPES = {2: pa.uint16(), 4: pa.int32()}
_VIEWS = {2: "<u2", 4: "<i4"}


class HuggingFace:
    """Writes `data/SPLIT-NNNNN-of-NNNNN.parquet` and `README.md`.

    A row is a document: `input_ids` (list of uint16, or of int32 where ids have 32 bits), `source`, `row`, and the
    metadata columns. The file that a row is in depends on the tokens before it alone.
    """

    name = "parquet"
    reader = "datasets.load_dataset('OUT'), the Transformers trainers, the hub's viewer"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_whole_documents(dataset, self.name)
        require_short_documents(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        nbytes = dataset.tokens * dataset.dtype.itemsize
        count = _count(dataset)
        return {_name(split, number, count): nbytes // count for number in range(count)} | {"README.md": 300}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        count = _count(dataset)
        groups = itertools.groupby(_row_groups(dataset, output.folder / ".origins"), key=lambda group: group.file)
        for number, of_file in groups:
            if not output.is_done(_name(split, number, count)):
                with output.file(_name(split, number, count)) as file:
                    _write_file(dataset, file, of_file)
        if not output.is_done("README.md"):
            with output.file("README.md") as file:
                file.write(_card(output.record.splits, dataset).encode())

    def open(self, source: Path, hints: Hints) -> Incoming:
        name = _SPLITS[hints.split]
        return _Rows(find_files(source, name, "data/{split}-*.parquet", "{split}*.parquet", "*.parquet"))


class _Rows:
    """Rows of parquet files, each a document (an `Incoming`)."""

    is_guess = False
    whole_file: Path | None = None

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        sizes = set()
        for path in files:
            schema = pq.read_schema(path)
            kind = schema.field("input_ids").type if "input_ids" in schema.names else None
            is_list = kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
            if kind is None or not is_list or not pa.types.is_integer(kind.value_type):
                raise ImportDataError(
                    f"{path}: expected a column input_ids of lists of integers, found {kind or schema.names}",
                    next_step="check --from",
                )
            sizes.add(kind.value_type.bit_width)
        self.dtype = np.dtype("<u2" if max(sizes) <= 16 else "<u4")

    def blocks(self, eos_id: int) -> Iterator[DocumentBlock]:
        for file, path in enumerate(self.files):
            row = 0
            for lists in _lists(path):
                lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
                values = lists.flatten().to_numpy()
                limit = np.iinfo(self.dtype).max
                if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= limit:
                    raise ImportDataError(
                        f"{path}: row {row} and after: expected ids from 0 to {limit}, found "
                        f"{int(values.min())} to {int(values.max())}",
                        next_step="mend the file",
                    )
                yield DocumentBlock(file, row, lengths, values.astype(self.dtype))
                row += len(lengths)


def _lists(path: Path) -> Iterator[pa.Array]:
    """Yield the lists of a file, some at once."""
    try:
        with pq.ParquetFile(path) as opened:
            for batch in opened.iter_batches(4096, columns=["input_ids"], use_threads=False):
                yield batch.column(0)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ImportDataError(f"{path}: cannot be read: {reason}", next_step="get the file again") from None


class _RowGroup(NamedTuple):
    file: int
    starts: NDArray[np.int64]
    end: int
    """One past the last token of its last document."""
    origins: pa.Table


def _row_groups(dataset: ExportedDataset, scratch: Path) -> Iterator[_RowGroup]:
    """Yield documents that begin within the same `GROUP_NBYTES` of the stream."""
    bounds = Bounds(running(dataset.lengths()))
    for table in dataset.origins(scratch):
        starts, ends = bounds.take(len(table))
        group = starts * dataset.dtype.itemsize // GROUP_NBYTES
        _, firsts = np.unique(group, return_index=True)
        for first, stop in itertools.pairwise([*firsts.tolist(), len(starts)]):
            file = int(group[first]) // (FILE_NBYTES // GROUP_NBYTES)
            yield _RowGroup(file, starts[first:stop], int(ends[stop - 1]), table.slice(first, stop - first))


def _count(dataset: ExportedDataset) -> int:
    """Return the number of files: one for each `FILE_NBYTES` in which a document begins, the last one at the end."""
    last = dataset.found.documents().parts_between(dataset.tokens - 1, dataset.tokens)[0].document.start
    return last * dataset.dtype.itemsize // FILE_NBYTES + 1


def _name(split: str, number: int, count: int) -> str:
    return f"data/{_SPLITS[split]}-{number:05d}-of-{count:05d}.parquet"


_SPLITS = {"train": "train", "val": "validation"}


def _write_file(dataset: ExportedDataset, file: OutputFile, groups: Iterator[_RowGroup]) -> None:
    kind = _TYPES[dataset.dtype.itemsize]
    columns = dataset.metadata
    schema = pa.schema(
        [
            pa.field("input_ids", pa.list_(kind)),
            pa.field("source", pa.string()),
            pa.field("row", pa.int64()),
            *(pa.field(column.name, pa.type_for_alias(column.arrow_type)) for column in columns),
        ]
    )
    with pq.ParquetWriter(pa.PythonFile(ByteSink(file), "w"), schema, compression="zstd") as writer:
        for group in groups:
            first = int(group.starts[0])
            values = pa.array(
                np.ascontiguousarray(dataset.stream.read(first, group.end)).view(_VIEWS[dataset.dtype.itemsize])
            )
            offsets = pa.array(np.append(group.starts, group.end) - first, pa.int32())
            table = group.origins.select(["source", "row", *(column.name for column in columns)])
            table = table.add_column(0, "input_ids", pa.ListArray.from_arrays(offsets, values))
            writer.write_table(table.cast(schema), row_group_size=len(table))


def _card(splits: Collection[str], dataset: ExportedDataset) -> str:
    """Return a dataset card: which files are which split."""
    files = "".join(f"  - split: {_SPLITS[split]}\n    path: data/{_SPLITS[split]}-*\n" for split in splits)
    return f"""---
configs:
- config_name: default
  data_files:
{files}---

Tokens of {dataset.tokenizer.vocab_size:,} ids, made with the tokenizer `{dataset.tokenizer.name}` (SHA-256 of
`tokenizer.json`: {dataset.tokenizer.sha256}). A row is a document: `input_ids` end with {dataset.tokenizer.eos_id};
`source` and `row` say where its text comes from.
"""

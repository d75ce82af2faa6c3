"""Megatron: `PREFIX.bin` and `PREFIX.idx` of Megatron-LM, NeMo and their kin.

Layout: `megatron/core/datasets/indexed_dataset.py` of https://github.com/NVIDIA/Megatron-LM. `.bin` is the tokens of
all documents, EOD at the end of each. `.idx` is `MMIDIDX\\0\\0`, version 1 (`<Q`), a code of the type (`<B`), the
numbers of sequences and of document bounds (`<Q` each), the length of each sequence (int32), its first byte in `.bin`
(int64), and the number of sequences before each document and after the last (int64). A document is a sequence here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ExportError, ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import (
    LONGEST_INT32,
    require_short_documents,
    require_whole_documents,
    running,
    write_arrays,
    write_tokens,
)
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import Output

MAGIC = b"MMIDIDX\0\0"
CODES = {2: 8, 4: 4}
"""The type of a token by its size: uint16, int32. There is no code for uint32."""
_NUMBERED = 1 << 20


class Megatron:
    """Writes `train.bin` with `train.idx`, and `val.bin` with `val.idx`."""

    name = "megatron"
    reader = "Megatron-LM, Megatron-Bridge, NeMo: --data-path OUT/train"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_whole_documents(dataset, self.name)
        if dataset.tokenizer.vocab_size > 1 << 31:
            raise ExportError(
                f"{dataset.root}: Megatron stores ids as int32: expected at most {1 << 31}, found "
                f"{dataset.tokenizer.vocab_size}",
                next_step="choose another format",
            )
        require_short_documents(dataset, self.name)
        if dataset.documents >= LONGEST_INT32:
            raise ExportError(
                f"{dataset.root}: Megatron numbers the documents of a prefix by int32: expected fewer than "
                f"{LONGEST_INT32}, found {dataset.documents}",
                next_step="export several views of it, each with a prefix of its own",
            )

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        return {
            f"{split}.bin": dataset.tokens * dataset.dtype.itemsize,
            f"{split}.idx": 42 + 20 * dataset.documents,
        }

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        write_tokens(dataset, f"{split}.bin", output, dataset.dtype)
        if output.is_done(f"{split}.idx"):
            return
        itemsize, documents = dataset.dtype.itemsize, dataset.documents
        with output.file(f"{split}.idx") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, CODES[itemsize], documents, documents + 1))
            write_arrays(file, dataset.lengths(), "<i4")
            write_arrays(file, (begins for begins, _ in running(dataset.lengths(), itemsize)), "<i8")
            write_arrays(file, _numbers(documents + 1), "<i8")

    def open(self, source: Path, hints: Hints) -> Incoming:
        (index,) = _indexes(source, hints.split)
        data = np.memmap(index, np.uint8, "r")
        if data[:9].tobytes() != MAGIC or len(data) < 34:
            raise ImportDataError(f"{index}: not a Megatron index", next_step="check --from")
        version, code, sequences, bounds = struct.unpack_from("<QBQQ", data[9:34].tobytes())
        kinds = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
        if version != 1 or code not in kinds or len(data) < 34 + 12 * sequences + 8 * bounds:
            raise ImportDataError(
                f"{index}: expected version 1, a type of integers and {sequences} sequences, found version {version}, "
                f"code {code} and {len(data)} bytes",
                next_step="get the file again, or make it again",
            )
        dtype = np.dtype(kinds[code])
        lengths = np.frombuffer(data, "<i4", sequences, 34)
        firsts = np.frombuffer(data, "<i8", bounds, 34 + 12 * sequences)
        documents = np.add.reduceat(np.append(lengths, 0), firsts[:-1]) if bounds > 1 else lengths[:0]
        documents = np.where(np.diff(firsts) > 0, documents, 0)
        return Tokens(whole_pieces([index.with_suffix(".bin")], dtype.itemsize), dtype, [documents])


def _indexes(source: Path, split: str) -> list[Path]:
    """Return the index of a prefix, of a file of it, or of a directory that has one."""
    if not source.is_dir():
        source = source.with_suffix("") if source.suffix in (".bin", ".idx") else source
        found = [source.with_name(source.name + ".idx")]
    else:
        found = find_files(source, split, "{split}.idx", "*.idx")
    if len(found) != 1 or not found[0].is_file() or not found[0].with_suffix(".bin").is_file():
        names = ", ".join(path.name for path in found)
        raise ImportDataError(
            f"{source}: expected one .idx with its .bin, found {names}", next_step="name the prefix of one of them"
        )
    return found


def _numbers(count: int) -> Iterator[NDArray[Any]]:
    for first in range(0, count, _NUMBERED):
        yield np.arange(first, min(first + _NUMBERED, count))

"""Megatron: `PREFIX.bin` and `PREFIX.idx` of Megatron-LM, NeMo and their kin.

Layout: `megatron/core/datasets/indexed_dataset.py` of https://github.com/NVIDIA/Megatron-LM. `.bin` is the tokens of
all documents, EOD at the end of each. `.idx` is `MMIDIDX\\0\\0`, version 1 (`<Q`), a code of the type (`<B`), the
numbers of sequences and of document bounds (`<Q` each), the length of each sequence (int32), its first byte in `.bin`
(int64), and the number of sequences before each document and after the last (int64). A document is a sequence here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ExportError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import (
    LONGEST_INT32,
    require_short_documents,
    require_whole_documents,
    running,
    write_arrays,
    write_tokens,
)
from tokenmill.interchange.output import Output

MAGIC = b"MMIDIDX\0\0"
CODES = {2: 8, 4: 4}
"""The type of a token by its size: uint16, int32. There is no code for uint32."""
_NUMBERED = 1 << 20


class Megatron:
    """Writes `train.bin` with `train.idx`, and `val.bin` with `val.idx`."""

    name = "megatron"
    reader = "Megatron-LM, Megatron-Bridge, NeMo: --data-path OUT/train"
    has_validation = True

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


def _numbers(count: int) -> Iterator[NDArray[Any]]:
    for first in range(0, count, _NUMBERED):
        yield np.arange(first, min(first + _NUMBERED, count))

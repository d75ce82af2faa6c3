"""llm.c and its kin (modded-nanogpt, Parameter Golf): `train_000000.bin`, `val_000000.bin`.

Layout: `dev/data/data_common.py` and `llmc/dataloader.h` of https://github.com/karpathy/llm.c. A file begins with 256
int32: magic, version and number of tokens; 20240520 and 1 for 16-bit ids, 20240801 and 7 for 32-bit ids. EOT stands
before each document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import Output

KINDS = {2: (20240520, 1), 4: (20240801, 7)}
"""Magic and version by the size of a token."""
HEADER_NBYTES = 1024
FILE_TOKENS = 100_000_000
"""As in the scripts that come with llm.c."""


class LlmC:
    """Writes files of 100 million tokens: the end token of each document is moved to where the next one begins."""

    name = "llmc"
    reader = "llm.c: -i 'OUT/train_*.bin' -j 'OUT/val_*.bin'; modded-nanogpt"

    def refuse(self, dataset: ExportedDataset) -> None:
        """Nothing stands against it: a file has at most 400 MB, and begins with a document or continues one."""

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        itemsize = dataset.dtype.itemsize
        return {
            f"{split}_{number:06d}.bin": HEADER_NBYTES + itemsize * (end - begin)
            for number, (begin, end) in enumerate(_files(dataset))
        }

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        magic, version = KINDS[dataset.dtype.itemsize]
        stream = _Stream(dataset)
        for number, (begin, end) in enumerate(_files(dataset)):
            name = f"{split}_{number:06d}.bin"
            if output.is_done(name):
                for _ in stream.take(end - begin):
                    pass
                continue
            header = np.zeros(256, "<i4")
            header[:3] = magic, version, end - begin
            with output.file(name) as file:
                file.write(header)
                for piece in stream.take(end - begin):
                    file.write(piece)

    def open(self, source: Path, hints: Hints) -> Incoming:
        paths = find_files(source, hints.split, "{split}_*.bin", "*{split}*.bin")
        kinds = {kind: size for size, kind in KINDS.items()}
        found = set()
        for path in paths:
            header = np.fromfile(path, "<i4", 256)
            size = kinds.get((int(header[0]), int(header[1]))) if len(header) == 256 else None
            if size is None or path.stat().st_size != HEADER_NBYTES + size * int(header[2]):
                raise ImportDataError(
                    f"{path}: expected the header of llm.c and the tokens that it names, found neither or less",
                    next_step="check --from, or get the file again",
                )
            found.add(size)
        if len(found) != 1:
            raise ImportDataError(f"{source}: files of 16 and of 32 bits together", next_step="import each kind alone")
        itemsize = found.pop()
        tokens = None if hints.record is None else hints.record.splits[hints.split].tokens
        pieces = whole_pieces(paths, itemsize, HEADER_NBYTES)
        return Tokens(pieces, np.dtype(f"<u{itemsize}"), end=hints.eos_id, tokens=tokens)


def _files(dataset: ExportedDataset) -> Iterator[tuple[int, int]]:
    """Yield the tokens of each file. There is one more than the data set has where its last document has no end."""
    tokens = dataset.tokens + (not dataset.ends_with_eos)
    for begin in range(0, tokens, FILE_TOKENS):
        yield begin, min(begin + FILE_TOKENS, tokens)


class _Stream:
    """The tokens with EOT first: token i of it is token i - 1 of ours."""

    def __init__(self, dataset: ExportedDataset) -> None:
        first = np.array([dataset.tokenizer.eos_id], dataset.dtype)
        self._coming = itertools.chain([first], dataset.chunks())
        self._here: NDArray[Any] = first[:0]

    def take(self, tokens: int) -> Iterator[NDArray[Any]]:
        """Yield the next tokens."""
        while tokens:
            if len(self._here) == 0:
                self._here = next(self._coming)
            piece, self._here = self._here[:tokens], self._here[tokens:]
            tokens -= len(piece)
            yield np.ascontiguousarray(piece)

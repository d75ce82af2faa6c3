"""torchtitan and its kin: a stream of tokens, and where its documents begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokenmill.dataroot import npy
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import require_whole_documents, write_arrays, write_tokens
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import Output


class TorchTitan:
    """Writes `tokens.bin` and `document_offsets.npy` (int64: first token of each document, and the end of the last).

    For loaders of one's own that cut windows of `1 + seq_len` tokens at offsets, as torchtitan's data loaders do.
    """

    name = "torchtitan"
    reader = "loaders that cut a mapped stream at offsets (docs/trainers.md has one for torchtitan)"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_whole_documents(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        return {
            f"{split}/tokens.bin": dataset.tokens * dataset.dtype.itemsize,
            f"{split}/document_offsets.npy": 128 + 8 * (dataset.documents + 1),
        }

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        write_tokens(dataset, f"{split}/tokens.bin", output, dataset.dtype)
        if not output.is_done(f"{split}/document_offsets.npy"):
            with output.file(f"{split}/document_offsets.npy") as file:
                file.write(npy.npy_header(np.dtype("<i8"), dataset.documents + 1))
                write_arrays(file, dataset.starts(), "<i8")
                file.write(np.array([dataset.tokens], "<i8"))

    def open(self, source: Path, hints: Hints) -> Incoming:
        (path,) = find_files(source, hints.split, "{split}/tokens.bin", "tokens.bin")
        itemsize = hints.itemsize(path)
        bounds = np.load(path.with_name("document_offsets.npy"), mmap_mode="r")
        return Tokens(whole_pieces([path], itemsize), np.dtype(f"<u{itemsize}"), [np.diff(bounds)])

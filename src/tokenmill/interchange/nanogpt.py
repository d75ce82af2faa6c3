"""nanoGPT: `train.bin`, `val.bin`, `meta.pkl`."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import require_uint16, write_tokens
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import Output


class NanoGpt:
    """Writes `train.bin`, `val.bin` and `meta.pkl`, as the scripts in `data/` of https://github.com/karpathy/nanoGPT
    do.

    16-bit ids without a header, EOT after each document; `meta.pkl` says how many ids there are.
    """

    name = "nanogpt"
    reader = "nanoGPT: dataset folder OUT"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_uint16(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        return {f"{split}.bin": dataset.tokens * 2, "meta.pkl": 30}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        write_tokens(dataset, f"{split}.bin", output, np.dtype("<u2"))
        if not output.is_done("meta.pkl"):
            with output.file("meta.pkl") as file:
                file.write(pickle.dumps({"vocab_size": dataset.tokenizer.vocab_size}, protocol=4))

    def open(self, source: Path, hints: Hints) -> Incoming:
        return Tokens(whole_pieces(find_files(source, hints.split, "{split}.bin"), 2), np.dtype("<u2"))

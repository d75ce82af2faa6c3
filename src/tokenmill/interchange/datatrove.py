"""datatrove and nanotron: `.ds`, `.ds.index`, `.ds.metadata`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokenmill.dataroot.layout import smallest_dtype
from tokenmill.dataroot.npy import token_dtype
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.format import require_whole_documents, running, write_arrays, write_tokens
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files, whole_pieces
from tokenmill.interchange.output import Output


class Datatrove:
    """Writes `SPLIT/00000_SPLIT.ds` with `.ds.index` and `.ds.metadata`, as datatrove's tokenizing step does.

    Layout: `src/datatrove/pipeline/tokens/tokenizer.py` of https://github.com/huggingface/datatrove. `.ds` is the
    tokens, of 2 bytes if there are at most 65,536 ids, else of 4; `.index` is the end of each document in tokens
    (uint64).
    """

    name = "datatrove"
    reader = "nanotron, datatrove's DatatroveFolderDataset: folder OUT/train"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_whole_documents(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        stem = f"{split}/00000_{split}.ds"
        nbytes = dataset.tokens * token_dtype(smallest_dtype(dataset.tokenizer.vocab_size)).itemsize
        return {stem: nbytes, f"{stem}.index": 8 * dataset.documents, f"{stem}.metadata": 100}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        stem = f"{split}/00000_{split}.ds"
        dtype = token_dtype(smallest_dtype(dataset.tokenizer.vocab_size))
        write_tokens(dataset, stem, output, dtype)
        if not output.is_done(f"{stem}.index"):
            with output.file(f"{stem}.index") as file:
                write_arrays(file, (ends for _, ends in running(dataset.lengths())), "<u8")
        if not output.is_done(f"{stem}.metadata"):
            lines = [f"{dataset.tokenizer.name}|{dtype.itemsize}", str(dataset.tokens), _in_words(dataset.tokens)]
            with output.file(f"{stem}.metadata") as file:
                file.write("\n".join(lines).encode())

    def open(self, source: Path, hints: Hints) -> Incoming:
        paths = find_files(source, hints.split, "{split}/*.ds", "*.ds")
        itemsize = _itemsize(paths[0], hints)
        ends = [np.fromfile(f"{path}.index", "<u8").astype(np.int64) for path in paths]
        return Tokens(whole_pieces(paths, itemsize), np.dtype(f"<u{itemsize}"), [np.diff(e, prepend=0) for e in ends])


def _itemsize(path: Path, hints: Hints) -> int:
    """Return the size of a token: as `.metadata` says, if it is there."""
    metadata = Path(f"{path}.metadata")
    size = metadata.read_text().split("\n")[0].rpartition("|")[2] if metadata.is_file() else ""
    return int(size) if size in ("2", "4") else hints.itemsize(path)


def _in_words(count: int) -> str:
    """Return a number as `humanize.metric(count, unit="T")` does: three digits and a prefix."""
    number, prefixes = float(count), ["", "k", "M", "G", "T"]
    while float(f"{number:.3g}") >= 1000 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    places = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{places}f} {prefixes[0]}T"

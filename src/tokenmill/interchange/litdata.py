"""LitData, LitGPT: `chunk-0-N.bin` and `index.json`, read with `TokensLoader`.

Layout: `src/litdata/streaming/writer.py` and `item_loader.py` of https://github.com/Lightning-AI/litData. A chunk is
the number of its items (`<I`), where each begins and the last ends (`<I` each), and the items; here it has one item,
which is tokens. The reader cuts each chunk into blocks and loses what is left over, so all chunks but the last hold
whole samples.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tokenmill.errors import ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files
from tokenmill.interchange.mds import read_index, require_samples
from tokenmill.interchange.output import Output
from tokenmill.loading.data_root import Piece

CHUNK_NBYTES = 1 << 26
"""As `litdata.optimize(chunk_bytes="64MB")`, which its documentation recommends for tokens."""
_HEADER_NBYTES = 12
_FORMATS = {2: "no_header_numpy:5", 4: "no_header_numpy:6"}
"""uint16 and uint32 in its table of NumPy types."""
_LEAF = '[1, {"type": null, "context": null, "children_spec": []}]'
"""How PyTorch's pytree writes down the structure of an item that is one array."""


class LitData:
    """Writes `SPLIT/chunk-0-N.bin` and `SPLIT/index.json`, for blocks of `seq_len` tokens, or of a divisor of that."""

    name = "litdata"
    reader = "LitData, LitGPT: StreamingDataset('OUT/train', item_loader=TokensLoader(block_size=seq_len))"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_samples(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        size, itemsize = _chunk_tokens(dataset), dataset.dtype.itemsize
        sizes = {
            f"{split}/chunk-0-{number}.bin": _HEADER_NBYTES + itemsize * min(size, dataset.tokens - begin)
            for number, begin in enumerate(range(0, dataset.tokens, size))
        }
        return sizes | {f"{split}/index.json": 120 * len(sizes) + 300}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        chunks = []
        for number, tokens in enumerate(dataset.chunks(_chunk_tokens(dataset))):
            name, nbytes = f"chunk-0-{number}.bin", _HEADER_NBYTES + tokens.nbytes
            chunks.append({"chunk_bytes": nbytes, "chunk_size": 1, "dim": len(tokens), "filename": name})
            if not output.is_done(f"{split}/{name}"):
                with output.file(f"{split}/{name}") as file:
                    file.write(np.array([1, _HEADER_NBYTES, nbytes], "<u4"))
                    file.write(np.ascontiguousarray(tokens))
        if not output.is_done(f"{split}/index.json"):
            config = {
                "chunk_bytes": CHUNK_NBYTES,
                "chunk_size": None,
                "compression": None,
                "data_format": [_FORMATS[dataset.dtype.itemsize]],
                "data_spec": _LEAF,
                "encryption": None,
                "item_loader": "TokensLoader",
            }
            with output.file(f"{split}/index.json") as file:
                index = {"chunks": chunks, "config": config, "updated_at": "0"}
                file.write(json.dumps(index, sort_keys=True).encode())

    def open(self, source: Path, hints: Hints) -> Incoming:
        (path,) = find_files(source, hints.split, "{split}/index.json", "index.json")
        kinds = {name: size for size, name in _FORMATS.items()} | {"no_header_tensor:20": 2, "no_header_tensor:16": 4}
        config = json.loads(path.read_bytes()).get("config", {})
        formats = config.get("data_format") or []
        if len(formats) != 1 or formats[0] not in kinds or config.get("compression"):
            raise ImportDataError(
                f"{path}: expected uncompressed tokens of 16 or 32 bits, found {formats}, {config.get('compression')}",
                next_step="write the data set again as such chunks, or import its text",
            )
        itemsize = kinds[formats[0]]
        chunks = read_index(path, "chunks")
        pieces = [
            Piece(path.with_name(chunk["filename"]), int(chunk["dim"]), 4 * (int(chunk["chunk_size"]) + 2))
            for chunk in chunks
        ]
        return Tokens(pieces, np.dtype(f"<u{itemsize}"))


def _chunk_tokens(dataset: ExportedDataset) -> int:
    """Return the tokens of a chunk: whole samples, about `CHUNK_NBYTES`."""
    return dataset.seq_len * max(1, CHUNK_NBYTES // (dataset.seq_len * dataset.dtype.itemsize))

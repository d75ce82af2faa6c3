"""MosaicML Streaming, llm-foundry: MDS shards and `index.json`.

Layout: `streaming/base/format/mds/` of https://github.com/mosaicml/streaming. A shard is the number of samples
(`<I`), where each begins and the last ends (`<I` each, from the start of the file), the configuration as JSON, and
the samples. A sample has the only column, `tokens`, whose shape its encoding fixes, so it is nothing but its tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.errors import ExportError, ImportDataError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.incoming import Hints, Incoming, Tokens, find_files
from tokenmill.interchange.output import Output
from tokenmill.loading.data_root import Piece

SHARD_NBYTES = 1 << 26
"""As MDSWriter has it by default."""
_KINDS = {2: "uint16", 4: "int32"}


class Mds:
    """Writes `SPLIT/shard.NNNNN.mds` and `SPLIT/index.json`: a row is a sample of `seq_len` tokens."""

    name = "mds"
    reader = "MosaicML Streaming, llm-foundry: StreamingDataset(local='OUT', split='train')"

    def refuse(self, dataset: ExportedDataset) -> None:
        require_samples(dataset, self.name)

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        config = _config(dataset)
        sizes = {
            f"{split}/{_shard_name(number)}": 4 + 4 * (samples + 1) + len(config) + samples * _sample_nbytes(dataset)
            for number, samples in enumerate(_shards(dataset))
        }
        return sizes | {f"{split}/index.json": 500 * len(sizes)}

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        config = _config(dataset)
        nbytes = _sample_nbytes(dataset)
        shards = _shards(dataset)
        for number, chunk in enumerate(dataset.chunks(shards[0] * dataset.seq_len)):  # to its end: it makes the digest
            name = f"{split}/{_shard_name(number)}"
            if number == len(shards) or output.is_done(name):
                continue
            samples = shards[number]
            first = 4 + 4 * (samples + 1) + len(config)
            with output.file(name) as file:
                file.write(np.array([samples], "<u4"))
                file.write((first + np.arange(samples + 1, dtype=np.int64) * nbytes).astype("<u4"))
                file.write(config)
                file.write(np.ascontiguousarray(chunk[: samples * dataset.seq_len]))
        output.settle()  # the index has the digests of the shards
        if not output.is_done(f"{split}/index.json"):
            with output.file(f"{split}/index.json") as file:
                file.write(json.dumps(_index(dataset, split, output), sort_keys=True).encode())

    def open(self, source: Path, hints: Hints) -> Incoming:
        (path,) = find_files(source, hints.split, "{split}/index.json", "index.json")
        shards = read_index(path, "shards")
        pieces, kinds = [], set()
        for shard in shards:
            names, encodings, sizes = (shard.get(f"column_{what}") or [] for what in ("names", "encodings", "sizes"))
            kind = str(encodings[0]).split(":")[1] if len(encodings) == 1 and ":" in str(encodings[0]) else ""
            is_ours = names == ["tokens"] and kind in ("uint16", "int32", "uint32") and sizes != [None]
            if shard.get("format") != "mds" or shard.get("compression") or not is_ours:
                raise ImportDataError(
                    f"{path}: expected uncompressed MDS with the only column tokens, arrays of a fixed length, found "
                    f"{names} {encodings} {sizes}",
                    next_step="write the data set again as such shards, or import its text",
                )
            kinds.add(np.dtype(kind))
            raw, nbytes = shard["raw_data"], int(shard["samples"]) * int(next(iter(sizes)))
            tokens = nbytes // np.dtype(kind).itemsize
            pieces.append(Piece(path.with_name(raw["basename"]), tokens, int(raw["bytes"]) - nbytes))
        if len(kinds) != 1:
            raise ImportDataError(f"{path}: shards of several types", next_step="import each kind alone")
        return Tokens(pieces, kinds.pop())


def read_index(path: Path, what: str) -> list[dict[str, Any]]:
    """Return the list of files of an `index.json`.

    Raises:
        ImportDataError: it has none.
    """
    try:
        found = json.loads(path.read_bytes())[what]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not found:
        raise ImportDataError(f"{path}: expected a list of {what}, found none", next_step="check --from")
    return found


def require_samples(dataset: ExportedDataset, name: str) -> None:
    """Require a whole sample, for formats whose rows are samples.

    Raises:
        ExportError: there is none.
    """
    if dataset.samples == 0:
        raise ExportError(
            f"{dataset.root}: {name} has samples, and {dataset.tokens:,} tokens make none of {dataset.seq_len:,}",
            next_step="build a view with a smaller seq_len, and export that",
        )


def _sample_nbytes(dataset: ExportedDataset) -> int:
    return dataset.seq_len * dataset.dtype.itemsize


def _shards(dataset: ExportedDataset) -> list[int]:
    """Return the samples of each shard."""
    most = max(1, (SHARD_NBYTES - 8192) // (_sample_nbytes(dataset) + 4))
    whole, rest = divmod(dataset.samples, most)
    return [most] * whole + [rest] * (rest > 0)


def _shard_name(number: int) -> str:
    return f"shard.{number:05d}.mds"


def _fields(dataset: ExportedDataset) -> dict[str, Any]:
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": SHARD_NBYTES,
        "column_names": ["tokens"],
        "column_encodings": [f"ndarray:{_KINDS[dataset.dtype.itemsize]}:{dataset.seq_len}"],
        "column_sizes": [_sample_nbytes(dataset)],
    }


def _config(dataset: ExportedDataset) -> bytes:
    return json.dumps(_fields(dataset), sort_keys=True).encode()


def _index(dataset: ExportedDataset, split: str, output: Output) -> dict[str, Any]:
    shards = []
    for number, samples in enumerate(_shards(dataset)):
        written = output.record.files[f"{split}/{_shard_name(number)}"]
        raw = {"basename": _shard_name(number), "bytes": written.nbytes, "hashes": {"sha256": written.sha256}}
        shards.append({"samples": samples, "raw_data": raw, "zip_data": None, **_fields(dataset)})
    return {"version": 2, "shards": shards}

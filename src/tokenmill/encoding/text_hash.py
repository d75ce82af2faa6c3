"""Text hash: XXH3-64 of a document's text, its identity wherever it lies. The one module that imports xxhash."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

_SHORT_NBYTES = 256
"""Texts that are shorter in the mean are copied, which is faster than to look at each where it lies."""


def text_hashes(documents: pa.LargeStringArray) -> NDArray[np.uint64]:
    """Return XXH3-64 (seed 0) of the UTF-8 bytes of each text, shape `(documents,)`; there are no nulls.

    The function is that of https://github.com/Cyan4973/xxHash, whose results are the same since version 0.8.
    """
    if len(documents) == 0:
        return np.empty(0, np.uint64)
    if documents.nbytes < _SHORT_NBYTES * len(documents):
        return np.fromiter(map(xxhash.xxh3_64_intdigest, documents.cast(pa.large_binary()).to_pylist()), np.uint64)
    _, offsets, data = documents.buffers()
    bounds = np.frombuffer(offsets, np.int64)[documents.offset : documents.offset + len(documents) + 1].tolist()
    texts = map(memoryview(data).__getitem__, map(slice, bounds, bounds[1:]))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(documents))


def bytes_hash(data: bytes | memoryview) -> int:
    """Return XXH3-64 (seed 0) of some bytes."""
    return xxhash.xxh3_64_intdigest(data)

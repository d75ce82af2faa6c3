"""Order: where each document of a view comes. Pure NumPy.

A document's key is the output of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number
Generators", 2014) at the place of its row, seeded by a digest of the view's seed, the source's name and its file.
Documents in ascending order of their keys are a random permutation that needs no count beforehand, and in which those
that were there before keep their relative order when others are added.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from tokenmill.encoding.splitmix import GOLDEN, mix64


def file_key(seed: int, source: str, path: str) -> int:
    """Return the seed of a source file: BLAKE2b of 8 bytes, as a little-endian integer."""
    named = f"{seed}\0{source}\0{path}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8, person=b"tokenmill view").digest(), "little")


def document_keys(file_keys: NDArray[np.uint64], row: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the key of each document, shape `(documents,)`, by the key of its file and its row."""
    return mix64(file_keys + (row.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def is_held_out(identity: NDArray[np.uint64], holdout: float) -> NDArray[np.bool_]:
    """Return which documents are for validation: those whose hash is below `holdout * 2**64`, so equal texts agree."""
    threshold = math.ceil(holdout * 2**64)
    if threshold >= 2**64:
        return np.ones(len(identity), bool)
    return identity < np.uint64(threshold)

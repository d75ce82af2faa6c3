"""Long documents: encoded in pieces, which take bounded memory and go to several threads. Same tokens.

A text is cut only at a space between two ASCII letters, and only for tokenizers that never merge across one (see
`gigatoken`, which knows them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

Cut: TypeAlias = Literal["before", "out"]
"""Whether a piece begins with the space at which the text was cut, or the space is taken out."""

LONG_NBYTES = 8 << 20
"""Longer documents are cut."""
PIECE_NBYTES = 1 << 20
GROUP_NBYTES = 8 << 20
"""Pieces that are encoded in one call: a call of the backend costs 5 ms."""
_BETWEEN_LETTERS = re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])")


def cut_document(document: pa.LargeStringArray, cut: Cut) -> Iterator[tuple[pa.LargeStringArray, slice]]:
    """Cut a text, an array of one row, into groups of pieces that share its memory.

    Yields each group as an array of strings, and which of these are pieces: where spaces are taken out they stand
    between the pieces, and are not to be encoded.
    """
    _, offsets, data = document.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[document.offset : document.offset + 2].tolist()
    bounds = [begin]
    for at in _cuts(memoryview(data), begin, end):
        bounds += [at, at + 1] if cut == "out" else [at]
        if at - bounds[0] >= GROUP_NBYTES:
            group = bounds if cut == "before" else bounds[:-1]
            yield _strings(group, data), slice(None, None, 1 if cut == "before" else 2)
            bounds = bounds[-1:]
    bounds.append(end)
    yield _strings(bounds, data), slice(None, None, 1 if cut == "before" else 2)


def _cuts(data: memoryview, begin: int, end: int) -> Iterator[int]:
    """Yield positions of spaces to cut at, at least `PIECE_NBYTES` from each other and from the begin."""
    at = begin + PIECE_NBYTES
    while at < end and (match := _BETWEEN_LETTERS.search(data, at, end)):
        yield match.start()
        at = match.start() + PIECE_NBYTES


def _strings(bounds: list[int], data: pa.Buffer) -> pa.LargeStringArray:
    return pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(np.array(bounds, np.int64)), data)

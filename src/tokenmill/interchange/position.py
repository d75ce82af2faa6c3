"""Position: from where a trainer says it is back to the stream, and so to source file and row."""

from __future__ import annotations

from pathlib import Path

from tokenmill.errors import QueryError
from tokenmill.interchange.llmc import FILE_TOKENS
from tokenmill.loading.provenance import Provenance, where_range
from tokenmill.loading.view import open_root

POSITIONS = {
    "megatron": "DOCUMENT[:OFFSET]",
    "parquet": "ROW[:OFFSET]",
    "mds": "SAMPLE[:OFFSET]",
    "litdata": "BLOCK[:OFFSET]",
    "datatrove": "WINDOW[:OFFSET]",
    "nanogpt": "TOKEN",
    "olmo": "TOKEN",
    "torchtitan": "TOKEN",
    "llmc": "FILE:TOKEN",
}
"""What a position is, by trainer. Counts begin at 0; an offset is in tokens, and without one the whole is meant."""


def where_trainer(root: Path, trainer: str, position: str) -> Provenance:
    """Return where the tokens at a trainer's position come from.

    Args:
        root: the data root or view that was exported.
        trainer: a format of exports.
        position: as `POSITIONS` says. Samples, blocks and windows are those of the data set's `seq_len`; a window has a
            token more, and begins after the one before.

    Raises:
        QueryError: there is no such position.
        DataRootError: the data root has no manifest, or is not finished.
    """
    first, offset = _parsed(trainer, position)
    found = open_root(root)
    tokens, length = found.tokens().tokens, found.seq_len
    if trainer in ("megatron", "parquet"):
        count = found.document_count or 0
        if first >= count:
            raise _nothing_there(trainer, position, f"the data set has {count} documents")
        document = found.documents().document(first)
        begin, end = document.start, min(document.start + document.tokens, tokens)
    elif trainer in ("mds", "litdata"):
        begin, end = first * length, (first + 1) * length
    elif trainer == "datatrove":
        begin, end = first * (length + 1), (first + 1) * (length + 1)
    elif trainer == "llmc":  # every end token lies before its document, so all others are a place further on
        begin = max(0, first * FILE_TOKENS + (offset or 0) - 1)
        end, offset = begin + 1, None
    else:
        begin, end = first, first + 1
    if offset is not None:
        if offset >= end - begin:
            raise _nothing_there(trainer, position, f"there are {end - begin} tokens")
        begin, end = begin + offset, begin + offset + 1
    if end > tokens:
        raise _nothing_there(trainer, position, f"the data set has {tokens} tokens")
    return where_range(found, begin, end)


def _parsed(trainer: str, position: str) -> tuple[int, int | None]:
    shape = POSITIONS[trainer]
    first, colon, offset = position.partition(":")
    fits = bool(colon) if shape == "FILE:TOKEN" else not colon or ":" in shape
    if not (fits and first.isascii() and first.isdecimal() and (not colon or offset.isdecimal())):
        raise QueryError(
            f"position {position!r} of {trainer}: expected {shape}, in numbers", next_step="correct --position"
        )
    return int(first), int(offset) if colon else None


def _nothing_there(trainer: str, position: str, why: str) -> QueryError:
    return QueryError(f"position {position} of {trainer}: {why}", next_step="check that this data set was exported")

"""Format: what an export needs to know of the files of a trainer, and helpers that several formats share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ExportError
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.incoming import Hints, Incoming
from tokenmill.interchange.output import Output, OutputFile

UINT16_IDS = 1 << 16


class Format(Protocol):
    """A format of files that trainers read."""

    name: str
    """As `--to` has it."""
    reader: str
    """What reads it."""

    def refuse(self, dataset: ExportedDataset) -> None:
        """Raise what stands against exporting a data set.

        Raises:
            ExportError: the format cannot hold it.
        """
        ...

    def files(self, dataset: ExportedDataset, split: str) -> dict[str, int]:
        """Return the files that `write` makes of a split, with their sizes in bytes; sizes may be estimates."""
        ...

    def write(self, dataset: ExportedDataset, split: str, output: Output) -> None:
        """Write the files of a split (`train` or `val`) that are not there yet."""
        ...

    def open(self, source: Path, hints: Hints) -> Incoming:
        """Open files of this format, whatever program made them, to import them.

        Raises:
            ImportDataError: they are not there, or not of this format.
        """
        ...


def require_whole_documents(dataset: ExportedDataset, name: str) -> None:
    """Require that documents lie in one piece, for formats that say where they begin.

    Raises:
        ExportError: samples are put in an order of their own.
    """
    if dataset.cuts_documents:
        raise ExportError(
            f"{dataset.root}: its samples are {dataset.arranged}, which cuts documents, and {name} is about documents",
            next_step='build a view with shuffle = "documents" or "none", and without weights; trainers shuffle by '
            "themselves",
        )


LONGEST_INT32 = (1 << 31) - 1


def require_short_documents(dataset: ExportedDataset, name: str) -> None:
    """Require that the length of every document fits into 32 bits with a sign.

    Raises:
        ExportError: one is longer.
    """
    longest = max((int(lengths.max()) for lengths in dataset.lengths() if len(lengths)), default=0)
    if longest > LONGEST_INT32:
        raise ExportError(
            f"{dataset.root}: {name} has lengths of 32 bits: expected documents of at most {LONGEST_INT32} "
            f"tokens, found {longest}",
            next_step=f'leave the document out with a view: where = "tokens <= {LONGEST_INT32}"',
        )


def require_uint16(dataset: ExportedDataset, name: str) -> None:
    """Require that all ids fit into 16 bits.

    Raises:
        ExportError: they do not.
    """
    if dataset.tokenizer.vocab_size > UINT16_IDS:
        raise ExportError(
            f"{dataset.root}: {name} has ids of 16 bits: expected a vocabulary of at most {UINT16_IDS}, added tokens "
            f"included, found {dataset.tokenizer.vocab_size}",
            next_step="choose another format, or a tokenizer with fewer ids",
        )


def smallest_unsigned(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type, little-endian, that holds ids below `vocab_size`."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= UINT16_IDS else "<u4")


def write_tokens(dataset: ExportedDataset, name: str, output: Output, dtype: np.dtype[Any]) -> None:
    """Write all tokens into a file, or link the one that holds just them."""
    if output.is_done(name):
        return
    whole = dataset.whole_file
    same = dtype.itemsize == dataset.dtype.itemsize
    if same and whole is not None and output.link(whole, name, dataset.digest()):
        return
    with output.file(name) as file:
        for chunk in dataset.chunks():
            file.write(as_type(chunk, dtype))


def as_type(tokens: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return tokens in another type that holds them; unsigned 32-bit ids below 2^31 are the same bits signed."""
    if tokens.dtype.itemsize == dtype.itemsize:
        return np.ascontiguousarray(tokens)
    return tokens.astype(dtype)


def write_arrays(file: OutputFile, arrays: Iterator[NDArray[Any]], dtype: str) -> None:
    """Write arrays one after the other in a type."""
    for array in arrays:
        file.write(np.ascontiguousarray(array.astype(dtype, copy=False)))


def running(
    lengths: Iterator[NDArray[np.int64]], scale: int = 1
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield where each of some lengths begins and ends, `scale` times as far."""
    base = 0
    for each in lengths:
        ends = base + np.cumsum(each) * scale
        yield ends - each * scale, ends
        base = int(ends[-1]) if len(ends) else base


class Bounds:
    """Bounds of documents, so many at a time."""

    def __init__(self, bounds: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
        self._coming = bounds
        self._here = np.empty((2, 0), np.int64)

    def take(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the next `count` documents begin and end."""
        pieces = [self._here]
        while sum(piece.shape[1] for piece in pieces) < count:
            pieces.append(np.stack(next(self._coming)))
        joined = np.hstack(pieces)
        self._here = joined[:, count:]
        return joined[0, :count], joined[1, :count]

"""Incoming: data that others tokenized, as documents after each other, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import DataRootError, ImportDataError
from tokenmill.interchange.output import ExportRecord, load_export
from tokenmill.loading.data_root import Piece, TokenStream

BLOCK_TOKENS = 1 << 21


class DocumentBlock(NamedTuple):
    """Documents one after the other, of one file."""

    file: int
    """Index into `Incoming.files`."""
    first_row: int
    """Number of the first document in that file."""
    lengths: NDArray[np.int64]
    tokens: NDArray[Any]
    """Tokens of all documents, unsigned, shape `(lengths.sum(),)`."""


class Incoming(Protocol):
    """What a format's `open` found."""

    files: list[Path]
    dtype: np.dtype[Any]
    """Data type of the tokens, unsigned."""
    is_guess: bool
    """Whether bounds of documents are where EOS is, as the format has none."""
    whole_file: Path | None
    """The file whose bytes are all tokens and nothing else, if there is one."""

    def blocks(self, eos_id: int) -> Iterator[DocumentBlock]:
        """Yield all documents, in order.

        Raises:
            ImportDataError: a file does not hold what it says.
        """
        ...


class Tokens:
    """Tokens in files that hold nothing behind them (an `Incoming`).

    Args:
        pieces: the files, in order.
        dtype: of a token; signed types are taken as unsigned ones of that size.
        lengths: of the documents of each file, in order; None: a document ends with EOS.
        end: token that the stream has at its end beside those of the files, and lacks at its beginning; None: neither.
        tokens: how many of them count, where less than all do.

    Raises:
        ImportDataError: a file is missing, or not as long as it must be.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        dtype: np.dtype[Any],
        lengths: Sequence[NDArray[np.integer[Any]]] | None = None,
        *,
        end: int | None = None,
        tokens: int | None = None,
    ) -> None:
        self.files = [piece.path for piece in pieces]
        self.dtype = np.dtype(f"<u{dtype.itemsize}")
        self.is_guess = lengths is None
        is_all = len(pieces) == 1 and pieces[0].offset == 0 and end is None and tokens is None
        self.whole_file = pieces[0].path if is_all else None
        try:
            self._streams = [TokenStream([piece], self.dtype) for piece in pieces]
        except DataRootError as error:
            raise ImportDataError(error.message, next_step="get the file again, or make it again") from None
        self._lengths = lengths
        self._end = end
        self._most = tokens
        for path, stream, each in zip(self.files, self._streams, lengths or (), strict=False):
            if int(each.sum()) != stream.tokens or (len(each) and int(each.min()) < 0):
                raise ImportDataError(
                    f"{path}: holds {stream.tokens} tokens, and its documents {int(each.sum())}",
                    next_step="get the files again, or make them again",
                )

    def blocks(self, eos_id: int) -> Iterator[DocumentBlock]:
        """Yield all documents, in order."""
        if self._lengths is None:
            yield from self._between_ends(eos_id)
            return
        for file, (stream, lengths) in enumerate(zip(self._streams, self._lengths, strict=True)):
            ends = np.cumsum(lengths, dtype=np.int64)
            first = begin = 0
            while first < len(ends):
                stop = max(first + 1, int(np.searchsorted(ends, begin + BLOCK_TOKENS, side="right")))
                end = int(ends[stop - 1])
                of_block = np.asarray(lengths[first:stop], np.int64)
                yield DocumentBlock(file, first, of_block, stream.read(begin, end))
                first, begin = stop, end

    def _chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the tokens that count, each time with the file that they are of."""
        left = sum(stream.tokens for stream in self._streams) if self._most is None else self._most
        is_first = self._end is not None
        for file, stream in enumerate(self._streams):
            for begin in range(int(is_first), stream.tokens, BLOCK_TOKENS):
                chunk = stream.read(begin, min(begin + BLOCK_TOKENS, stream.tokens))[:left]
                left -= len(chunk)
                yield file, chunk
            is_first = False
        if self._end is not None and left > 0:
            yield len(self._streams) - 1, np.array([self._end], self.dtype)

    def _between_ends(self, eos_id: int) -> Iterator[DocumentBlock]:
        """Yield documents that end with EOS; the rest at the end is one, too. One in two files is the first's."""
        waiting: list[NDArray[Any]] = []
        of_waiting, rows = 0, [0] * len(self._streams)
        for file, chunk in self._chunks():
            ends = np.flatnonzero(chunk == eos_id) + 1
            if not waiting:
                of_waiting = file
            if len(ends) == 0:
                waiting.append(chunk)
                continue
            tokens = np.concatenate([*waiting, chunk[: ends[-1]]])
            lengths = np.diff(ends + sum(map(len, waiting)), prepend=0)
            if of_waiting != file:  # the first document began in the file before
                yield DocumentBlock(of_waiting, rows[of_waiting], lengths[:1], tokens[: lengths[0]])
                rows[of_waiting] += 1
                tokens, lengths = tokens[lengths[0] :], lengths[1:]
            if len(lengths):
                yield DocumentBlock(file, rows[file], lengths, tokens)
            rows[file] += len(lengths)
            waiting = [chunk[ends[-1] :]] if ends[-1] < len(chunk) else []
            of_waiting = file
        if waiting:
            tokens = np.concatenate(waiting)
            yield DocumentBlock(of_waiting, rows[of_waiting], np.array([len(tokens)]), tokens)


def find_files(source: Path, split: str, *patterns: str) -> list[Path]:
    """Return the files of a split in a directory: those that the first pattern that fits any finds, sorted by name.

    A pattern may name `{split}`. A file that is named is taken as it is.

    Raises:
        ImportDataError: none fits.
    """
    if source.is_file():
        return [source]
    for pattern in patterns:
        if found := sorted(source.glob(pattern.format(split=split))):
            return found
    looked_for = ", ".join(pattern.format(split=split) for pattern in patterns)
    raise ImportDataError(
        f"{source}: no such files in it: {looked_for}", next_step="check the path, --from and --split"
    )


def whole_pieces(paths: Sequence[Path], itemsize: int, offset: int = 0) -> list[Piece]:
    """Return files that are nothing but tokens after a header.

    Raises:
        ImportDataError: a size does not fit.
    """
    pieces = []
    for path in paths:
        tokens, rest = divmod(path.stat().st_size - offset, itemsize)
        if rest or tokens < 0:
            raise ImportDataError(
                f"{path}: expected tokens of {itemsize} bytes, found {path.stat().st_size - offset} bytes",
                next_step="check --from and --dtype",
            )
        pieces.append(Piece(path, tokens, offset))
    return pieces


class Hints(NamedTuple):
    """What is known besides the files."""

    split: str
    dtype: np.dtype[Any] | None
    """Data type that the user gives, for formats that do not say it."""
    eos_id: int
    record: ExportRecord | None
    """`export.json`, where tokenmill made them."""

    def itemsize(self, path: Path) -> int:
        """Return the size of a token of a format that does not say it.

        Raises:
            ImportDataError: nothing says it.
        """
        if self.dtype is not None:
            return self.dtype.itemsize
        if self.record is not None:
            return np.dtype(self.record.splits[self.split].dtype).itemsize
        raise ImportDataError(f"{path}: nothing says how large a token is", next_step="give --dtype uint16 or uint32")


def find_record(source: Path, split: str) -> ExportRecord | None:
    """Return `export.json` of a directory, if it is a finished export that has the split."""
    record = load_export(source) if source.is_dir() else None
    return record if record is not None and record.complete and split in record.splits else None

"""Source, plain text without a separator: a file is a document.

Its one row is known before the file is read, which the thread that encodes it does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from tokenmill.corpus.opening import (
    BYTE_ORDER_MARK,
    READ_NBYTES,
    compression_of,
    open_content,
    translate_source_errors,
)
from tokenmill.corpus.reader import Figures, Opener, Span, Texts, too_large


class WholeFile:
    """A text file that is one row (a `reader.SpanReader`)."""

    rows = 1

    def __init__(self, name: str, opener: Opener, nbytes: int, *, limit: int) -> None:
        self.name = name
        self._opener = opener
        self._nbytes = nbytes
        self._limit = limit
        self._compression = compression_of(name)

    def figures(self) -> Figures:
        """Return one row, and the size of the file; compressed text is three times as large, about."""
        return Figures(1, self._nbytes * (3 if self._compression else 1), exact=self._compression is None)

    def sample(self) -> Texts:
        """Return the beginning of the text."""
        return Texts(pa.array([self._read(READ_NBYTES)], pa.large_binary()))

    def spans(self) -> Iterator[Span]:
        """Yield the only span."""
        yield Span(0, 1, 0, self._nbytes)

    def start(self) -> None:
        """Do nothing: the file is read by the thread that encodes it."""

    def prefetch(self, span: Span) -> None:
        """Do nothing."""

    def keep_only(self, spans: Collection[Span]) -> None:
        """Do nothing: nothing is kept."""

    def drop(self, span: Span) -> None:
        """Do nothing."""

    def read(self, span: Span) -> Texts:
        """Return the text.

        Raises:
            SourceError: it cannot be read, or is larger than a document may be.
        """
        if self._compression is None and self._nbytes > self._limit:
            raise too_large(self.name, 0, f"{self._nbytes} bytes", self._limit)
        data = self._read(self._limit + 1)
        if len(data) > self._limit:
            raise too_large(self.name, 0, "more", self._limit)
        return Texts(pa.array([data], pa.large_binary()))

    def _read(self, most: int) -> bytes:
        """Return the first `most` bytes of the content."""
        pieces: list[bytes] = []
        with translate_source_errors(self.name, lambda: "after its beginning" if pieces else "at its beginning"):
            opened = self._opener([(0, self._nbytes)])
            if isinstance(opened, Path) and self._compression is None:
                return _read_local(opened, self._nbytes, most).removeprefix(BYTE_ORDER_MARK)
            with open_content(opened, self.name, self._nbytes) as (_, stream):
                while most > 0 and (data := stream.read(min(READ_NBYTES, most))):
                    pieces.append(data)
                    most -= len(data)
        return b"".join(pieces).removeprefix(BYTE_ORDER_MARK)


def _read_local(path: Path, nbytes: int, most: int) -> bytes:
    """Return the first `most` bytes of a file of about `nbytes`.

    There may be many files, and threads that read them side by side wait for each other at each system call: so a
    small file is read by one, which asks for a byte more than there should be.
    """
    pieces: list[bytes] = []
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = nbytes + 1
        while most > 0 and (data := os.read(descriptor, min(size, most))):
            pieces.append(data)
            most -= len(data)
            if len(data) < size <= READ_NBYTES:  # the end, as the system reads that much at once
                break
        return b"".join(pieces)
    finally:
        os.close(descriptor)

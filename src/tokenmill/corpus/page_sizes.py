"""Page sizes: the pages of a parquet file, held to a limit before the library makes room for what they declare.

The header of a page says how large the page is once it is decompressed, and the library allocates that much before it
looks at anything else. Headers are Thrift structs in the compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md); their fields are those of
`PageHeader` in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

_HEADER_NBYTES = 16 << 20
"""What Arrow, too, takes for the largest header."""
_PEEK_NBYTES = 1 << 16
_DEEPEST = 32
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _, _, _, _STRUCT, _UUID = range(14)
_FIXED_NBYTES = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}


class PageTooLargeError(ValueError):
    """A page declares more than the limit, or its header is none."""


class PageHeader(NamedTuple):
    """What the header of a page declares."""

    header_nbytes: int
    compressed_nbytes: int
    """What follows the header."""
    uncompressed_nbytes: int

    def check(self, at: int, limit: int) -> None:
        """Raise `PageTooLargeError` if the page, which begins at byte `at`, is larger than `limit`."""
        if self.uncompressed_nbytes > limit:
            raise PageTooLargeError(
                f"a page at byte {at} declares {self.uncompressed_nbytes} bytes, more than {limit} "
                "(see --max-document-size)"
            )


def check_pages(data: bytes, begin: int, end: int, limit: int) -> None:
    """Check the pages of a column chunk of a parquet file that is in memory, like `BoundedPages`."""
    view = memoryview(data)
    while begin < min(end, len(data)):
        try:
            header = parse_page_header(view[begin:])
        except IndexError:
            raise _endless(begin) from None
        header.check(begin, limit)
        begin += header.header_nbytes + header.compressed_nbytes


def _endless(at: int) -> PageTooLargeError:
    return PageTooLargeError(f"the header of the page at byte {at} has no end")


class BoundedPages(io.RawIOBase):
    """A parquet file, front to back within each column chunk, whose pages are looked at as they pass.

    Args:
        file: the file; seekable.
        nbytes: its size.
        chunks: `(begin, end)` of the column chunks that are read.
        limit: bytes of a page, decompressed.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, nbytes: int, chunks: Sequence[tuple[int, int]], limit: int):
        super().__init__()
        self._file, self._nbytes, self._limit = file, nbytes, limit
        self._next = [[begin, end] for begin, end in chunks]
        """Per chunk: where the header of the next page is, and the end of all."""

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self._file.tell()
        data = self._file.read(-1 if size is None else size) or b""
        for chunk in self._next:
            while begin <= chunk[0] < min(chunk[1], begin + len(data)):
                header = self._header(data, begin, chunk[0])
                header.check(chunk[0], self._limit)
                chunk[0] += header.header_nbytes + header.compressed_nbytes
        return data

    def _header(self, data: bytes, begin: int, at: int) -> PageHeader:
        """Return the header at byte `at` of the file, which begins in `data`."""
        end = begin + len(data)
        try:
            return parse_page_header(memoryview(data)[at - begin :])
        except IndexError:
            pass  # the header is longer than what was read
        rest = bytearray(data[at - begin :])
        try:
            while len(rest) < _HEADER_NBYTES:
                more = self._file.read(_PEEK_NBYTES) or b""
                rest += more
                try:
                    return parse_page_header(memoryview(bytes(rest)))
                except IndexError:
                    if not more:
                        break
        finally:
            self._file.seek(end)
        raise _endless(at)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        """In bytes."""
        return self._nbytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def parse_page_header(data: memoryview) -> PageHeader:
    """Return the header that `data` begins with.

    Raises:
        IndexError: `data` ends before the header does.
        PageTooLargeError: no header.
    """
    sizes: dict[int, int] = {}
    at, number = 0, 0
    while True:
        number, kind, at = _field(data, at, number)
        if kind == _STOP:
            break
        if kind == _I32 and number in (2, 3):
            raw, at = _varint(data, at)
            sizes[number] = (raw >> 1) ^ -(raw & 1)
        else:
            at = _skip(data, at, kind, 0)
    if len(sizes) != 2 or min(sizes.values()) < 0:
        raise PageTooLargeError("a page header does not say how large the page is")
    return PageHeader(at, sizes[3], sizes[2])


def _field(data: memoryview, at: int, before: int) -> tuple[int, int, int]:
    """Number and kind of the field at `at`, and where its value begins; the number of the one before is `before`."""
    byte = data[at]
    if byte >> 4:
        return before + (byte >> 4), byte & 15, at + 1
    if byte & 15 == _STOP:
        return before, _STOP, at + 1
    raw, at = _varint(data, at + 1)
    return (raw >> 1) ^ -(raw & 1), byte & 15, at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise PageTooLargeError("a page header holds a number of more than 64 bits")


def _skip(data: memoryview, at: int, kind: int, depth: int) -> int:
    """Return where the value of that kind at `at` ends."""
    if depth > _DEEPEST:
        raise PageTooLargeError("a page header is nested too deep")
    if kind in (_TRUE, _FALSE):
        return at
    if kind in (_I16, _I32, _I64):
        return _varint(data, at)[1]
    if kind == _BINARY:
        nbytes, at = _varint(data, at)
        at += nbytes
    elif kind == _STRUCT:
        number = 0
        while True:
            number, inner, at = _field(data, at, number)
            if inner == _STOP:
                return at
            at = _skip(data, at, inner, depth + 1)
    elif kind in _FIXED_NBYTES:
        at += _FIXED_NBYTES[kind]
    else:  # no header has a list, a set or a map
        raise PageTooLargeError(f"a page header holds something of kind {kind}")
    if at > len(data):
        raise IndexError
    return at

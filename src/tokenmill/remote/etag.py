"""ETags: how stores name the bytes of an object, made and compared here alone. Pure.

Most stores make the ETag of an object of the MD5 of its bytes, or of the MD5s of its parts and their count. Some list
it without quotes, in upper case, or as a weak one; here all are written one way.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

_MD5 = re.compile(r"[0-9a-fA-F]{32}(-\d+)?")


def canonical(etag: str) -> str:
    """Return an ETag as it is written here: quoted, not marked as weak, MD5s in lower case; empty if there is none."""
    value = etag.strip().removeprefix("W/").strip().strip('"')
    if not value:
        return ""
    return f'"{value.lower() if _MD5.fullmatch(value) else value}"'


def is_weak(etag: str) -> bool:
    """Return whether it says of itself that equal ones need not mean equal bytes (RFC 9110, 8.8.1)."""
    return etag.strip().startswith("W/")


def same(first: str, second: str) -> bool:
    """Return whether two ETags are one, however they are written. None at all is not the same as anything."""
    return canonical(first) == canonical(second) != ""


def md5_etag(data: bytes | bytearray | memoryview) -> str:
    """Return the ETag of an object stored whole, or of a part, where the store makes it of the bytes (most do)."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def content_md5(etag: str) -> str:
    """Return what `md5_etag` made as the header `Content-MD5` (RFC 1864) writes it."""
    return base64.b64encode(bytes.fromhex(etag.strip('"'))).decode()


def parts_etag(etags: list[str]) -> str:
    """Return the ETag of an object made of parts with these."""
    digests = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(etags)}"'


def likely_part_nbytes(etag: str, nbytes: int) -> list[int]:
    """Return sizes that the parts of an object may have, by its size and their number: those that common tools use."""
    match = _MD5.fullmatch(etag.strip('"'))
    if match is None or not match[1]:
        return []
    count = int(match[1][1:])
    even = -(-nbytes // max(1, count))
    sizes = [each << 20 for each in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1024)]
    sizes += [each * 10**6 for each in (5, 10, 50, 100)] + [-(-even // (1 << 20)) << 20, even]
    return list(dict.fromkeys(size for size in sizes if size and -(-nbytes // size) == count))


class ETagHasher:
    """The ETag that bytes have where it is made of them: of the whole (MD5), or of its parts.

    Args:
        etag: as the store lists it, in canonical form.
        part_sizes: in bytes; those that its parts may have, where it was made of parts.
    """

    def __init__(self, etag: str, part_sizes: Iterable[int] = ()) -> None:
        match = _MD5.fullmatch(etag.strip('"'))
        self._expected = etag
        self._makers: list[_Maker] = []
        if match is not None:
            self._makers = [_Maker(size) for size in part_sizes] if match[1] else [_Maker(None)]

    @property
    def is_known(self) -> bool:
        """Whether it can be made of the bytes at all."""
        return bool(self._makers)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Go on with the next bytes."""
        for maker in self._makers:
            maker.update(data)

    @property
    def found(self) -> str:
        """The ETag of the bytes seen: the one expected, if any size of parts gives that; empty where none is known."""
        found = [maker.found for maker in self._makers]
        return self._expected if self._expected in found else next(iter(found), "")


class _Maker:
    def __init__(self, part_nbytes: int | None) -> None:
        self._part_nbytes = part_nbytes
        self._parts: list[str] = []
        self._part = hashlib.md5(usedforsecurity=False)
        self._in_part = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = len(view) if self._part_nbytes is None else self._part_nbytes - self._in_part
            self._part.update(view[:room])
            self._in_part += len(view[:room])
            view = view[room:]
            if self._in_part == self._part_nbytes:
                self._parts.append(self._part.hexdigest())
                self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0

    @property
    def found(self) -> str:
        if self._part_nbytes is None:
            return f'"{self._part.hexdigest()}"'
        return parts_etag([*self._parts, *([self._part.hexdigest()] if self._in_part else [])])

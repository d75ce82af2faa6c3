"""Ranges: a remote file as Arrow reads it, parts of it fetched ahead over several connections."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

PART_NBYTES = 4 << 20
_PARTS_AHEAD = 4

Fetch = Callable[[int, int], bytearray]
"""Offset and size in bytes to exactly those bytes."""


class _Part(NamedTuple):
    begin: int
    end: int


class RemoteFile(io.RawIOBase):
    """A seekable file over `fetch`.

    Args:
        nbytes: size of the file.
        fetch: called from threads of `pool` and of readers.
        pool: whose threads fetch ahead.
        planned: `(begin, end)` of the stretches that will be read front to back; their parts are fetched
            ahead, a few at a time. All else is fetched when it is asked for.
    """

    def __init__(
        self, nbytes: int, fetch: Fetch, pool: ThreadPoolExecutor, planned: Iterable[tuple[int, int]] = ()
    ) -> None:
        super().__init__()
        self._nbytes = nbytes
        self._fetch = fetch
        self._pool = pool
        self._position = 0
        self._to_fetch = _cut(planned)
        self._coming: deque[tuple[_Part, Future[bytearray]]] = deque()
        self._current: tuple[_Part, bytearray] | None = None
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        while len(self._coming) < _PARTS_AHEAD and (part := next(self._to_fetch, None)) is not None:
            self._coming.append((part, self._pool.submit(self._fetch, part.begin, part.end - part.begin)))

    def _part_at(self, offset: int) -> tuple[_Part, bytearray] | None:
        """Return the planned part that holds `offset`; those before it are let go."""
        if self._current is not None and self._current[0].begin <= offset < self._current[0].end:
            return self._current
        if offset >= max((part.end for part, _ in itertools.islice(self._coming, 2)), default=0):
            return None  # a distant read (a footer, say) must not discard prefetched parts
        while self._coming and self._coming[0][0].begin <= offset:
            part, future = self._coming.popleft()
            self._fetch_ahead()
            if offset < part.end:
                self._current = part, future.result()
                return self._current
            future.cancel()
        return None

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._nbytes - self._position if size is None or size < 0 else size
        left = max(0, min(left, self._nbytes - self._position))
        pieces = []
        while left:
            held = self._part_at(self._position)
            if held is None:
                # Up to the next planned part, which would be fetched twice otherwise.
                begins = [part.begin for part, _ in self._coming if part.begin > self._position]
                size = min([left, *(begin - self._position for begin in begins[:1])])
                piece = bytes(self._fetch(self._position, size))
            else:
                part, data = held
                at = self._position - part.begin
                piece = bytes(memoryview(data)[at : at + left])
            pieces.append(piece)
            self._position += len(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        return self.read(-1)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """In bytes."""
        return self._nbytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        while self._coming:
            self._coming.popleft()[1].cancel()
        self._current = None
        super().close()


def _cut(stretches: Iterable[tuple[int, int]]) -> Iterator[_Part]:
    for begin, end in stretches:
        for at in range(begin, end, PART_NBYTES):
            yield _Part(at, min(end, at + PART_NBYTES))

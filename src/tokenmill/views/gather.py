"""Gather: the tokens of documents of a view, from wherever they lie.

Where the sources fit in memory, documents are read where they lie. Where they do not, that would be a random read of
the disk for each: the sources are read once, front to back, and each document is appended to the file of its stretch
of the view, its bucket; later each bucket is read at once.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic
from tokenmill.errors import StorageError
from tokenmill.loading.data_root import PLACES_AT_ONCE, TokenStream
from tokenmill.loading.view import ViewIndex

BUCKET_NBYTES = 64 << 20
RESIDENT_NBYTES = 256 << 20
"""Resident limit of the sources' pages; more of them stays in the system's cache, if it has room."""
CHUNK_TOKENS = 1 << 24
"""Read at once while documents are put into buckets."""
_LOOKED_AT = 1 << 16
_DONE = "done"


class Gatherer(Protocol):
    """Gives the tokens of consecutive documents; threads may share it."""

    def read(self, first: int, end: int) -> NDArray[Any]:
        """Return the tokens of documents `first` to before `end`, one after the other."""
        ...


class Places:
    """Tokens of the sources of a view, by their places.

    Args:
        streams: of the sources, in order.
        index: of the view.
    """

    def __init__(self, streams: list[TokenStream], index: ViewIndex) -> None:
        self.dtype = streams[0].dtype
        self.index = index
        self._streams = streams
        for stream in streams:
            stream.limit_resident(RESIDENT_NBYTES)
        self._whole = [stream.whole for stream in streams]
        self._bases = np.cumsum([0, *(stream.tokens for stream in streams)])

    def read(self, first: int, end: int) -> NDArray[Any]:
        """Return the tokens of documents `first` to before `end`, read in the order in which they lie."""
        places = self.index.places[first:end]
        ends = self.index.begins[first : end + 1] - self.index.begins[first]
        out = np.empty(int(ends[-1]), self.dtype)
        self.copy(places, ends[:-1], ends[1:] - ends[:-1], out)
        return out

    def copy(
        self, places: NDArray[np.int64], to: NDArray[np.int64], lengths: NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        """Copy documents at `places`, of these lengths, each to its position in `out`."""
        order = np.argsort(places)
        sources = np.searchsorted(self._bases, places[order], side="right") - 1
        starts = places[order] - self._bases[sources]
        rows = [sources, starts, starts + lengths[order], to[order], (to + lengths)[order]]
        for at in range(0, len(order), PLACES_AT_ONCE):
            some = [column[at : at + PLACES_AT_ONCE].tolist() for column in rows]
            for source in set(some[0]):
                nbytes = int(lengths[order[at : at + PLACES_AT_ONCE]].sum()) * self.dtype.itemsize
                self._streams[source].note_read(nbytes, len(some[0]))
            for source, start, end, first, last in zip(*some, strict=True):
                whole = self._whole[source]  # a slice of it takes a tenth of the time of a read
                out[first:last] = self._streams[source].read(start, end) if whole is None else whole[start:end]

    def release(self) -> None:
        """Release the mapped pages of the sources and of the index, which would stay in memory beside what follows."""
        for stream in self._streams:
            stream.release()
        self.index.release()


def _chunks(index: ViewIndex, order: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield stretches of `order` whose documents have about `CHUNK_TOKENS` together."""
    first = 0
    while first < len(order):
        end, tokens = first, 0
        while end < len(order) and tokens < CHUNK_TOKENS:
            some = order[end : end + _LOOKED_AT]
            ends = tokens + np.cumsum(index.begins[some + 1] - index.begins[some])
            taken = int(np.searchsorted(ends, CHUNK_TOKENS)) + 1
            taken = min(taken, len(some))
            end, tokens = end + taken, int(ends[taken - 1])
        yield first, end
        first = end


class Buckets:
    """The documents of a view on disk, a file for each stretch of it.

    Args:
        folder: of the files; made by `fill` if an earlier run has not.
        places: where the documents lie.
        key: what the files belong to.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """

    def __init__(self, folder: Path, places: Places, key: str) -> None:
        self._folder = folder
        self._places = places
        self._key = key
        begins = places.index.begins
        tokens = max(1, BUCKET_NBYTES // places.dtype.itemsize)
        count = max(1, -(-int(begins[-1]) // tokens))
        self.bounds = np.unique(np.searchsorted(begins, np.arange(count + 1) * tokens).clip(max=len(begins) - 1))
        """First document of each bucket, and the end of the last."""
        self._loaded = threading.local()

    def fill(self, on_progress: Callable[[int], None]) -> None:
        """Put every document into its bucket, unless an earlier run did; `on_progress` gets tokens that were read."""
        done = self._folder / _DONE
        if done.is_file() and done.read_text() == self._key:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        index = self._places.index
        with atomic.translate_write_errors(self._folder):
            self._folder.mkdir()
            order = np.argsort(index.places)
            for first, end in _chunks(index, order):
                bucket = np.searchsorted(self.bounds, order[first:end], side="right") - 1
                by_bucket = np.argsort(bucket, kind="stable")
                documents = order[first:end][by_bucket]
                of_chunk = index.begins[documents + 1] - index.begins[documents]
                out = np.empty(int(of_chunk.sum()), self._places.dtype)
                to = np.cumsum(of_chunk) - of_chunk
                self._places.copy(index.places[documents], to, of_chunk, out)
                used, starts = np.unique(bucket[by_bucket], return_index=True)
                edges = [*to[starts].tolist(), len(out)]
                for number, begin, stop in zip(used.tolist(), edges, edges[1:], strict=False):
                    # Not kept open: there may be more buckets than a process may have files.
                    with self._path(number).open("ab", buffering=0) as file:
                        file.write(out[begin:stop].data.cast("B"))
                on_progress(len(out))
        self._places.release()
        atomic.write_whole(done, self._key.encode())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.bucket"

    def read(self, first: int, end: int) -> NDArray[Any]:
        """Return the tokens of documents `first` to before `end`; each thread holds one bucket."""
        pieces = []
        begins = self._places.index.begins
        while first < end:
            number = int(np.searchsorted(self.bounds, first, side="right")) - 1
            stop = min(end, int(self.bounds[number + 1]))
            base = int(begins[self.bounds[number]])
            pieces.append(self._bucket(number)[int(begins[first]) - base : int(begins[stop]) - base])
            first = stop
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _bucket(self, number: int) -> NDArray[Any]:
        """Return the tokens of a bucket, in the order of the view."""
        if getattr(self._loaded, "number", None) == number:
            found: NDArray[Any] = self._loaded.tokens
            return found
        self._loaded.tokens = None
        first, end = self.bounds[number : number + 2].tolist()
        begins, places = self._places.index.begins[first : end + 1], self._places.index.places[first:end]
        stored = np.fromfile(self._path(number), self._places.dtype)
        tokens = int(begins[-1] - begins[0])
        if len(stored) != tokens:
            raise StorageError(
                f"{self._path(number)}: expected {tokens} tokens, found {len(stored)}",
                next_step=f"delete {self._folder}, and run the same command again",
            )
        order = np.argsort(places)
        lengths = np.diff(begins)[order]
        sources = (np.cumsum(lengths) - lengths).tolist()
        targets = (begins[:-1] - begins[0])[order].tolist()
        out = np.empty(tokens, self._places.dtype)
        for source, target, length in zip(sources, targets, lengths.tolist(), strict=True):
            out[target : target + length] = stored[source : source + length]
        self._loaded.number, self._loaded.tokens = number, out
        return out


def available_memory_nbytes() -> int | None:
    """Return the memory that programs can have without the system's writing any to disk; None if it does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None

"""Load, stage 8: a data root's tokens and sample ids, memory-mapped. Reads only.

Importing this loads no Arrow: a trainer that asks for no documents does without.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot.manifest import Consolidated, FileRecord, Manifest, TokenizerRecord
from tokenmill.errors import DataRootError, QueryError
from tokenmill.transfer.journal import elsewhere

if TYPE_CHECKING:
    from tokenmill.loading.documents import DocumentIndex

_VERIFY = "run tokenmill verify on the data root"
RESIDENT_NBYTES = 2 << 30
"""Resident limit of mapped files; beyond it pages are released with madvise (they stay in the system's cache)."""
_FAULT_NBYTES = 2 << 20
"""What Linux may map around a page that is touched: as much as one folio of its cache holds."""
PLACES_AT_ONCE = 256
"""Read between two looks at how much is resident: half a gigabyte at most."""
_PAGE_NBYTES = mmap.PAGESIZE


class Piece(NamedTuple):
    """A file of tokens, after a header if it has one."""

    path: Path
    tokens: int
    offset: int = 0
    """Bytes before the first token."""


class Windows(NamedTuple):
    """Samples with what follows them, and where documents begin in them; `n` samples of `t` tokens."""

    tokens: NDArray[Any]
    """Each sample and the token after it, of the stored dtype, shape `(n, t + 1)`."""
    has_next: NDArray[np.bool_]
    """Whether there is a token after each sample, shape `(n,)`; where there is none, anything may be in its place."""
    bounds: NDArray[np.int64]
    """Where each document, piece of one, or stretch of padding begins, counted over all `n * t` tokens, and `n * t`."""
    next_begins: NDArray[np.bool_]
    """Whether the token after each sample begins a document, shape `(n,)`."""
    padding: NDArray[np.int64]
    """Where padding begins and ends, counted as `bounds`, shape `(stretches, 2)`."""


def most_parts(starts: NDArray[np.int64], edges: NDArray[np.int64]) -> int:
    """Return the most parts that samples consist of, which lie between `edges`; parts begin at `starts`."""
    inside = np.searchsorted(starts, edges[1:]) - np.searchsorted(starts, edges[:-1], side="right") + 1
    return int(inside.max(initial=0))


class TokenStream:
    """The token stream of a data root, from `tokens.bin` or from its shards. Threads and forks may share one.

    Args:
        pieces: the files, in order.
        dtype: of a stored token, little-endian.

    Raises:
        DataRootError: a file is missing, or not as long as it must be.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._files = [MappedArray(piece, dtype) for piece in pieces]
        self._starts = np.cumsum([0, *(piece.tokens for piece in pieces)])
        self.tokens = int(self._starts[-1])
        self._read_nbytes = 0
        self._resident_limit = self._allowed_nbytes = RESIDENT_NBYTES

    def limit_resident(self, nbytes: int) -> None:
        """Release mapped pages earlier than when `RESIDENT_NBYTES` are resident."""
        self._resident_limit = self._allowed_nbytes = nbytes

    def release(self) -> None:
        """Release all mapped pages; they are mapped again as they are read."""
        for file in self._files:
            release_pages(file.array)

    @property
    def whole(self) -> NDArray[Any] | None:
        """All tokens as one mapped array, shape `(tokens,)`; None if several files hold them."""
        return self._files[0].array if len(self._files) == 1 else None

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Return tokens `begin` to `end`, shape `(end - begin,)`; a read-only view if one file has them all."""
        if not 0 <= begin <= end <= self.tokens:
            raise QueryError(
                f"tokens {begin} to {end}: the data set has {self.tokens}",
                next_step=f"ask for tokens from 0 to {self.tokens - 1}",
            )
        self.note_read((end - begin) * self.dtype.itemsize)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        pieces = []
        while begin < end:
            offset = begin - int(self._starts[first])
            pieces.append(self._files[first].array[offset : offset + end - begin])
            begin += len(pieces[-1])
            first += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def chunks(self, tokens: int) -> Iterator[NDArray[Any]]:
        """Yield all tokens, at most so many at once."""
        for file in self._files:
            for at in range(0, len(file.array), tokens):
                chunk = file.array[at : at + tokens]
                self.note_read(chunk.nbytes)
                yield chunk

    def note_read(self, nbytes: int, places: int = 1) -> None:
        """Say that bytes are about to be read in so many places, so that resident memory stays bounded on any walk.

        What could have become resident is counted; what is, is measured when that is too much.
        """
        limit = self._resident_limit
        self._read_nbytes += nbytes + places * _FAULT_NBYTES
        if self._read_nbytes <= limit // 4 or self.tokens * self.dtype.itemsize < limit:
            return
        self._read_nbytes = 0
        if mapped_nbytes() + limit // 4 >= self._allowed_nbytes:
            self.release()
            # What is left does not belong to this stream, so it cannot be released here.
            self._allowed_nbytes = max(limit, mapped_nbytes() + limit // 2)


def mapped_nbytes() -> int:
    """Resident memory of this process that files back; more than all there is where the system does not tell."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            return int(file.read().split()[2]) * _PAGE_NBYTES
    except OSError:
        return 1 << 62


class MappedArray:
    """A stretch of a file as a read-only array.

    Raises:
        DataRootError: the file is missing, or not as long as it must be.
    """

    def __init__(self, piece: Piece, dtype: np.dtype[Any]) -> None:
        path, tokens, offset = piece
        expected = offset + tokens * dtype.itemsize
        if not path.exists():
            raise DataRootError(f"{path}: is missing", next_step=_VERIFY)
        mapping: mmap.mmap | None = None
        with atomic.translate_read_errors(path), path.open("rb") as file:
            found = path.stat().st_size
            if found != expected:
                raise DataRootError(f"{path}: expected {expected} bytes, found {found}", next_step=_VERIFY)
            if tokens:  # an empty file cannot be mapped
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array: NDArray[Any] = np.frombuffer(mapping or b"", dtype, tokens, offset if tokens else 0)


def release_pages(array: NDArray[Any]) -> None:
    """Release the pages of a file that an array maps for reading; they are mapped again as they are read."""
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class DataRoot(NamedTuple):
    """What is known of a data root that is finished."""

    root: Path
    manifest: Manifest | None
    record: Consolidated | None

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        if self.record is not None:
            return self.record.seq_len
        assert self.manifest is not None
        return self.manifest.recipe.seq_len

    @property
    def tokenizer(self) -> TokenizerRecord | None:
        """What made its tokens; None where there is no manifest to say so."""
        return None if self.manifest is None else self.manifest.tokenizer

    @property
    def eos_token(self) -> str | None:
        """What ends a document."""
        return None if self.manifest is None else self.manifest.recipe.eos_token

    @property
    def document_count(self) -> int | None:
        """Number of its documents; None where there is no manifest to say so."""
        return None if self.manifest is None else self.manifest.documents

    @property
    def files(self) -> list[FileRecord]:
        """Source files, as the manifest lists them."""
        return [] if self.manifest is None else self.manifest.files

    def tokens(self) -> TokenStream:
        """Its tokens, from `tokens.bin` or from its shards, whichever is there.

        Raises:
            DataRootError: neither is, or a file is not as long as it must be.
        """
        self._refuse_part()
        if self.record is not None and self.record.complete:
            pieces = [Piece(self.root / layout.TOKENS, self.record.tokens)]
            return TokenStream(pieces, np.dtype(self.record.dtype).newbyteorder("<"))
        if self.manifest is not None and self.manifest.complete:
            pieces = [
                Piece(self.root / layout.shard_name(shard.index), shard.tokens, layout.NPY_HEADER_NBYTES)
                for shard in self.manifest.shards
            ]
            return TokenStream(pieces, np.dtype(self.manifest.stored_dtype).newbyteorder("<"))
        raise DataRootError(
            f"{self.root}: expected a finished data set, found neither a complete {layout.MANIFEST} nor "
            f"a complete {layout.CONSOLIDATED}",
            next_step="run tokenmill pretokenize (or consolidate, for downloaded shards) to its end",
        )

    def _refuse_part(self) -> None:
        gone = elsewhere(self.root)
        for name, store in sorted(gone.items()):
            if name == layout.TOKENS or layout.shard_index(name) is not None:
                raise DataRootError(
                    f"{self.root}: a part of a data set: {name} is not here but in {store} ({len(gone)} such files)",
                    next_step=f"run: tokenmill download {store} {self.root}",
                )

    def documents(self) -> DocumentIndex:
        """Its documents.

        Raises:
            DataRootError: it has no manifest, so where tokens come from is not known.
        """
        from tokenmill.loading.documents import DocumentIndex

        if self.manifest is None:
            raise DataRootError(
                f"{self.root}: where its tokens come from is not known: expected {layout.MANIFEST}, found none",
                next_step="only data roots that tokenmill pretokenize made have provenance",
            )
        return DocumentIndex(self.root, self.manifest, self.seq_len)

    def sample_ids(self) -> NDArray[np.uint64]:
        """Return the ids of all samples, shape `(samples,)`.

        Raises:
            DataRootError: the data root is not consolidated.
        """
        if self.record is None or not self.record.complete:
            raise not_consolidated(self.root)
        return map_sample_ids(self.root, self.record.samples)


def map_sample_ids(root: Path, samples: int) -> NDArray[np.uint64]:
    """`sample_ids.bin` of a data root, shape `(samples,)`.

    Raises:
        DataRootError: it is missing, or not as long as it must be.
    """
    return MappedArray(Piece(root / layout.SAMPLE_IDS, samples), np.dtype("<u8")).array


def not_consolidated(root: Path) -> DataRootError:
    """Return the error for ids that are not stored."""
    return DataRootError(
        f"{root}: it has no sample ids: expected a complete {layout.CONSOLIDATED}, found none",
        next_step=f"run: tokenmill consolidate {root}",
    )

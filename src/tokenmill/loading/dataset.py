"""Dataset: a data root as samples, their ids, and the documents in them; what a trainer opens.

Nothing is read or computed at opening but sizes and records. Memory is mapped, read-only, and shared by
all processes that open the same files.
"""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, NamedTuple, get_args, overload

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot import sample_ids as ids
from tokenmill.dataroot.inventory import find_shards_of, read_header
from tokenmill.dataroot.manifest import Consolidated
from tokenmill.dataroot.proof import choose_scheme
from tokenmill.errors import DataRootError
from tokenmill.loading.data_root import (
    PLACES_AT_ONCE,
    DataRoot,
    Piece,
    TokenStream,
    Windows,
    map_sample_ids,
    most_parts,
    not_consolidated,
)
from tokenmill.loading.view import OpenView, ViewStream, open_view

ROOT_VARIABLE = "DATASET_BINS_PATH"
"""Environment variable that names the data root where no argument does, as Templar's trainer has it."""
_COUNTED_SAMPLES = 1 << 16


class TokenDataset:
    """The samples of a data root; sample `i` is tokens `[i * seq_len, (i + 1) * seq_len)` of its stream.

    `ds[i]` and `ds[a:b]` are views of the mapped files where they can be, of shapes `(seq_len,)` and
    `(samples, seq_len)`; `ds[[3, 1, 2]]` gathers a batch. All are read-only, of the stored dtype. Opens
    `tokens.bin` and `sample_ids.bin`, or the shards where there are only those, with the same indices.
    May be pickled (it is opened again), forked, and used by several threads.

    Args:
        root: the data root; None takes `$DATASET_BINS_PATH`.
        seq_len: tokens per sample. Must be what the data root was made with; must be given where nothing
            is recorded, as in data of the original Templar scripts.
        dtype: `uint8`, `uint16` or `uint32`; likewise, for a `tokens.bin` of which nothing is recorded.
        tokenizer_sha256: what the SHA-256 of the `tokenizer.json` that made the tokens must be.

    Raises:
        DataRootError: not a finished data set, a file of another size than recorded, or another `seq_len`,
            `dtype` or tokenizer than asked for.
        ValueError: an argument that nothing could have.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        seq_len: int | None = None,
        dtype: str | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.root = _located(root)
        if seq_len is not None and seq_len < 1:
            raise ValueError(f"seq_len: expected 1 or more, found {seq_len}")
        if dtype not in (None, *get_args(layout.DTypeName)):
            raise ValueError(f"dtype: expected one of {', '.join(get_args(layout.DTypeName))}, found {dtype!r}")
        asked = _Asked(seq_len, dtype, tokenizer_sha256)
        self._arguments = {"root": self.root, **asked._asdict()}
        found: DataRoot | OpenView | None = open_view(self.root)
        if found is None:
            found = DataRoot(self.root, manifests.load(self.root), manifests.load_consolidated(self.root))
        if found.tokenizer is None and found.record is None:
            opened = _open_unrecorded(self.root, asked)
        else:
            opened = _open_recorded(found, asked)
        self.seq_len, self._stream, self._ids, self._scheme = opened
        self._recorded = found
        self._samples = self._stream.tokens // self.seq_len
        whole = self._stream.whole
        self._rows = None if whole is None else whole[: self._samples * self.seq_len].reshape(-1, self.seq_len)
        self._documents: Any = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of a stored token."""
        return self._stream.dtype

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this; None where there is no manifest to say so."""
        tokenizer = self._recorded.tokenizer
        return None if tokenizer is None else tokenizer.vocab_size

    @property
    def record(self) -> Consolidated | None:
        """What `consolidated.json` says; None if there is none."""
        return self._recorded.record

    @property
    def tokens(self) -> int:
        """Number of tokens of the stream, those after the last whole sample included."""
        return self._stream.tokens

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice | list[int] | NDArray[np.integer[Any]]) -> NDArray[Any]: ...
    def __getitem__(self, index: int | np.integer[Any] | slice | list[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return a sample, shape `(seq_len,)`, or several, shape `(samples, seq_len)`.

        Raises:
            IndexError: there is no such sample.
        """
        if not isinstance(index, slice) and (number := _as_number(index)) is not None:
            begin = self._index(number) * self.seq_len
            return self._stream.read(begin, begin + self.seq_len)
        if isinstance(index, slice):
            begin, end, step = index.indices(self._samples)
            if step == 1 and self._rows is not None:
                self._stream.note_read(max(0, end - begin) * self.seq_len * self.dtype.itemsize)
                return self._rows[begin:end]
            index = np.arange(begin, end, step)
        batch = self.gather(index)  # type: ignore[arg-type]  # a single one was dealt with
        batch.flags.writeable = False
        return batch

    def gather(self, indices: list[int] | NDArray[np.integer[Any]], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return samples at `indices`, shape `(len(indices), seq_len)`.

        Args:
            indices: any samples in any order, shape `(n,)`.
            out: takes them, cast to its dtype; None makes an array of the stored dtype.

        Raises:
            IndexError: there is no such sample.
            ValueError: `out` has another shape.
        """
        wanted = self._indices(indices)
        if out is None:
            out = np.empty((len(wanted), self.seq_len), self.dtype)
        if out.shape != (len(wanted), self.seq_len):
            raise ValueError(f"out: expected the shape {(len(wanted), self.seq_len)}, found {out.shape}")
        if isinstance(self._stream, ViewStream):
            self._stream.gather(wanted, out)
            return out
        if self._rows is None:
            for row, begin in zip(out, (wanted * self.seq_len).tolist(), strict=True):
                row[...] = self._stream.read(begin, begin + self.seq_len)
            return out
        for at in range(0, len(wanted), PLACES_AT_ONCE):
            some, into = wanted[at : at + PLACES_AT_ONCE], out[at : at + PLACES_AT_ONCE]
            self._stream.note_read(len(some) * self.seq_len * self.dtype.itemsize, len(some))
            if out.dtype == self.dtype:
                self._rows.take(some, axis=0, out=into, mode="clip")  # the other modes gather twice
            else:
                into[...] = self._rows.take(some, axis=0, mode="clip")
        return out

    def windows(self, indices: list[int] | NDArray[np.integer[Any]], *, with_bounds: bool) -> Windows:
        """Return samples at `indices` with the token that follows each, and where documents begin in them.

        Args:
            indices: any samples in any order, shape `(n,)`.
            with_bounds: whether bounds of documents are wanted; they are empty otherwise, but in a view.

        Raises:
            IndexError: there is no such sample.
            DataRootError: bounds are wanted, and no manifest says where documents begin, or a sidecar is missing.
        """
        wanted = self._indices(indices)
        if isinstance(self._stream, ViewStream):
            return self._stream.windows(wanted)
        length = self.seq_len
        begins = wanted * length
        has_next = begins + length < self.tokens
        tokens = np.empty((len(wanted), length + 1), self.dtype)
        whole = self._stream.whole
        if whole is not None:
            self._stream.note_read(tokens.nbytes, len(wanted))
        for row, begin, end in zip(tokens, begins.tolist(), (begins + length + has_next).tolist(), strict=True):
            row[: end - begin] = self._stream.read(begin, end) if whole is None else whole[begin:end]
        bounds, next_begins = self._bounds(begins) if with_bounds else (wanted[:0], np.zeros(len(wanted), np.bool_))
        return Windows(tokens, has_next, bounds, next_begins, np.empty((0, 2), np.int64))

    def _bounds(self, begins: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return `bounds` and `next_begins` of the windows that begin at tokens."""
        length = self.seq_len
        found = self._document_index().starts_in(begins + 1, np.minimum(begins + length + 1, self.tokens))
        last = np.array([each[-1] if len(each) else -1 for each in found], np.int64)
        next_begins = last == begins + length
        counts = np.array([len(each) for each in found], np.int64) - next_begins
        row = np.arange(len(begins))
        bounds = np.zeros(len(begins) + int(counts.sum()) + 1, np.int64)
        at = np.cumsum(counts + 1) - (counts + 1)
        bounds[at], bounds[-1] = row * length, len(begins) * length
        is_start = np.ones(len(bounds), np.bool_)
        is_start[at] = is_start[-1] = False
        inside = [each[:-1] if is_next else each for each, is_next in zip(found, next_begins.tolist(), strict=True)]
        bounds[is_start] = np.concatenate([*inside, begins[:0]]) - np.repeat(begins - row * length, counts)
        return bounds, next_begins

    @property
    def is_mixture(self) -> bool:
        """Whether samples lie in the order in which to train on them (`SequentialSampler`), as a view by weight."""
        return isinstance(self._recorded, OpenView) and bool(self._recorded.view.stages)

    @property
    def sources(self) -> list[str]:
        """Names of what samples come from: the sources of a view, or the data root."""
        if isinstance(self._recorded, OpenView):
            return [source.name for source in self._recorded.view.sources]
        return [self.root.name]

    def source_of(self, indices: list[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the number, in `sources`, of what each sample comes from, shape `(len(indices),)`.

        A sample of a view without weights may hold documents of several sources; the first one counts.

        Raises:
            IndexError: there is no such sample.
        """
        wanted = self._indices(indices)
        if isinstance(self._stream, ViewStream):
            return self._stream.source_of(wanted)
        return np.zeros(len(wanted), np.int64)

    def max_documents(self) -> int:
        """Return the most documents that any sample holds, pieces of some, and padding, included; it looks at all.

        Of a mixture these are the samples of an epoch of each source, whether a stage gets so far or not.

        Raises:
            DataRootError: as `document_bounds`.
        """
        if isinstance(self._stream, ViewStream):
            return self._stream.max_documents()
        most = 0
        for begin in range(0, self._samples, _COUNTED_SAMPLES):
            edges = np.arange(begin, min(self._samples, begin + _COUNTED_SAMPLES) + 1) * self.seq_len
            starts = self._starts(int(edges[0]), int(edges[-1]))
            most = max(most, most_parts(starts, edges))
        return most

    def _starts(self, begin: int, end: int) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self._document_index().starts_between(begin, end)
        return found

    def _document_index(self) -> Any:
        if self._documents is None:
            self._documents = self._recorded.documents()
        return self._documents

    @property
    def sample_ids(self) -> NDArray[np.uint64]:
        """The ids of all samples, mapped, shape `(len(self),)`.

        Raises:
            DataRootError: none are stored; `sample_id` makes single ones.
        """
        return self._recorded.sample_ids() if self._ids is None else self._ids

    def sample_id(self, index: int) -> int:
        """Return the id of a sample; made from its tokens where the data root is not consolidated."""
        sample = self._index(index)
        if self._ids is not None:
            return int(self._ids[sample])
        window = layout.id_window_nbytes(self._scheme, seq_len=self.seq_len, itemsize=self.dtype.itemsize)
        tokens = window // self.dtype.itemsize
        data = self._stream.read(*(min(at * tokens, self.tokens) for at in (sample, sample + 1))).tobytes()
        return int.from_bytes(ids.sample_ids(data, window) or ids.EMPTY_ID, "little")

    @property
    def samples_sha256(self) -> str:
        """SHA-256 of what defines all samples: of `sample_ids.bin`, or of a view's index and sources.

        Raises:
            DataRootError: the data root is not consolidated, so that nothing says what its ids are.
        """
        if isinstance(self._recorded, OpenView):
            return self._recorded.view.samples_sha256
        if self.record is None:
            raise not_consolidated(self.root)
        return self.record.sample_ids_sha256

    def ids_of(self, indices: list[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
        """Return the ids of samples at `indices`, shape `(len(indices),)`; made of their tokens where none are stored.

        Raises:
            IndexError: there is no such sample.
        """
        wanted = self._indices(indices)
        if self._ids is not None:
            return self._ids[wanted]
        return np.array([self.sample_id(sample) for sample in wanted.tolist()], np.uint64)

    def document_bounds(self, index: int) -> NDArray[np.int32]:
        """Return where the documents in a sample begin: 0, the token at which each further one starts, `seq_len`.

        The array has shape `(documents + 1,)`: the cumulative sequence lengths (`cu_seqlens`) that attention kernels
        for packed samples take. They come from the documents sidecars; the first call for a shard reads the starts of
        its documents.

        Raises:
            DataRootError: the data root has no manifest, or a sidecar is missing.
        """
        sample = self._index(index)
        begin = sample * self.seq_len
        starts = self._starts(begin + 1, begin + self.seq_len)
        return np.concatenate([[0], starts - begin, [self.seq_len]]).astype(np.int32)

    cu_seqlens = document_bounds

    def _index(self, index: int) -> int:
        if not -self._samples <= index < self._samples:
            raise self._no_sample(index)
        return index + self._samples if index < 0 else index

    def _indices(self, indices: list[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        found = np.asarray(indices)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
            raise TypeError(f"expected sample indices as integers, shape (n,), found {found.dtype} {found.shape}")
        if len(found) == 0:
            return found.astype(np.int64)
        lowest, highest = int(found.min()), int(found.max())
        if lowest < -self._samples or highest >= self._samples:
            raise self._no_sample(highest if highest >= self._samples else lowest)
        wanted = found.astype(np.int64, copy=False)
        return wanted if lowest >= 0 else np.where(wanted < 0, wanted + self._samples, wanted)

    def _no_sample(self, index: int) -> IndexError:
        return IndexError(f"{self.root}: sample {index}: there are {self._samples}")

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenDataset.__init__(self, **state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}: {self._samples} samples of {self.seq_len} {self.dtype.name})"


class ShardSamples:
    """The samples of one shard on its own, as Templar's trainers of today read them.

    Args:
        tokens: an `.npy` file of tokens, shape `(tokens,)`.
        ids: an `.npy` file of their sample ids, shape `(samples,)`; where there is none, they are made of the tokens.
        seq_len: tokens per sample.
        dtype: `uint16` or `uint32`, of the samples; as wide as the stored tokens, or wider.

    Raises:
        DataRootError: a file is missing, not what its name says, of another length, or of a wider dtype.
        ValueError: the tokens do not divide by `seq_len`.
    """

    def __init__(self, tokens: Path, ids: Path, *, seq_len: int, dtype: str) -> None:
        self._arguments = {"tokens": tokens, "ids": ids, "seq_len": seq_len, "dtype": dtype}
        header = read_header(tokens)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if np.dtype(header.dtype).itemsize > self._dtype.itemsize:
            raise DataRootError(
                f"{tokens}: expected tokens of {dtype}, found {header.dtype}",
                next_step=f"give token_dtype={header.dtype}",
            )
        if header.tokens % seq_len:
            raise ValueError(f"{tokens}: {header.tokens} tokens do not divide by {seq_len}, the length of a sample")
        stored = np.dtype(header.dtype).newbyteorder("<")
        self._stream = TokenStream([Piece(tokens, header.tokens, header.nbytes)], stored)
        self._seq_len, self._count = seq_len, header.tokens // seq_len
        self.sample_ids = self._stored_ids(ids) if ids.exists() else self._made_ids()
        """Shape `(samples,)`."""

    def _stored_ids(self, path: Path) -> NDArray[np.uint64]:
        try:
            found: NDArray[np.uint64] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataRootError(f"{path}: not an array of sample ids: {error}", next_step="fetch it again") from None
        if found.dtype != np.uint64 or found.shape != (self._count,):
            raise DataRootError(
                f"{path}: expected {self._count} ids of uint64, found shape {found.shape} of {found.dtype}",
                next_step="fetch it again, or give the seq_len that it was made with",
            )
        return found

    def _made_ids(self) -> NDArray[np.uint64]:
        window = self._seq_len * self._stream.dtype.itemsize
        data = b"".join(ids.sample_ids(chunk.tobytes(), window) for chunk in self._stream.chunks(256 * self._seq_len))
        return np.frombuffer(data, "<u8")

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardSamples.__init__(self, **state)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | list[int]) -> NDArray[Any]:
        """Return a sample, shape `(seq_len,)`, or several, shape `(samples, seq_len)`."""
        if isinstance(index, list):
            return np.stack([self[each] for each in index])
        if not -self._count <= index < self._count:
            raise IndexError(f"sample {index}: there are {self._count}")
        begin = (index % self._count) * self._seq_len
        return self._stream.read(begin, begin + self._seq_len).astype(self._dtype, copy=False)

    def sample_id(self, index: int) -> int:
        """Return the id of a sample."""
        return int(self.sample_ids[index])


def _as_number(index: Any) -> int | None:
    """Return a single index as an integer, also from a tensor or an array without dimensions; None for others."""
    if getattr(index, "ndim", 0) != 0 or isinstance(index, list | tuple | bool | np.bool_):
        return None
    try:
        return operator.index(index)
    except TypeError:
        raise TypeError(f"expected a sample's index, a slice, or several indices, found {index!r:.80}") from None


class _Asked(NamedTuple):
    seq_len: int | None
    dtype: str | None
    tokenizer_sha256: str | None


class _Opened(NamedTuple):
    seq_len: int
    stream: TokenStream | ViewStream
    ids: NDArray[np.uint64] | None
    scheme: layout.IdScheme


def _located(root: Path | str | None) -> Path:
    named = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not named:
        raise DataRootError(
            f"no data root: expected an argument or ${ROOT_VARIABLE}, found neither",
            next_step=f"set {ROOT_VARIABLE} to the directory that holds {layout.TOKENS} or shards",
        )
    found = Path(named).absolute()
    if not found.is_dir():
        raise DataRootError(f"{found}: no such directory", next_step="give the directory that holds the data set")
    return found


def _open_recorded(found: DataRoot | OpenView, asked: _Asked) -> _Opened:
    root, record = found.root, found.record
    if record is not None and not record.complete:
        raise DataRootError(
            f"{root}: {layout.TOKENS} is unfinished: {layout.CONSOLIDATED} is not complete",
            next_step=f"let the command that makes it end, or run it again: tokenmill consolidate {root}",
        )
    stream = found.tokens()
    _expect(root, "samples of", asked.seq_len, found.seq_len, "consolidate the shards with that --seq-len")
    _expect(root, "tokens of", asked.dtype, stream.dtype.name, f"give {stream.dtype.name}, or none: it is recorded")
    if asked.tokenizer_sha256 is not None:
        sha256 = found.tokenizer.sha256 if found.tokenizer else f"no {layout.MANIFEST} to tell"
        step = "train with the tokenizer that made the data, or give the data root that was made with this one"
        _expect(root, "a tokenizer.json of SHA-256", asked.tokenizer_sha256, sha256, step)
    if isinstance(found, OpenView):
        return _Opened(found.seq_len, stream, None, "blake2b-64")
    if record is None:
        recipe = found.manifest.recipe if found.manifest else None
        scheme = choose_scheme(recipe, tokens=stream.tokens, seq_len=found.seq_len)
        return _Opened(found.seq_len, stream, None, scheme)
    return _Opened(found.seq_len, stream, found.sample_ids(), record.id_scheme)


def _open_unrecorded(root: Path, asked: _Asked) -> _Opened:
    """Return files of the original scripts, or downloaded without their records."""
    if asked.tokenizer_sha256 is not None:
        raise DataRootError(
            f"{root}: which tokenizer made it is not known: expected {layout.MANIFEST}, found none",
            next_step="leave tokenizer_sha256 out, or fetch the manifest too",
        )
    if asked.seq_len is None:
        raise _not_told(root, "seq_len", "seq_len=2048, if that is what its sample ids were made with")
    path = root / layout.TOKENS
    if not path.exists():
        partial = path.with_name(path.name + layout.PARTIAL_SUFFIX)
        if partial.exists():
            raise DataRootError(
                f"{partial}: is unfinished", next_step="wait for the command that makes it, or run it again"
            )
        shards = find_shards_of(root, None, None, asked.dtype)
        pieces = [Piece(shard.path, shard.tokens, len(shard.header)) for shard in shards]
        stream = TokenStream(pieces, np.dtype(shards[0].dtype).newbyteorder("<"))
        return _Opened(asked.seq_len, stream, None, choose_scheme(None, tokens=stream.tokens, seq_len=asked.seq_len))
    if asked.dtype is None:
        raise _not_told(root, "dtype", "dtype='uint16', if that is what its tokens are")
    dtype = np.dtype(asked.dtype).newbyteorder("<")
    nbytes = path.stat().st_size
    if nbytes % dtype.itemsize:
        raise DataRootError(
            f"{path}: expected tokens of {dtype.name}, found {nbytes} bytes, which are no multiple of {dtype.itemsize}",
            next_step="give the dtype it was written with",
        )
    stream = TokenStream([Piece(path, nbytes // dtype.itemsize)], dtype)
    try:
        sample_ids = map_sample_ids(root, stream.tokens // asked.seq_len)
    except DataRootError as error:
        raise DataRootError(
            f"{error.message} (for {stream.tokens} tokens of {dtype.name} in samples of {asked.seq_len})",
            next_step="give the dtype and seq_len it was made with, or fetch both files again",
        ) from None
    return _Opened(asked.seq_len, stream, sample_ids, choose_scheme(None, tokens=stream.tokens, seq_len=asked.seq_len))


def _expect(root: Path, what: str, asked: object, found: object, step: str) -> None:
    if asked is not None and asked != found:
        raise DataRootError(f"{root}: expected {what} {asked}, found {found}", next_step=step)


def _not_told(root: Path, name: str, example: str) -> DataRootError:
    return DataRootError(
        f"{root}: its {name} is not known: neither {layout.MANIFEST} nor {layout.CONSOLIDATED} is there",
        next_step=f"give it: {example}",
    )

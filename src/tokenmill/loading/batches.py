"""Batches: samples → what a trainer computes with: ids, targets, masks, and where documents begin. Pure NumPy."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.loading.data_root import Windows
from tokenmill.loading.dataset import TokenDataset

FIELDS = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen", "source")
IGNORED = -100
"""Label of a token that has no target; PyTorch's and Transformers' losses leave it out."""
_OF_BOUNDS = {"position_ids", "cu_seqlens", "max_seqlen"}


class BatchSpec(NamedTuple):
    """What batches consist of.

    Raises:
        ValueError: as of `spec_of`.
    """

    fields: tuple[str, ...]
    mask_across_documents: bool = False
    """Whether a document's last token has no target, as that would be the first one of another document."""
    cu_seqlens_len: int | None = None
    """Length that `cu_seqlens` is padded to."""

    @property
    def needs_bounds(self) -> bool:
        """Whether anything depends on where documents begin."""
        has_targets = bool({"labels", "loss_mask"} & set(self.fields))
        return bool(_OF_BOUNDS & set(self.fields)) or (self.mask_across_documents and has_targets)


def spec_of(
    fields: Sequence[str], *, mask_across_documents: bool = False, cu_seqlens_len: int | None = None
) -> BatchSpec:
    """Return the spec that arguments mean.

    Raises:
        ValueError: there is no such field, or a length nothing could have.
    """
    if isinstance(fields, str):
        raise ValueError(f"fields: expected a list of names, found {fields!r}")  # noqa: TRY004  # as for other values
    for field in fields:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"fields: no field is called {field!r}: {meant}they are {', '.join(FIELDS)}")
    if cu_seqlens_len is not None and operator.index(cu_seqlens_len) < 2:
        raise ValueError(f"cu_seqlens_len: expected 2 or more, found {cu_seqlens_len}")
    return BatchSpec(tuple(fields), mask_across_documents, cu_seqlens_len)


class Gathered(NamedTuple):
    """A batch as it is read, small enough to hand from one process to another; `expand` makes its fields."""

    windows: Windows
    source: NDArray[np.int64] | None


def gather(dataset: TokenDataset, indices: Sequence[int] | NDArray[np.integer[Any]], spec: BatchSpec) -> Gathered:
    """Read what a batch of samples needs.

    Raises:
        IndexError: there is no such sample.
        DataRootError: where documents begin is asked for, and no manifest says it.
    """
    wanted = np.asarray(indices)
    windows = dataset.windows(wanted, with_bounds=spec.needs_bounds)
    return Gathered(windows, dataset.source_of(wanted) if "source" in spec.fields else None)


def sample_of(batch: Gathered, number: int) -> Gathered:
    """Return one sample of a batch."""
    windows, row = batch.windows, slice(number, number + 1)
    length = windows.tokens.shape[1] - 1
    begin, end = number * length, (number + 1) * length
    inside = windows.bounds[(windows.bounds >= begin) & (windows.bounds <= end)] - begin
    padding = windows.padding[(windows.padding[:, 0] >= begin) & (windows.padding[:, 0] < end)] - begin
    alone = Windows(windows.tokens[row], windows.has_next[row], inside, windows.next_begins[row], padding)
    return Gathered(alone, None if batch.source is None else batch.source[row])


def expand(batch: Gathered, spec: BatchSpec) -> dict[str, Any]:
    """Return the fields of a batch of `n` samples of `t` tokens, by name.

    - `input_ids`: shape `(n, t)`, of the stored dtype.
    - `labels`: int64, shape `(n, t)`: the token that follows each, also after the last one of a sample where the next
      one in its data follows it; `IGNORED` where `loss_mask` is false.
    - `loss_mask`: bool, shape `(n, t)`: whether a token has a target. Padding has none, nor has a token before it, nor
      the last one of a sample that is packed or has nothing after it.
    - `cu_seqlens`: int32, shape `(documents + 1,)`: where each document, piece of one, or stretch of padding begins
      among all `n * t` tokens of the batch, and `n * t`; after that `n * t` again up to `cu_seqlens_len`.
    - `max_seqlen`: int: the longest of them; with `cu_seqlens_len`, `t`, so that it does not change either.
    - `position_ids`: int64, shape `(n, t)`: each token's place among those.
    - `source`: int64, shape `(n,)`: the number of the source that a sample comes from (`TokenDataset.sources`).

    Raises:
        ValueError: more documents than `cu_seqlens_len` has room for.
    """
    windows = batch.windows
    tokens = windows.tokens
    count, length = tokens.shape[0], tokens.shape[1] - 1
    found: dict[str, Any] = {}
    untargeted = _untargeted(windows, spec) if {"labels", "loss_mask"} & set(spec.fields) else None
    for field in spec.fields:
        match field:
            case "input_ids":
                found[field] = tokens[:, :-1]
            case "labels":
                found[field] = labels = tokens[:, 1:].astype(np.int64)
                labels.reshape(-1)[untargeted] = IGNORED
            case "loss_mask":
                found[field] = mask = np.ones((count, length), np.bool_)
                mask.reshape(-1)[untargeted] = False
            case "position_ids":
                found[field] = _position_ids(windows.bounds, length).reshape(count, length)
            case "cu_seqlens":
                found[field] = _cu_seqlens(windows.bounds, spec.cu_seqlens_len)
            case "max_seqlen":
                longest = int(np.diff(windows.bounds).max(initial=0))
                found[field] = longest if spec.cu_seqlens_len is None else length
            case "source":
                found[field] = batch.source
    return found


def _untargeted(windows: Windows, spec: BatchSpec) -> NDArray[np.int64]:
    """Return which tokens of a batch have no target, counted over all its samples."""
    count, length = windows.tokens.shape[0], windows.tokens.shape[1] - 1
    last = np.arange(1, count + 1, dtype=np.int64) * length - 1
    found = [last[~windows.has_next]]
    if len(windows.padding):
        begins, ends = windows.padding.T
        inside = np.arange(int((ends - begins + 1).sum()))  # the token before each stretch, too
        sizes = ends - begins + 1
        found.append(inside + np.repeat(begins - 1 - (np.cumsum(sizes) - sizes), sizes))
    if spec.mask_across_documents:
        before = windows.bounds[1:] - 1
        found += [before[(before + 1) % length != 0], last[windows.next_begins]]
    return np.concatenate(found)


def _position_ids(bounds: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    places, found = np.arange(length), np.empty(int(bounds[-1]), np.int64)
    edges = bounds.tolist()
    for begin, end in itertools.pairwise(edges):  # a fifth of the time that np.repeat takes
        found[begin:end] = places[: end - begin]
    return found


def _cu_seqlens(bounds: NDArray[np.int64], padded_len: int | None) -> NDArray[np.int32]:
    if padded_len is None:
        return bounds.astype(np.int32)
    if len(bounds) > padded_len:
        raise ValueError(
            f"cu_seqlens_len: a batch has {len(bounds) - 1} documents: expected room for {len(bounds)}, found "
            f"{padded_len}; give batch_size * TokenDataset.max_documents() + 1, which no batch exceeds"
        )
    found = np.full(padded_len, bounds[-1], np.int32)
    found[: len(bounds)] = bounds
    return found

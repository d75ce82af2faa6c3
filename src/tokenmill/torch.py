"""Torch: samples as tensors; the one module that imports PyTorch (extra `torch`)."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tokenmill.dataroot import layout
from tokenmill.loading import dataset
from tokenmill.loading.dataset import ShardSamples

try:
    import torch
    from torch.utils.data import DataLoader, Dataset, get_worker_info
    from torch.utils.data._utils.collate import default_collate_fn_map
except ImportError as error:
    raise ImportError(
        "tokenmill.torch needs PyTorch, which is not installed; run: pip install 'tokenmill[torch]'"
    ) from (error)


class TokenDataset(Dataset[torch.Tensor]):
    """The samples of a data root as tensors, for a `torch.utils.data.DataLoader`.

    `ds[i]` is a sample, shape `(seq_len,)`, and `ds[[3, 1, 2]]` a batch, shape `(3, seq_len)`: memory of their
    own, never the file. Any `DataLoader` takes it, and PyTorch's own collation copies no batch again.

    Args:
        root, seq_len, stored_dtype, tokenizer_sha256: as `root`, `seq_len`, `dtype`, `tokenizer_sha256` of
            `tokenmill.TokenDataset`.
        dtype: of the tensors; None keeps the stored one (`torch.uint16` or `torch.uint32`): a quarter or half
            of the bytes to move to a GPU, to be cast there.

    Raises:
        DataRootError: as `tokenmill.TokenDataset`.
        ValueError: `dtype` cannot hold the tokens.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        dtype: torch.dtype | None = torch.int64,
        seq_len: int | None = None,
        stored_dtype: str | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.data = dataset.TokenDataset(root, seq_len=seq_len, dtype=stored_dtype, tokenizer_sha256=tokenizer_sha256)
        """The same samples as NumPy arrays."""
        self.dtype: torch.dtype = dtype or getattr(torch, self.data.dtype.name)
        largest = (self.data.vocab_size or np.iinfo(self.data.dtype).max + 1) - 1
        if dtype is not None and (dtype.is_floating_point or torch.iinfo(dtype).max < largest):
            raise ValueError(f"dtype: {dtype} does not hold token ids up to {largest}: give torch.int64, or None")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | list[int]) -> torch.Tensor:
        if isinstance(index, list):
            batch = torch.empty((len(index), self.data.seq_len), dtype=self.dtype)
            self.data.gather(index, batch.numpy())
            return batch
        return _widened(self.data[index], self.dtype)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """Return the samples of a batch, gathered at once, for a `DataLoader`."""
        return _Rows(self.data.gather(indices), self.dtype)

    def sample_id(self, index: int) -> int:
        """Return the id of a sample."""
        return self.data.sample_id(index)


def loader(
    dataset: TokenDataset | SharedShardedDataset,
    sampler: Iterable[int],
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    drop_last: bool = True,
) -> DataLoader[torch.Tensor]:
    """Batches of shape `(batch_size, seq_len)`, each gathered straight into one tensor.

    Worker processes hand over the stored tokens, a quarter of the bytes, and this one makes tensors of them.

    Args:
        dataset: what to take samples from.
        sampler: which ones, in which order.
        batch_size: samples of a batch.
        num_workers: processes that gather; 0 is the fastest unless something else in the loop is slow.
        pin_memory: as `DataLoader` means it.
        drop_last: leave out a last batch that is short.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
    )


class _First(torch.Tensor):
    """The first sample of a batch that was gathered at once; it tells PyTorch's own collate function how to go on.

    That looks up what to do with a batch by the type of its first sample. Whatever is made of one is a plain tensor.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl


class _Rows(list[torch.Tensor]):
    """The samples of a batch, gathered at once: the rows of one tensor, which is the batch."""

    def __init__(self, tokens: NDArray[Any], dtype: torch.dtype) -> None:
        self._tokens = tokens
        self._batch = _widened(tokens, dtype)
        super().__init__(self._batch.unbind(0))
        if self:
            self[0] = self[0].as_subclass(_First)
        self._gathered = list(self)

    def collated(self) -> torch.Tensor | _Gathered:
        """Return the batch, shape `(len(self), seq_len)`: without another copy, unless a sample was exchanged."""
        if len(self) != len(self._gathered) or any(map(operator.is_not, self, self._gathered)):
            return torch.stack(self)
        return self._batch if get_worker_info() is None else _Gathered(self._tokens, self._batch.dtype)


def _collate_rows(rows: list[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor | _Gathered:
    return rows.collated() if isinstance(rows, _Rows) else torch.stack(rows)


default_collate_fn_map[_First] = _collate_rows


class _Gathered:
    """A batch on its way out of a worker process; it arrives as a tensor."""

    def __init__(self, tokens: NDArray[Any], dtype: torch.dtype) -> None:
        self._tokens, self._dtype = tokens, dtype

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[NDArray[Any], torch.dtype]]:
        return _widened, (self._tokens, self._dtype)


def _widened(tokens: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """Return tokens as a tensor with memory of its own, or with that of an array that was made for it."""
    if tokens.flags.writeable and dtype is getattr(torch, tokens.dtype.name, None):
        return torch.from_numpy(tokens)
    batch = torch.empty(tokens.shape, dtype=dtype)
    batch.numpy()[...] = tokens
    return batch


class SharedShardedDataset(Dataset[torch.Tensor]):
    """In place of Templar's class of this name, of today or of July 2025.

    Today's (one-covenant/templar, commit e1e76c3 of January 2026) takes a shard's index first and opens
    `train_NNNNNN.npy` with `sample_ids_NNNNNN.npy` below `$DATASET_BINS_PATH`; where such ids are not stored they are
    made from the tokens. That of July 2025 (tplr-ai/templar, commit fc913cf) takes the sequence length first and opens
    `tokens.bin` with `sample_ids.bin`. All four of the first arguments mean today's, which wants all of them.

    Samples are tensors of the stored dtype with memory of their own.

    Args:
        shard_index: which shard; left out for the class of July 2025.
        sequence_length: tokens per sample.
        rank: of this process; all ranks see all samples, their samplers share them out.
        world_size: number of processes.
        token_dtype: of the stored tokens; None takes uint32 for today's class, uint16 for the one of July 2025.
        file_prefix: of the shard's name.

    Raises:
        DataRootError: a file is missing, not a shard, or of another dtype.
        ValueError: the shard's tokens do not divide by `sequence_length`.
    """

    def __init__(
        self,
        *positional: int,
        shard_index: int | None = None,
        sequence_length: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        token_dtype: DTypeLike | None = None,
        file_prefix: str = "train",
    ) -> None:
        given = {"sequence_length": sequence_length, "rank": rank, "world_size": world_size}
        if shard_index is not None or len(positional) + sum(value is not None for value in given.values()) == 4:
            given = {"shard_index": shard_index, **given}
        names = [name for name, value in given.items() if value is None]
        if len(positional) > len(names):
            raise TypeError(f"expected at most {len(names)} positional arguments, found {len(positional)}")
        found = given | dict(zip(names, positional, strict=False))
        is_of_shards = "shard_index" in found
        length = found["sequence_length"]
        if length is None:
            raise TypeError("sequence_length is missing")
        self.seqlen: int = length
        self.rank, self.world = found["rank"] or 0, found["world_size"] or 1
        kind = np.dtype(token_dtype if token_dtype is not None else np.uint32 if is_of_shards else np.uint16)
        if is_of_shards:
            files = self.locate_shards(found["shard_index"] or 0, file_prefix=file_prefix)
            self.tokens_file, self.ids_file = map(Path, files)
            self._samples: Any = ShardSamples(self.tokens_file, self.ids_file, seq_len=length, dtype=kind.name)
        else:
            self._samples = dataset.TokenDataset(None, seq_len=length, dtype=kind.name)
            self.tokens_file, self.ids_file = (self._samples.root / name for name in (layout.TOKENS, layout.SAMPLE_IDS))
        self.data = self._samples
        """The same samples as NumPy arrays."""
        self.dtype: torch.dtype = getattr(torch, kind.name)
        self.total_samples = len(self._samples.sample_ids)

    @staticmethod
    def locate_shards(
        shard_index: int, custom_path: os.PathLike[str] | str | None = None, file_prefix: str = "train"
    ) -> tuple[str, str]:
        """Return paths of a shard's tokens and sample ids, as Templar names them, whether they exist or not.

        Raises:
            ValueError: neither `custom_path` nor `$DATASET_BINS_PATH` says where.
        """
        folder = custom_path or os.environ.get(dataset.ROOT_VARIABLE)
        if not folder:
            raise ValueError(f"no data root: set {dataset.ROOT_VARIABLE}, or give custom_path")
        infix = f"{file_prefix}_" if file_prefix == "anneal" else ""
        names = f"{file_prefix}_{shard_index:06d}.npy", f"sample_ids_{infix}{shard_index:06d}.npy"
        return str(Path(folder, names[0])), str(Path(folder, names[1]))

    def __len__(self) -> int:
        return self.total_samples

    def __getitem__(self, index: int | list[int]) -> torch.Tensor:
        return _widened(self._samples[index], self.dtype)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """Return the samples of a batch, gathered at once, for a `DataLoader`."""
        return _Rows(self.data[indices], self.dtype)

    @property
    def sample_ids(self) -> torch.Tensor:
        """All ids, shape `(total_samples,)`, `torch.uint64`; what is written to it stays in this process."""
        if self.ids_file.suffix == ".bin":
            return torch.from_numpy(np.memmap(self.ids_file, "<u8", "c"))
        return torch.from_numpy(np.array(self._samples.sample_ids))

    def sample_id(self, index: int) -> int:
        """Return the id of a sample."""
        return int(self._samples.sample_id(index))

"""Torch: samples as tensors; the one module that imports PyTorch (extra `torch`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tokenmill import dataset, layout

try:
    import torch
    from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info
except ImportError as error:
    raise ImportError(
        "tokenmill.torch needs PyTorch, which is not installed; run: pip install 'tokenmill[torch]'"
    ) from (error)


class TokenDataset(Dataset[torch.Tensor]):
    """The samples of a data root as tensors, for a `torch.utils.data.DataLoader`.

    `ds[i]` is a sample, shape `(seq_len,)`, and `ds[[3, 1, 2]]` a batch, shape `(3, seq_len)`: memory of their
    own, never the file. Any `DataLoader` takes it; `loader` makes the one that copies least.

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
        """A batch, gathered at once: the rows of one tensor."""
        return list(self[indices].unbind(0))

    def sample_id(self, index: int) -> int:
        """The id of a sample."""
        return self.data.sample_id(index)


def loader(
    dataset: TokenDataset,
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
        _Batches(dataset),
        batch_size=None,
        sampler=BatchSampler(sampler, batch_size, drop_last),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


class _Batches(Dataset[Any]):
    """Batches by their indices, for a `DataLoader` that is not to collate."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: list[int]) -> torch.Tensor | _Gathered:
        if get_worker_info() is None:
            return self._dataset[indices]
        return _Gathered(self._dataset.data[indices], self._dataset.dtype)


class _Gathered:
    """A batch on its way out of a worker process; it arrives as a tensor."""

    def __init__(self, tokens: NDArray[Any], dtype: torch.dtype) -> None:
        self._tokens, self._dtype = tokens, dtype

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[NDArray[Any], torch.dtype]]:
        return _widened, (self._tokens, self._dtype)


def _widened(tokens: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    batch = torch.empty(tokens.shape, dtype=dtype)
    batch.numpy()[...] = tokens
    return batch


class SharedShardedDataset(TokenDataset):
    """In place of Templar's class of this name: the data root in `$DATASET_BINS_PATH`, samples of the stored dtype.

    Args:
        sequence_length: tokens per sample.
        rank: of this process; all ranks see all samples, their samplers share them out.
        world_size: number of processes.
        token_dtype: of the stored tokens.

    Raises:
        DataRootError: as `tokenmill.TokenDataset`, and where there is no `tokens.bin`.
    """

    def __init__(
        self, sequence_length: int, rank: int = 0, world_size: int = 1, *, token_dtype: DTypeLike = np.uint16
    ) -> None:
        super().__init__(None, dtype=None, seq_len=sequence_length, stored_dtype=np.dtype(token_dtype).name)
        self.seqlen = sequence_length
        self.rank, self.world = rank, world_size
        self.tokens_file = self.data.root / layout.TOKENS
        self.ids_file = self.data.root / layout.SAMPLE_IDS
        self.total_samples = len(self.data.sample_ids)

    @property
    def sample_ids(self) -> torch.Tensor:
        """All ids, mapped, shape `(total_samples,)`, `torch.uint64`; what is written to it stays in this process."""
        return torch.from_numpy(np.memmap(self.ids_file, "<u8", "c"))

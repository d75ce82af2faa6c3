"""Torch: samples as tensors; the one module that imports PyTorch (extra `torch`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tokenmill import dataset, layout

try:
    import torch
    from torch.utils.data import Dataset, default_collate, get_worker_info
except ImportError as error:
    raise ImportError(
        "tokenmill.torch needs PyTorch, which is not installed; run: pip install 'tokenmill[torch]'"
    ) from (error)


class Rows(list[torch.Tensor]):
    """The samples of a batch, as the rows of the one tensor that holds them all."""

    def __init__(self, batch: torch.Tensor) -> None:
        super().__init__(batch.unbind(0))
        self.batch = batch
        """Shape `(samples, seq_len)`."""


def collate(rows: Any) -> Any:
    """For `DataLoader(..., collate_fn=collate)`: the tensor a batch was gathered into, not copied again."""
    return rows.batch if isinstance(rows, Rows) else default_collate(rows)


class TokenDataset(Dataset[torch.Tensor]):
    """The samples of a data root as tensors, for a `torch.utils.data.DataLoader`.

    `ds[i]` is a sample, shape `(seq_len,)`, and `ds[[3, 1, 2]]` a batch, shape `(3, seq_len)`: memory of their
    own, never the file. A `DataLoader` asks for a whole batch at once, which is one gather into one tensor
    (in its worker processes, one in shared memory); with `collate_fn=collate` it is not copied again.

    Args:
        root, seq_len, stored_dtype, tokenizer_sha256: as `root`, `seq_len`, `dtype`, `tokenizer_sha256` of
            `tokenmill.TokenDataset`.
        dtype: of the tensors; None keeps the stored one (`torch.uint16` or `torch.uint32`): a quarter or half
            of the bytes to move to a GPU, to be cast there.

    Raises:
        DataRootError: as `tokenmill.TokenDataset`.
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

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | list[int]) -> torch.Tensor:
        if isinstance(index, list):
            return self._gather(index)
        sample = torch.empty(self.data.seq_len, dtype=self.dtype)
        sample.numpy()[...] = self.data[index]
        return sample

    def __getitems__(self, indices: list[int]) -> Rows:
        """A batch."""
        return Rows(self._gather(indices))

    def _gather(self, indices: list[int]) -> torch.Tensor:
        batch = torch.empty((len(indices), self.data.seq_len), dtype=self.dtype)
        if get_worker_info() is not None:
            batch.share_memory_()  # where it must go anyway: gathered there, it is not copied
        self.data.gather(indices, batch.numpy())
        return batch

    def sample_id(self, index: int) -> int:
        """The id of a sample."""
        return self.data.sample_id(index)


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

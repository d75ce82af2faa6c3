"""Torch: samples as tensors; the one module that imports PyTorch (extra `torch`)."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from tokenmill.dataroot import layout
from tokenmill.errors import DataRootError
from tokenmill.loading import batches, dataset
from tokenmill.loading.dataset import ShardSamples
from tokenmill.loading.samplers import EpochSampler, SequentialSampler

try:
    import torch
    from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
    from torch.utils.data._utils.collate import default_collate_fn_map
except ImportError as error:
    raise ImportError(
        "tokenmill.torch needs PyTorch, which is not installed; run: pip install 'tokenmill[torch]'"
    ) from (error)


class TokenDataset(Dataset[Any]):
    """The samples of a data root as tensors, for a `torch.utils.data.DataLoader`.

    `ds[i]` is a sample, shape `(seq_len,)`, and `ds[[3, 1, 2]]` a batch, shape `(3, seq_len)`: memory of their
    own, never the file. Any `DataLoader` takes it, and PyTorch's own collation copies no batch again.

    With `fields`, a sample or a batch is a dict instead, of what `batches.expand` describes: `input_ids`, `labels`,
    `loss_mask`, `position_ids`, `cu_seqlens`, `max_seqlen`, `source`. `cu_seqlens` are those of all tokens of a batch,
    as kernels for packed sequences take them.

    Args:
        root, seq_len, stored_dtype, tokenizer_sha256: as `root`, `seq_len`, `dtype`, `tokenizer_sha256` of
            `tokenmill.TokenDataset`.
        dtype: of the tensors; None keeps the stored one (`torch.uint16` or `torch.uint32`): a quarter or half
            of the bytes to move to a GPU, to be cast there. `labels` are int64 always.
        fields: names of what a batch consists of; None makes it a tensor of ids.
        mask_across_documents: whether a document's last token has no target, as that would be the first one of
            another document.
        cu_seqlens_len: length that `cu_seqlens` is padded to, for compiled graphs: `batch_size * max_documents() + 1`
            is enough for any batch.

    Raises:
        DataRootError: as `tokenmill.TokenDataset`.
        ValueError: `dtype` cannot hold the tokens, or there is no such field.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        dtype: torch.dtype | None = torch.int64,
        seq_len: int | None = None,
        stored_dtype: str | None = None,
        tokenizer_sha256: str | None = None,
        fields: Sequence[str] | None = None,
        mask_across_documents: bool = False,
        cu_seqlens_len: int | None = None,
    ) -> None:
        self.data = dataset.TokenDataset(root, seq_len=seq_len, dtype=stored_dtype, tokenizer_sha256=tokenizer_sha256)
        """The same samples as NumPy arrays."""
        self.dtype: torch.dtype = dtype or getattr(torch, self.data.dtype.name)
        largest = (self.data.vocab_size or np.iinfo(self.data.dtype).max + 1) - 1
        if dtype is not None and (dtype.is_floating_point or torch.iinfo(dtype).max < largest):
            raise ValueError(f"dtype: {dtype} does not hold token ids up to {largest}: give torch.int64, or None")
        options = {"mask_across_documents": mask_across_documents, "cu_seqlens_len": cu_seqlens_len}
        if fields is None and any(options.values()):
            raise ValueError(f"{', '.join(name for name, value in options.items() if value)}: only with fields")
        self._spec = (
            None
            if fields is None
            else batches.spec_of(fields, mask_across_documents=mask_across_documents, cu_seqlens_len=cu_seqlens_len)
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | slice | list[int]) -> Any:
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        if self._spec is not None:
            indices = index if isinstance(index, list) else [operator.index(index)]
            batch = _expanded(batches.gather(self.data, indices, self._spec), self._spec, self.dtype)
            return batch if isinstance(index, list) else _only_sample(batch)
        if isinstance(index, list):
            tokens = torch.empty((len(index), self.data.seq_len), dtype=self.dtype)
            self.data.gather(index, tokens.numpy())
            return tokens
        return _widened(self.data[index], self.dtype)

    def __getitems__(self, indices: list[int]) -> Sequence[Any]:
        """Return the samples of a batch, gathered at once, for a `DataLoader`."""
        if self._spec is not None:
            return _Samples(batches.gather(self.data, indices, self._spec), self._spec, self.dtype)
        return _Rows(self.data.gather(indices), self.dtype)

    def sample_id(self, index: int) -> int:
        """Return the id of a sample."""
        return self.data.sample_id(index)

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        return self.data.seq_len

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this; None where there is no manifest to say so."""
        return self.data.vocab_size

    @property
    def sources(self) -> list[str]:
        """Names of what samples come from, by their number in the field `source`."""
        return self.data.sources

    def max_documents(self) -> int:
        """Return the most documents that any sample holds; it looks at all of them."""
        return self.data.max_documents()


class Loader(DataLoader[Any]):
    """A `DataLoader` that says how far its consumer has come; `loader` makes it.

    `state_dict()` and `load_state_dict()` follow `torchdata.stateful_dataloader`: a state that was loaded holds for the
    next iteration. It counts the samples of all ranks together, as `start` of a sampler does, so that other ranks,
    batch sizes and workers go on from it.
    """

    def __init__(self, data: Any, sampler: Iterable[int], **options: Any) -> None:
        self._order = _Order(sampler, _identity_of(data))
        super().__init__(data, sampler=self._order, **options)

    def __iter__(self) -> Any:
        """Iterate over batches, from the state that was loaded if one was."""
        self._order.begin()
        for batch in super().__iter__():
            self._order.count(self.batch_size or 1)
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Return what `load_state_dict` of any loader of the same data takes."""
        return self._order.state()

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Let the next iteration go on from a state.

        Of a view that was changed behind what was trained on, give the sampler `start=state["samples"]` instead.

        Raises:
            ValueError: it is of another data set or another order.
        """
        self._order.load(state)


def _identity_of(data: Any) -> str | None:
    """Return the digest of what defines all samples; None where nothing is recorded that says it."""
    try:
        found: str = data.data.samples_sha256
    except (DataRootError, AttributeError):  # the latter of samples of one shard, and of data sets of others
        return None
    return found


class _Order:
    """A sampler that continues where another stopped."""

    def __init__(self, sampler: Iterable[int], identity: str | None) -> None:
        self._identity = identity
        self._given = self._now = sampler
        self._loaded: Iterable[int] | None = None
        self._taken = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now if self._loaded is None else self._loaded)  # type: ignore[arg-type]

    def begin(self) -> None:
        # A sampler that is at its end is false, as an empty list is.
        self._now, self._loaded, self._taken = self._given if self._loaded is None else self._loaded, None, 0

    def count(self, samples: int) -> None:
        self._taken = min(self._taken + samples, len(self))

    def state(self) -> dict[str, int | str]:
        sampler, taken = (self._now, self._taken) if self._loaded is None else (self._loaded, 0)
        if not isinstance(sampler, EpochSampler | SequentialSampler):
            raise TypeError(
                f"state_dict: expected an EpochSampler or a SequentialSampler, which can begin anywhere, found "
                f"{type(sampler).__name__}"
            )
        samples = min(sampler.dataset_len, sampler.start + taken * sampler.world_size)
        if taken and taken == len(sampler):  # ranks may differ by one, and all are at the end
            samples = sampler.dataset_len
        of_epoch = {"seed": sampler.seed, "epoch": sampler.epoch} if isinstance(sampler, EpochSampler) else {}
        identity = {} if self._identity is None else {"samples_sha256": self._identity}
        return {"dataset_len": sampler.dataset_len, **identity, **of_epoch, "samples": samples}

    def load(self, state: dict[str, Any]) -> None:
        ours = self.state()
        is_ours = isinstance(state, dict) and state.keys() == ours.keys()
        is_ours = is_ours and all(type(state[name]) is type(ours[name]) for name in ours)
        if not is_ours or any(state[name] != ours[name] for name in ours.keys() - {"epoch", "samples"}):
            raise ValueError(
                f"load_state_dict: the state is of other data or of another order: expected {ours} but for "
                f"epoch and samples, found {state}; if only what comes later was changed, give the sampler start=, the "
                "samples of the state"
            )
        changes = {"start": state["samples"]} | ({"epoch": state["epoch"]} if "epoch" in state else {})
        self._loaded = msgspec.structs.replace(self._given, **changes)  # type: ignore[type-var]


def loader(
    dataset: TokenDataset | SharedShardedDataset,
    sampler: Iterable[int],
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    drop_last: bool = True,
) -> Loader:
    """Batches of shape `(batch_size, seq_len)`, each gathered straight into one tensor; or of the data set's `fields`.

    Worker processes hand over the stored tokens, a quarter of the bytes, and this one makes tensors of them.

    Args:
        dataset: what to take samples from.
        sampler: which ones, in which order.
        batch_size: samples of a batch.
        num_workers: processes that gather; 0 is the fastest unless something else in the loop is slow.
        pin_memory: as `DataLoader` means it.
        drop_last: leave out a last batch that is short.
    """
    return Loader(
        dataset,
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
    )


class _Samples(Sequence["_Sample"]):
    """The samples of a batch that were gathered at once; a collate function of one's own takes them one by one."""

    def __init__(self, gathered: batches.Gathered, spec: batches.BatchSpec, dtype: torch.dtype) -> None:
        self._gathered, self._spec, self._dtype = gathered, spec, dtype

    def __len__(self) -> int:
        return len(self._gathered.windows.tokens)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a batch of {len(self)}")
        return _Sample(self._gathered, index % len(self), self._spec, self._dtype)

    def collated(self) -> dict[str, Any] | _GatheredFields:
        """Return the batch."""
        if get_worker_info() is None:
            return _expanded(self._gathered, self._spec, self._dtype)
        return _GatheredFields(self._gathered, self._spec, self._dtype)


class _Sample(Mapping[str, Any]):
    """A sample of a batch, whose fields are made when one is asked for: PyTorch's own collate function asks for none.

    As of `_First`, that function looks up how to go on by the type of the first sample.
    """

    def __init__(self, gathered: batches.Gathered, number: int, spec: batches.BatchSpec, dtype: torch.dtype) -> None:
        self._gathered, self._number, self._spec, self._dtype = gathered, number, spec, dtype

    @functools.cached_property
    def _fields(self) -> dict[str, Any]:
        alone = batches.sample_of(self._gathered, self._number)
        return _only_sample(_expanded(alone, self._spec, self._dtype))

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec.fields)

    def __len__(self) -> int:
        return len(self._spec.fields)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        """From a worker process it arrives as a dict."""
        return dict, (self._fields,)


def _collate_samples(samples: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    if isinstance(samples, _Samples):
        return samples.collated()
    return default_collate([dict(sample) for sample in samples])


default_collate_fn_map[_Sample] = _collate_samples


class _GatheredFields:
    """A batch with fields on its way out of a worker process, as it was read; it arrives as tensors."""

    def __init__(self, *of: Any) -> None:
        self._of = of

    def __reduce__(self) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        return _expanded, self._of


def _expanded(gathered: batches.Gathered, spec: batches.BatchSpec, dtype: torch.dtype) -> dict[str, Any]:
    found = batches.expand(gathered, spec)
    return {
        name: _widened(value, dtype)
        if name == "input_ids"
        else torch.from_numpy(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in found.items()
    }


def _only_sample(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the one sample of a batch."""
    whole = ("cu_seqlens", "max_seqlen")
    return {name: value if name in whole else value[0] for name, value in batch.items()}


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
    if tokens.flags.writeable and tokens.flags.c_contiguous and dtype is getattr(torch, tokens.dtype.name, None):
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

"""Batches with fields as tensors, through loaders, and what a trainer does with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.data_roots import SEQ_LEN, consolidated, shards  # noqa: F401  # fixtures
from support.views import batch_roots  # noqa: F401  # a fixture
from tokenmill import EpochSampler, SequentialSampler, TokenDataset, WindowSampler
from tokenmill.loading import batches

FIELDS = batches.FIELDS

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tokenmill[torch]'")

from torch.nn import functional as F  # noqa: E402, N812
from torch.utils.data import DataLoader  # noqa: E402

from tokenmill.torch import TokenDataset as TorchDataset  # noqa: E402
from tokenmill.torch import loader  # noqa: E402


@pytest.mark.parametrize("name", ["consolidated", "best-fit documents mixture"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["loader", "DataLoader", "own collate function"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_loaders(batch_roots: dict[str, Path], name: str, workers: int, how: str) -> None:
    dataset, plain = TorchDataset(batch_roots[name], fields=FIELDS), TokenDataset(batch_roots[name])
    sampler, spec = EpochSampler(len(dataset), seed=1), batches.spec_of(FIELDS)
    if how == "loader":
        found = list(loader(dataset, sampler, batch_size=16, num_workers=workers, drop_last=False))
    elif how == "DataLoader":
        found = list(DataLoader(dataset, 16, sampler=sampler, num_workers=workers))
    else:
        collate = {"collate_fn": list}
        rows = list(DataLoader(dataset, 16, sampler=sampler, num_workers=workers, **collate))
        assert [len(row) for row in rows] == [16] * (len(dataset) // 16) + [len(dataset) % 16]
        for sample, number in zip(rows[1], sampler.indices(16, 32).tolist(), strict=True):
            expected = dataset[number]
            assert list(sample) == list(FIELDS)
            assert all(torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(expected[key])) for key in FIELDS)
            assert sample["cu_seqlens"].tolist() == plain.document_bounds(number).tolist()
        return
    assert len(found) == math.ceil(len(dataset) / 16)
    for begin, batch in zip(range(0, len(dataset), 16), found, strict=True):
        indices = sampler.indices(begin, min(begin + 16, len(dataset)))
        expected = batches.expand(batches.gather(plain, indices, spec), spec)
        assert list(batch) == list(FIELDS)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert (batch["cu_seqlens"].dtype, batch["loss_mask"].dtype) == (torch.int32, torch.bool)
        for field in FIELDS:
            assert np.array_equal(np.asarray(batch[field]), expected[field]), field


def test_a_loader_goes_on_from_its_state(batch_roots: dict[str, Path]) -> None:
    """With other ranks, batch sizes and workers; the state is of the batches that were handed over."""
    dataset = TorchDataset(batch_roots["best-fit documents mixture"])
    whole = dataset.data[:].tolist()
    ranks = [loader(dataset, SequentialSampler(len(dataset), rank, 2), batch_size=3) for rank in (0, 1)]
    taken: list[list[int]] = []
    for batch, other in zip(*ranks, strict=True):
        taken += [sample for pair in zip(batch.tolist(), other.tolist(), strict=True) for sample in pair]
        if len(taken) == 18:
            break
    sha256 = dataset.data.samples_sha256
    expected = {"dataset_len": len(dataset), "samples_sha256": sha256, "samples": 18}
    assert ranks[0].state_dict() == ranks[1].state_dict() == expected
    for world in (1, 3):
        again = [loader(dataset, SequentialSampler(len(dataset), rank, world), batch_size=2) for rank in range(world)]
        for each in again:
            each.load_state_dict(ranks[0].state_dict())
            assert each.state_dict() == ranks[0].state_dict()
        assert len(again[0]) == math.ceil((len(dataset) - 18) / world) // 2
        batch_ = [next(iter(each)) for each in again]
        found = [sample for number in range(2) for each in batch_ for sample in [each[number].tolist()]]
        assert taken + found == whole[: 18 + 2 * world]
        assert again[0].state_dict()["samples"] == 18 + 2 * world
    # The next iteration is whole again.
    assert next(iter(again[0])).tolist() == whole[0:6:3]
    epoch = loader(dataset, EpochSampler(len(dataset), seed=3, epoch=2), batch_size=5)
    expected = {"dataset_len": len(dataset), "samples_sha256": sha256, "seed": 3, "epoch": 2, "samples": 0}
    assert epoch.state_dict() == expected
    first = [batch for batch, _ in zip(epoch, range(4), strict=False)]
    other = loader(dataset, EpochSampler(len(dataset), seed=3), batch_size=5)
    other.load_state_dict(epoch.state_dict() | {"samples": 10})
    assert torch.equal(next(iter(other)), first[2])
    for state in (
        {},
        {"samples": 3},
        {**epoch.state_dict(), "samples_sha256": "0" * 64},
        {**epoch.state_dict(), "seed": 4},
        ranks[0].state_dict(),
    ):
        with pytest.raises(ValueError, match="the state is of other data or of another order"):
            other.load_state_dict(state)
    for state in (None, [], {**epoch.state_dict(), "samples": "3"}):
        with pytest.raises(ValueError, match="the state is of other data or of another order"):
            other.load_state_dict(state)
    # At the end there is nothing left, on any rank.
    for ranks_, start in ((1, len(dataset)), (3, len(dataset) - 1)):
        for rank in range(ranks_):
            last = loader(dataset, SequentialSampler(len(dataset), rank, ranks_), batch_size=7, drop_last=False)
            last.load_state_dict({**ranks[0].state_dict(), "samples": start})
            assert sum(len(batch) for batch in last) == (start < len(dataset) and rank == 0)
    thirds = [loader(dataset, SequentialSampler(len(dataset), r, 3), batch_size=1, drop_last=False) for r in range(3)]
    for each in thirds:
        assert len(list(each)) == len(each)
        assert each.state_dict()["samples"] == len(dataset)
    with pytest.raises(TypeError, match="found WindowSampler"):
        loader(dataset, WindowSampler(len(dataset), 1, 1, 10), batch_size=5).state_dict()


def test_fields_are_options_of_the_data_set(batch_roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="mask_across_documents: only with fields"):
        TorchDataset(batch_roots["consolidated"], mask_across_documents=True)
    with pytest.raises(ValueError, match="no field is called 'ids'"):
        TorchDataset(batch_roots["consolidated"], fields=["ids"])
    narrow = TorchDataset(batch_roots["consolidated"], fields=["input_ids", "labels"], dtype=None)[[1, 2]]
    assert (narrow["input_ids"].dtype, narrow["labels"].dtype) == (torch.uint16, torch.int64)
    assert narrow["input_ids"].is_contiguous()
    pad = TorchDataset(batch_roots["consolidated"], fields=["cu_seqlens", "max_seqlen"], cu_seqlens_len=200)
    batch = pad[[1, 2]]
    assert (batch["cu_seqlens"].shape, batch["max_seqlen"]) == ((200,), SEQ_LEN)


def attend(tokens: Any, positions: Any, allowed: Any, weights: list[Any]) -> Any:
    """Logits of one layer of attention with positions, for one sequence."""
    embedding, places, qkv, head = weights
    x = embedding[tokens] + places[positions]
    q, k, v = (x @ qkv).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed) @ head


@pytest.mark.parametrize("name", ["best-fit documents mixture", "concat documents all", "consolidated"])
def test_a_document_attends_to_itself_alone(batch_roots: dict[str, Path], name: str) -> None:
    """Block-diagonal by `cu_seqlens`, causal inside: the logits of a document are those it has without the others."""
    fields = ("input_ids", "cu_seqlens", "position_ids", "max_seqlen")
    batch = TorchDataset(batch_roots[name], fields=fields)[[4, 1, 9]]
    torch.manual_seed(0)
    shapes = [(4_096, 16), (128, 16), (16, 48), (16, 64)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tokens, positions = batch["input_ids"].reshape(-1), batch["position_ids"].reshape(-1)
    bounds = batch["cu_seqlens"]
    document = torch.bucketize(torch.arange(len(tokens)), bounds, right=True)
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    packed = attend(tokens, positions, causal & (document[:, None] == document[None, :]), weights)
    spans = list(zip(bounds.tolist(), bounds.tolist()[1:], strict=False))
    assert max(end - begin for begin, end in spans) == batch["max_seqlen"]
    assert len(spans) > 3
    for begin, end in spans:
        alone = tokens[begin:end]
        mask = torch.ones(len(alone), len(alone), dtype=torch.bool).tril()
        torch.testing.assert_close(packed[begin:end], attend(alone, torch.arange(len(alone)), mask, weights))

"""Batches with fields against a slow reference: token by token, from the sidecars and the index."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import text
from support.data_roots import SEQ_LEN, consolidated, shards, without_records  # noqa: F401  # fixtures
from support.views import make
from tokenmill import EpochSampler, SequentialSampler, TokenDataset, WindowSampler, errors
from tokenmill.loading import batches
from tokenmill.loading.provenance import where_sample
from tokenmill.loading.view import OpenView, open_root
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

FIELDS = batches.FIELDS


@pytest.fixture(scope="module")
def roots(shards: Path, consolidated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("views")
    web = make(folder, "web", {"a.parquet": [text(i, 2 + i % 50) for i in range(120)]}, seq_len=40)
    code = make(folder, "code", {"a.parquet": [text(i, 2 + i % 90) for i in range(500, 560)]}, seq_len=40)
    made = {"shards": shards, "consolidated": consolidated}
    for policy in ("concat", "best-fit"):
        for shuffle in ("documents", "none"):
            for weights in ((None, None), (2.0, 1.0)):
                name = f"{policy} {shuffle} {'mixture' if weights[0] else 'all'}"
                sources = [
                    ViewSource(name=source, root=str(root), weight=weight, max_epochs=3)
                    for source, root, weight in zip(("web", "code"), (web, code), weights, strict=True)
                ]
                spec = ViewSpec(sources=sources, seq_len=40, seed=4, shuffle=shuffle, packing=policy)
                build_view(spec, folder / name)
                made[name] = folder / name
    return made


ROOTS = ["shards", "consolidated"] + [
    f"{policy} {shuffle} {what}"
    for policy in ("concat", "best-fit")
    for shuffle in ("documents", "none")
    for what in ("all", "mixture")
]


class Slow:
    """Samples of a data set, and what is said of them by its other functions."""

    def __init__(self, root: Path) -> None:
        self.root, self.dataset = root, TokenDataset(root)
        self.packs = "best-fit" in root.name
        self.length = self.dataset.seq_len
        # The row of documents, of each source of a mixture, in the order in which it lies.
        found = open_root(root)
        self.rows: list[list[int]] = [np.concatenate([*found.tokens().chunks(1 << 20)]).tolist()]
        if isinstance(found, OpenView):
            index = found.open_index()
            streams = [token for source in found.sources for part in source.tokens().chunks(1 << 20) for token in part]
            lying: list[int] = []
            for place, begin, end in zip(index.places, index.begins, index.begins[1:], strict=False):
                lying += [2] * int(end - begin) if place < 0 else streams[place : place + end - begin]
            spans = [source.span for source in found.view.sources] if found.view.stages else [len(lying)]
            self.rows = [lying[end - span : end] for span, end in zip(spans, np.cumsum(spans).tolist(), strict=True)]

    def sample(self, number: int) -> dict[str, Any]:
        tokens = self.dataset[number].tolist()
        bounds = self.dataset.document_bounds(number).tolist()
        parts = where_sample(self.root, number).documents
        filled = sum(part.end - part.begin for part in parts)
        following = [
            row[at + self.length]
            for row in self.rows
            for at in range(0, len(row) - self.length, self.length)
            if row[at : at + self.length] == tokens
        ]
        targets = [*tokens[1:], following[0] if following and not self.packs else None]
        targets = [None if at + 1 > filled - 1 and filled < self.length else each for at, each in enumerate(targets)]
        ends = parts[-1].document_end == parts[-1].document_tokens
        return {"tokens": tokens, "bounds": bounds, "targets": targets, "ends": ends}


@pytest.fixture(scope="module")
def slow(roots: dict[str, Path]) -> dict[str, Slow]:
    return {name: Slow(root) for name, root in roots.items()}


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(ROOTS), masked=st.booleans(), padded=st.booleans())
def test_any_batch_is_the_slow_one(
    slow: dict[str, Slow], data: st.DataObject, name: str, *, masked: bool, padded: bool
) -> None:
    dataset, reference = slow[name].dataset, slow[name]
    numbers = st.integers(0, len(dataset) - 1) | st.just(len(dataset) - 1)
    indices = data.draw(st.lists(numbers, min_size=1, max_size=5))
    length, count = dataset.seq_len, len(indices)
    room = count * dataset.max_documents() + 1 if padded else None
    spec = batches.spec_of(FIELDS, mask_across_documents=masked, cu_seqlens_len=room)
    found = batches.expand(pickle.loads(pickle.dumps(batches.gather(dataset, indices, spec))), spec)
    samples = [reference.sample(number) for number in indices]
    assert found["input_ids"].tolist() == [sample["tokens"] for sample in samples]
    bounds = [at + row * length for row, sample in enumerate(samples) for at in sample["bounds"][:-1]]
    bounds.append(count * length)
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    assert found["cu_seqlens"].tolist() == bounds + [bounds[-1]] * ((room or 0) - len(bounds))
    assert found["max_seqlen"] == (length if padded else longest)
    places = [at - begin for begin, end in itertools.pairwise(bounds) for at in range(begin, end)]
    assert found["position_ids"].reshape(-1).tolist() == places
    labels, mask = found["labels"], found["loss_mask"]
    assert np.array_equal(labels != batches.IGNORED, mask)
    for row, sample in enumerate(samples):
        for at, target in enumerate(sample["targets"]):
            ends = at + 1 < length and at + 1 in sample["bounds"]
            if at + 1 == length and target is not None:  # whether the next document begins there is checked below
                assert labels[row, at] in ((target, batches.IGNORED) if masked else (target,))
            elif target is None or (masked and ends):
                assert labels[row, at] == batches.IGNORED
            else:
                assert labels[row, at] == target
            if masked and not reference.packs and at + 1 == length:
                assert (labels[row, at] == batches.IGNORED) == (target is None or sample["ends"])
    names = dataset.sources
    for number, row in zip(indices, found["source"].tolist(), strict=True):
        first = where_sample(reference.root, number).documents[0].source
        assert len(names) == 1 or first.startswith(f"{names[row]}/")
    # Alone, a sample says the same of itself.
    alone = batches.expand(batches.sample_of(batches.gather(dataset, indices, spec), count - 1), spec)
    assert alone["labels"].tolist() == labels[-1:].tolist()
    assert alone["position_ids"].tolist() == found["position_ids"][-1:].tolist()
    assert alone["cu_seqlens"].tolist()[: len(samples[-1]["bounds"])] == samples[-1]["bounds"]


def test_targets_are_exact_across_the_ends_of_samples(roots: dict[str, Path]) -> None:
    """All targets of samples that lie in order are the stream, moved by one."""
    for name in ("shards", "consolidated", "concat none all", "concat documents all"):
        dataset = TokenDataset(roots[name])
        spec = batches.spec_of(["labels"])
        found = batches.expand(batches.gather(dataset, range(len(dataset)), spec), spec)["labels"]
        tokens = np.concatenate([dataset[:].reshape(-1), [0]])[1:]
        ends_here = len(dataset) * dataset.seq_len == dataset.tokens
        assert found.reshape(-1)[:-1].tolist() == tokens[:-1].tolist()
        assert (found[-1, -1] == batches.IGNORED) == ends_here


def test_only_what_was_asked_for_is_there(roots: dict[str, Path], tmp_path: Path) -> None:
    dataset = TokenDataset(roots["consolidated"])
    for fields in (["input_ids"], ["labels", "source"], [], ["cu_seqlens"]):
        spec = batches.spec_of(fields)
        assert list(batches.expand(batches.gather(dataset, [3], spec), spec)) == fields
    bare = without_records(roots["consolidated"], tmp_path / "bare")
    dataset = TokenDataset(bare, seq_len=SEQ_LEN, dtype="uint16")
    spec = batches.spec_of(["input_ids", "labels"])
    batches.gather(dataset, [3], spec)
    with pytest.raises(errors.DataRootError):
        batches.gather(dataset, [3], batches.spec_of(["cu_seqlens"]))


def test_problems_are_named(roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no field is called 'label': did you mean 'labels'\?"):
        batches.spec_of(["label"])
    with pytest.raises(ValueError, match="cu_seqlens_len: expected 2 or more, found 1"):
        batches.spec_of(["cu_seqlens"], cu_seqlens_len=1)
    dataset = TokenDataset(roots["consolidated"])
    spec = batches.spec_of(["cu_seqlens"], cu_seqlens_len=3)
    with pytest.raises(ValueError, match=r"a batch has \d+ documents: expected room for \d+, found 3; give batch_size"):
        batches.expand(batches.gather(dataset, range(8), spec), spec)
    with pytest.raises(IndexError):
        batches.gather(dataset, [len(dataset)], spec)


torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tokenmill[torch]'")

from torch.nn import functional as F  # noqa: E402, N812
from torch.utils.data import DataLoader  # noqa: E402

from tokenmill.torch import TokenDataset as TorchDataset  # noqa: E402
from tokenmill.torch import loader  # noqa: E402


@pytest.mark.parametrize("name", ["consolidated", "best-fit documents mixture"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["loader", "DataLoader", "own collate function"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_loaders(roots: dict[str, Path], name: str, workers: int, how: str) -> None:
    dataset, plain = TorchDataset(roots[name], fields=FIELDS), TokenDataset(roots[name])
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


def test_a_loader_goes_on_from_its_state(roots: dict[str, Path]) -> None:
    """With other ranks, batch sizes and workers; the state is of the batches that were handed over."""
    dataset = TorchDataset(roots["best-fit documents mixture"])
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


def test_fields_are_options_of_the_data_set(roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="mask_across_documents: only with fields"):
        TorchDataset(roots["consolidated"], mask_across_documents=True)
    with pytest.raises(ValueError, match="no field is called 'ids'"):
        TorchDataset(roots["consolidated"], fields=["ids"])
    narrow = TorchDataset(roots["consolidated"], fields=["input_ids", "labels"], dtype=None)[[1, 2]]
    assert (narrow["input_ids"].dtype, narrow["labels"].dtype) == (torch.uint16, torch.int64)
    assert narrow["input_ids"].is_contiguous()
    pad = TorchDataset(roots["consolidated"], fields=["cu_seqlens", "max_seqlen"], cu_seqlens_len=200)
    batch = pad[[1, 2]]
    assert (batch["cu_seqlens"].shape, batch["max_seqlen"]) == ((200,), SEQ_LEN)


def attend(tokens: Any, positions: Any, allowed: Any, weights: list[Any]) -> Any:
    """Logits of one layer of attention with positions, for one sequence."""
    embedding, places, qkv, head = weights
    x = embedding[tokens] + places[positions]
    q, k, v = (x @ qkv).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed) @ head


@pytest.mark.parametrize("name", ["best-fit documents mixture", "concat documents all", "consolidated"])
def test_a_document_attends_to_itself_alone(roots: dict[str, Path], name: str) -> None:
    """Block-diagonal by `cu_seqlens`, causal inside: the logits of a document are those it has without the others."""
    fields = ("input_ids", "cu_seqlens", "position_ids", "max_seqlen")
    batch = TorchDataset(roots[name], fields=fields)[[4, 1, 9]]
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

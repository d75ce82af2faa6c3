"""Batches with fields against a slow reference: token by token, from the sidecars and the index."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.data_roots import SEQ_LEN, consolidated, shards, without_records  # noqa: F401  # fixtures
from support.views import batch_roots  # noqa: F401  # a fixture
from tokenmill import TokenDataset, errors
from tokenmill.loading import batches
from tokenmill.loading.provenance import where_sample
from tokenmill.loading.view import OpenView, open_root

FIELDS = batches.FIELDS


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
        # Of one row, the sample is the one of that number; of a mixture, each that has the same tokens may be it.
        following = [
            row[at + self.length]
            for row in self.rows
            for at in range(0, len(row) - self.length, self.length)
            if (at == number * self.length if len(self.rows) == 1 else row[at : at + self.length] == tokens)
        ]
        next_tokens = following if following and not self.packs else [None]
        targets = [[token] for token in tokens[1:]] + [next_tokens]
        targets = [[None] if at + 1 > filled - 1 and filled < self.length else each for at, each in enumerate(targets)]
        ends = parts[-1].document_end == parts[-1].document_tokens
        return {"tokens": tokens, "bounds": bounds, "targets": targets, "ends": ends}


@pytest.fixture(scope="module")
def slow(batch_roots: dict[str, Path]) -> dict[str, Slow]:
    return {name: Slow(root) for name, root in batch_roots.items()}


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
        for at, targets in enumerate(sample["targets"]):
            ends = at + 1 < length and at + 1 in sample["bounds"]
            if at + 1 == length and targets != [None]:  # whether the next document begins there is checked below
                assert labels[row, at] in ([*targets, batches.IGNORED] if masked else targets)
            elif targets == [None] or (masked and ends):
                assert labels[row, at] == batches.IGNORED
            else:
                assert labels[row, at] in targets
            if masked and not reference.packs and at + 1 == length:
                assert (labels[row, at] == batches.IGNORED) == (targets == [None] or sample["ends"])
    names = dataset.sources
    for number, row in zip(indices, found["source"].tolist(), strict=True):
        first = where_sample(reference.root, number).documents[0].source
        assert len(names) == 1 or first.startswith(f"{names[row]}/")
    # Alone, a sample says the same of itself.
    alone = batches.expand(batches.sample_of(batches.gather(dataset, indices, spec), count - 1), spec)
    assert alone["labels"].tolist() == labels[-1:].tolist()
    assert alone["position_ids"].tolist() == found["position_ids"][-1:].tolist()
    assert alone["cu_seqlens"].tolist()[: len(samples[-1]["bounds"])] == samples[-1]["bounds"]


def test_targets_are_exact_across_the_ends_of_samples(batch_roots: dict[str, Path]) -> None:
    """All targets of samples that lie in order are the stream, moved by one."""
    for name in ("shards", "consolidated", "concat none all", "concat documents all"):
        dataset = TokenDataset(batch_roots[name])
        spec = batches.spec_of(["labels"])
        found = batches.expand(batches.gather(dataset, range(len(dataset)), spec), spec)["labels"]
        tokens = np.concatenate([dataset[:].reshape(-1), [0]])[1:]
        ends_here = len(dataset) * dataset.seq_len == dataset.tokens
        assert found.reshape(-1)[:-1].tolist() == tokens[:-1].tolist()
        assert (found[-1, -1] == batches.IGNORED) == ends_here


def test_only_what_was_asked_for_is_there(batch_roots: dict[str, Path], tmp_path: Path) -> None:
    dataset = TokenDataset(batch_roots["consolidated"])
    for fields in (["input_ids"], ["labels", "source"], [], ["cu_seqlens"]):
        spec = batches.spec_of(fields)
        assert list(batches.expand(batches.gather(dataset, [3], spec), spec)) == fields
    bare = without_records(batch_roots["consolidated"], tmp_path / "bare")
    dataset = TokenDataset(bare, seq_len=SEQ_LEN, dtype="uint16")
    spec = batches.spec_of(["input_ids", "labels"])
    batches.gather(dataset, [3], spec)
    with pytest.raises(errors.DataRootError):
        batches.gather(dataset, [3], batches.spec_of(["cu_seqlens"]))


def test_problems_are_named(batch_roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no field is called 'label': did you mean 'labels'\?"):
        batches.spec_of(["label"])
    with pytest.raises(ValueError, match="cu_seqlens_len: expected 2 or more, found 1"):
        batches.spec_of(["cu_seqlens"], cu_seqlens_len=1)
    dataset = TokenDataset(batch_roots["consolidated"])
    spec = batches.spec_of(["cu_seqlens"], cu_seqlens_len=3)
    with pytest.raises(ValueError, match=r"a batch has \d+ documents: expected room for \d+, found 3; give batch_size"):
        batches.expand(batches.gather(dataset, range(8), spec), spec)
    with pytest.raises(IndexError):
        batches.gather(dataset, [len(dataset)], spec)

"""What views keep for ever: samples of the same data, the side of a holdout, and the old when new data come."""

from __future__ import annotations

import itertools
import math
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARED, golden, golden_corpus, text, write_parquet
from support.engines import PicklingEngine
from support.runs import require_golden_views
from tokenmill.cli.demo import TOKENIZER
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.receipts import ReceiptWriter, check_receipt
from tokenmill.loading.samplers import EpochSampler
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("roots")
    for number, name in enumerate(("web", "code", "old")):
        texts = [text(i, 2 + i % 40) for i in range(30 * number, 30 * number + 70)]
        write_parquet(folder / f"corpus-{name}" / "a.parquet", texts)
        recipe = Recipe(dataset=str(folder / f"corpus-{name}"), tokenizer=str(TOKENIZER), shard_size=900, seq_len=16)
        pretokenize(recipe, folder / name)
    return {name: folder / name for name in ("web", "code", "old")}


def documents_of(view: Path) -> list[Any]:
    opened = open_root(view)
    documents = opened.documents()
    return [documents.document(number) for number in range(opened.document_count)]


@pytest.mark.parametrize("case", golden("demo.json"), ids=lambda case: f"{case['order']}-seed{case['seed']}")
def test_golden_views(tmp_path: Path, case: dict) -> None:
    """A view of a data set is the same for ever. Those of the real corpus are in tests/pipeline/test_pipeline.py."""
    fields = {field: case[field] for field in Recipe.__struct_fields__ if field in case}
    recipe = Recipe(dataset=str(golden_corpus(tmp_path / "corpus")), tokenizer=str(TOKENIZER), **fields)
    pretokenize(recipe, tmp_path / "root")
    require_golden_views(tmp_path / "root", tmp_path, case["tokens_sha256"])


def test_the_holdout_is_the_same_for_any_tokenizer_engine_order_and_workers(tmp_path: Path) -> None:
    """The texts for validation are those whose hash says so, and no run puts equal texts on two sides."""
    texts = [text(i % 150, 2 + i % 40) for i in range(200)]
    write_parquet(tmp_path / "corpus" / "a.parquet", texts[:90])
    write_parquet(tmp_path / "corpus" / "b.parquet", texts[90:])
    ways: dict[str, tuple[Recipe, dict[str, Any]]] = {}
    recipe = Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER), shard_size=900, seq_len=16)
    ways["plain"] = recipe, {}
    ways["hf"] = msgspec.structs.replace(recipe, order="sequential"), {"tokenizer_backend": "hf", "workers": 3}
    ways["cluster"] = msgspec.structs.replace(recipe, seed=8, buffer_size=7), {"engine": PicklingEngine(2)}
    other = SHARED / "data" / "llama2-tokenizer"
    if other.exists():
        ways["another tokenizer"] = msgspec.structs.replace(recipe, tokenizer=str(other), dtype="uint32"), {}
    limit = math.ceil(Fraction(0.25) * 2**64)
    expected = {i for i, each in enumerate(texts) if xxhash.xxh3_64_intdigest(each.encode()) < limit}
    assert 20 < len(expected) < 80
    for name, (settings_, options) in ways.items():
        pretokenize(settings_, tmp_path / name, **options)
        source = ViewSource(name="s", root=str(tmp_path / name))
        build_view(ViewSpec(sources=[source], holdout=0.25, split="validation"), tmp_path / f"{name} view")
        found = {(d.source, d.row) for d in documents_of(tmp_path / f"{name} view")}
        assert {90 * (file == "s/b.parquet") + row for file, row in found} == expected, name


@settings(max_examples=6)
@given(data=st.data())
def test_growth_moves_nothing_that_was_there(roots: dict[str, Path], data: st.DataObject) -> None:
    """With new data at the end of a view that is not shuffled, samples, ids and receipts of before stay as they are;
    shuffled, the old documents keep their order."""
    names = data.draw(st.permutations(["web", "code", "old"]))
    grown = data.draw(st.integers(2, 3))
    seed = data.draw(st.integers(0, 9))
    folder = Path(tempfile.mkdtemp(dir=roots["web"].parent))
    sources = [ViewSource(name=f"{i}-{name}", root=str(roots[name])) for i, name in enumerate(names)]
    opened = {}
    for shuffle, count in itertools.product(("none", "documents"), (grown - 1, grown)):
        spec = ViewSpec(sources=sources[:count], shuffle=shuffle, seed=seed, seq_len=16)
        build_view(spec, folder / f"{shuffle}-{count}")
        opened[shuffle, count] = TokenDataset(folder / f"{shuffle}-{count}")
    before, after = opened["none", grown - 1], opened["none", grown]
    assert len(before) < len(after)
    assert np.array_equal(after[: len(before)], before[:])
    wanted = list(range(len(before)))
    assert [after.sample_id(i) for i in wanted] == [before.sample_id(i) for i in wanted]
    writer = ReceiptWriter(before, EpochSampler(len(before), seed=seed))
    writer.add(EpochSampler(len(before), seed=seed).indices(0, len(before)))
    assert all(check.passed for check in check_receipt(folder / f"none-{grown - 1}", writer.receipt()))
    old, new = (documents_of(folder / f"documents-{count}") for count in (grown - 1, grown))
    known = {(d.source, d.row) for d in old}
    assert [(d.source, d.row) for d in old] == [(d.source, d.row) for d in new if (d.source, d.row) in known]

"""How far an order is from a random one: known at both ends, and its 99% range held against permutations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import run_cli, text, write_parquet
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.order import BufferOrder
from tokenmill.loading import order_quality as quality
from tokenmill.loading.order_quality import order_quality
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec


@pytest.fixture(scope="module")
def by_language(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus that is sorted by language, through a buffer, as it is, and in views; some texts occur three times."""
    folder = tmp_path_factory.mktemp("sorted")
    for number, language in enumerate(("de", "en", "fr", "ja")):
        texts = [f"{language} {text(number * 1_000 + i, 2 + i % 9)}" for i in range(600)]
        texts[50] = texts[51] = texts[52] = f"{language} again"
        write_parquet(folder / "corpus" / f"{language}.parquet", texts)
    roots = {"buffer": folder / "buffer", "none": folder / "none"}
    for name, root in roots.items():
        order = "sequential" if name == "none" else "buffer"
        recipe = Recipe(dataset=str(folder / "corpus"), tokenizer=str(TOKENIZER), order=order, buffer_size=100)
        pretokenize(recipe, root)
    for name in ("documents", "samples"):
        source = ViewSource(name="sorted", root=str(roots["none"]))
        build_view(ViewSpec(sources=[source], shuffle=name, seq_len=64), folder / name)
        roots[name] = folder / name
    return roots


def test_a_buffer_visibly_fails_where_documents_pass(by_language: dict[str, Path]) -> None:
    shuffled = order_quality(by_language["documents"])
    assert len(shuffled.measures) == 4
    assert all(measure.is_random for measure in shuffled.measures), shuffled
    for name in ("buffer", "none"):
        found = order_quality(by_language[name])
        assert not any(measure.is_random for measure in found.measures), found
        neighbours, windows, correlation, distance = (measure.found for measure in found.measures)
        assert (neighbours > 0.8, windows > 20, distance < 150) == (True, True, True)
        assert abs(correlation) > 0.5 or name == "buffer"  # the buffer puts files in another order
    samples = order_quality(by_language["samples"])
    # Documents that lie together are shuffled together: what is left of the order is within a sample.
    assert [measure.is_random for measure in samples.measures][2] is True
    assert shuffled.measures[0].found < samples.measures[0].found < 0.95


def test_beside_the_buffer_stands_what_pretokenize_does(
    by_language: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "BUFFER_SIZE", 100)
    buffered = order_quality(by_language["buffer"])
    for name in ("buffer", "none", "documents"):
        found = order_quality(by_language[name])
        assert [measure.buffer for measure in found.measures] == [measure.found for measure in buffered.measures]
    assert BufferOrder(100, 42)


@pytest.mark.parametrize("number", range(4))
def test_the_range_holds_for_permutations(
    by_language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Means and ranges are formulas; of 400 permutations, about 99 in 100 lie within, around the mean."""
    rng = np.random.default_rng(number)
    real = quality.open_root(by_language["none"])
    order = quality.order_of(real)
    found = []
    for _ in range(400):
        measures = quality.measured(order._replace(place=rng.permutation(len(order.file))), 1_024)
        found.append(measures[number].found)
    measure = measures[number]
    deviation = (measure.high - measure.low) / 2 / 2.576
    assert abs(np.mean(found) - measure.random) < 4 * deviation / 20
    assert 0.8 < np.std(found) / deviation < 1.25
    within = np.mean([measure.low <= value <= measure.high for value in found])
    assert within > 0.96


def test_at_the_command_line(by_language: dict[str, Path], tmp_path: Path) -> None:
    result = run_cli("stats", by_language["buffer"], "--order")
    assert (result.returncode, result.stdout.count("NOT random")) == (0, 4)
    result = run_cli("stats", by_language["documents"], "--order")
    assert (result.returncode, result.stdout.count("as random")) == (0, 4)
    write_parquet(tmp_path / "corpus" / "a.parquet", ["one", "two"])
    pretokenize(Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER)), tmp_path / "root")
    with pytest.raises(errors.DataRootError, match="three documents"):
        order_quality(tmp_path / "root")

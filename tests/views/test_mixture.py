"""Mixtures, stages and packing against slow references: one sample, one document after the other."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli, text, write_record
from support.views import Row, key, make, rows_of
from tokenmill import errors, export, import_data
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout
from tokenmill.dataroot.layout import SCHEDULE_PERIOD as PERIOD
from tokenmill.loading.arrangement import InOrder, MixedSource, MixedStage, Mixture, Shuffled
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.provenance import show, where_row, where_sample
from tokenmill.loading.receipts import ReceiptWriter, check_receipt, load_receipt
from tokenmill.loading.samplers import SequentialSampler, permute
from tokenmill.loading.stats import stats
from tokenmill.loading.view import open_root
from tokenmill.verification.verify import verify
from tokenmill.views import packing
from tokenmill.views.build import build_view, plan_view
from tokenmill.views.disjoint import prove_disjoint
from tokenmill.views.mixture import mix
from tokenmill.views.schedule import integer_shares, make_period
from tokenmill.views.spec import ViewSource, ViewSpec, ViewStage, load_spec
from tokenmill.views.write import write_view

GOLDEN = Path(__file__).parents[1] / "golden" / "mixtures.json"
EOS = 2


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three of different sizes, and another name of one."""
    folder = tmp_path_factory.mktemp("roots")
    made = {
        "web": make(folder, "web", {"a.parquet": [text(i, 2 + i % 40) for i in range(150)]}),
        "code": make(folder, "code", {"a.parquet": [text(i, 2 + i % 90) for i in range(1_000, 1_060)]}, seed=7),
        "wiki": make(folder, "wiki", {"a.parquet": [text(i, 9) for i in range(2_000, 2_040)], "b.parquet": ["x", ""]}),
    }
    made["copy"] = make(folder, "copy", {"z.parquet": [text(i, 2 + i % 40) for i in range(150)]}, seed=1)
    return made


def source(
    roots: dict[str, Path], name: str, weight: float | None = None, epochs: float = 1.0, **more: Any
) -> ViewSource:
    return ViewSource(name=name, root=str(roots[more.pop("of", name)]), weight=weight, max_epochs=epochs, **more)


# The schedule.


def slow_period(shares: dict[str, int], places: int = PERIOD) -> list[tuple[str, int]]:
    """Of all sources whose next sample may come, the one whose must come first, place after place."""
    given_ = dict.fromkeys(shares, 0)
    found = []
    for place in range(places):
        due = [
            (-((given_[name] + 1) * PERIOD // -share) - 1, name)
            for name, share in shares.items()
            if share and given_[name] < share and given_[name] * PERIOD // share <= place
        ]
        last, name = min(due)
        assert place <= last
        found.append((name, given_[name]))
        given_[name] += 1
    return found


WEIGHTS = st.dictionaries(
    st.sampled_from(["web", "code", "wiki", "b", "a"]), st.floats(0.1, 1_000), min_size=1, max_size=4
)


@settings(max_examples=6)
@given(weights=WEIGHTS)
def test_a_period_is_the_slow_one(weights: dict[str, float]) -> None:
    shares = integer_shares(weights)
    sources, ranks = make_period(shares)
    names = list(shares)
    assert [
        (names[number], rank) for number, rank in zip(sources.tolist(), ranks.tolist(), strict=True)
    ] == slow_period(shares)


@settings(max_examples=8)
@given(data=st.data(), count=st.integers(1, 30) | st.just(1_000))
def test_every_prefix_is_within_one_sample_of_every_share(data: st.DataObject, count: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = {f"s{number}": float(weight) + 0.1 for number, weight in enumerate(rng.random(count))}
    shares = integer_shares(weights)
    assert sum(shares.values()) == PERIOD
    total = sum(map(Fraction, weights.values()))
    exact = {name: Fraction(weight) * PERIOD / total for name, weight in weights.items()}
    assert all(abs(shares[name] - exact[name]) < 1 for name in shares)
    sources, ranks = make_period(shares)
    assert np.bincount(sources, minlength=count).tolist() == list(shares.values())
    share, place, ranks = np.array(list(shares.values()))[sources], np.arange(PERIOD), ranks.astype(np.int64)
    # A source of which `rank` samples came before a place, and which comes there, is within one sample at both ends.
    assert (np.abs(ranks - share * place / PERIOD) < 1).all()
    assert (np.abs(ranks + 1 - share * (place + 1) / PERIOD) < 1).all()


def test_a_weight_that_comes_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tiny', 1e-09, is 1e-09 of all: expected 0, or at least 1/65536"):
        integer_shares({"tiny": 1e-9, "web": 1.0})
    assert integer_shares({"none": 0.0, "web": 0.2, "code": 0.8}) == {"none": 0, "web": 13_107, "code": 52_429}


# Packing.


def slow_packing(lengths: list[int], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Samples of one window, each a list of document, offset and length, by their rule."""
    pieces = [
        (number, at, min(seq_len, length - at))
        for number, length in enumerate(lengths)
        for at in range(0, length, seq_len)
    ]
    samples: list[list[tuple[int, int, int]]] = []
    lines: dict[int, deque[int]] = {room: deque() for room in range(seq_len + 1)}
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        room = next((room for room in range(piece[2], seq_len + 1) if lines[room]), None)
        if room is None:
            room = seq_len
            lines[room].append(len(samples))
            samples.append([])
        sample = lines[room].popleft()
        samples[sample].append(piece)
        lines[room - piece[2]].append(sample)
    return sorted(sorted(sample) for sample in samples)


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from([1, 8, 16, 17, 32, 33, 200]), max_size=80),
    seq_len=st.sampled_from([1, 8, 16, 17, 31]),
    window=st.sampled_from([1, 7, 1_000]),
)
def test_packing_is_the_slow_one(lengths: list[int], seq_len: int, window: int) -> None:
    place = np.cumsum([5, *lengths])[:-1].astype(np.int64)
    expected: list[tuple[int, int]] = []
    for begin in range(0, len(lengths), window):
        for sample in slow_packing(lengths[begin : begin + window], seq_len):
            expected += [(int(place[begin + number]) + at, length) for number, at, length in sample]
            if padding := seq_len - sum(length for _, _, length in sample):
                expected.append((-1, padding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        found = list(packing.pack(place, np.array(lengths, np.uint32), seq_len))
        samples = packing.count_samples(np.array(lengths, np.uint32), seq_len)
    assert [pair for some in found for pair in zip(some.place.tolist(), some.length.tolist(), strict=True)] == expected
    assert samples * seq_len == sum(length for _, length in expected)


def test_best_fit_fills_web_like_samples() -> None:
    lengths = np.random.default_rng(0).lognormal(6.2, 1.2, 200_000).astype(np.uint32) + 1
    for seq_len in (2_048, 8_192):
        samples = packing.count_samples(lengths, seq_len)
        assert int(lengths.sum()) / (samples * seq_len) > 0.999


# Views.


def documents(spec: ViewSpec, source_: ViewSource) -> list[Row]:
    rows = rows_of(Path(source_.root), source_.name)
    if spec.shuffle == "documents":
        rows = sorted(rows, key=lambda row: (key(row, spec.seed), row.file, row.row))
    return rows


def row_samples(spec: ViewSpec, rows: list[Row]) -> list[list[int]]:
    """The samples of one source, as they lie."""
    length = spec.seq_len or 32
    if spec.packing == "concat":
        stream = [token for row in rows for token in row.tokens]
        return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
    samples = slow_packing([len(row.tokens) for row in rows], length)
    filled = [
        [token for number, at, size in sample for token in rows[number].tokens[at : at + size]] for sample in samples
    ]
    return [tokens + [EOS] * (length - len(tokens)) for tokens in filled]


def drawn(spec: ViewSpec) -> Iterator[tuple[str, list[int]]]:
    """The samples of a mixture, one after the other, with the names of their sources."""
    lying = {each.name: row_samples(spec, documents(spec, each)) for each in spec.sources}
    taken = dict.fromkeys(lying, 0)
    for stage in spec.stages:
        weights = stage.weights or {each.name: each.weight or 0.0 for each in spec.sources}
        length = stage.samples or (stage.tokens or 0) // (spec.seq_len or 32)
        period = slow_period(integer_shares({name: weights.get(name, 0.0) for name in lying}), length)
        for place in range(length):
            name = period[place][0]
            epoch, visit = divmod(taken[name], len(lying[name]))
            if spec.shuffle != "none":
                moved = permute(np.array([visit], np.uint64), len(lying[name]), f"view/{spec.seed}/{name}/{epoch}")
                visit = int(moved[0])
            taken[name] += 1
            yield name, lying[name][visit]


@settings(max_examples=10)
@given(
    seq_len=st.sampled_from([5, 32, 61]),
    seed=st.integers(0, 1_000),
    shuffle=st.sampled_from(["documents", "samples", "none"]),
    policy=st.sampled_from(["concat", "best-fit"]),
    weights=st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=3, max_size=3),
    stages=st.lists(
        st.tuples(st.integers(1, 60), st.none() | st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=3, max_size=3)),
        max_size=3,
    ),
)
def test_any_mixture_equals_the_slow_way(
    roots: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    seq_len: int,
    seed: int,
    shuffle: str,
    policy: str,
    weights: list[float],
    stages: list[tuple[int, list[float] | None]],
) -> None:
    names = ["web", "code", "wiki"]
    weights = weights if any(weights) else [1.0, 1.0, 1.0]
    spec = ViewSpec(
        sources=[source(roots, name, weight, 9) for name, weight in zip(names, weights, strict=True)],
        seq_len=seq_len,
        seed=seed,
        shuffle=shuffle,
        packing=policy,
        stages=[
            ViewStage(samples=samples, weights=dict(zip(names, of, strict=True)) if of and any(of) else None)
            for samples, of in stages
        ]
        or [ViewStage(tokens=70 * seq_len + 1)],
    )
    folder = tmp_path_factory.mktemp("view") / "view"
    built, _ = build_view(spec, folder)
    expected = list(drawn(spec))
    dataset = TokenDataset(folder)
    assert len(dataset) == built.record.samples == len(expected)
    assert dataset[:].tolist() == [tokens for _, tokens in expected]
    assert [dataset.sources[number] for number in dataset.source_of(np.arange(len(expected)))] == [
        n for n, _ in expected
    ]
    assert dataset[[len(expected) - 1, 0]].tolist() == [expected[-1][1], expected[0][1]]
    for stage in built.record.stages:
        here, expected = expected[: stage.samples], expected[stage.samples :]
        counts = {name: [n for n, _ in here].count(name) for name in stage.shares}
        assert stage.taken == counts
    found = verify(folder)
    assert found.passed, found.findings


def test_a_mixture_lasts_as_long_as_its_sources(roots: dict[str, Path]) -> None:
    spec = ViewSpec(sources=[source(roots, "web", 3), source(roots, "code", 1, 2)], seq_len=16)
    record = plan_view(spec).record
    (stage,) = record.stages
    web, code = record.sources
    assert stage.taken["web"] == web.samples
    assert stage.taken["code"] < 2 * code.samples
    longer = msgspec.structs.replace(spec, stages=[ViewStage(samples=stage.samples + 1)])
    with pytest.raises(errors.RecipeError) as raised:
        plan_view(longer)
    assert f"source 'web' has {web.samples} samples, and may be taken 1 times" in str(raised.value)
    assert f"at sample {stage.samples}, which is sample {stage.samples} of the {stage.samples + 1} of stage 1" in str(
        raised.value
    )
    assert f"a stage of {stage.samples} samples (tokens = {stage.samples * 16})" in str(raised.value)
    # What it says would fit, fits.
    epochs = float(str(raised.value.next_step).rpartition("max_epochs = ")[2])
    plan_view(msgspec.structs.replace(longer, sources=[source(roots, "web", 3, epochs), source(roots, "code", 1, 2)]))
    fitting = [ViewStage(samples=stage.samples), ViewStage(weights={"code": 1})]
    rest = plan_view(msgspec.structs.replace(spec, stages=fitting)).record.stages[1]
    assert rest.samples == 2 * code.samples - stage.taken["code"]
    with pytest.raises(errors.RecipeError, match=r"stage 2: source 'web' has nothing left: it has"):
        plan_view(msgspec.structs.replace(spec, stages=[ViewStage(samples=stage.samples), ViewStage()]))


def test_what_changes_later_changes_nothing_before(roots: dict[str, Path], tmp_path: Path) -> None:
    """Another length, other weights, a source that a later stage brings in, and one more stage."""
    first = ViewStage(samples=80, weights={"web": 0.7, "code": 0.3})
    base = [source(roots, "web", epochs=5), source(roots, "code", epochs=5)]
    wiki = source(roots, "wiki", epochs=5)
    specs = [
        ViewSpec(sources=base, stages=[first, ViewStage(samples=40, weights={"web": 1})]),
        ViewSpec(sources=base, stages=[first, ViewStage(samples=90, weights={"code": 1, "web": 2})]),
        ViewSpec(sources=[wiki, *base], stages=[first, ViewStage(samples=40, weights={"web": 1, "wiki": 1})]),
        ViewSpec(sources=[*base, wiki], stages=[msgspec.structs.replace(first, samples=50)]),
        ViewSpec(sources=base[::-1], stages=[msgspec.structs.replace(first, samples=100)]),
    ]
    found = []
    for number, spec in enumerate(specs):
        for policy in ("concat", "best-fit"):
            folder = tmp_path / f"{number}-{policy}"
            build_view(msgspec.structs.replace(spec, seq_len=24, packing=policy), folder)
            found.append((policy, TokenDataset(folder)[:50].tolist(), TokenDataset(folder)[:80].tolist()))
    for policy in ("concat", "best-fit"):
        prefixes = [(short, long) for name, short, long in found if name == policy]
        assert all(short == prefixes[0][0] for short, _ in prefixes)
        assert all(long == prefixes[0][1] for _, long in prefixes if len(long) == 80)


@pytest.mark.parametrize("policy", ["concat", "best-fit"])
def test_nothing_repeats_before_its_epoch_is_over(roots: dict[str, Path], tmp_path: Path, policy: str) -> None:
    stages = [
        ViewStage(samples=30),
        ViewStage(samples=31, weights={"code": 1}),
        ViewStage(weights={"code": 1, "web": 1}),
    ]
    sources = [source(roots, "web", 1, 3), source(roots, "code", 2, 3)]
    build_view(ViewSpec(sources=sources, seq_len=64, packing=policy, stages=stages), tmp_path / "view")
    dataset = TokenDataset(tmp_path / "view")
    of_source = dataset.source_of(np.arange(len(dataset)))
    begins = open_root(tmp_path / "view").arrangement().begins(np.arange(len(dataset)))
    for number, name in enumerate(dataset.sources):
        mine = begins[of_source == number].tolist()
        count = plan_view(ViewSpec(sources=[source(roots, name)], seq_len=64, packing=policy)).record.samples
        assert len(mine) > count
        for begin in range(0, len(mine), count):
            epoch = mine[begin : begin + count]
            assert len(set(epoch)) == len(epoch)
        assert mine[:count] != mine[count : 2 * count]


@pytest.mark.usefixtures("opened_once")
@pytest.mark.parametrize("policy", ["concat", "best-fit"])
@pytest.mark.parametrize("shuffle", ["documents", "samples", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_is_read_as_a_data_root_is(
    roots: dict[str, Path], tmp_path: Path, policy: str, shuffle: str, *, mixed: bool
) -> None:
    weights = (2.0, 1.0) if mixed else (None, None)
    sources = [source(roots, name, weight, 3) for name, weight in zip(("web", "code"), weights, strict=True)]
    spec = ViewSpec(sources=sources, seq_len=48, packing=policy, shuffle=shuffle)
    view = tmp_path / "view"
    record = build_view(spec, view)[0].record
    dataset = TokenDataset(view)
    checked = verify(view)
    assert checked.passed, checked.findings
    for number in range(0, len(dataset), 29):
        place = where_sample(view, number)
        shown = show(view, number)
        assert [token.id for token in shown.tokens] == dataset[number].tolist()
        inside = sum(part.end - part.begin for part in place.documents)
        assert inside == 48 or policy == "best-fit"
        bounds = dataset.document_bounds(number).tolist()
        starts = [part.begin - place.begin for part in place.documents]
        assert bounds == [*starts, *([inside] if inside < 48 else []), 48]
        for part in place.documents:
            assert number in where_row(view, part.source, part.row).samples
            name, _, path = part.source.partition("/")
            (row,) = [row for row in rows_of(roots[name], name) if (row.file, row.row) == (path, part.row)]
            tokens = list(row.tokens[part.document_begin : part.document_end])
            assert dataset[number][part.begin - place.begin : part.end - place.begin].tolist() == tokens
            whole = part.document_begin == 0 and part.document_end == len(row.tokens)
            assert whole or policy == "concat" or len(row.tokens) > 48
    # Back: all samples that hold a row, in every epoch.
    row = rows_of(roots["code"], "code")[5]
    found = where_row(view, f"code/{row.file}", row.row).samples
    documents_ = open_root(view).documents()
    every = range(len(dataset)) if shuffle == "documents" else found  # it takes seconds to look at all
    named = {
        at: {(part.document.source, part.document.row) for part in documents_.parts_between(at * 48, (at + 1) * 48)}
        for at in every
    }
    assert found == [at for at, rows in named.items() if (f"code/{row.file}", row.row) in rows]
    figures = stats(view)
    assert figures.documents == record.documents
    assert figures.tokens <= len(dataset) * 48 + (record.tokens if policy == "concat" and not mixed else 0)
    assert dataset.max_documents() == max(len(dataset.document_bounds(number)) - 1 for number in range(len(dataset)))
    lines = (["info"], ["show", "--sample", 3], ["stats"], ["where", "--source", "web/a.parquet", "--row", 5])
    for line in lines if shuffle == "documents" else ():
        result = run_cli(line[0], view, *line[1:])
        assert result.returncode == 0, result.stderr
    if mixed or policy == "best-fit":
        with pytest.raises(errors.DataRootError, match=r"samples are (drawn by weight|packed), which cuts documents"):
            write_view(view, tmp_path / "written")


def test_disjoint_and_receipts(roots: dict[str, Path], tmp_path: Path) -> None:
    for split in ("train", "validation"):
        sources = [source(roots, "web", 2, 3), source(roots, "code", 1, 3)]
        spec = ViewSpec(sources=sources, seq_len=40, packing="best-fit", holdout=0.2, split=split)
        build_view(spec, tmp_path / split)
    found = prove_disjoint(tmp_path / "train", tmp_path / "validation")
    assert found.passed
    assert sum(found.documents) == 210
    assert not prove_disjoint(tmp_path / "train", tmp_path / "train").passed
    dataset = TokenDataset(tmp_path / "train")
    writer = ReceiptWriter(dataset, sampler := SequentialSampler(len(dataset), rank=1, world_size=2, start=3))
    writer.add(sampler.indices(0, 9))
    writer.receipt().save(tmp_path / "receipt.json")
    checks = check_receipt(tmp_path / "train", load_receipt(tmp_path / "receipt.json"))
    assert all(check.passed for check in checks)
    assert sampler.indices().tolist() == list(range(4, len(dataset), 2))
    other = check_receipt(tmp_path / "validation", load_receipt(tmp_path / "receipt.json"))
    assert not all(check.passed for check in other)


def test_the_same_data_under_two_names_is_found(roots: dict[str, Path], tmp_path: Path) -> None:
    twice = [source(roots, "web", 1.0, 4), source(roots, "again", 2.0, 4, of="web"), source(roots, "code", 1.0, 4)]
    with pytest.raises(errors.RecipeError, match="sources 'web' and 'again' are the same documents") as raised:
        plan_view(ViewSpec(sources=twice, seq_len=32))
    assert 'same_data = "merge"' in str(raised.value)
    # Made from another file, in another order: other shards, the same texts.
    copied = [source(roots, "web", 1.0, 4), source(roots, "copy", 2.0, 4), source(roots, "code", 1.0, 4)]
    with pytest.raises(errors.RecipeError, match="sources 'web' and 'copy' are the same documents"):
        plan_view(ViewSpec(sources=copied, seq_len=32))
    stages = [ViewStage(samples=40), ViewStage(samples=40, weights={"copy": 1, "web": 1, "code": 1})]
    merged = ViewSpec(sources=copied, seq_len=32, same_data="merge", stages=stages)
    by_hand = ViewSpec(
        sources=[source(roots, "web", 3.0, 4), source(roots, "code", 1.0, 4)],
        seq_len=32,
        stages=[ViewStage(samples=40), ViewStage(samples=40, weights={"web": 2, "code": 1})],
    )
    build_view(merged, tmp_path / "merged")
    build_view(by_hand, tmp_path / "by-hand")
    assert TokenDataset(tmp_path / "merged").samples_sha256 == TokenDataset(tmp_path / "by-hand").samples_sha256
    assert "copy: has the same documents as web" in plan_view(merged).record.notes[0]
    # Some documents of the same data: no sum of weights would be right.
    part = source(roots, "part", 1.0, 4, of="web", where="row < 50")
    with pytest.raises(errors.RecipeError, match="'web' and 'part' share 50 documents of the same data"):
        plan_view(ViewSpec(sources=[twice[0], part], seq_len=32, same_data="merge"))
    rest = source(roots, "rest", 1.0, 4, of="web", where="row >= 50")
    assert plan_view(ViewSpec(sources=[part, rest], seq_len=32)).record.documents == 150


WEB = '[[sources]]\nname = "web"\nroot = "web"\n'
PROBLEMS = {
    "a source without a weight": (WEB + "weight = 1\n" + WEB.replace("web", "code"), 5, "weight"),
    "a weight below 0": (WEB + "weight = -1", 4, "weight"),
    "a weight that is no number": (WEB + "weight = nan", 4, "weight"),
    "no weight above 0": (WEB + "weight = 0", 4, "weight"),
    "epochs of nothing": (WEB + "weight = 1\nmax_epochs = 0", 5, "max_epochs"),
    "endless epochs": (WEB + "weight = 1\nmax_epochs = inf", 5, "max_epochs"),
    "a stage of both": (WEB + "weight = 1\n[[stages]]\ntokens = 5\nsamples = 5", 6, "not both"),
    "a stage of neither": (WEB + "weight = 1\n[[stages]]\n[[stages]]\nsamples = 5", 5, "only the last"),
    "a name that is none": (WEB + "[[stages]]\nsamples = 5\nweights = {wbe = 1}", 6, "'web'"),
    "a stage of no weight": (WEB + "[[stages]]\nsamples = 5\nweights = {web = 0}", 6, "above 0"),
    "a stage's weight that is no number": (WEB + "[[stages]]\nsamples = 5\nweights = {web = nan}", 6, "weights"),
    "a count that is none": (WEB + 'weight = 1\n[[stages]]\ntokens = "many"', 6, "tokens"),
    "an unknown field": (WEB + "weight = 1\n[[stages]]\ntoken = 1", 6, "did you mean tokens?"),
    "an unknown policy": ('packing = "best"\n' + WEB, 1, "'best-fit'"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_name_the_line_and_what_was_meant(tmp_path: Path, name: str) -> None:
    content, line, words = PROBLEMS[name]
    (tmp_path / "view.toml").write_text(content)
    with pytest.raises(errors.RecipeError) as raised:
        load_spec(tmp_path / "view.toml")
    assert f"line {line}" in str(raised.value)
    assert words in str(raised.value)


def swap_two_samples(array: np.ndarray) -> None:
    array[[10, 11]] = array[[11, 10]]


DAMAGE = {
    "a bit of the schedule": (layout.VIEW_SCHEDULE, "<u2", lambda array: array.__setitem__(5, array[5] ^ 1)),
    "two places swapped": (layout.VIEW_SCHEDULE, "<u2", swap_two_samples),
    "a rank": (layout.VIEW_SCHEDULE, "<u2", lambda array: array.__setitem__(PERIOD + 7, 9)),
    "a document that became padding": (layout.VIEW_PLACES, "<i8", lambda array: array.__setitem__(3, -1)),
    "padding that became a document": (
        layout.VIEW_PLACES,
        "<i8",
        lambda array: array.__setitem__(int(np.flatnonzero(array < 0)[0]), 0),
    ),
    "a piece of another document": (layout.VIEW_PLACES, "<i8", lambda array: array.__setitem__(3, array[9])),
    "a bound that moved": (layout.VIEW_BEGINS, "<i8", lambda array: array.__setitem__(4, array[4] + 1)),
    "entries swapped": (layout.VIEW_PLACES, "<i8", lambda array: array.__setitem__([2, 3], array[[3, 2]])),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_what_the_digests_would_not(roots: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Whoever writes such an index writes its digests, too."""
    sources = [source(roots, "web", 2, 3), source(roots, "code", 1, 3)]
    view = tmp_path / "view"
    build_view(ViewSpec(sources=sources, seq_len=40, packing="best-fit"), view)
    file, dtype, change = DAMAGE[name]
    array = np.fromfile(view / file, dtype)
    change(array)
    array.tofile(view / file)
    field = file.removeprefix("view_").replace(".bin", "_sha256")
    record = json.loads((view / layout.VIEW).read_text())
    write_record(view / layout.VIEW, record | {field: hashlib.sha256(array.tobytes()).hexdigest()})
    found = verify(view)
    assert not found.passed
    assert all(
        finding.file in (file, layout.VIEW, layout.VIEW_BEGINS, layout.VIEW_PLACES, "web", "code")
        for finding in found.findings
    )


LIES: dict[str, Any] = {
    "another share": lambda record: record["stages"][0]["shares"].update(web=1, code=65_535),
    "more samples": lambda record: record["stages"][0].update(samples=record["stages"][0]["samples"] + 50),
    "fewer epochs": lambda record: record["sources"][0].update(max_epochs=0.5),
    "a longer span": lambda record: record["sources"][0].update(span=record["sources"][0]["span"] + 40),
    "less padding": lambda record: record.update(padding=0),
    "another taken": lambda record: record["stages"][0]["taken"].update(web=1),
}


@pytest.mark.parametrize("name", LIES)
def test_a_record_that_lies_is_found(roots: dict[str, Path], tmp_path: Path, name: str) -> None:
    sources = [source(roots, "web", 2, 3), source(roots, "code", 1, 3)]
    view = tmp_path / "view"
    build_view(ViewSpec(sources=sources, seq_len=40, packing="best-fit"), view)
    record = json.loads((view / layout.VIEW).read_text())
    LIES[name](record)
    write_record(view / layout.VIEW, record)
    assert not verify(view).passed


def test_a_schedule_that_is_missing_is_named(roots: dict[str, Path], tmp_path: Path) -> None:
    view = tmp_path / "view"
    spec = ViewSpec(sources=[source(roots, "web", 2), source(roots, "code", 1)], seq_len=40)
    build_view(spec, view)
    assert build_view(spec, view)[1]  # was there
    (view / layout.VIEW_SCHEDULE).unlink()
    with pytest.raises(errors.DataRootError, match=r"view_schedule\.bin: is missing"):
        TokenDataset(view)
    assert any("view_schedule.bin" in finding.file for finding in verify(view).findings)
    assert not build_view(spec, view)[1]  # built again
    assert verify(view).passed
    os.truncate(view / layout.VIEW_SCHEDULE, 77)
    with pytest.raises(errors.DataRootError, match="expected 262144 bytes, found 77"):
        TokenDataset(view)


def test_arrangements_answer_both_ways() -> None:
    rng = np.random.default_rng(3)
    shares = integer_shares({"a": 1.0, "b": 2.0, "none": 0.0})
    names = list(shares)
    period = make_period(shares)
    stages = [MixedStage(samples, np.array([*shares.values()]), *period) for samples in (1_000, PERIOD + 777)]
    sources = [
        MixedSource(name, begin, span, span // 10)
        for name, begin, span in zip(names, (0, 70_005, 90_000), (70_005, 19_995, 0), strict=True)
    ]
    arrangements = [
        InOrder(500, 10),
        Shuffled(500, 10, "view/1"),
        Mixture(sources, stages, seq_len=10, seed=None),
        Mixture(sources, stages, seq_len=10, seed=9),
    ]
    for arrangement in arrangements:
        samples = np.unique(rng.integers(0, arrangement.samples, 200))
        begins = arrangement.begins(samples)
        for sample, begin in zip(samples.tolist(), begins.tolist(), strict=True):
            assert sample in arrangement.samples_with(begin + 3, begin + 4).tolist()
        begin = int(begins[17])
        every = np.arange(arrangement.samples)
        expected = every[(arrangement.begins(every) < begin + 15) & (arrangement.begins(every) + 10 > begin)]
        assert arrangement.samples_with(begin, begin + 15).tolist() == expected.tolist()
        assert arrangement.begins(every[:0]).tolist() == []


def test_golden_mixtures(roots: dict[str, Path], tmp_path: Path) -> None:
    """The samples of fixed specs, so that no version draws others; anyone can make them by docs/format.md."""
    stages = [ViewStage(samples=70), ViewStage(tokens=3_333, weights={"wiki": 1, "code": 0.25})]
    found = {}
    for policy in ("concat", "best-fit"):
        for shuffle in ("documents", "none"):
            sources = [source(roots, "web", 0.7, 4), source(roots, "code", 0.3, 4), source(roots, "wiki", 0, 40)]
            spec = ViewSpec(sources=sources, seq_len=37, seed=5, packing=policy, shuffle=shuffle, stages=stages)
            build_view(spec, tmp_path / f"{policy}-{shuffle}")
            dataset = TokenDataset(tmp_path / f"{policy}-{shuffle}")
            expected = np.array([tokens for _, tokens in drawn(spec)], np.uint16)
            assert np.array_equal(dataset[:], expected)
            found[f"{policy} {shuffle}"] = hashlib.sha256(expected.tobytes()).hexdigest()
    for name, weights in {"two": {"web": 0.7, "code": 0.3}, "three": {"c": 1, "b": 2, "a": 4.5}}.items():
        found[f"period {name}"] = hashlib.sha256(
            np.stack(make_period(integer_shares(weights))).astype("<u2")
        ).hexdigest()
    assert found == json.loads(GOLDEN.read_text())


# What a hostile tester found.


@pytest.mark.parametrize(("samples", "epochs", "most"), [(10, 0.3, 3), (10, 2.3, 23), (10, 0.7, 7), (100, 0.29, 29)])
def test_fractions_of_epochs_are_the_decimals_that_were_written(samples: int, epochs: float, most: int) -> None:
    spec = ViewSpec(sources=[ViewSource(name="a", root="x", weight=1, max_epochs=epochs)], seq_len=8)
    assert mix(spec, {"a": samples}, 8, {"a": {}}).stages[0].samples == most


@pytest.mark.parametrize(
    ("samples", "epochs", "stages"),
    [
        ([235, 1_000, 10], [0.1, 3, 0.05], [23]),
        ([3], [1.0], [1_000_003]),
        ([235], [1.0], [235, 10]),
        ([40, 7], [0.7, 2.3], [30, 50]),
        ([11, 200], [2.3, 0.05], [5, 300]),
    ],
)
def test_what_an_error_says_would_fit_fits(samples: list[int], epochs: list[float], stages: list[int]) -> None:
    names = "abc"[: len(samples)]
    counts = dict(zip(names, samples, strict=True))
    sources = [
        ViewSource(name=name, root="x", weight=1, max_epochs=most) for name, most in zip(names, epochs, strict=True)
    ]
    spec = ViewSpec(sources=sources, seq_len=8, stages=[ViewStage(samples=length) for length in stages])
    nothing: dict[str, dict[str, int]] = {name: {} for name in names}
    for _ in range(10):  # each advice mends one source
        try:
            mix(spec, counts, 8, nothing)
        except errors.RecipeError as error:
            step, name = str(error.next_step), str(error).split("source '")[1][0]
            if "what fits" not in step:
                assert "raise its max_epochs" in step
                return
            stage = int(str(error).split("of stage ")[1].split()[0].rstrip(":")) - 1
            shorter = list(spec.stages)
            shorter[stage] = ViewStage(samples=int(step.split("a stage of ")[1].split(maxsplit=1)[0]))
            mix(msgspec.structs.replace(spec, stages=shorter[: stage + 1]), counts, 8, nothing)
            more = float(step.rpartition("max_epochs = ")[2])
            mended = [
                msgspec.structs.replace(each, max_epochs=more if each.name == name else each.max_epochs)
                for each in spec.sources
            ]
            assert mended != spec.sources
            spec = msgspec.structs.replace(spec, sources=mended)
        else:
            return
    raise AssertionError(spec)


def test_a_schedule_of_noise_is_named(roots: dict[str, Path], tmp_path: Path) -> None:
    view = tmp_path / "view"
    build_view(ViewSpec(sources=[source(roots, "web", 2), source(roots, "code", 1)], seq_len=40), view)
    (view / layout.VIEW_SCHEDULE).write_bytes(np.random.default_rng(0).bytes(4 * PERIOD))
    with pytest.raises(errors.DataRootError, match=r"view_schedule\.bin: names sources that the view does not have"):
        TokenDataset(view)
    assert run_cli("show", view, "--sample", 1).returncode == 5
    assert not verify(view).passed


def test_samples_may_be_longer_than_all_there_is(roots: dict[str, Path]) -> None:
    for policy in ("concat", "best-fit"):
        spec = ViewSpec(sources=[source(roots, "web")], seq_len=10**9, packing=policy)
        built = plan_view(spec, compare_packings=True)
        assert built.record.samples == (policy == "best-fit")
        assert {plan.samples for plan in built.packings if plan.seq_len == 10**9} == {0, 1}


def test_arrays_that_take_samples_must_have_their_shape(roots: dict[str, Path], tmp_path: Path) -> None:
    build_view(ViewSpec(sources=[source(roots, "web")], seq_len=48), tmp_path / "view")
    for root in (tmp_path / "view", roots["web"]):
        dataset = TokenDataset(root)
        for shape in ((2, dataset.seq_len + 2), (3, dataset.seq_len), (1, dataset.seq_len), (2, dataset.seq_len - 1)):
            with pytest.raises(ValueError, match=r"shape|match|broadcast"):
                dataset.gather([1, 2], np.zeros(shape))
        for wrong in ([2**63], np.array([2**64 - 1], np.uint64)):
            with pytest.raises(IndexError, match=f"sample {int(wrong[0])}"):
                _ = dataset[wrong]


def test_sources_are_merged_only_where_that_is_meant(roots: dict[str, Path]) -> None:
    different = [source(roots, "web", 1.0, 1), source(roots, "copy", 2.0, 9)]
    with pytest.raises(errors.RecipeError, match="are the same documents, and have max_epochs 1 and 9"):
        plan_view(ViewSpec(sources=different, seq_len=32, same_data="merge"))
    unused = [source(roots, "web", 1.0), source(roots, "copy", 0.0), source(roots, "code", 1.0)]
    assert plan_view(ViewSpec(sources=unused, seq_len=32)).record.stages
    with pytest.raises(errors.RecipeError, match="Expected weights, as only sources"):
        plan_view(ViewSpec(sources=[source(roots, "web"), source(roots, "copy")], seq_len=32, same_data="merge"))
    with pytest.raises(errors.RecipeError, match=r"documents of it were left out: 150 \(duplicate\)"):
        plan_view(ViewSpec(sources=different, seq_len=32, duplicates="first"))


LINES = {
    "a table inside a line": ('seq_len = 8\nsources = [{name = "web", root = "web", weight = -1}]', None, "weight"),
    "a quoted table": ('[["sources"]]\nname = "web"\nroot = "web"\nweight = -1', 4, "weight"),
    "a text of several lines": (
        'seq_len = 8\n[[sources]]\nname = "web"\nroot = "web"\nwhere = """\n[[sources]]\nweight=7\n"""\nweight = -1',
        9,
        "weight",
    ),
    "an empty policy": ('packing = ""\n' + WEB, 1, "it is one of concat, best-fit"),
    "plain words": (WEB + 'weight = "much"', 4, "Expected a number"),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    content, line, words = LINES[name]
    (tmp_path / "view.toml").write_text("\ufeff" + content, encoding="utf-8")
    with pytest.raises(errors.RecipeError) as raised:
        load_spec(tmp_path / "view.toml")
    assert (f", line {line}:" in str(raised.value)) if line else (", line" not in str(raised.value))
    assert words in str(raised.value) + str(raised.value.next_step)


def test_exports_of_mixtures_are_about_samples(roots: dict[str, Path], tmp_path: Path) -> None:
    sources = [source(roots, "web", 2, 2), source(roots, "code", 1, 2)]
    build_view(ViewSpec(sources=sources, seq_len=40), tmp_path / "mixture")
    build_view(ViewSpec(sources=sources, seq_len=40, packing="best-fit"), tmp_path / "packed")
    with pytest.raises(errors.ExportError, match="its samples are drawn by weight, which cuts documents, and megatron"):
        export(tmp_path / "mixture", tmp_path / "out", "megatron")
    with pytest.raises(errors.ExportError, match="its samples are packed with padding"):
        export(tmp_path / "packed", tmp_path / "out", "mds")
    export(tmp_path / "mixture", tmp_path / "out", "mds")
    import_data(tmp_path / "out", tmp_path / "back", "mds", tokenizer=str(TOKENIZER), seq_len=40)
    found, back = TokenDataset(tmp_path / "mixture"), TokenDataset(tmp_path / "back")
    assert np.array_equal(back[:], found[:])

"""Views against a slow reference: lists, sorts, and the rules of docs/format.md once more."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import REPOSITORY, run_cli, text, write_parquet, write_record
from support.reference import sample_ids
from support.views import Row, key, make, rows_of
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.provenance import show, where_row, where_sample
from tokenmill.loading.receipts import ReceiptWriter, check_receipt, load_receipt
from tokenmill.loading.samplers import EpochSampler, permute
from tokenmill.loading.stats import stats
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.verification.verify import verify
from tokenmill.views import order
from tokenmill.views.build import build_view, plan_view
from tokenmill.views.disjoint import prove_disjoint
from tokenmill.views.spec import ViewSource, ViewSpec, load_spec
from tokenmill.views.sql import Condition
from tokenmill.views.write import write_view


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that share some texts, one of them consolidated, too; one cut off inside a document; one without hashes."""
    folder = tmp_path_factory.mktemp("roots")
    web = {"a.parquet": [text(i, 2 + i % 40) for i in range(120)], "b/c.parquet": ["twice", None, "", "twice", "once"]}
    code = {"a.parquet": [text(i, 2 + i % 40) for i in range(90, 200)]}
    made = {
        "web": make(folder, "web", web),
        "code": make(folder, "code", code, seed=7),
        "cut": make(folder, "cut", code, total_tokens=2_345),
    }
    consolidate(made["code"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "DOCUMENTS_VERSION", 1)
        made["old"] = make(folder, "old", web)
    return made


def reference(spec: ViewSpec, removed: set[tuple[str, str, int]]) -> tuple[list[Row], list[int]]:
    """Documents in order, and the tokens of the view."""
    rows = [row for source in spec.sources for row in rows_of(Path(source.root), source.name)]
    rows = [row for row in rows if (row.name, row.file, row.row) not in removed]
    if spec.holdout:
        limit = math.ceil(Fraction(spec.holdout) * 2**64)
        rows = [row for row in rows if (row.xxh3 < limit) == (spec.split == "validation")]
    if spec.duplicates == "first":
        first: dict[int, Row] = {}
        for row in sorted(rows, key=lambda row: (row.name, row.file, row.row)):
            first.setdefault(row.xxh3, row)
        rows = [row for row in rows if first[row.xxh3] is row]
    if spec.shuffle == "documents":
        rows.sort(key=lambda row: (key(row, spec.seed), row.name, row.file, row.row))
    return rows, [token for row in rows for token in row.tokens]


def expected_samples(spec: ViewSpec, stream: list[int]) -> np.ndarray:
    length = spec.seq_len or 32
    samples = np.array(stream[: len(stream) // length * length], np.uint16).reshape(-1, length)
    if spec.shuffle == "samples" and len(samples):
        places = np.arange(len(samples), dtype=np.uint64)
        return samples[permute(places, len(samples), f"view/{spec.seed}").astype(np.int64)]
    return samples


SOURCES = st.lists(st.sampled_from(["web", "code", "cut", "old"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=60)
@given(
    names=SOURCES,
    seq_len=st.sampled_from([None, 3, 7, 64, 100_000]),
    seed=st.integers(0, 2**40),
    shuffle=st.sampled_from(["documents", "samples", "none"]),
    holdout=st.sampled_from([0.0, 0.05, 0.3, 0.999]),
    validation=st.booleans(),
    duplicates=st.sampled_from(["keep", "first"]),
    removed=st.sets(st.integers(0, 119), max_size=5),
)
def test_any_view_equals_the_slow_way(
    roots: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    seq_len: int | None,
    seed: int,
    shuffle: str,
    holdout: float,
    validation: bool,
    duplicates: str,
    removed: set[int],
) -> None:
    folder = tmp_path_factory.mktemp("view")
    listed = folder / "removed.txt"
    listed.write_text("# taken down\n\n" + "".join(f"a.parquet {row}\n" for row in sorted(removed)))
    sources = [
        ViewSource(name=name, root=str(roots[name]), remove=str(listed) if number == 0 else None)
        for number, name in enumerate(names)
    ]
    spec = ViewSpec(
        sources=sources,
        seq_len=seq_len,
        seed=seed,
        shuffle=shuffle,
        holdout=holdout,
        split="validation" if validation and holdout else "train",
        duplicates=duplicates,
    )
    rows, stream = reference(spec, {(names[0], "a.parquet", row) for row in removed})
    built, _ = build_view(spec, folder / "view")
    samples = expected_samples(spec, stream)
    assert (built.record.documents, built.record.tokens) == (len(rows), len(stream))
    assert sum(source.taken + sum(source.left_out.values()) for source in built.record.sources) == sum(
        source.documents for source in built.record.sources
    )
    assert built.duplicates == (0 if duplicates == "first" else len(rows) - len({row.xxh3 for row in rows}))
    dataset = TokenDataset(folder / "view")
    assert np.array_equal(dataset[:], samples)
    found = verify(folder / "view")
    assert found.passed, found.findings
    if shuffle != "samples":
        bounds = np.cumsum([0, *(len(row.tokens) for row in rows)]).tolist()
        for number in range(0, len(samples), len(samples) // 4 + 1):
            begin, end = number * dataset.seq_len, (number + 1) * dataset.seq_len
            expected = [0, *(at - begin for at in bounds[1:-1] if begin < at < end), dataset.seq_len]
            assert dataset.document_bounds(number).tolist() == expected
            parts = where_sample(folder / "view", number).documents
            inside = [row for row, at in zip(rows, bounds, strict=False) if at < end and at + len(row.tokens) > begin]
            assert [(part.source, part.row) for part in parts] == [
                (f"{row.name}/{row.file}", row.row) for row in inside
            ]


@pytest.mark.parametrize("shuffle", ["documents", "samples", "none"])
def test_a_view_is_read_as_a_data_root_is(roots: dict[str, Path], tmp_path: Path, shuffle: str) -> None:
    sources = [ViewSource(name=name, root=str(roots[name])) for name in ("web", "code")]
    spec = ViewSpec(sources=sources, shuffle=shuffle)
    view = tmp_path / "view"
    build_view(spec, view)
    dataset = TokenDataset(view)
    assert np.array_equal(np.stack(list(dataset)), expected_samples(spec, reference(spec, set())[1]))
    assert (dataset.seq_len, dataset.vocab_size, dataset.dtype) == (32, 4_096, np.dtype("<u2"))
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[5], dataset[5])
    ids = np.frombuffer(sample_ids(np.concatenate(list(dataset)), 32, "blake2b-64"), "<u8")
    assert [dataset.sample_id(number) for number in range(len(dataset))] == ids.tolist()
    with pytest.raises(errors.DataRootError, match="a view stores no sample ids"):
        _ = dataset.sample_ids
    assert not dataset[3].flags.writeable
    # Both ways: where a sample comes from, and which samples hold that row.
    for number in range(0, len(dataset), 11):
        place = where_sample(view, number)
        assert sum(part.end - part.begin for part in place.documents) == 32
        for part in place.documents:
            assert number in where_row(view, part.source, part.row).samples
            name, _, path = part.source.partition("/")
            (row,) = [row for row in rows_of(roots[name], name) if (row.file, row.row) == (path, part.row)]
            tokens = list(row.tokens[part.document_begin : part.document_end])
            assert dataset[number][part.begin - place.begin : part.end - place.begin].tolist() == tokens
    assert [token.id for token in show(view, 4).tokens] == dataset[4].tolist()
    figures = stats(view)
    texts = [row.xxh3 for row in reference(spec, set())[0]]
    assert figures.repeated_texts.documents == len(texts) - len(set(texts)) > 0
    assert figures.repeated_texts.texts == sum(texts.count(value) > 1 for value in set(texts))
    assert (figures.documents, figures.tokens) == (233, dataset.tokens)
    assert sum((figures.tokens_by_source or {}).values()) == sum(len(row.tokens) for row in reference(spec, set())[0])
    for line in (["info"], ["show", "--sample", 3], ["where", "--source", "web/a.parquet", "--row", 5], ["stats"]):
        result = run_cli(line[0], view, *line[1:])
        assert result.returncode == 0, result.stderr
    result = run_cli("where", view, "--source", "nowhere/a.parquet", "--row", 5)
    assert (result.returncode, "in a view after NAME/" in result.stderr) == (2, True)


@pytest.mark.parametrize("shuffle", ["documents", "samples"])
def test_receipts_of_a_view(roots: dict[str, Path], tmp_path: Path, shuffle: str) -> None:
    """They hold wherever the data roots lie, and for no other view."""
    for name in ("web", "code"):
        shutil.copytree(roots[name], tmp_path / "moved" / name)
    for where, seed in ((roots["web"].parent, 1), (tmp_path / "moved", 1), (roots["web"].parent, 2)):
        sources = [ViewSource(name=name, root=str(where / name)) for name in ("web", "code")]
        build_view(ViewSpec(sources=sources, shuffle=shuffle, seed=seed), tmp_path / f"{where.name}-{seed}")
    first, moved, other = (tmp_path / name for name in (f"{roots['web'].parent.name}-1", "moved-1", f"{where.name}-2"))
    dataset = TokenDataset(first)
    sampler = EpochSampler(len(dataset), seed=4)
    writer = ReceiptWriter(dataset, sampler)
    for begin in range(0, 40, 10):
        writer.add(sampler.indices(begin, begin + 10))
    writer.receipt().save(tmp_path / "receipt.json")
    for view in (first, moved):
        checks = check_receipt(view, load_receipt(tmp_path / "receipt.json"))
        assert all(check.passed for check in checks), checks
    assert not all(check.passed for check in check_receipt(other, writer.receipt()))
    writer.add([3])
    assert not all(check.passed for check in check_receipt(first, writer.receipt()))
    assert run_cli("receipts", first, tmp_path / "receipt.json").returncode == 0
    (first / layout.VIEW_PLACES).write_bytes(bytes((first / layout.VIEW_PLACES).stat().st_size))
    assert not check_receipt(first, load_receipt(tmp_path / "receipt.json"))[1].passed


def test_documents_keep_their_order_when_others_are_added(roots: dict[str, Path]) -> None:
    def taken(*names: str) -> list[tuple[str, str, int]]:
        spec = ViewSpec(sources=[ViewSource(name=name, root=str(roots[name])) for name in names], seed=5)
        rows, _ = reference(spec, set())
        assert plan_view(spec).record.documents == len(rows)
        return [row[:3] for row in rows]

    alone, together = taken("web"), taken("code", "web")
    assert [row for row in together if row[0] == "web"] == alone


def test_equal_keys_fall_back_on_names(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """So the order is defined even where hashes collide; here all do."""
    monkeypatch.setattr("tokenmill.views.choice.document_keys", lambda keys, row: (row % 2).astype(np.uint64))
    spec = ViewSpec(sources=[ViewSource(name=name, root=str(roots[name])) for name in ("web", "code")])
    rows, _ = reference(msgspec.structs.replace(spec, shuffle="none"), set())
    rows.sort(key=lambda row: (row.row % 2, row.name, row.file, row.row))
    assert np.diff(plan_view(spec).begins).tolist() == [len(row.tokens) for row in rows]


def test_the_holdout_depends_on_the_text_alone(roots: dict[str, Path], tmp_path: Path) -> None:
    """Whatever else a view says, a document is on one side; and the two sides share none."""
    both = [ViewSource(name=name, root=str(roots[name])) for name in ("web", "code")]
    train = ViewSpec(sources=both, holdout=0.3)
    validation = ViewSpec(sources=both[::-1], holdout=0.3, split="validation", seed=9, shuffle="samples", seq_len=8)
    build_view(train, tmp_path / "train")
    build_view(validation, tmp_path / "validation")
    found = prove_disjoint(tmp_path / "train", tmp_path / "validation")
    assert found.passed
    assert sum(found.documents) == 233
    assert 0 < found.documents[1] < 120
    other = msgspec.structs.replace(train, holdout=0.0)
    build_view(other, tmp_path / "all")
    found = prove_disjoint(tmp_path / "validation", tmp_path / "all")
    assert (found.passed, found.shared) == (False, found.texts[0])
    result = run_cli("view", "prove-disjoint", tmp_path / "validation", tmp_path / "all")
    assert (result.returncode, "in both" in result.stdout) == (1, True)
    result = run_cli("view", "prove-disjoint", tmp_path / "train", tmp_path / "validation")
    assert (result.returncode, "no text is in both" in result.stdout) == (0, True)
    assert order.is_held_out(np.array([0, 2**63, 2**64 - 1], np.uint64), 0.5).tolist() == [True, False, False]
    # A text without a hash of its own cannot be compared with one that has one.
    build_view(ViewSpec(sources=[ViewSource(name="old", root=str(roots["old"]))]), tmp_path / "old")
    with pytest.raises(errors.DataRootError, match="cannot be compared"):
        prove_disjoint(tmp_path / "old", tmp_path / "all")
    assert not prove_disjoint(tmp_path / "old", tmp_path / "old").passed


def test_conditions(roots: dict[str, Path], tmp_path: Path) -> None:
    def planned(where: str) -> Any:
        return plan_view(ViewSpec(sources=[ViewSource(name="web", root=str(roots["web"]), where=where)])).record

    rows = rows_of(roots["web"], "web")
    assert planned("tokens > 60").documents == sum(len(row.tokens) > 60 for row in rows)
    assert planned("source like 'b/%' and row <> 4 -- all but one").documents == 2
    assert planned(f"text_xxh3 = {rows[5].xxh3}").documents == 1
    assert planned("source in ('a.parquet', 'select)')").documents == 120
    for wrong in (
        "",
        "tokns > 5",
        "1) ; drop table documents; select (1",
        "source = 5 or nosuch(1)",
        "random() < 0.5",
        *INJECTED,
    ):
        with pytest.raises(errors.RecipeError, match="source 'web': where: "):
            planned(wrong)
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(errors.RecipeError, match="where: "):
        planned(f"exists (select * from read_csv('{secret}'))")
    with pytest.raises(errors.RecipeError, match="where: "):
        planned(f"exists (select * from '{secret}')")


INJECTED = (
    "row in (select max(row) from documents)",  # each shard would have another
    "exists (from documents)",
    "true) union all select 999999 where (true",
    "true) limit (5",
    "((true)",
    "__row < 5",
)


def test_a_signal_ends_a_condition_that_takes_long() -> None:
    """What its handler raises comes through DuckDB, which would make another error of it."""

    class StopError(KeyboardInterrupt):
        pass

    def stop(number: int, frame: object) -> None:
        raise StopError

    table = pa.table({"source": ["a" * 50] * 200_000})
    slow = "length(regexp_replace(repeat(source, 2000), '(a|b)*c', 'b', 'g')) > 3"
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with Condition(slow, "a test") as condition:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(StopError):
                condition.rows(table)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_removal(roots: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of(roots["web"], "web")
    listed = tmp_path / "list"
    listed.write_text(f"  a.parquet 7\n{rows[9].xxh3:016X}\nweb/b/c.parquet row 3\n0123456789abcdef\n")
    spec = ViewSpec(sources=[ViewSource(name="web", root=str(roots["web"]), remove=str(listed))], duplicates="keep")
    built, _ = build_view(spec, tmp_path / "view")
    assert built.record.sources[0].left_out == {"removed": 3}
    assert any("1 of 4 entries of its removal list name no document: 0123456789abcdef" in n for n in built.record.notes)
    assert any("1 documents that stay have the text of one that is removed" in note for note in built.record.notes)
    assert verify(tmp_path / "view").passed
    for line, reason in (
        ("a.parquet", "expected FILE ROW"),
        ("none.parquet 5", "no source file is called 'none.parquet'"),
        ("a.parquet -1", "expected FILE ROW"),
    ):
        listed.write_text(f"a.parquet 7\n{line}\n")
        with pytest.raises(errors.RecipeError, match=rf"list, line 2: .*{reason}"):
            plan_view(spec)
    listed.unlink()
    with pytest.raises(errors.RecipeError, match=r"removal list .* cannot be read"):
        plan_view(spec)


SPEC = """seq_len = 16
seed = 4

[[sources]]
name = "web"
root = "web"

[[sources]]
name = "code"
root = "code"
"""

WRONG = {
    "an unknown word": (SPEC.replace("seed", "sead"), "line 2: .*sead", "did you mean seed"),
    "an unknown word of a source": (SPEC + 'wher = "row = 1"\n', "line 11: .*wher", "did you mean where"),
    "a wrong choice": (SPEC.replace("seed = 4", 'shuffle = "sample"'), "line 2: shuffle: .*sample", "'samples'"),
    "a wrong type": (SPEC.replace("16", "1.5"), "line 1: seq_len: Expected", "the fields are"),
    "out of range": (SPEC.replace("seed = 4", "holdout = 1.0"), "line 2: holdout: Expected a number < 1", "fields"),
    "a name twice": (
        SPEC.replace('"code"\nroot', '"web"\nroot'),
        "line 9: name: Two sources are called 'web'",
        "fields",
    ),
    "a name that is a path": (SPEC.replace('"web"\nroot', '"a/b"\nroot'), "line 5: name: Expected a name", "fields"),
    "nothing held out": (
        SPEC.replace("seed = 4", 'split = "validation"'),
        "line 2: split: Expected a holdout",
        "fields",
    ),
    "no source": ("seed = 1\n", "line 1: .*missing required field `sources`", "fields"),
    "no root": (SPEC.replace('root = "code"\n', ""), "line 8: .*missing required field `root`", "fields"),
    "no TOML": ("seed = ", "not TOML", "correct the file"),
    "a count": (SPEC.replace("16", '"16 hills"'), "line 1: seq_len", "correct it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_names_the_line_and_the_nearest_word(tmp_path: Path, what: str) -> None:
    content, message, step = WRONG[what]
    (tmp_path / "view.toml").write_text(content)
    with pytest.raises(errors.RecipeError, match=message) as found:
        load_spec(tmp_path / "view.toml")
    assert step in found.value.next_step
    result = run_cli("view", "plan", tmp_path / "view.toml")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)


def test_data_roots_that_do_not_go_together(roots: dict[str, Path], tmp_path: Path) -> None:
    wide = make(tmp_path, "wide", {"a.parquet": ["x y"]}, dtype="uint32")
    longer = make(tmp_path, "longer", {"a.parquet": ["x y z"]}, seq_len=64)

    def planned(*where: Path, **changes: Any) -> Any:
        sources = [ViewSource(name=f"s{number}", root=str(root)) for number, root in enumerate(where)]
        return plan_view(ViewSpec(sources=sources, **changes))

    with pytest.raises(errors.DataRootError, match=r"'s1': expected tokens of uint16 as in .*, found uint32"):
        planned(roots["web"], wide)
    with pytest.raises(errors.RecipeError, match="samples of 32 and 64"):
        planned(roots["web"], longer)
    assert planned(roots["web"], longer, seq_len=8).record.seq_len == 8
    with pytest.raises(errors.DataRootError, match="no such directory"):
        planned(tmp_path / "nowhere")
    with pytest.raises(errors.DataRootError, match=r"expected a finished data root .* found no manifest"):
        planned(tmp_path)
    build_view(ViewSpec(sources=[ViewSource(name="web", root=str(roots["web"]))]), tmp_path / "view")
    with pytest.raises(errors.DataRootError, match="expected a data root, found a view"):
        planned(tmp_path / "view")
    with pytest.raises(errors.RecipeError, match="Expected a name"):
        plan_view(ViewSpec(sources=[ViewSource(name="", root=str(roots["web"]))]))


def test_an_index_that_is_not_the_views_proves_nothing(roots: dict[str, Path], tmp_path: Path) -> None:
    """Whatever reads all of it compares it with the record first; and a record must agree with its data roots."""
    sources = [ViewSource(name="web", root=str(roots["web"]))]
    view, other = tmp_path / "view", tmp_path / "other"
    for folder in (view, other):
        build_view(ViewSpec(sources=sources), folder)
    places = view / layout.VIEW_PLACES
    right = places.read_bytes()

    def shifted(array: np.ndarray) -> None:
        array += 2**40

    places.write_bytes((np.frombuffer(right, "<i8") + 2**40).tobytes())
    with pytest.raises(errors.DataRootError, match="expected sha256"):
        prove_disjoint(view, other)
    with pytest.raises(errors.DataRootError, match="expected sha256"):
        write_view(view, tmp_path / "out")
    places.write_bytes(right)
    entries(view, layout.VIEW_PLACES, shifted)
    with pytest.raises(errors.DataRootError, match="names tokens that its sources do not have"):
        prove_disjoint(view, other)
    places.unlink()
    with pytest.raises(errors.DataRootError, match="is missing"):
        prove_disjoint(view, other)
    record = json.loads((other / layout.VIEW).read_text())
    for change in ({"tokens": 2**62}, {"identity": "tokens"}):
        forged(other, sources=[record["sources"][0] | change])
        with pytest.raises(errors.DataRootError, match="does not agree"):
            TokenDataset(other)
        assert not verify(other).passed
    forged(other, sources=[record["sources"][0] | {"removed": ["zzz"], "left_out": {"odd": 3}}])
    assert not verify(other).passed
    assert run_cli("info", other).returncode == 0
    forged(other, sources=[record["sources"][0] | {"root": "x" * 5_000}])
    result = run_cli("show", other, "--sample", 1)
    assert (result.returncode, "Traceback" in result.stderr) == (5, False)


def test_a_view_behind_a_link(roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(roots["web"], tmp_path / "web")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    build_view(ViewSpec(sources=[ViewSource(name="web", root="web")]), Path("link"))
    assert verify(Path("link")).passed
    assert len(TokenDataset("link")) == len(TokenDataset(tmp_path / "far" / "away")) > 0


def test_building_again(roots: dict[str, Path], tmp_path: Path) -> None:
    """The same is left alone, another is not written over, and one that was cut off is built."""
    spec = ViewSpec(sources=[ViewSource(name="web", root=str(roots["web"]))])
    view = tmp_path / "view"
    assert build_view(spec, view)[1] is False
    before = {path.name: path.stat().st_mtime_ns for path in view.iterdir()}
    assert build_view(spec, view)[1] is True
    assert {path.name: path.stat().st_mtime_ns for path in view.iterdir()} == before
    with pytest.raises(errors.DataRootError, match="holds another view"):
        build_view(msgspec.structs.replace(spec, seed=1), view)
    (view / layout.VIEW_BEGINS).unlink()
    assert build_view(spec, view)[1] is False
    assert verify(view).passed
    (view / layout.VIEW).unlink()
    (view / layout.VIEW_PLACES).write_bytes(b"torn")
    assert build_view(spec, view)[1] is False
    assert verify(view).passed
    with pytest.raises(errors.DataRootError, match="is there: expected an empty directory"):
        build_view(spec, roots["code"])


def test_a_view_that_moves_with_its_data(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data roots that the file names by relative paths are found beside the view, wherever both are."""
    for name in ("web", "code"):
        shutil.copytree(roots[name], tmp_path / "here" / name)
    (tmp_path / "here" / "view.toml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    result = run_cli("view", "build", Path("here/view.toml"), Path("here/views/one"))
    assert (result.returncode, "built" in result.stdout) == (0, True), result.stderr
    first = TokenDataset("here/views/one")[3].tolist()
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    assert TokenDataset(tmp_path / "there" / "views" / "one")[3].tolist() == first


def forged(view: Path, **changes: Any) -> None:
    """A record that says something else, with digests to match."""
    write_record(view / layout.VIEW, json.loads((view / layout.VIEW).read_text()) | changes)


def entries(view: Path, name: str, change: Any) -> None:
    """An index with other entries, and a record that has its digest."""
    found = np.fromfile(view / name, "<i8")
    change(found)
    (view / name).write_bytes(found.tobytes())
    forged(view, **{name.removeprefix("view_").removesuffix(".bin") + "_sha256": hashlib.sha256(found).hexdigest()})


def swap(array: np.ndarray) -> None:
    array[[4, 9]] = array[[9, 4]]


DAMAGE = {
    "a bit": lambda view: (view / layout.VIEW_PLACES).write_bytes(b"x" + (view / layout.VIEW_PLACES).read_bytes()[1:]),
    "cut": lambda view: os.truncate(view / layout.VIEW_BEGINS, 80),
    "gone": lambda view: (view / layout.VIEW_BEGINS).unlink(),
    "two swapped": lambda view: entries(view, layout.VIEW_PLACES, swap),
    "no document there": lambda view: entries(
        view, layout.VIEW_PLACES, lambda array: array.__setitem__(3, array[3] + 1)
    ),
    "twice": lambda view: entries(view, layout.VIEW_PLACES, lambda array: array.__setitem__(3, array[4])),
    "outside": lambda view: entries(view, layout.VIEW_PLACES, lambda array: array.__setitem__(3, 10**9)),
    "longer": lambda view: entries(view, layout.VIEW_BEGINS, lambda array: array.__setitem__(3, array[3] + 1)),
    "another holdout": lambda view: forged(view, holdout=0.6),
    "another seed": lambda view: forged(view, seed=77),
    "another order": lambda view: forged(view, shuffle="none"),
    "fewer documents": lambda view: forged(view, tokens=17),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_view_is_found(roots: dict[str, Path], tmp_path: Path, what: str) -> None:
    view = tmp_path / "view"
    sources = [ViewSource(name=name, root=str(roots[name])) for name in ("web", "code")]
    build_view(ViewSpec(sources=sources, holdout=0.2), view)
    assert verify(view).passed
    DAMAGE[what](view)
    assert not verify(view).passed
    assert verify(view, quick=True).passed is (what not in ("cut", "gone", "fewer documents"))
    result = run_cli("verify", view)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)


def test_what_was_removed_or_doubled_is_found(roots: dict[str, Path], tmp_path: Path) -> None:
    view = tmp_path / "view"
    build_view(ViewSpec(sources=[ViewSource(name="web", root=str(roots["web"]))]), view)
    assert verify(view).passed
    sources = json.loads((view / layout.VIEW).read_text())["sources"]
    hashed = f"{rows_of(roots['web'], 'web')[3].xxh3:016x}"
    for entry in ("a.parquet 5", hashed):
        forged(view, sources=[sources[0] | {"removed": [entry]}])
        assert [finding.what for finding in verify(view).findings] == ["that were to be removed"]
    forged(view, sources=sources, duplicates="first")
    assert [finding.what for finding in verify(view).findings] == ["with the text of another"]


def test_sources_that_are_no_longer_what_they_were(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["web"], tmp_path / "web")
    view = tmp_path / "view"
    build_view(ViewSpec(sources=[ViewSource(name="web", root=str(tmp_path / "web"))]), view)
    path = tmp_path / "web" / "train_000001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    findings = verify(view).findings
    assert [finding.file for finding in findings][:1] == ["web: train_000001.npy"]
    fields = json.loads((tmp_path / "web" / "manifest.json").read_text())
    fields["shards"][1]["sha256"] = "0" * 64
    write_record(tmp_path / "web" / "manifest.json", fields)
    with pytest.raises(errors.DataRootError, match="another data root than it was built from"):
        TokenDataset(view)
    assert "digest of its shards" in [finding.what for finding in verify(view).findings]
    shutil.rmtree(tmp_path / "web")
    with pytest.raises(errors.DataRootError, match=r"source 'web' of the view: expected a data root"):
        TokenDataset(view)
    assert [finding.what for finding in verify(view).findings] == ["is there"]


def test_manifests_of_sources_are_read_once_written(roots: dict[str, Path]) -> None:
    assert manifest.load(roots["web"]).documents_version == layout.DOCUMENTS_VERSION
    assert manifest.load(roots["old"]).documents_version == 1


# The page


def test_the_page_on_views_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and commands, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOKENIZER, "tokenizer")
    for number in range(2):
        texts = [text(i, 5 + i % 60) for i in range(number * 200, number * 200 + 200)]
        write_parquet(Path("corpus", f"part-{number}.parquet"), texts)
    blocks = re.findall(r"```(toml|sh)\n(.*?)```", (REPOSITORY / "docs" / "views.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for kind, block in blocks[1:] if kind == "sh" for line in block.splitlines()]
    for kind, block in blocks:
        if kind == "toml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
    ran = 0
    for line in lines:
        if "--only-new" in line:
            write_parquet(Path("corpus", "part-2.parquet"), [text(i, 5 + i % 60) for i in range(300, 500)])
            refused = run_cli("pretokenize", "data/", "--dataset", "corpus/", "--tokenizer", "tokenizer/")
            assert (refused.returncode, "--only-new" in refused.stderr) == (3, True), refused.stderr
        if line.startswith("tokenmill"):
            result = run_cli(*line.split()[1:])
            assert result.returncode == 0, f"{line}\n{result.stderr}"
            ran += 1
        else:
            content, _, name = line.removeprefix("echo ").partition(" > ")
            Path(name).write_text(content.strip('"') + "\n")
    assert ran == 16
    week2 = manifest.load(Path("week2"))
    assert [file.path for file in week2.files] == ["part-2.parquet"]
    assert any("earlier data roots" in note for note in week2.notes)
    old, both = ({d[:3] for d in map(identify, documents_of(Path(name)))} for name in ("train", "both"))
    assert old < both
    shuffled = documents_of(Path("shuffled"))
    assert ("web/part-0.parquet", 17) not in {(d.source, d.row) for d in shuffled}
    assert all(20 <= d.tokens <= 100_000 for d in shuffled)


def documents_of(view: Path) -> list[Any]:
    opened = open_root(view)
    documents = opened.documents()
    return [documents.document(number) for number in range(opened.document_count)]


def identify(document: Any) -> tuple[str, int, int, int]:
    return document.source, document.row, document.tokens, document.start


def test_only_new_files(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_parquet(corpus / "a.parquet", ["one", "two"])
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), seq_len=8)
    pretokenize(recipe, tmp_path / "first")
    with pytest.raises(errors.SourceError, match="none of its 1 files is new"):
        pretokenize(recipe, tmp_path / "second", only_new=[tmp_path / "first"])
    with pytest.raises(errors.DataRootError, match=r"expected an earlier data root of the corpus, found no manifest"):
        pretokenize(recipe, tmp_path / "second", only_new=[corpus])
    write_parquet(corpus / "b.parquet", ["three"])
    pretokenize(recipe, tmp_path / "second", only_new=[tmp_path / "first"])
    write_parquet(corpus / "c.parquet", ["four"])
    # A run that continues takes the files it began with.
    assert pretokenize(recipe, tmp_path / "second", only_new=[tmp_path / "first"]).status == "already complete"
    made = pretokenize(recipe, tmp_path / "third", only_new=[tmp_path / "first", tmp_path / "second"])
    pretokenize(msgspec.structs.replace(recipe, total_tokens=2), tmp_path / "cut")
    write_parquet(corpus / "d.parquet", ["five"])
    pretokenize(recipe, tmp_path / "after", only_new=[tmp_path / "cut"])
    assert any("stopped at 2 tokens" in note for note in manifest.load(tmp_path / "after").notes)
    assert (made.documents, verify(tmp_path / "third", deep=5).passed) == (1, True)
    other = tmp_path / "other"
    write_parquet(other / "a.parquet", ["one", "two"])
    with pytest.raises(errors.DataRootError, match="was made from another corpus"):
        pretokenize(msgspec.structs.replace(recipe, dataset=str(other)), tmp_path / "x", only_new=[tmp_path / "first"])
    write_parquet(corpus / "a.parquet", ["one", "two", "changed"])
    with pytest.raises(errors.SourceChangedError, match=r"a\.parquet: is not the file that .*first was made from"):
        pretokenize(recipe, tmp_path / "x", only_new=[tmp_path / "first"])

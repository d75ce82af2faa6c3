"""Metadata columns: what the sidecar keeps of each row is what the source has there, in every format."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli, text
from support.engines import PicklingEngine
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest as manifests
from tokenmill.loading.documents import DocumentIndex
from tokenmill.loading.provenance import where_row, where_sample
from tokenmill.options import StoreOptions
from tokenmill.pipeline import driver
from tokenmill.pipeline.pretokenize import plan, pretokenize
from tokenmill.recipe import MetadataColumn, Recipe, load_recipe
from tokenmill.shards import shard
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.write import write_view

COLUMNS = ("lang", "meta.score:float64", "doc_source=source", "meta.n:int64", "meta.deep.ok:bool", "a.b:int64")
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("lang", pa.string()),
        ("source", pa.large_string()),
        ("meta", pa.struct([("score", pa.float64()), ("n", pa.int64()), ("deep", pa.struct([("ok", pa.bool_())]))])),
        ("a.b", pa.int64()),
        ("unused", pa.list_(pa.int32())),
    ]
)

strings = st.none() | st.text(max_size=8)
rows = st.fixed_dictionaries(
    {"text": st.none() | st.text(max_size=20)},
    optional={
        "lang": strings,
        "source": strings,
        "meta": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "score": st.none() | st.floats(allow_nan=False) | st.integers(-(1 << 53), 1 << 53),
                "n": st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
                "deep": st.none() | st.fixed_dictionaries({}, optional={"ok": st.none() | st.booleans()}),
            },
        ),
        "a.b": st.none() | st.integers(0, 5),
        "unused": st.lists(st.integers(0, 9), max_size=3),
    },
)


def expected(row: dict[str, Any]) -> dict[str, object]:
    """What the sidecar must have of a row, said once more and plainly."""
    meta = row.get("meta") or {}
    return {
        "lang": row.get("lang"),
        "meta.score": meta.get("score"),
        "doc_source": row.get("source"),
        "meta.n": meta.get("n"),
        "meta.deep.ok": (meta.get("deep") or {}).get("ok"),
        "a.b": row.get("a.b"),
    }


def as_json_lines(path: Path, found: list[dict[str, Any]]) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def as_gzip(path: Path, found: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode(errors="replace")
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(data))


def as_parquet(path: Path, found: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(found, SCHEMA), path.with_suffix(".parquet"), row_group_size=3)


def as_dictionaries(path: Path, found: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(found, SCHEMA)
    table = table.set_column(1, "lang", table["lang"].dictionary_encode())
    with pa.ipc.new_file(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def as_stream(path: Path, found: list[dict[str, Any]]) -> None:
    with pa.ipc.new_stream(path.with_suffix(".arrow"), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(found, SCHEMA), max_chunksize=5)


FORMATS = [as_json_lines, as_gzip, as_parquet, as_dictionaries, as_stream]
Write = Callable[[Path, list[dict[str, Any]]], None]


def recipe(corpus: Path, *columns: str, **fields: Any) -> Recipe:
    return Recipe(
        dataset=str(corpus),
        tokenizer=str(TOKENIZER),
        metadata_columns=columns or COLUMNS,
        **{"shard_size": 40, "seq_len": 8, "buffer_size": 5, **fields},
    )


def stored(root: Path) -> dict[tuple[str, int], dict[str, object]]:
    manifest = manifests.load(root)
    assert manifest is not None
    index = DocumentIndex(root, manifest, manifest.recipe.seq_len)
    documents = [index.between(0, manifest.tokens)]
    return {(document.source, document.row): dict(document.metadata) for document in itertools.chain(*documents)}


@settings(max_examples=12)
@given(
    files=st.lists(st.lists(rows, min_size=1, max_size=12), min_size=1, max_size=3),
    write=st.sampled_from(FORMATS),
    on_cluster=st.booleans(),
    order=st.sampled_from(["buffer", "sequential"]),
    shard_size=st.sampled_from([3, 40, 10_000]),
    span_rows=st.sampled_from([1, 4, None]),
)
def test_every_document_keeps_what_its_row_has(
    files: list[list[dict[str, Any]]],
    write: Write,
    on_cluster: bool,
    order: str,
    shard_size: int,
    span_rows: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("metadata")
    corpus = folder / "corpus"
    corpus.mkdir()
    files[0].append({"text": "so that there is one"})
    for number, found in enumerate(files):
        write(corpus / f"f{number}", found)
    engine = PicklingEngine(2) if on_cluster else None
    made = recipe(corpus, order=order, shard_size=shard_size)
    pretokenize(made, folder / "root", span_rows=span_rows, engine=engine)
    wanted = {
        (path.name, at): expected(row)
        for path, found in zip(sorted(corpus.iterdir()), files, strict=True)
        for at, row in enumerate(found)
        if row["text"]
    }
    assert stored(folder / "root") == wanted
    assert verify(folder / "root", deep=100).findings == []


def test_the_bytes_are_the_same_on_every_way_and_after_a_kill(tmp_path: Path) -> None:
    """Sidecars do not depend on spans, workers, executor or history; tokens not on metadata."""
    found = [{"text": text(i, i % 30), "lang": "de" if i % 3 else None, "meta": {"score": i / 7}} for i in range(200)]
    (tmp_path / "corpus").mkdir()
    as_parquet(tmp_path / "corpus" / "a", found)
    settings = recipe(tmp_path / "corpus", shard_size=500)
    pretokenize(settings, tmp_path / "one")
    pretokenize(settings, tmp_path / "rows", span_rows=1, workers=3)
    pretokenize(settings, tmp_path / "cluster", engine=PicklingEngine(2))
    pretokenize(settings, tmp_path / "resumed")
    (tmp_path / "resumed" / "documents_000002.parquet").unlink()
    pretokenize(settings, tmp_path / "resumed")
    records = [manifests.load(tmp_path / name) for name in ("one", "rows", "cluster", "resumed")]
    digests = [[(s.sha256, s.documents_sha256) for s in record.shards] for record in records if record is not None]
    assert digests == [digests[0]] * 4
    assert len(digests[0]) > 3
    pretokenize(recipe(tmp_path / "corpus", "lang", shard_size=500), tmp_path / "less")
    less = manifests.load(tmp_path / "less")
    assert less is not None
    assert [s.sha256 for s in less.shards] == [sha256 for sha256, _ in digests[0]]
    with pytest.raises(errors.DataRootError, match="metadata_columns"):
        pretokenize(recipe(tmp_path / "corpus", "lang", shard_size=500), tmp_path / "one")


def test_a_recipe_without_metadata_has_the_fingerprint_it_had() -> None:
    """Data roots that were begun before there were metadata columns are resumed and verified."""
    plain = Recipe(dataset="d", tokenizer="t")
    assert plain.fingerprint == "eeacd6658286343952753575ba920231456112d7debe70bec9bd8e251ad15904"
    assert plain.fingerprint != Recipe(dataset="d", tokenizer="t", metadata_columns=("lang",)).fingerprint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["x:y:string"], None),  # a field may have a colon in its name
        (["lang:date"], "with TYPE one of string, int64"),
        (["x:"], "with TYPE one of"),
        (["source"], "doc_source=source"),
        (["Row=r"], "a column 'Row' of its own"),
        (["Source:int64"], "doc_Source=Source:int64"),
        (["lang", "LANG"], "named twice"),
        (["=x"], "expected .NAME=.PATH"),
        (["x="], "expected .NAME=.PATH"),
        ([""], "expected .NAME=.PATH"),
    ],
)
def test_names_are_checked(columns: list[str], message: str | None) -> None:
    fields = {"dataset": "d", "tokenizer": "t", "metadata_columns": columns}
    if message is None:
        assert load_recipe(None, fields).metadata == (MetadataColumn("x:y", "x:y", "string"),)
        return
    with pytest.raises(errors.RecipeError, match=message):
        load_recipe(None, fields)


@pytest.mark.parametrize("write", [as_parquet, as_stream], ids=["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("meta.n", "expected string, found int64"),
        ("meta", "expected string, found struct"),
        ("lang:int64", "expected int64, found string"),
        ("lang.x", "'lang': expected a struct, found string"),
        ("meta.score:bool", "expected bool, found double"),
        ("unused", "expected string, found list"),
    ],
)
def test_a_column_of_another_type_is_refused(write: Write, column: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "a", [{"text": "one", "lang": "x", "meta": {"n": 1}}])
    with pytest.raises(errors.SourceError, match=message) as caught:
        pretokenize(recipe(tmp_path / "corpus", column), tmp_path / "root")
    assert "--metadata-column" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "x", "lang": 3}', "metadata column 'lang': expected string, found int"),
        ('{"text": "x", "meta": "flat"}', "metadata column 'meta.score': expected an object, found str"),
        ('{"text": "x", "meta": {"n": true}}', "'meta.n': expected int64, found bool"),
        ('{"text": "x", "meta": {"n": 9223372036854775808}}', "'meta.n': expected int64, found 9223372036854775808"),
        ('{"text": "x", "meta": {"n": ' + "9" * 5000 + "}}", "'meta.n': expected int64, found _LongInteger"),
        ('{"text": "x", "meta": {"score": ' + "9" * 5000 + "}}", "'meta.score': expected float64, found _LongInteger"),
        ('{"text": "x", "meta": {"score": 9007199254740993}}', "which it would round"),
        ('{"text": "x", "lang": "\\ud800"}', "'lang': half of a surrogate pair"),
        ('{"text": 3, "lang": "x"}', "Expected `str . null`, got `int`"),
    ],
)
def test_a_value_of_another_type_is_a_bad_row(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(f'{{"text": "first", "lang": "de"}}\n{line}\n{{"text": "last"}}\n')
    with pytest.raises(errors.SourceError, match=reason):
        pretokenize(recipe(tmp_path / "corpus"), tmp_path / "root")
    pretokenize(recipe(tmp_path / "corpus"), tmp_path / "root", on_bad_rows="skip")
    assert [row for _, row in stored(tmp_path / "root")] in ([0, 2], [2, 0])
    assert verify(tmp_path / "root", deep=100).passed


def test_values_of_columns_that_cannot_be_stored_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    not_text = pa.array([b"ok", b"\xff", b"ok", None]).view(pa.string())
    large = pa.array([1, 2, 1 << 63, 3], pa.uint64())
    pq.write_table(pa.table({"text": list("abcd"), "lang": not_text, "n": large}), tmp_path / "corpus" / "a.parquet")
    settings = recipe(tmp_path / "corpus", "lang", "n:int64", order="sequential")
    with pytest.raises(errors.SourceError, match="row 1: metadata column 'lang': not valid UTF-8: byte 0xff"):
        pretokenize(settings, tmp_path / "root")
    pretokenize(settings, tmp_path / "root", on_bad_rows="skip")
    assert list(stored(tmp_path / "root").values()) == [{"lang": "ok", "n": 1}, {"lang": None, "n": 3}]


def test_numbers_that_no_standard_has_are_read_as_python_reads_them(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "x", "meta": {"score": NaN}, "lang": "\\ud83d\\ude00"}\n')
    pretokenize(recipe(tmp_path / "corpus"), tmp_path / "root")
    (found,) = stored(tmp_path / "root").values()
    assert math.isnan(float(str(found["meta.score"])))
    assert found["lang"] == "\U0001f600"
    assert verify(tmp_path / "root", deep=100).passed


def test_plain_text_has_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(errors.SourceError, match="plain text has no metadata columns"):
        pretokenize(recipe(tmp_path / "a.txt", "lang"), tmp_path / "root")


def test_a_column_that_nothing_has_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    as_parquet(tmp_path / "corpus" / "a", [{"text": "one", "lang": "x"}])
    notes = plan(recipe(tmp_path / "corpus", "lang", "langauge"), tmp_path / "root")[1].notes
    assert notes == ["no row that was looked at has a value for the metadata columns langauge"]


def test_pages_and_values_of_metadata_are_held_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(
        pa.table({"text": ["a", "b"], "n": [1, 2], "lang": ["x", "y" * 5_000]}), tmp_path / "corpus" / "a.parquet"
    )
    limit = StoreOptions(max_document_nbytes=1000)
    with pytest.raises(
        errors.SourceError, match=r"row 1: expected a value of 'lang' of at most 1000 bytes, found 5000"
    ):
        pretokenize(recipe(tmp_path / "corpus", "n:int64", "lang"), tmp_path / "root", store=limit)


def test_a_view_selects_by_metadata_and_keeps_it(tmp_path: Path) -> None:
    """Chosen by SQL, found by `where`, written out with the documents."""
    roots = []
    for number, columns in enumerate([("lang", "meta.n:int64"), ("lang",)]):
        corpus = tmp_path / f"corpus-{number}"
        corpus.mkdir()
        found = [{"text": text(i, 4), "lang": "de" if i % 3 else "en", "meta": {"n": i}} for i in range(60)]
        as_parquet(corpus / "a", found)
        pretokenize(recipe(corpus, *columns), tmp_path / f"root-{number}")
        roots.append(tmp_path / f"root-{number}")
    sources = [
        ViewSource(name="first", root=str(roots[0]), where="lang = 'de' and \"meta.n\" >= 30"),
        ViewSource(name="second", root=str(roots[1]), where="lang = 'en'"),
    ]
    build_view(ViewSpec(sources=sources, seq_len=8, seed=4), tmp_path / "view")
    for through_disk, name in ((False, "a"), (True, "b")):
        write_view(tmp_path / "view", tmp_path / name, shard_size=70, through_disk=through_disk, workers=2)
        wanted = {("first/a.parquet", i): {"lang": "de", "meta.n": i} for i in range(30, 60) if i % 3}
        wanted |= {("second/a.parquet", i): {"lang": "en", "meta.n": None} for i in range(0, 60, 3)}
        assert stored(tmp_path / name) == wanted
        assert verify(tmp_path / name).passed
        assert not list((tmp_path / name).glob("*.partial"))
    one, other = (sorted((p.name, p.read_bytes()) for p in (tmp_path / name).glob("*.parquet")) for name in ("a", "b"))
    assert one == other
    part = where_sample(tmp_path / "view", 0).documents[0]
    assert part.metadata == {name: value for name, value in wanted[part.source, part.row].items() if value is not None}
    assert where_row(tmp_path / "view", "first/a.parquet", 31).samples


def test_sources_that_disagree_about_a_type_are_not_written(tmp_path: Path) -> None:
    for number, kind in enumerate(("string", "int64")):
        (tmp_path / f"c{number}").mkdir()
        value = 1 if number else "1"
        (tmp_path / f"c{number}" / "a.jsonl").write_text(json.dumps({"text": "x y z", "n": value}))
        pretokenize(recipe(tmp_path / f"c{number}", f"n:{kind}"), tmp_path / f"r{number}")
    sources = [ViewSource(name=f"s{number}", root=str(tmp_path / f"r{number}")) for number in range(2)]
    build_view(ViewSpec(sources=sources, seq_len=2), tmp_path / "view")
    with pytest.raises(errors.DataRootError, match="'n' is string in the source 's0', and 'n' is int64"):
        write_view(tmp_path / "view", tmp_path / "out")


def test_deep_compares_metadata_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    as_json_lines(tmp_path / "corpus" / "a", [{"text": "one", "lang": "de"}])
    pretokenize(recipe(tmp_path / "corpus"), tmp_path / "root")
    as_json_lines(tmp_path / "corpus" / "a", [{"text": "one", "lang": "en"}])
    finding = verify(tmp_path / "root", deep=100).findings[0]
    assert (finding.what, finding.expected, finding.found) == ("metadata column lang", "en", "de")


def test_the_command_line_keeps_and_shows_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two three", "lang": "de", "meta": {"score": 0.5}}\n')
    options = ["--metadata-column", "lang", "--metadata-column", "quality=meta.score:float64"]
    made = run_cli(
        "pretokenize", tmp_path / "root", "--dataset", tmp_path / "a.jsonl", "--tokenizer", TOKENIZER, *options
    )
    assert made.returncode == 0, made.stderr
    shown = run_cli("where", tmp_path / "root", "--token", 0)
    assert ', lang "de", quality 0.5' in shown.stdout
    (told,) = json.loads(run_cli("where", tmp_path / "root", "--token", 0, "--json").stdout)
    assert told["documents"][0]["metadata"] == {"lang": "de", "quality": 0.5}


def odd_columns(rows: int) -> dict[str, Any]:
    """Columns that are stored and read in odd ways, beside what nobody asked for."""
    lang = pa.array((["de", "en", None] * rows)[:rows])
    nanoseconds = pa.array([1_700_000_000_123_456_789 + i for i in range(rows)], pa.timestamp("ns"))
    not_text = pa.array([b"\xff"] * rows).view(pa.string())
    meta = pa.StructArray.from_arrays([lang, nanoseconds, not_text], ["lang", "crawled", "junk"])
    packed = pa.StructArray.from_arrays([lang.dictionary_encode()], ["lang"])
    return {"meta": meta, "packed": packed, "__row": pa.array([i * 7 for i in range(rows)]), "a=b": lang, "..": lang}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_odd_names_and_odd_neighbours(kind: str, tmp_path: Path) -> None:
    """Read, verified, selected by, and written out: what is asked for, whatever lies beside it."""
    rows = 3_000
    table = pa.table({"text": [f"document {i}" for i in range(rows)], **odd_columns(rows)})
    (tmp_path / "corpus").mkdir()
    if kind == "parquet":
        pq.write_table(table, tmp_path / "corpus" / "a.parquet", row_group_size=700)
    else:
        with pa.ipc.new_file(tmp_path / "corpus" / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    columns = ["meta.lang", "p=packed.lang", "__row:int64", "equals=a=b", ".."]
    pretokenize(recipe(tmp_path / "corpus", *columns, shard_size=10_000), tmp_path / "root")
    for (_, row), values in stored(tmp_path / "root").items():
        lang = ["de", "en", None][row % 3]
        wanted = {"meta.lang": lang, "p": lang, "__row": row * 7, "equals": lang, "..": lang}
        assert values == wanted
    assert verify(tmp_path / "root", deep=100).findings == []
    source = ViewSource(name="s", root=str(tmp_path / "root"), where='"__row" < 70 and ".." is not null')
    build_view(ViewSpec(sources=[source], seq_len=8), tmp_path / "view")
    write_view(tmp_path / "view", tmp_path / "out")
    written = stored(tmp_path / "out")
    assert sorted(row for _, row in written) == [0, 1, 3, 4, 6, 7, 9]
    assert {values["equals"] for values in written.values()} == {"de", "en"}


def test_two_fields_of_one_name_are_refused(tmp_path: Path) -> None:
    lang = pa.array(["de"])
    meta = pa.StructArray.from_arrays([lang, lang], ["lang", "lang"])
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["one"], "meta": meta}), tmp_path / "corpus" / "a.parquet")
    with pytest.raises(errors.SourceError, match="two fields of 'meta' are called 'lang'"):
        pretokenize(recipe(tmp_path / "corpus", "meta.lang"), tmp_path / "root")


def test_row_groups_of_sidecars_end_earlier_where_metadata_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded, and the bytes do not depend on blocks."""
    monkeypatch.setattr(shard, "METADATA_NBYTES", 1_000)
    (tmp_path / "corpus").mkdir()
    as_parquet(tmp_path / "corpus" / "a", [{"text": text(i, 3), "lang": "x" * (i % 200)} for i in range(300)])
    sidecars = []
    for name, block in (("one", 16_384), ("two", 7)):
        monkeypatch.setattr(driver, "BLOCK_ROWS", block)
        pretokenize(recipe(tmp_path / "corpus", "lang", shard_size=10_000), tmp_path / name)
        sidecars.append((tmp_path / name / "documents_000000.parquet").read_bytes())
    assert sidecars[0] == sidecars[1]
    assert pq.ParquetFile(tmp_path / "one" / "documents_000000.parquet").num_row_groups > 20


def test_numbers_without_end_are_told_from_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [math.inf]}), tmp_path / "corpus" / "a.parquet")
    pretokenize(recipe(tmp_path / "corpus", "n:float64"), tmp_path / "root")
    assert where_row(tmp_path / "root", "a.parquet", 0).samples == []
    (told,) = json.loads(run_cli("where", tmp_path / "root", "--token", 0, "--json").stdout)
    assert told["documents"][0]["metadata"] == {"n": "inf"}

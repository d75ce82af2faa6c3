"""The whole pipeline: exact bytes, the ledger, provenance, resume and refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import golden, golden_corpus, run_cli, text, write_parquet, write_record
from support.reference import documents, rows_in_order
from support.runs import StopError, every_digest, golden_recipe, require_golden_views, shard_digests, stop_after
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.pipeline.local import ThreadExecutor
from tokenmill.pipeline.pretokenize import plan, pretokenize
from tokenmill.progress import TOKENIZING, Progress
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.shards.shard import tally

EOS = 2


def tokens_of(root: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(root.glob("train_*.npy"))])


def sidecar(root: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(root.glob("documents_*.parquet"))])


def ordering(recipe: Recipe) -> dict:
    return {"order": recipe.order, "buffer_size": recipe.buffer_size, "seed": recipe.seed}


@pytest.mark.parametrize("case", golden("shards.json"), ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
@pytest.mark.parametrize(("workers", "span_rows"), [(1, None), (2, 137), (3, None), (7, 50)])
def test_golden_shards(tmp_path: Path, case: dict, workers: int, span_rows: int | None) -> None:
    recipe = golden_recipe(case)
    summary = pretokenize(recipe, tmp_path / "out", workers=workers, span_rows=span_rows)
    assert shard_digests(tmp_path / "out") == case["shards"]
    assert summary.tokens == case["tokens"]
    if workers == 1:
        require_golden_views(tmp_path / "out", tmp_path, case["tokens_bin_sha256"])


@pytest.mark.parametrize("case", golden("demo.json"), ids=lambda case: f"{case['order']}-seed{case['seed']}")
@pytest.mark.parametrize(("workers", "span_rows", "consolidated"), [(1, None, False), (3, 7, False), (2, 50, True)])
def test_golden_bytes_of_the_demo_tokenizer(
    tmp_path: Path, case: dict, workers: int, span_rows: int | None, consolidated: bool
) -> None:
    """Digests that the slow way gave once: without the real corpus they hold the bytes, in every form of the data."""
    fields = {field: case[field] for field in Recipe.__struct_fields__ if field in case}
    recipe = Recipe(dataset=str(golden_corpus(tmp_path / "corpus")), tokenizer=str(TOKENIZER), **fields)
    root = tmp_path / "out"
    pretokenize(recipe, root, workers=workers, span_rows=span_rows, consolidated=consolidated)
    if not consolidated:
        assert shard_digests(root) == case["shards"]
        consolidate(root)
    assert {shard.sha256 for shard in manifest.load(root).shards} == set(case["shards"].values())
    for name, field in ((layout.TOKENS, "tokens_sha256"), (layout.SAMPLE_IDS, "sample_ids_sha256")):
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == case[field]


ROWS = st.none() | st.just("") | st.text(max_size=30) | st.sampled_from(["</s>", "word " * 40, "\x00"])


@settings(max_examples=60)
@given(
    files=st.lists(st.lists(ROWS, max_size=25), min_size=1, max_size=5),
    order=st.sampled_from(["buffer", "sequential"]),
    buffer_size=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    shard_size=st.integers(1, 90).map(lambda n: n * 7),
    total_tokens=st.none() | st.integers(1, 600),
    special_in_text=st.sampled_from(["parse", "text"]),
    dtype=st.sampled_from(["auto", "uint32"]),
    stop=st.none() | st.integers(0, 900),
    row_group_size=st.integers(1, 30),
    span_rows=st.none() | st.integers(1, 12),
    workers=st.integers(1, 3),
)
def test_any_corpus_equals_the_slow_way(
    files: list[list[str | None]],
    order: str,
    buffer_size: int,
    seed: int,
    shard_size: int,
    total_tokens: int | None,
    special_in_text: str,
    dtype: str,
    stop: int | None,
    row_group_size: int,
    span_rows: int | None,
    workers: int,
) -> None:
    if not any(text for texts in files for text in texts):
        files = [*files, ["at least this"]]
    with TemporaryDirectory() as folder:
        corpus, root = Path(folder) / "corpus", Path(folder) / "out"
        for number, texts in enumerate(files):
            write_parquet(corpus / f"{number}.parquet", pa.array(texts, pa.string()), row_group_size=row_group_size)
        recipe = Recipe(
            dataset=str(corpus),
            tokenizer=str(TOKENIZER),
            order=order,
            buffer_size=buffer_size,
            seed=seed,
            shard_size=shard_size,
            total_tokens=total_tokens,
            special_in_text=special_in_text,
            dtype=dtype,
        )
        if stop is not None:
            with contextlib.suppress(StopError):
                pretokenize(recipe, root, on_progress=stop_after(stop))
        pretokenize(recipe, root, workers=workers, span_rows=span_rows)
        check_against_reference(recipe, corpus, root)


def check_against_reference(recipe: Recipe, corpus: Path, root: Path) -> None:
    """Tokens, file by file; the sidecar, document by document; the ledger, row by row."""
    special_as_text = recipe.special_in_text == "text"
    expected = list(documents(corpus, TOKENIZER / "tokenizer.json", EOS, special_as_text, **ordering(recipe)))
    stream = [token for _, _, tokens in expected for token in tokens][: recipe.total_tokens]
    for index, at in enumerate(range(0, len(stream), recipe.shard_size)):
        wanted = corpus.parent / "wanted.npy"
        np.save(
            wanted, np.array(stream[at : at + recipe.shard_size], np.uint32 if recipe.dtype == "uint32" else np.uint16)
        )
        assert (root / layout.shard_name(index)).read_bytes() == wanted.read_bytes()
    assert len(list(root.glob("train_*.npy"))) == -(-len(stream) // recipe.shard_size)

    start, rows = 0, []
    text_of = {path: pq.read_table(corpus / path)["text"].to_pylist() for path in {name for name, _, _ in expected}}
    for name, row, tokens in expected:
        if start < len(stream):
            hashed = xxhash.xxh3_64_intdigest(text_of[name][row].encode())
            rows.append({"start": start, "tokens": len(tokens), "source": name, "row": row, "text_xxh3": hashed})
        start += len(tokens)
    assert sidecar(root).to_pylist() == rows

    done = manifest.load(root)
    assert done.complete
    assert (done.tokens, done.documents) == (len(stream), len(rows))
    written = Counter(row["source"] for row in rows)
    for entry in done.ledger:
        texts = text_of.get(entry.path) or pq.read_table(corpus / entry.path)["text"].to_pylist()
        assert entry.documents == written[entry.path]
        assert entry.rows == entry.documents + entry.null + entry.empty + entry.unused
        if len(stream) != recipe.total_tokens:
            assert entry.unused == 0
            assert (entry.rows, entry.null) == (len(texts), texts.count(None))
            assert entry.empty == texts.count("")


def test_ledger_and_provenance(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    summary = pretokenize(recipe, tmp_path / "out")
    assert (summary.rows, summary.documents, summary.skipped_null, summary.skipped_empty) == (300, 296, 2, 2)
    texts = {
        (name, row): text
        for name, row, text in rows_in_order(corpus, order="sequential", buffer_size=1, seed=0)
        if text
    }
    assert summary.special_documents == sum("</s>" in text or "<unk>" in text for text in texts.values())
    rows = sidecar(tmp_path / "out").to_pylist()
    assert sorted((row["source"], row["row"]) for row in rows) == sorted(texts)
    tokens = tokens_of(tmp_path / "out")
    assert all(tokens[row["start"] + row["tokens"] - 1] == EOS for row in rows)
    assert sum(row["tokens"] for row in rows) == len(tokens) == summary.tokens


def test_workers_spans_and_engines_change_no_byte(tmp_path: Path, recipe: Recipe) -> None:
    results = []
    for number, options in enumerate(
        ({"workers": 1}, {"workers": 4, "span_rows": 1}, {"workers": 2, "span_rows": 33}, {"tokenizer_backend": "hf"})
    ):
        pretokenize(recipe, tmp_path / str(number), **options)
        results.append(every_digest(tmp_path / str(number)))
    assert all(result == results[0] for result in results)


def test_special_policy_changes_bytes(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    pretokenize(msgspec.structs.replace(recipe, special_in_text="text"), tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert (tokens == EOS).sum() == 296
    assert (tokens == 0).sum() == 0


def test_wide_tokens(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "narrow")
    pretokenize(msgspec.structs.replace(recipe, dtype="uint32"), tmp_path / "wide")
    assert tokens_of(tmp_path / "wide").dtype == np.dtype("<u4")
    assert np.array_equal(tokens_of(tmp_path / "wide"), tokens_of(tmp_path / "narrow"))


def test_corpus_forms(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    """A directory, a recursive glob and a list in any order are the same corpus."""
    names = [str(path) for path in corpus.rglob("*.parquet")]
    digests = []
    for number, dataset in enumerate((str(corpus), f"{corpus}/**/*.parquet", tuple(sorted(names, reverse=True)))):
        pretokenize(msgspec.structs.replace(recipe, dataset=dataset), tmp_path / str(number))
        digests.append(every_digest(tmp_path / str(number)))
    assert digests[0] == digests[1] == digests[2]


def test_large_row_groups_are_streamed_in_spans(tmp_path: Path, recipe: Recipe) -> None:
    write_parquet(tmp_path / "big" / "a.parquet", [f"row {i}" for i in range(5000)], row_group_size=5000)
    write_parquet(tmp_path / "small" / "a.parquet", [f"row {i}" for i in range(5000)], row_group_size=100)
    for name, span_rows in (("big", 64), ("small", None)):
        changed = msgspec.structs.replace(recipe, dataset=str(tmp_path / name))
        pretokenize(changed, tmp_path / f"out-{name}", workers=3, span_rows=span_rows)
    assert shard_digests(tmp_path / "out-big") == shard_digests(tmp_path / "out-small")


@pytest.mark.parametrize("order", ["buffer", "sequential"])
@pytest.mark.parametrize("stops", [(1_000,), (4_100, 9_000), (2_000, 4_000, 6_000, 8_000, 10_000)])
def test_resume_gives_the_same_bytes(tmp_path: Path, recipe: Recipe, order: str, stops: tuple[int, ...]) -> None:
    recipe = msgspec.structs.replace(recipe, order=order, shard_size=700)
    pretokenize(recipe, tmp_path / "whole")
    for tokens in stops:
        with pytest.raises(StopError):
            pretokenize(recipe, tmp_path / "out", on_progress=stop_after(tokens), span_rows=5)
        assert not list((tmp_path / "out").glob("*.partial"))
    pretokenize(recipe, tmp_path / "out", span_rows=11)
    assert every_digest(tmp_path / "out") == every_digest(tmp_path / "whole")
    assert manifest.load(tmp_path / "out").ledger == manifest.load(tmp_path / "whole").ledger


def test_resume_encodes_only_the_window(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = msgspec.structs.replace(recipe, buffer_size=10, shard_size=500)
    encoded = []
    original = ThreadExecutor.encode
    monkeypatch.setattr(
        ThreadExecutor,
        "encode",
        lambda self, batch: encoded.append(batch) or original(self, batch),
    )
    whole = pretokenize(recipe, tmp_path / "whole", span_rows=5)
    everything = len(encoded)
    with pytest.raises(StopError):
        pretokenize(recipe, tmp_path / "out", on_progress=stop_after(whole.tokens * 9 // 10), span_rows=5)
    encoded.clear()
    pretokenize(recipe, tmp_path / "out", span_rows=5)
    assert 0 < len(encoded) < everything / 2
    assert every_digest(tmp_path / "out") == every_digest(tmp_path / "whole")


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many-shards")
    texts = [None if i % 9 == 0 else f"document number {i} " * (i % 13) for i in range(400)]
    write_parquet(folder / "corpus" / "a.parquet", texts)
    recipe = Recipe(dataset=str(folder / "corpus"), tokenizer=str(TOKENIZER), buffer_size=20, shard_size=800)
    pretokenize(recipe, folder / "out")
    return folder / "out"


@settings(max_examples=40)
@given(
    damaged=st.sets(st.integers(0, 19), min_size=1), how=st.sampled_from(["deleted", "torn", "foreign", "no sidecar"])
)
def test_damaged_shards_are_made_again(many_shards: Path, damaged: set[int], how: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder)
        shutil.copytree(many_shards, path / "out")
        whole, before = every_digest(path / "out"), manifest.load(path / "out")
        recipe = before.recipe
        hit = {index for index in damaged if index < len(before.shards)} or {0}
        for index in hit:
            shard = path / "out" / layout.shard_name(index)
            if how == "deleted":
                shard.unlink()
            elif how == "torn":
                os.truncate(shard, shard.stat().st_size - 2)
            elif how == "foreign":
                shard.write_bytes(shard.read_bytes()[:-2] + b"\x07\x07")
            else:
                (path / "out" / layout.documents_name(index)).unlink()
        summary = pretokenize(recipe, path / "out")
        assert len(summary.remade) == len(hit)
        assert summary.new_tokens == sum(before.shards[index].tokens for index in hit)
        assert every_digest(path / "out") == whole
        assert manifest.load(path / "out").ledger == before.ledger


def test_finished_root_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")

    def times() -> dict[Path, int]:
        """Without the lock, which filelock before 4.3 truncates each time that it takes it."""
        paths = (path for path in (tmp_path / "out").iterdir() if path.name != layout.LOCK)
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    summary = pretokenize(recipe, tmp_path / "out")
    assert (summary.status, summary.new_tokens) == ("already complete", 0)
    assert times() == before


def test_copied_root_is_still_complete(tmp_path: Path, recipe: Recipe) -> None:
    """Modification times are lost by a copy: the files are hashed, and found right."""
    pretokenize(recipe, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copy)
    assert pretokenize(recipe, tmp_path / "copy").status == "already complete"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", 4), ("buffer_size", 41), ("shard_size", 2_001), ("total_tokens", 5), ("special_in_text", "text")),
        *(("order", "sequential"), ("dtype", "uint32"), ("seq_len", 1), ("eos_token", "<s>"), ("text_column", "other")),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, recipe: Recipe, corpus: Path, field: str, value: object) -> None:
    for name in ("a", "b", "d", "sub/c"):
        write_parquet(corpus / f"{name}.parquet", ["x"] * 20, other=["y"] * 20)
    recipe = msgspec.structs.replace(recipe, shard_size=5)
    with pytest.raises(StopError):
        pretokenize(recipe, tmp_path / "out", on_progress=stop_after(20))
    before = every_digest(tmp_path / "out")
    with pytest.raises(errors.DataRootError, match=f"made by another recipe: {field} = "):
        pretokenize(msgspec.structs.replace(recipe, **{field: value}), tmp_path / "out")
    assert every_digest(tmp_path / "out") == before


def test_another_tokenizer_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    shutil.copytree(TOKENIZER, tmp_path / "t")
    same = msgspec.structs.replace(recipe, tokenizer=str(tmp_path / "t"))
    assert pretokenize(same, tmp_path / "out").status == "already complete"
    with (tmp_path / "t" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(errors.DataRootError, match=r"another tokenizer: .* there, .* here"):
        pretokenize(same, tmp_path / "out")


def test_a_library_that_changed_its_mind_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    path = tmp_path / "out" / layout.MANIFEST
    fields = json.loads(path.read_text())
    fields["tokenizer"]["probe"]["Hello world"] = [1, 2, 3]
    write_record(path, fields)
    with pytest.raises(errors.TokenizerError, match="no longer gives the ids"):
        pretokenize(recipe, tmp_path / "out")


def test_changed_sources_are_refused(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    small = msgspec.structs.replace(recipe, shard_size=500)
    with pytest.raises(StopError):
        pretokenize(small, tmp_path / "out", on_progress=stop_after(4_000))
    original = (corpus / "a.parquet").read_bytes()
    write_parquet(corpus / "a.parquet", ["shorter"])
    with pytest.raises(errors.SourceChangedError, match=r"a\.parquet: the source changed .* bytes, found .* bytes"):
        pretokenize(small, tmp_path / "out")
    (corpus / "a.parquet").unlink()
    with pytest.raises(errors.SourceChangedError, match=r"a\.parquet: .* found no such file"):
        pretokenize(small, tmp_path / "out")
    (corpus / "a.parquet").write_bytes(original)
    write_parquet(corpus / "z.parquet", ["new"])
    with pytest.raises(errors.SourceChangedError, match=r"z\.parquet: .*expected no such file"):
        pretokenize(small, tmp_path / "out")
    (corpus / "z.parquet").unlink()
    assert pretokenize(small, tmp_path / "out").status == "complete"


def test_same_size_but_other_rows_is_refused(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    with pytest.raises(StopError):
        pretokenize(msgspec.structs.replace(recipe, shard_size=500), tmp_path / "out", on_progress=stop_after(9_000))
    path = tmp_path / "out" / layout.MANIFEST
    state = manifest.load(tmp_path / "out")
    reached = next(file for file in state.files if file.rows)
    write_record(
        path, json.loads(path.read_text().replace(f'"rows": {reached.rows}', f'"rows": {reached.rows + 1}', 1))
    )
    with pytest.raises(errors.SourceChangedError, match=rf"expected {reached.rows + 1} rows, found {reached.rows}"):
        pretokenize(msgspec.structs.replace(recipe, shard_size=500), tmp_path / "out")


def test_foreign_directory_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000000.npy").write_bytes(b"precious")
    for start in (pretokenize, plan):
        with pytest.raises(errors.DataRootError, match="holds another data set"):
            start(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "train_000000.npy").read_bytes() == b"precious"


def test_broken_manifest_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    (tmp_path / "out" / layout.MANIFEST).write_text('{"version": 1, "shards": "no"}')
    with pytest.raises(errors.DataRootError, match="not a tokenmill manifest"):
        pretokenize(recipe, tmp_path / "out")


def test_a_second_run_on_the_root_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        if progress.phase == TOKENIZING:
            entered.set()
            leave.wait(30)

    first = threading.Thread(target=pretokenize, args=(recipe, tmp_path / "out"), kwargs={"on_progress": hold})
    first.start()
    assert entered.wait(30)
    with pytest.raises(errors.DataRootError, match="another tokenmill process"):
        pretokenize(recipe, tmp_path / "out")
    leave.set()
    first.join()
    assert pretokenize(recipe, tmp_path / "out").status == "already complete"


def test_unbalanced_ledger_fails(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tally
    monkeypatch.setattr("tokenmill.shards.shard.tally", lambda rows: original(rows)[1:])
    with pytest.raises(errors.LedgerError, match="rows"):
        pretokenize(recipe, tmp_path / "out")
    assert not manifest.load(tmp_path / "out").complete


def test_a_remade_shard_that_is_another_is_refused(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    """The corpus was edited in place, same size and rows: no seam between old and new shards."""
    path = corpus / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"the cat number {i:04}" for i in range(300)]}),
        path,
        compression="none",
        use_dictionary=False,
    )
    recipe = msgspec.structs.replace(recipe, shard_size=500, order="sequential")
    pretokenize(recipe, tmp_path / "out")
    path.write_bytes(path.read_bytes().replace(b"the cat number", b"cats? not here"))
    (tmp_path / "out" / layout.shard_name(1)).unlink()
    for _ in range(2):
        with pytest.raises(errors.SourceChangedError, match=r"train_000001\.npy: made again it is another shard"):
            pretokenize(recipe, tmp_path / "out")
        assert not (tmp_path / "out" / layout.shard_name(1)).exists()


def test_a_refused_run_does_not_claim_the_root(tmp_path: Path, recipe: Recipe) -> None:
    """What the error advises must then work in the same directory."""
    for mistake in ({"text_column": "body"}, {"tokenizer": str(tmp_path)}):
        with pytest.raises(errors.TokenmillError):
            pretokenize(msgspec.structs.replace(recipe, **mistake), tmp_path / "out")
    with pytest.raises(errors.StorageError):
        pretokenize(recipe, tmp_path / "out", on_plan=_full)
    assert pretokenize(msgspec.structs.replace(recipe, seed=9), tmp_path / "out").status == "complete"


def _full(plan: object) -> None:
    raise errors.StorageError("the disk is full", next_step="make room")


def test_begin_is_called_once(tmp_path: Path, recipe: Recipe) -> None:
    recipe = msgspec.structs.replace(recipe, shard_size=500)
    calls: list[object] = []
    pretokenize(recipe, tmp_path / "out", on_plan=calls.append)
    for index in (1, 5):
        (tmp_path / "out" / layout.shard_name(index)).unlink()
    pretokenize(recipe, tmp_path / "out", on_plan=calls.append)
    assert len(calls) == 2


def test_files_of_others_are_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "movie.partial").write_text("mine")
    pretokenize(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "movie.partial").read_text() == "mine"


def test_a_recipe_made_in_python_is_checked(tmp_path: Path, recipe: Recipe) -> None:
    for mistake in ({"order": "shuffle"}, {"dtype": "uint8"}, {"shard_size": 0}, {"seed": "x"}):
        with pytest.raises(errors.RecipeError, match=next(iter(mistake))):
            pretokenize(msgspec.structs.replace(recipe, **mistake), tmp_path / "out")


def test_links_are_followed_and_dangling_ones_reported(tmp_path: Path, recipe: Recipe, corpus: Path) -> None:
    farm = tmp_path / "farm"
    farm.mkdir()
    (farm / "linked").symlink_to(corpus)
    (corpus / "loop").symlink_to(farm)
    summary = pretokenize(msgspec.structs.replace(recipe, dataset=str(farm)), tmp_path / "out")
    assert summary.rows == 300
    (farm / "z.parquet").symlink_to(tmp_path / "nowhere.parquet")
    with pytest.raises(errors.SourceError, match=r"z\.parquet: No such file"):
        pretokenize(msgspec.structs.replace(recipe, dataset=str(farm)), tmp_path / "other")


def test_repeated_texts_are_bounded_and_estimated(tmp_path: Path, recipe: Recipe) -> None:
    """A dictionary stores them once: the footer says next to nothing of the text."""
    write_parquet(tmp_path / "same" / "a.parquet", ["the very same text " * 50] * 20_000, row_group_size=20_000)
    recipe = msgspec.structs.replace(recipe, dataset=str(tmp_path / "same"), shard_size=10**6)
    prepared, figures = plan(recipe, tmp_path / "out")
    assert max(span.rows for span in prepared.corpus.open(0).spans()) <= 8192
    summary = pretokenize(recipe, tmp_path / "out")
    assert summary.tokens * 0.9 < figures.tokens < summary.tokens * 1.1


def test_sidecar_row_groups_do_not_depend_on_spans(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.shards.shard.DOCUMENTS_ROW_GROUP", 16)
    pretokenize(recipe, tmp_path / "a", span_rows=3)
    pretokenize(recipe, tmp_path / "b", span_rows=50)
    assert every_digest(tmp_path / "a") == every_digest(tmp_path / "b")
    assert pq.ParquetFile(tmp_path / "a" / "documents_000000.parquet").num_row_groups > 1


def test_the_plan_of_files_with_rows_of_all_sizes_is_near_the_truth(tmp_path: Path) -> None:
    """Few long rows in one file and many short ones in another are not taken for repeated texts."""
    write_parquet(tmp_path / "corpus" / "long.parquet", [text(i, 4_000) for i in range(20)])
    lines = [json.dumps({"text": text(i, 12)}) for i in range(4_000)]
    (tmp_path / "corpus" / "short.jsonl").write_text("\n".join(lines))
    line = ["pretokenize", tmp_path / "root", "--dataset", tmp_path / "corpus", "--tokenizer", TOKENIZER]
    planned = json.loads(run_cli(*line, "--dry-run", "--json").stdout)
    made = json.loads(run_cli(*line, "--json").stdout)
    assert made["tokens"] / 2 < planned["preflight"]["estimated_corpus_tokens"] < made["tokens"] * 2

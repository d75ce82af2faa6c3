"""What surrounds and divides documents: BOS, and fill in the middle, against a slow reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli, text, write_parquet, write_record
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.encoding.framing import Fim, Pieces, put_together, take_apart
from tokenmill.encoding.tokenizer import load_tokenizer, with_special_tokens
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.provenance import show
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe, load_recipe
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.write import write_view

SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
TEXTS = [text(i, 1 + i % 40) for i in range(60)] + ["x", "é\U0001f469\u200d\U0001f680 漢字", "  \n\n  ", "a" * 300]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with BOS and sentinels."""
    folder = tmp_path_factory.mktemp("tokenizer") / "with-sentinels"
    shutil.copytree(TOKENIZER, folder)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<bos>", *SENTINELS)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": {"content": "<bos>"}}))
    return folder


def slow_parts(value: str, fim: Fim) -> tuple[str, list[tuple[str, str]]] | None:
    """Order, and parts after the sentinels they follow; None for a text that stays whole."""
    draws, mask = [], 2**64 - 1
    for number in range(1, 5):
        z = (xxhash.xxh3_64_intdigest(value.encode()) + (fim.seed + number) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        draws.append(((z ^ z >> 31) >> 11) / 2**53)
    if draws[0] >= fim.rate:
        return None
    low, high = sorted(min(len(value), int(draw * (len(value) + 1))) for draw in draws[1:3])
    prefix, middle, suffix = value[:low], value[low:high], value[high:]
    if draws[3] < fim.spm_rate:
        return "spm", [("PS", suffix), ("M", prefix), ("", middle)]
    return "psm", [("P", prefix), ("S", suffix), ("M", middle)]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), max_size=12),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    spm=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**70),
    bos=st.none() | st.just(1),
)
def test_documents_are_taken_apart_as_the_slow_way_does(
    texts: list[str], rate: float, spm: float, seed: int, bos: int | None
) -> None:
    """Characters stand for tokens."""
    texts = [value.encode("utf-8", "ignore").decode() or "?" for value in texts]
    fim = Fim(rate, spm, seed, ("P", "M", "S"), (7, 8, 9)) if rate else None
    hashes = np.array([xxhash.xxh3_64_intdigest(value.encode()) for value in texts], np.uint64)
    pieces: Pieces = take_apart(pa.array(texts, pa.large_string()), hashes, bos_id=bos, fim=fim)
    parts = pieces.texts.to_pylist()
    ids = np.array([ord(c) + 100 for part in parts for c in part], np.uint32)
    counts = np.array([len(part) for part in parts], np.int64)
    tokens, lengths = pieces.framed(ids, counts, eos_id=2, dtype=np.dtype("<u4"))
    expected = []
    for value in texts:
        body: list[int] = []
        apart = None if fim is None else slow_parts(value, fim)
        for sentinels, part in [("", value)] if apart is None else apart[1]:
            body += [{"P": 7, "M": 8, "S": 9}[each] for each in sentinels] + [ord(c) + 100 for c in part]
        expected.append([*([] if bos is None else [bos]), *body, 2])
        back = put_together(expected[-1], (7, 8, 9), bos_id=bos, eos_id=2)
        assert (back is None) == (apart is None)
        if back is not None:
            assert "".join(chr(each - 100) for part in back for each in part) == value
    assert tokens.tolist() == [token for document in expected for token in document]
    assert lengths.tolist() == [len(document) for document in expected]


def part_is_prefix(order: str, sentinels: str) -> bool:
    return sentinels == ("M" if order == "spm" else "P")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "a.parquet", [*TEXTS, None, "", *TEXTS[:5]])
    return folder


def recipe_of(corpus: Path, tokenizer: Path, **changes: Any) -> Recipe:
    common = {"dataset": str(corpus), "tokenizer": str(tokenizer), "seq_len": 64, "shard_size": 700, "buffer_size": 9}
    return Recipe(**common | changes)


@pytest.mark.parametrize("backend", ["gigatoken", "hf"])
@pytest.mark.parametrize("bos", ["none", "prepend"])
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_a_data_root_with_them(
    corpus: Path, tokenizer: Path, tmp_path: Path, backend: str, bos: str, rate: float
) -> None:
    recipe = recipe_of(corpus, tokenizer, bos=bos, fim_rate=rate, seed=5)
    pretokenize(recipe, tmp_path / "root", tokenizer_backend=backend, workers=2)
    found = manifests.load(tmp_path / "root")
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [library.token_to_id(token) for token in SENTINELS]
    bos_id = library.token_to_id("<bos>")
    assert found.tokenizer.bos_id == (bos_id if bos == "prepend" else None)
    assert found.tokenizer.fim_ids == (tuple(ids) if rate else None)
    assert found.recipe.bos_token == ("<bos>" if bos == "prepend" else None)
    assert found.recipe.fim_tokens == (SENTINELS if rate else None)
    fim = Fim(rate, 0.5, 5, SENTINELS, tuple(ids)) if rate else None
    lead = found.tokenizer.fim_lead
    of_lead = len(library.encode(lead, add_special_tokens=False).ids) if lead else 0
    assert bool(lead) == bool(rate)  # this one puts a blank before every text
    orders = set()
    opened = open_root(tmp_path / "root")
    rows = dict(enumerate([*TEXTS, None, "", *TEXTS[:5]]))
    for document in opened.documents().between(0, found.tokens):
        value = rows[document.row]
        apart = None if fim is None else slow_parts(value, fim)
        body = []
        for sentinels, part in [("", value)] if apart is None else apart[1]:
            body += [ids["PMS".index(each)] for each in sentinels]
            is_first = apart is None or part_is_prefix(apart[0], sentinels)
            if is_first or not part:
                body += library.encode(part, add_special_tokens=False).ids
            else:
                body += library.encode(lead + part, add_special_tokens=False).ids[of_lead:]
        orders.add(apart and apart[0])
        tokens = opened.tokens().read(document.start, document.start + document.tokens).tolist()
        assert tokens == [*([bos_id] if bos == "prepend" else []), *body, 2]
        assert document.text_xxh3 == xxhash.xxh3_64_intdigest(value.encode())
    assert orders == ({None, "psm", "spm"} if rate else {None})
    checked = verify(tmp_path / "root", deep=100)
    assert checked.passed, checked.findings
    assert pretokenize(recipe, tmp_path / "root", tokenizer_backend=backend).status == "already complete"


def test_text_is_shown_as_it_was(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    recipe = recipe_of(corpus, tokenizer, bos="prepend", fim_rate=1.0, order="sequential")
    pretokenize(recipe, tmp_path / "root")
    dataset = TokenDataset(tmp_path / "root")
    seen = {}
    for number in range(len(dataset)):
        sample = show(tmp_path / "root", number)
        for part, original in zip(sample.place.documents, sample.originals, strict=True):
            if original is not None:
                seen[part.row] = original
    rows = dict(enumerate([*TEXTS, None, "", *TEXTS[:5]]))
    assert len(seen) > 60
    for row, original in seen.items():  # decoding puts a blank after control tokens, in any document
        assert original == rows[row] or "<" in rows[row], row
    result = run_cli("show", tmp_path / "root", "--sample", 1)
    assert "its text before it was taken apart" in result.stdout
    assert "<fim_prefix>" in result.stdout
    described = run_cli("info", tmp_path / "root").stdout
    assert "BOS <bos>" in described
    assert "100.0% of the documents are taken apart at <fim_prefix> <fim_middle> <fim_suffix>" in described


def test_views_keep_them(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name, rate in (("apart", 1.0), ("whole", 0.0)):
        pretokenize(recipe_of(corpus, tokenizer, bos="prepend", fim_rate=rate), tmp_path / name)
    pretokenize(recipe_of(corpus, tokenizer), tmp_path / "plain")
    sources = [ViewSource(name=name, root=str(tmp_path / name)) for name in ("whole", "apart")]
    build_view(ViewSpec(sources=sources), tmp_path / "view")
    assert any(original for number in range(9) for original in show(tmp_path / "view", number).originals)
    write_view(tmp_path / "view", tmp_path / "written")
    assert verify(tmp_path / "written").passed
    written = manifests.load(tmp_path / "written").recipe
    assert (written.bos, written.fim_tokens) == ("prepend", SENTINELS)
    mixed = [ViewSource(name=name, root=str(tmp_path / name)) for name in ("whole", "plain")]
    with pytest.raises(errors.DataRootError, match="expected BOS with the id"):
        build_view(ViewSpec(sources=mixed), tmp_path / "mixed")


def test_a_wrong_bos_is_found(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    pretokenize(recipe_of(corpus, tokenizer, bos="prepend", shard_size=100_000), tmp_path / "root")
    shard = np.load(tmp_path / "root" / layout.shard_name(0), mmap_mode="r+")
    shard[0] = 5
    shard.flush()
    found = verify(tmp_path / "root")
    assert any(finding.what == "BOS at token 0 of the stream" for finding in found.findings)


def test_problems_are_named(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    demo = load_tokenizer(str(TOKENIZER))
    known = load_tokenizer(str(tokenizer))
    for made, changes, message in (
        (demo, {"bos": "prepend"}, "expected a beginning-of-sequence token, found none"),
        (known, {"bos": "prepend", "bos_token": "<b>"}, "found '<b>', which is not in its vocabulary"),
        (demo, {"fim_rate": 0.5}, "each one token of its vocabulary, found none that is known"),
        (known, {"fim_rate": 0.5, "fim_tokens": ("a", "b", "<nothing>")}, "found '<nothing>', which is not"),
        (
            known,
            {"fim_rate": 0.5, "fim_tokens": (SENTINELS[0], SENTINELS[2], SENTINELS[1])},
            "in the order prefix, mid",
        ),
        (known, {"fim_rate": 0.5, "fim_tokens": ("a", "b", "a")}, "expected three different sentinels"),
    ):
        with pytest.raises(errors.TokenizerError, match=message):
            with_special_tokens(made, recipe_of(corpus, tokenizer, **changes))
    for fields, message in (
        ({"bos_token": "<bos>"}, 'is named, but bos is "none"'),
        ({"fim_tokens": SENTINELS}, "fim_rate is 0"),
        ({"fim_rate": 1.5}, "<= 1"),
        ({"bos": "append"}, "Invalid enum value 'append'"),
    ):
        with pytest.raises(errors.RecipeError, match=message):
            load_recipe(None, {"dataset": "x", "tokenizer": "y", **fields})
    line = ["pretokenize", tmp_path / "root", "--dataset", corpus, "--tokenizer", tokenizer, "-q"]
    options = ["--bos", "prepend", "--fim-rate", "0.5", "--fim-tokens", *SENTINELS, "--seq-len", 64]
    result = run_cli(*line, *options)
    assert result.returncode == 0, result.stderr
    result = run_cli(*line, "--bos", "prepend", "--seq-len", 64)
    assert (result.returncode, "fim_rate = 0.5 there, 0.0 here" in result.stderr) == (5, True), result.stderr


# Fingerprints.


def test_recipes_keep_the_fingerprint_they_had() -> None:
    """Those that `tests/golden/fingerprints.json` has were made before there were later fields."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "fingerprints.json").read_text())
    for case in golden:
        recipe = load_recipe(None, {"dataset": "corpus/", "tokenizer": "tokenizer/", **case["fields"]})
        assert recipe.fingerprint == case["fingerprint"], case["fields"]


class Tomorrow(Recipe, frozen=True, kw_only=True):
    """A recipe with one more field."""

    flavour: str = "vanilla"


def test_a_field_that_is_added_changes_no_fingerprint() -> None:
    given = {"dataset": "corpus/", "tokenizer": "tokenizer/"}
    today, tomorrow = Recipe(**given), Tomorrow(**given)
    assert today.fingerprint == tomorrow.fingerprint
    assert today.difference(tomorrow) is None
    other = Tomorrow(**given, flavour="chocolate")
    assert other.fingerprint != today.fingerprint
    assert today.difference(other) == "flavour = None there, 'chocolate' here"


def test_a_manifest_of_yesterday_is_resumed_and_verified(corpus: Path, tmp_path: Path) -> None:
    """One without the fields that came later, whose digests say so."""
    recipe = recipe_of(corpus, TOKENIZER)
    pretokenize(recipe, tmp_path / "root")
    path = tmp_path / "root" / layout.MANIFEST
    record = json.loads(path.read_text())
    for field in ("bos", "bos_token", "fim_rate", "fim_spm_rate", "fim_tokens", "metadata_columns"):
        del record["recipe"][field]
    for field in ("bos_id", "fim_ids"):
        del record["tokenizer"][field]
    write_record(path, record)
    assert verify(tmp_path / "root", deep=20).passed
    assert pretokenize(recipe, tmp_path / "root").status == "already complete"
    record["shards"][1]["sha256"] = "0" * 64
    (tmp_path / "root" / layout.shard_name(1)).unlink()
    record["complete"] = False
    del record["shards"][1:]
    record["tokens"], record["documents"] = record["shards"][0]["tokens"], record["shards"][0]["documents"]
    write_record(path, record)
    assert pretokenize(recipe, tmp_path / "root").status == "complete"
    assert verify(tmp_path / "root", deep=20).passed
    assert msgspec.json.decode(path.read_bytes())["fingerprint"] == record["fingerprint"]


def test_a_broken_configuration_does_no_harm_where_tokens_are_named(tokenizer: Path, tmp_path: Path) -> None:
    """As the message about it says."""
    folder = Path(shutil.copytree(tokenizer, tmp_path / "broken"))
    (folder / "tokenizer_config.json").write_text("{")
    loaded = load_tokenizer(str(folder), eos_token="</s>")
    recipe = Recipe(dataset="x", tokenizer="y", bos="prepend")
    with pytest.raises(errors.TokenizerError, match="is not JSON") as raised:
        with_special_tokens(loaded, recipe)
    assert "--bos-token" in str(raised.value.next_step)
    named = with_special_tokens(loaded, msgspec.structs.replace(recipe, bos_token="<bos>"))
    assert named.bos_token == "<bos>"

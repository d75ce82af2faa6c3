"""Tokenizer files: ids are those of the library that encodes; what is malformed is an error, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conftest import run_cli, write_record
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.reader import Texts
from tokenmill.dataroot.manifest import load
from tokenmill.encoding import encoder as encode
from tokenmill.encoding.encoder import AUDIT_FIRST_NBYTES, Encoder
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.errors import AuditError, TokenizerError
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.verification.verify import verify

DEMO: dict = json.loads((TOKENIZER / "tokenizer.json").read_text())


def folder(path: Path, tokenizer: object, config: object = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    (path / "tokenizer.json").write_text(text)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} if config is None else config))
    return path


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path.parent


def colliding(path: Path) -> Path:
    """A file whose special token was added before training: it has an id that the vocabulary gives to another."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.add_special_tokens(["<eos>"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        ["red green blue"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return folder(path, trained.to_str(), {"eos_token": "<eos>"})


def holes(path: Path) -> Path:
    """A vocabulary with holes, where the library gives an added token another id than the file."""
    vocab = {"<unk>": 0, "red": 1, "green": 7}
    fields = DEMO | {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [DEMO["added_tokens"][2] | {"id": 8, "content": "<eos>"}],
    }
    return folder(path, fields, {"eos_token": "<eos>"})


@pytest.mark.parametrize("make", [colliding, holes])
def test_ids_come_from_the_library(make, tmp_path: Path) -> None:
    tokenizer, corpus = make(tmp_path / "tok"), jsonl(tmp_path / "corpus" / "a.jsonl", "red green", "green red red")
    expected_id = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<eos>")
    assert load_tokenizer(str(tokenizer)).eos_id != expected_id
    recipe = Recipe(dataset=str(corpus), tokenizer=str(tokenizer), order="sequential")
    summary = pretokenize(recipe, tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.eos_id == expected_id
    assert any(f"{expected_id} is used" in note for note in summary.notes)
    assert verify(tmp_path / "out", deep=10).passed
    assert pretokenize(recipe, tmp_path / "out").status == "already complete"


def test_a_data_root_with_the_files_id_is_not_gone_on_with(tmp_path: Path) -> None:
    tokenizer, corpus = colliding(tmp_path / "tok"), jsonl(tmp_path / "corpus" / "a.jsonl", "red green")
    recipe = Recipe(dataset=str(corpus), tokenizer=str(tokenizer), order="sequential")
    pretokenize(recipe, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    before = json.loads(manifest.read_text())
    before["tokenizer"]["eos_id"] = load_tokenizer(str(tokenizer)).eos_id
    write_record(manifest, before)
    with pytest.raises(TokenizerError, match="its documents end in id"):
        pretokenize(recipe, tmp_path / "out")
    findings = verify(tmp_path / "out", deep=5).findings
    assert "tokenizer.eos_id" in {finding.position for finding in findings}


def test_the_run_says_which_engine_and_why(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "corpus" / "a.jsonl", "red green", "green red red")
    tokenizer = holes(tmp_path / "tok")
    result = run_cli("pretokenize", tmp_path / "out", "--dataset", corpus, "--tokenizer", tokenizer)
    assert result.returncode == 0, result.stderr
    assert "note: tokenizer" in result.stderr
    assert "model.type 'WordLevel'" in result.stderr
    assert any("HF tokenizers encodes" in note for note in load(tmp_path / "out").notes)
    assert "model.type 'WordLevel'" in run_cli("info", tmp_path / "out").stdout
    plan = run_cli("pretokenize", tmp_path / "x", "--dataset", corpus, "--tokenizer", tokenizer, "--dry-run")
    assert "note       tokenizer" in plan.stdout
    assert json.loads(run_cli("info", tmp_path / "out", "--json").stdout)["notes"]


MALFORMED: dict[str, tuple[object, object, str]] = {
    "a list": ([], None, "has no model"),
    "a number": (1, None, "has no model"),
    "no JSON": ("{", None, "is not JSON"),
    "deep": ("[" * 100_000, None, "is not JSON"),
    "surrogate": ('{"model": "\\ud800"}', None, "is not JSON"),
    "vocabulary of strings": (
        DEMO | {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
        None,
        "model.vocab",
    ),
    "negative id": (DEMO | {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, None, "model.vocab"),
    "an id near 2^31": (
        DEMO | {"model": {"type": "BPE", "vocab": {"a": 2**31 - 2}, "merges": []}},
        None,
        "model.vocab",
    ),
    "an added id near 2^31": (
        DEMO | {"added_tokens": [DEMO["added_tokens"][2] | {"id": 2**31 - 2}]},
        None,
        "added_tokens",
    ),
    "empty vocabulary": (
        DEMO | {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
        None,
        "empty",
    ),
    "unigram of strings": (DEMO | {"model": {"type": "Unigram", "vocab": ["a"]}}, None, "model.vocab"),
    "added tokens as an object": (DEMO | {"added_tokens": {"a": 1}}, None, "added_tokens"),
    "an added token without content": (DEMO | {"added_tokens": [{"id": 1}]}, None, "added_tokens"),
    "config is a list": (DEMO, [], "expected a JSON object"),
    "config is a string": (DEMO, "x", "expected a JSON object"),
    "eos is a number": (DEMO, {"eos_token": 2}, "eos_token: expected a string"),
    "eos is a list": (DEMO, {"eos_token": ["</s>"]}, "eos_token: expected a string"),
    "eos without content": (DEMO, {"eos_token": {"lstrip": True}}, "no end-of-sequence token"),
    "merge of nothing": (DEMO | {"model": DEMO["model"] | {"merges": [["zzz", "yyy"]]}}, None, "cannot load it"),
    "a prefix that is cut off": (
        DEMO | {"model": DEMO["model"] | {"continuing_subword_prefix": "##"}},
        None,
        "cannot load it",
    ),
    "a regex that does not end": (
        DEMO
        | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}},
        None,
        "cannot load it",
    ),
    "dropout": (DEMO | {"model": DEMO["model"] | {"dropout": 0.1}}, None, "dropout"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer, config, says = MALFORMED[case]
    path = folder(tmp_path / "tok", tokenizer, config)
    with pytest.raises(TokenizerError, match=says):
        Encoder(load_tokenizer(str(path)), backend="auto", special_in_text="parse", dtype="auto")
    assert "panicked" not in capfd.readouterr().err


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**33) | st.text(max_size=5) | st.just("</s>") | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(field=st.sampled_from(["model", "added_tokens", "vocab", "merges", "type", "eos_token"]), value=VALUES)
def test_no_field_of_any_type_is_a_traceback(
    field: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Up to the point where native code takes over, which is tried in a process of its own."""
    fields: dict = DEMO | ({field: value} if field in DEMO else {})
    if field in ("vocab", "merges", "type"):
        fields = DEMO | {"model": DEMO["model"] | {field: value}}
    config = {"eos_token": value} if field == "eos_token" else None
    path = folder(tmp_path_factory.mktemp("fuzzed"), fields, config)
    try:
        loaded = load_tokenizer(str(path))
    except TokenizerError:
        return
    encode.load_gigatoken  # noqa: B018  # the module is loaded
    from tokenmill.encoding.gigatoken import unproven_field

    unproven_field(loaded)


def unigram(texts: list[str]) -> str:
    vocabulary = [("<eos>", 0.0)] + [(c, -3.0) for c in sorted(set("".join(texts)))]
    made = Tokenizer(models.Unigram(vocabulary, None))
    made.add_special_tokens(["<eos>"])
    return made.to_str()


def test_a_text_without_ids_is_named(tmp_path: Path) -> None:
    texts = ["red green", "blue"]
    tokenizer = folder(tmp_path / "tok", unigram(texts), {"eos_token": "<eos>"})
    corpus = jsonl(tmp_path / "corpus" / "a.jsonl", *texts, "中")
    result = run_cli("pretokenize", tmp_path / "out", "--dataset", corpus, "--tokenizer", tokenizer)
    assert result.returncode == 4
    assert "a.jsonl: row 2: tokenizers" in result.stderr
    assert "Traceback" not in result.stderr


class Differing:
    """A fast engine that changes the ids of texts that hold `mark`."""

    name, version, doubtful, cut = "gigatoken", "liar 1", None, None

    def __init__(self, reference: Encoder, mark: str) -> None:
        self._reference, self._mark = reference.backend, mark

    def encode(self, texts: pa.LargeStringArray) -> tuple:
        ids, offsets = self._reference.encode(texts)
        for row, text in enumerate(texts.to_pylist()):
            if self._mark in text:
                ids[offsets[row]] ^= 1
        return ids, offsets


def lying(mark: str) -> Encoder:
    demo = load_tokenizer(str(TOKENIZER))
    found = Encoder(demo, backend="gigatoken", special_in_text="parse", dtype="uint16")
    found.backend = Differing(Encoder(demo, backend="hf", special_in_text="parse", dtype="uint16"), mark)
    return found


def test_a_small_corpus_is_audited_whole() -> None:
    texts = [f"document {i}" for i in range(400)]
    assert lying("zzz").encode(Texts(pa.array(texts)), where="x", first_row=0).audited == 400
    with pytest.raises(AuditError, match="row 399"):
        lying("document 399").encode(Texts(pa.array(texts)), where="x", first_row=0)


def test_the_audit_counts_text_and_not_files() -> None:
    """Files of a few rows each, as many as you like, cost one in a thousand once the beginning is over."""
    encoder = lying("zzz")
    page = "a page of text " * 70
    audited = [
        encoder.encode(Texts(pa.array([page] * 10)), where=f"{file}", first_row=0).audited for file in range(400)
    ]
    beginning = AUDIT_FIRST_NBYTES // (10 * len(page))
    assert sum(audited[: beginning - 1]) == 10 * (beginning - 1)
    assert 1 <= sum(audited[beginning + 1 :]) <= 5


def test_the_beginning_of_a_long_document_is_audited() -> None:
    giant = "x " * encode.AUDIT_MAX_NBYTES
    assert lying("zzz").encode(Texts(pa.array([giant])), where="x", first_row=0).audited == 1
    with pytest.raises(AuditError, match="row 0"):
        lying("x x").encode(Texts(pa.array([giant])), where="x", first_row=0)


def test_a_probe_that_differs_means_the_reference_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Encoder(load_tokenizer(str(TOKENIZER)), backend="hf", special_in_text="parse", dtype="uint16")
    monkeypatch.setattr(encode, "load_gigatoken", lambda tokenizer, special: Differing(reference, "CamelCase"))
    recipe = Recipe(dataset=str(jsonl(tmp_path / "c" / "a.jsonl", "one", "two")), tokenizer=str(TOKENIZER))
    assert pretokenize(recipe, tmp_path / "out").engine == reference.backend.version
    assert load(tmp_path / "out").software["engine"] == reference.backend.version
    with pytest.raises(AuditError, match="CamelCase"):
        pretokenize(recipe, tmp_path / "other", tokenizer_backend="gigatoken")

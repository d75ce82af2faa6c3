"""Encoding: engines agree, the audit finds one that lies, control tokens follow the policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import shared
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.reader import Texts
from tokenmill.encoding.encoder import EMPTY, NULL, SPECIAL, EncodedBatch, Encoder
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.errors import AuditError, SourceError, TokenizerError

DEMO = load_tokenizer(str(TOKENIZER))


def encoder(engine: str = "gigatoken", special: str = "parse", dtype: str = "uint16") -> Encoder:
    return Encoder(DEMO, backend=engine, special_in_text=special, dtype=dtype)


FAST, REFERENCE = encoder(), encoder("hf")
FAST_TEXT, REFERENCE_TEXT = encoder(special="text"), encoder("hf", "text")

TEXTS = st.lists(
    st.none() | st.text(max_size=40) | st.sampled_from(["</s>", "a</s>b <s>", "<unk>", " ", "\x00", "▁", "<0x41>"]),
    max_size=12,
)


def encode(encoder: Encoder, texts: list[str | None]) -> EncodedBatch:
    return encoder.encode(Texts(pa.array(texts, pa.string())), where="test", first_row=0)


@given(TEXTS)
def test_engines_agree(texts: list[str | None]) -> None:
    for fast, reference in ((FAST, REFERENCE), (FAST_TEXT, REFERENCE_TEXT)):
        found, expected = encode(fast, texts), encode(reference, texts)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.lengths.tolist() == expected.lengths.tolist()
        assert found.flags.tolist() == expected.flags.tolist()


@given(TEXTS)
def test_documents_end_in_eos_and_text_never_becomes_a_control_token(texts: list[str | None]) -> None:
    for span in (encode(FAST, texts), encode(FAST_TEXT, texts)):
        ends = np.cumsum(span.lengths)
        assert (span.lengths > 0).tolist() == [bool(text) for text in texts]
        assert (span.tokens[ends[span.lengths > 0] - 1] == DEMO.eos_id).all()
        assert len(span.tokens) == span.lengths.sum()
    control = [token.id for token in DEMO.added_tokens if token.special]
    assert np.isin(span.tokens, control).sum() == (span.lengths > 0).sum()


def test_flags() -> None:
    span = encode(FAST, ["x", None, "", "a</s>"])
    assert span.flags.tolist() == [0, NULL, EMPTY, SPECIAL]
    assert span.lengths[1:3].tolist() == [0, 0]


def test_parse_makes_the_control_token() -> None:
    assert encode(FAST, ["</s>"]).tokens.tolist() == [DEMO.eos_id, DEMO.eos_id]


def test_slices_and_other_text_types_encode_alike() -> None:
    texts = ["left out", "one", None, "two </s>", "", "three"]
    expected = encode(FAST, texts[1:]).tokens.tolist()
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()):
        array = pa.array([t if t is None or pa.types.is_string(kind) else t.encode() for t in texts]).cast(kind)
        assert FAST.encode(Texts(array.slice(1)), where="test", first_row=0).tokens.tolist() == expected
    dictionary = pa.array(texts).dictionary_encode()
    assert FAST.encode(Texts(dictionary.slice(1)), where="test", first_row=0).tokens.tolist() == expected


class LyingEngine:
    """Changes the last token of every document."""

    name, version, doubtful, cut = "liar", "liar 1", None, None

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = REFERENCE.backend.encode(texts)
        ids[offsets[1:] - 1] ^= 1
        return ids, offsets


def test_audit_stops_an_engine_that_lies() -> None:
    lying = encoder("hf")
    lying.backend = LyingEngine()
    texts = pa.array([f"document {i}" for i in range(5000)])
    with pytest.raises(AuditError, match=r"part-7\.parquet: row \d+: liar 1 and tokenizers .* expected \[.*found \["):
        lying.encode(Texts(texts), where="part-7.parquet", first_row=0)
    with pytest.raises(AuditError, match=r"row 10:"):
        lying.encode(Texts(pa.array(["holds </s> inside"])), where="part-7.parquet", first_row=10)


def test_invalid_utf8_names_the_row() -> None:
    for kind in (pa.binary(), pa.large_binary()):
        with pytest.raises(SourceError, match=r"x\.parquet: row 102: .*UTF-8"):
            FAST.encode(Texts(pa.array([b"ok", None, b"\xff\xfe", b"ok"], kind)), where="x.parquet", first_row=100)


def test_invalid_utf8_in_a_string_column() -> None:
    sneaky = pa.array([b"ok", b"\xc3\x28"]).view(pa.string())
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        with pytest.raises(SourceError, match="row 1"):
            FAST.encode(Texts(sneaky.cast(kind)), where="x.parquet", first_row=0)
    with pytest.raises(SourceError, match="row 1"):
        FAST.encode(Texts(sneaky.dictionary_encode()), where="x.parquet", first_row=0)


def test_long_and_odd_documents() -> None:
    texts = ["\x00" * 1000, "a" * 300_000, " " * 5000, "\ufeff", "\U0010ffff"]
    assert encode(FAST, texts).tokens.tolist() == encode(REFERENCE, texts).tokens.tolist()


def tokenizer_folder(path: Path, config: dict | None = None, **fields: object) -> Path:
    path.mkdir()
    data = json.loads((TOKENIZER / "tokenizer.json").read_text()) | fields
    (path / "tokenizer.json").write_text(json.dumps(data))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_eos_sources(tmp_path: Path) -> None:
    for number, config in enumerate(({"eos_token": "<s>"}, {"eos_token": {"content": "<s>"}})):
        assert load_tokenizer(str(tokenizer_folder(tmp_path / str(number), config))).eos_id == 1
    bare = tokenizer_folder(tmp_path / "bare")
    assert load_tokenizer(str(bare / "tokenizer.json"), eos_token="</s>").eos_id == 2
    with pytest.raises(TokenizerError, match=r"no end-of-sequence token[\s\S]*--eos-token"):
        load_tokenizer(str(bare))
    with pytest.raises(TokenizerError, match="'<end>' is not in its vocabulary"):
        load_tokenizer(str(bare), eos_token="<end>")


def test_truncation_in_the_file_loses_no_text(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    folder = tokenizer_folder(tmp_path / "t", {"eos_token": "</s>"}, truncation=truncation)
    for engine in ("hf", "gigatoken"):
        cutter = Encoder(load_tokenizer(str(folder)), backend=engine, special_in_text="parse", dtype="uint16")
        assert len(encode(cutter, ["one two three four five six"]).tokens) > 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs", "is not JSON"),
        (b"[]", "has no model"),
        (b'{"model": {}}', "has no vocabulary"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(str(tmp_path))


def test_reference_engine_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "t", {"eos_token": "</s>"}, normalizer={"type": "FromTheFuture"})
    with pytest.raises(TokenizerError, match="cannot load it"):
        Encoder(load_tokenizer(str(folder)), backend="hf", special_in_text="parse", dtype="uint16")


def wordlevel_folder(path: Path) -> Path:
    """A tokenizer gigatoken does not take."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "cat": 2}, "unk_token": "<unk>"}
    return tokenizer_folder(
        path,
        {"eos_token": "</s>"},
        model=model,
        normalizer=None,
        pre_tokenizer={"type": "Whitespace"},
        decoder=None,
        added_tokens=[],
    )


def test_auto_falls_back_to_the_reference_engine(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(wordlevel_folder(tmp_path / "t")))
    fallback = Encoder(tokenizer, backend="auto", special_in_text="parse", dtype="uint16")
    assert fallback.backend.name == "hf"
    assert encode(fallback, ["cat dog"]).tokens.tolist() == [2, 0, 1]
    with pytest.raises(TokenizerError, match="gigatoken cannot take it"):
        Encoder(tokenizer, backend="gigatoken", special_in_text="parse", dtype="uint16")


def test_dtype_must_hold_the_vocabulary(tmp_path: Path) -> None:
    big = DEMO._replace(vocab_size=70_000)
    with pytest.raises(TokenizerError, match="70000 ids do not fit dtype uint16"):
        Encoder(big, backend="gigatoken", special_in_text="parse", dtype="uint16")


def test_ids_outside_the_vocabulary_stop_the_run() -> None:
    narrow = Encoder(DEMO._replace(vocab_size=300), backend="gigatoken", special_in_text="parse", dtype="uint16")
    with pytest.raises(TokenizerError, match="outside the vocabulary of 300"):
        encode(narrow, ["the quick brown fox"])


def test_byte_level_caches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte-level tokenizer is loaded anew after so much text, with the same result."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tokenmill.encoding import gigatoken as encode_gigatoken

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        ["some text to learn from, some more text"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encode_gigatoken, "CACHE_TEXT_NBYTES", 50)
    tokenizer = load_tokenizer(str(tmp_path), eos_token="<end>")
    fast = Encoder(tokenizer, backend="gigatoken", special_in_text="parse", dtype="uint16")
    first = fast.backend._backend
    texts = ["some text", "more, to learn", "unseen wörds \U0001f680"] * 3
    assert (
        encode(fast, texts).tokens.tolist()
        == encode(Encoder(tokenizer, backend="hf", special_in_text="parse", dtype="uint16"), texts).tokens.tolist()
    )
    assert fast.backend._backend is not first


def test_llama2_on_the_real_corpus() -> None:
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(str(shared("data/llama2-tokenizer")))
    texts = pq.read_table(shared("data/corpus/part-00000.parquet"))["text"].combine_chunks()
    spans = [
        Encoder(tokenizer, backend=engine, special_in_text=special, dtype="uint16").encode(
            Texts(texts), where="", first_row=0
        )
        for special in ("parse", "text")
        for engine in ("gigatoken", "hf")
    ]
    assert np.array_equal(spans[0].tokens, spans[1].tokens)
    assert np.array_equal(spans[2].tokens, spans[3].tokens)
    assert not np.array_equal(spans[0].tokens, spans[2].tokens)

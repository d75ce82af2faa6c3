"""The fast backend: what it is trusted with gives the reference backend's ids; everything else is refused."""

from __future__ import annotations

import copy
import functools
import json
import random
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.reader import Texts
from tokenmill.encoding import encoder as encoder_module
from tokenmill.encoding import gigatoken as encode_gigatoken
from tokenmill.encoding import long_documents
from tokenmill.encoding.encoder import Encoder
from tokenmill.encoding.gigatoken import GigatokenBackend, unproven_field
from tokenmill.encoding.hf import HFBackend
from tokenmill.encoding.tokenizer import TokenizerFile, load_tokenizer
from tokenmill.errors import TokenizerError

PIECES: dict = json.loads((TOKENIZER / "tokenizer.json").read_text())
TRAINING = [
    "The gene genes, genetic; I'm you're he'll WE'LL don't 1234567 12 3.14 café naïve 日本語 ひらがな한국어 русский",
    "def f(x):\n    return x ** 2  # comment\n\n\tint main(void) {\r\n  return 0;\r\n}\n\n\n   \n",
] * 40


def loaded(folder: Path, fields: dict, eos: str) -> TokenizerFile:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return load_tokenizer(str(folder), eos_token=eos)


@functools.cache
def byte_level_json() -> str:
    """Merges across what a regular expression would keep apart, so that splits show in the ids."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]{1,12}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=900, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return trained.to_str()


def byte_level(**fields: object) -> dict:
    return json.loads(byte_level_json()) | {"pre_tokenizer": GPT2, **fields}


def pieces(**fields: object) -> dict:
    return copy.deepcopy(PIECES) | fields


def model(base: dict, **fields: object) -> dict:
    return base | {"model": base["model"] | fields}


def added(content: str, base: dict, **flags: object) -> dict:
    """One more added token, with the id that it must have."""
    token = {"id": 0, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token |= {"special": False, **flags}
    vocab, others = base["model"]["vocab"], base["added_tokens"]
    token["id"] = vocab.get(content, max(len(vocab), *(other["id"] + 1 for other in others)))
    return base | {"added_tokens": [*others, token]}


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}


def splits(regexes: list[str], **how: object) -> dict:
    steps = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | how
        for regex in regexes
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTES]}


SPLITS = encode_gigatoken.SPLITS
PROVEN: dict[str, Callable[[], dict]] = {
    "pieces": pieces,
    "pieces, spaces only": lambda: pieces(normalizer=encode_gigatoken.SPACES),
    "pieces, Gemma": lambda: pieces(normalizer=encode_gigatoken.SPACES, pre_tokenizer=encode_gigatoken.SPLIT_SPACES),
    **{
        f"pieces, Metaspace {scheme} {split}": lambda scheme=scheme, split=split: pieces(
            normalizer=None, pre_tokenizer=METASPACE | {"prepend_scheme": scheme, "split": split}
        )
        for scheme in ("first", "always", "never")
        for split in (True, False)
    },
    "pieces, added tokens": lambda: added("a b", added("<|x|>", pieces(), special=True)),
    "pieces, tokens that strip": lambda: added("<|x|>", pieces(), lstrip=True, rstrip=True),
    "byte level": byte_level,
    "byte level, no default": lambda: byte_level(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    ),
    "byte level, NFC": lambda: byte_level(normalizer={"type": "NFC"}, pre_tokenizer=splits(SPLITS[2])),
    "byte level, merges ignored": lambda: model(byte_level(), ignore_merges=True),
    "byte level, added tokens": lambda: added("  ", added("<|x|>y", added("<|x|>", byte_level()))),
    "byte level, tokens that strip": lambda: added("<|x|>", byte_level(), lstrip=True, rstrip=True),
    "byte level, all normalized": lambda: byte_level(
        added_tokens=[token | {"normalized": True} for token in byte_level()["added_tokens"]]
    ),
    **{f"split {n}": lambda n=n: byte_level(pre_tokenizer=splits(SPLITS[n])) for n in range(len(SPLITS))},
    "split, removed": lambda: byte_level(pre_tokenizer=splits(SPLITS[1], behavior="Removed", invert=True)),
}

ODD = [
    *"abRSTV'stdmrelv019.,;:!?/-_()\n\r\t ",
    "é",
    "ß",
    "ſ",
    "K",
    "Å",
    "日",
    "ひ",
    "カ",
    "한",
    "ع",
    "ह",
    "\u093f",
    "²",
    "½",
]
ODD += ["\u0301", "\u0327", "\u200d", "\u200b", "\ufeff", "\u00a0", "\u2003", "\u2028", "\x85", "\x0b", "\x1c", "\x00"]
ODD += [
    "Ⅷ",
    "①",
    "٣",
    "\U0001f680",
    "\U0001f3fd",
    "’",
    "“",
    "▁",
    "Ġ",
    "<|x|>",
    "<|x|>y",
    "<|end|>",
    "</s>",
    "'s",
    "'LL",
]
ODD += ["  ", "\n\n", "\r\n", "a b", "\U0001611e", "\U00016123", "\u0897", "e\u0301", "\u1112\u1161\u11ab"]
ANY = "any other character"
"""Stands among strings to choose from."""


@st.composite
def joined(draw: st.DrawFn, strings: list[str], *, min_size: int = 0, max_size: int) -> str:
    """Some of the strings, one after the other: a draw for all of them, as Hypothesis takes its time for each."""
    numbers = draw(st.text(st.characters(max_codepoint=len(strings) - 1), min_size=min_size, max_size=max_size))
    chosen = [strings[ord(number)] for number in numbers]
    others = iter(draw(st.text(max_size=max_size)) if ANY in chosen else "")
    return "".join(next(others, "") if string is ANY else string for string in chosen)


TEXTS = st.lists(joined([*ODD, *[ANY] * len(ODD)], max_size=12), min_size=1, max_size=40)


def ids(engine: Encoder, texts: list[str]) -> list[int]:
    return engine.encode(Texts(pa.array(texts, pa.string())), where="test", first_row=0).tokens.tolist()


@pytest.fixture(scope="module", params=PROVEN)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Encoder]:
    fields = PROVEN[request.param]()
    eos = fields["added_tokens"][0]["content"]
    file = loaded(tmp_path_factory.mktemp("proven"), fields, eos)
    assert unproven_field(file) is None
    made = [Encoder(file, backend=name, special_in_text="parse", dtype="auto") for name in ("gigatoken", "hf")]
    return made[0], made[1]


LONG = joined([*ODD, " the ", " cat ", "a b c", "e f"], min_size=1, max_size=60)


@settings(max_examples=60)
@given(texts=st.lists(LONG, min_size=1, max_size=4), piece=st.integers(1, 30), group=st.integers(1, 60))
def test_long_documents_are_encoded_in_pieces(
    both: tuple[Encoder, Encoder], texts: list[str], piece: int, group: int
) -> None:
    """Where a tokenizer may be cut, the tokens are those of the whole, wherever the cuts are."""
    fast, reference = both
    with pytest.MonkeyPatch.context() as patch:
        for module in (long_documents, encoder_module):
            patch.setattr(module, "LONG_NBYTES", 20)
        patch.setattr(encoder_module, "AUDIT_MAX_NBYTES", 20)
        patch.setattr(long_documents, "PIECE_NBYTES", piece)
        patch.setattr(long_documents, "GROUP_NBYTES", group)
        assert ids(fast, texts) == ids(reference, texts)


def test_tokenizers_that_may_be_cut(both: tuple[Encoder, Encoder], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["both"]
    never = name in ("pieces, added tokens", "byte level, added tokens")
    out = name in ("pieces", "pieces, tokens that strip") or (
        name.startswith("pieces, Metaspace") and "never" not in name
    )
    assert both[0].backend.cut == (None if never else "out" if out else "before")


def test_a_cut_document_is_in_several_pieces() -> None:
    text = pa.array(["", "ab cd  ef gh. ij", "x"], pa.large_string()).slice(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "PIECE_NBYTES", 2)
        found = {cut: list(long_documents.cut_document(text, cut)) for cut in ("before", "out")}
        patch.setattr(long_documents, "GROUP_NBYTES", 3)
        groups = [strings.to_pylist() for strings, _ in long_documents.cut_document(text, "out")]
    ((strings, are_pieces),) = found["before"]
    assert strings.to_pylist()[are_pieces] == ["ab", " cd  ef", " gh. ij"]
    ((strings, are_pieces),) = found["out"]
    assert strings.to_pylist()[are_pieces] == ["ab", "cd  ef", "gh. ij"]
    assert groups == [["ab", " ", "cd  ef"], ["gh. ij"]]


@settings(max_examples=60)
@given(texts=TEXTS)
def test_what_is_trusted_is_equal(both: tuple[Encoder, Encoder], texts: list[str]) -> None:
    fast, reference = both
    assert fast.backend.name == "gigatoken"
    assert ids(fast, texts) == ids(reference, texts)


def test_a_batch_gives_what_one_text_after_the_other_does(both: tuple[Encoder, Encoder]) -> None:
    """Few texts are encoded one by one, many in a batch, and threads that do both have the same ids."""
    fast, reference = both
    rng = random.Random(5)
    texts = ["".join(rng.choices(ODD, k=rng.randrange(8))) for _ in range(encode_gigatoken.FEW_TEXTS + 200)]
    wanted = ids(reference, texts)
    few = [texts[at : at + 150] for at in range(0, len(texts), 150)]
    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(ids, fast, texts) for _ in range(3)]
        parts = list(pool.map(functools.partial(ids, fast), few))
    assert [token for part in parts for token in part] == wanted
    assert all(batch.result() == wanted for batch in batches)


@functools.cache
def some_characters() -> list[str]:
    """What changes between versions of Unicode, and a share of the rest."""
    marks = [chr(c) for c in range(0x300, 0x20000) if unicodedata.combining(chr(c))]
    every = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return marks + [chr(c) for c in random.Random(7).sample(every, 4_000)]


def test_every_character_of_some_blocks_is_equal(both: tuple[Encoder, Encoder]) -> None:
    """The whole of Unicode was compared once; here some of it."""
    fast, reference = both
    texts = [f"a{c}b {c}{c} {c}1'{c} A{c}\u0301" for c in some_characters()]
    assert ids(fast, texts) == ids(reference, texts)
    fast.require_equal_backends()


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}
UNPROVEN: dict[str, tuple[Callable[[], dict], str]] = {
    "single word": (lambda: added("gene", byte_level(), single_word=True), "single_word"),
    "single word, late": (
        lambda: added(
            "gene", functools.reduce(lambda b, n: added(f"<|{n}|>", b), range(9), pieces()), single_word=True
        ),
        "single_word",
    ),
    "no regex": (lambda: byte_level(pre_tokenizer=BYTES), "pre_tokenizer"),
    "prefix space": (lambda: byte_level(pre_tokenizer=GPT2 | {"add_prefix_space": True}), "pre_tokenizer"),
    "digits before": (
        lambda: byte_level(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, *splits(SPLITS[0])["pretokenizers"]]}
        ),
        "Digits",
    ),
    "punctuation": (
        lambda: byte_level(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, BYTES],
            }
        ),
        "Punctuation",
    ),
    "metaspace before": (
        lambda: byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [METASPACE, BYTES]}),
        "Metaspace",
    ),
    **{
        f"behavior {behavior} {invert}": (
            lambda behavior=behavior, invert=invert: byte_level(
                pre_tokenizer=splits(SPLITS[0], behavior=behavior, invert=invert)
            ),
            "pre_tokenizer",
        )
        for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        for invert in (True, False)
        if (behavior, invert) not in (("Isolated", False), ("Removed", True))
    },
    "GPT-4's expression": (lambda: byte_level(pre_tokenizer=splits([CL100K])), "pre_tokenizer"),
    "another expression": (lambda: byte_level(pre_tokenizer=splits([r"\w+|\s+"])), "pre_tokenizer"),
    "no pre_tokenizer": (lambda: byte_level(pre_tokenizer=None), "pre_tokenizer"),
    "NFKC": (lambda: byte_level(normalizer={"type": "NFKC"}), "NFKC"),
    "lower case": (lambda: pieces(normalizer={"type": "Lowercase"}), "Lowercase"),
    "another prefix": (
        lambda: pieces(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "_"}, encode_gigatoken.SPACES],
            }
        ),
        "normalizer",
    ),
    "end of word": (lambda: model(byte_level(), end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "subword prefix": (lambda: model(byte_level(), continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "a byte lacks": (
        lambda: model(
            pieces(),
            vocab={("<<g>>" if piece == "<0xE1>" else piece): id for piece, id in PIECES["model"]["vocab"].items()},
        ),
        "<0xE1>",
    ),
    "merges ignored in pieces": (lambda: model(pieces(), ignore_merges=True), "ignore_merges"),
    "normalized tokens, NFC": (
        lambda: added("<|x|>", byte_level(normalizer={"type": "NFC"}), normalized=True),
        "normalized text",
    ),
    "some tokens normalized": (lambda: added("<|x|>", byte_level(), normalized=True), "normalized text"),
    "an unknown field": (lambda: byte_level(from_the_future={}), "from_the_future"),
    "an unknown field of the model": (lambda: model(byte_level(), from_the_future=1), "from_the_future"),
    "a wrong id": (
        lambda: byte_level(
            added_tokens=[*byte_level()["added_tokens"], added("<x>", byte_level())["added_tokens"][1] | {"id": 5}]
        ),
        "the id 5",
    ),
    "a hole": (lambda: model(byte_level(), vocab=byte_level()["model"]["vocab"] | {"Ġzz": 5_000}), "holes"),
    "a merge twice": (
        lambda: model(byte_level(), merges=[*byte_level()["model"]["merges"], byte_level()["model"]["merges"][0]]),
        "twice",
    ),
    "WordLevel": (
        lambda: pieces(
            model={"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}, added_tokens=[]
        ),
        "WordLevel",
    ),
}


@pytest.mark.parametrize("case", UNPROVEN)
def test_everything_else_goes_to_the_reference_engine(case: str, tmp_path: Path) -> None:
    make, says = UNPROVEN[case]
    fields = make()
    file = loaded(tmp_path, fields, "</s>" if "</s>" in fields["model"]["vocab"] else "<|end|>")
    unproven = unproven_field(file)
    assert unproven is not None
    assert says in unproven
    with pytest.raises(TokenizerError, match="gigatoken cannot take it: it is not proven to honour"):
        GigatokenBackend(file)
    try:
        Tokenizer.from_str(json.dumps(fields))
    except BaseException:  # noqa: BLE001  # a panic is no Exception
        with pytest.raises(TokenizerError, match="cannot load it"):
            Encoder(file, backend="auto", special_in_text="parse", dtype="auto")
        return
    encoder = Encoder(file, backend="auto", special_in_text="parse", dtype="auto")
    assert encoder.backend.name == "hf"
    assert says in encoder.notes[0]
    texts = ["the gene was found", "genes 12 x2y", "ᄑ გ", "a  b\n\nc"]
    expected: list[int] = []
    reference = Tokenizer.from_str(json.dumps(fields))
    for text in texts:
        expected += [*reference.encode(text, add_special_tokens=False).ids, reference.token_to_id(file.eos_token)]
    assert ids(encoder, texts) == expected


def test_control_tokens_as_text_in_normalized_text(tmp_path: Path) -> None:
    fields = byte_level(added_tokens=[token | {"normalized": True} for token in byte_level()["added_tokens"]])
    file = loaded(tmp_path, fields, "<|end|>")
    assert unproven_field(file, "parse") is None
    assert "normalized text" in (unproven_field(file, "text") or "")


def test_newer_marks_go_to_the_reference_engine(tmp_path: Path) -> None:
    """HF normalizes by older tables than gigatoken does: a document with such a mark must be HF's."""
    file = loaded(tmp_path, byte_level(normalizer={"type": "NFC"}), "<|end|>")
    texts = pa.array(["plain", "a\u0301\u0897\u0327b", "\U0001611e\U0001611e"], pa.large_string())
    fast, reference = GigatokenBackend(file), HFBackend(file, special_in_text="parse")
    assert not np.array_equal(fast.encode(texts)[0], reference.encode(texts)[0])
    encoder = Encoder(file, backend="auto", special_in_text="parse", dtype="auto")
    assert encoder.backend.name == "gigatoken"
    assert encoder.encode_documents(texts, np.empty(0, np.int64))[0].tolist() == reference.encode(texts)[0].tolist()

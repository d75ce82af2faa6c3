"""The fast backend: the one module that imports `gigatoken` (and `awkward`, its array type).

About twelve times HF `tokenizers` a core on Llama-2, with the GIL released, so threads scale. It
trusts its input to be UTF-8, and always parses added-token strings: callers see to both.

It reads some fields of a tokenizer.json that it then does not honour, so it is given a file only if every field
has a value that was proven equal to HF `tokenizers` (`unproven_field`): every Unicode character in several
surroundings, and 200,000 random strings, for each value on the list. `tests/encoding/test_gigatoken.py` repeats some.
"""

from __future__ import annotations

import itertools
import re
import string
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import gigatoken
import msgspec
import numpy as np
import pyarrow as pa
from gigatoken.gigatoken_rs import BPETokenizer
from numpy.typing import NDArray

from tokenmill.encoding.framing import join_ids
from tokenmill.encoding.long_documents import Cut
from tokenmill.encoding.tokenizer import AddedToken, TokenizerFile
from tokenmill.errors import TokenizerError

if TYPE_CHECKING:
    import awkward as ak

CACHE_TEXT_NBYTES = 1 << 30
"""Text after which a tokenizer is loaded anew where gigatoken 0.10 keeps every distinct word it met, for ever: those of
byte level do, and all of them in calls for one text. (SentencePiece-style caches of a batch live for one call.)"""

FEW_NBYTES = 1 << 16
FEW_TEXTS = 1_000
"""Texts up to that size, and as many, are encoded one by one: a batch costs 3 ms more, however small it is. A call for
one text holds the GIL, and no other thread may use the tokenizer meanwhile."""


class GigatokenBackend:
    """gigatoken over a `tokenizer.json`. Threads may share it.

    Args:
        special_in_text: `parse` or `text`, as of the recipe.

    Raises:
        TokenizerError: a field of the file is not proven, or gigatoken refuses it.
    """

    name = "gigatoken"
    version = f"gigatoken {version('gigatoken')}"

    def __init__(self, tokenizer: TokenizerFile, special_in_text: str = "parse") -> None:
        self._json = tokenizer.json
        fields = msgspec.json.decode(self._json)
        unproven = next(_unproven(fields, tokenizer.added_tokens, special_in_text), None)
        if unproven is not None:
            raise _cannot_take(tokenizer, f"it is not proven to honour {unproven}")
        try:
            self._backend = gigatoken.Tokenizer.from_json(self._json).backend
        except (ValueError, TypeError, RuntimeError) as error:
            raise _cannot_take(tokenizer, str(error)) from None
        self.doubtful = _NEWER_MARKS if fields.get("normalizer") in _NFC else None
        """A regular expression for documents that the reference backend must encode; None if there are none."""
        self.cut = _cut_of(fields, tokenizer.added_tokens)
        self._cache_grows = isinstance(self._backend, BPETokenizer)
        self._cached_nbytes = 0
        self._batches = 0
        """Under way in other threads."""
        self._lock = threading.Lock()

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return ids of all texts one after the other, and where each begins: shapes `(tokens,)`, `(rows + 1,)`.

        `texts` has no nulls and is valid UTF-8; its buffers are read in place.
        """
        are_few = texts.nbytes <= FEW_NBYTES and len(texts) <= FEW_TEXTS
        with self._lock:
            one_by_one = are_few and not self._batches
            if one_by_one or self._cache_grows:
                self._bound_cache(texts.nbytes)
            if one_by_one:
                return join_ids(map(self._backend.encode, texts.to_pylist()))
            self._batches += 1
            backend = self._backend
        try:
            layout = backend.encode_batch(_as_awkward(texts), parallel=False).layout
        finally:
            with self._lock:
                self._batches -= 1
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data)

    def _bound_cache(self, nbytes: int) -> None:
        self._cached_nbytes += nbytes
        if self._cached_nbytes > CACHE_TEXT_NBYTES:
            self._backend = gigatoken.Tokenizer.from_json(self._json).backend
            self._cached_nbytes = 0


def _cut_of(fields: dict[str, Any], added: Sequence[AddedToken]) -> Cut | None:
    """Return how a text may be cut at a space between ASCII letters; None if it may not.

    Byte-level tokenizers split words from each other first, with all of `SPLITS`: a match that ends with a letter never
    continues with a space, and none looks back. The others merge across words only if a piece of the vocabulary has a
    letter before a space; and where it begins each text with a space of its own, that stands for the one at the cut.
    No added token may lie at the cut.
    """
    letters = set(string.ascii_letters)
    if any(" " in token.content or {token.content[0], token.content[-1]} & letters for token in added):
        return None
    if not fields["model"].get("byte_fallback"):
        return "before"
    if re.search("[A-Za-z]▁", "\n".join(fields["model"]["vocab"])):
        return None
    normalizer = fields.get("normalizer")
    prepends = normalizer == _PIECE_NORMALIZERS[2] or (
        normalizer is None and fields["pre_tokenizer"].get("prepend_scheme", "always") != "never"
    )
    return "out" if prepends else "before"


def _cannot_take(tokenizer: TokenizerFile, reason: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer {tokenizer.name}: gigatoken cannot take it: {reason}",
        next_step="use --tokenizer-backend hf (slower, same bytes), or auto to choose by itself",
    )


def _as_awkward(texts: pa.LargeStringArray) -> ak.Array:
    """Return the same buffers as an awkward array of strings."""
    import awkward as ak  # takes as long to load as all else together, and is not needed where nothing is encoded

    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    characters = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    content = ak.contents.NumpyArray(characters, parameters={"__array__": "char"})
    strings = ak.contents.ListOffsetArray(ak.index.Index64(bounds), content, parameters={"__array__": "string"})
    return ak.Array(strings)


# What is proven. All else is refused: a value is added here only with its differential test.

_TOP = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"}
"""The last two have no part in ids: the special tokens of templates are never asked for."""
_MODEL = {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"}
_MODEL |= {"byte_fallback", "ignore_merges", "vocab", "merges"}

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PIECE_NORMALIZERS: list[Any] = [
    SPACES,
    {"type": "Sequence", "normalizers": [SPACES]},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]},
]
_BYTE_PIECES = frozenset(map("<0x{:02X}>".format, range(256)))
"""What a byte without a piece of its own becomes, with `byte_fallback`."""
SPLIT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_OTHERS_OR_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS
SPLITS: list[list[str]] = [
    [_GPT2],
    [rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}{_OTHERS}"],  # Llama 3, OLMo 2
    [rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{_OTHERS}"],  # Qwen 2
    [rf"{_CONTRACTIONS}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_BLANKS}"],  # Qwen 3.5
    [
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}{_OTHERS_OR_SLASH}"  # GPT-4o
    ],
    [rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_OTHERS_OR_SLASH}"],  # Nemotron 3
    [
        r"\p{N}{1,3}",  # DeepSeek 3
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
]
"""Regular expressions of `Split` steps before `ByteLevel`. Not GPT-4's: gigatoken differs on runs of digits and of
blanks, in one of a thousand random strings."""

_KEPT_APART = {"behavior": "Isolated", "invert": False}
_KEPT_ALONE = {"behavior": "Removed", "invert": True}
"""The same where a single expression matches all of any text, as these do."""

_NFC: list[Any] = [{"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}]
_NEWER_MARKS = (
    "[\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1aff\u1df6-\u1dfa\ua82c"
    "\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85"
    "\U00011070\U0001133b\U00011380-\U000113ff\U0001145e\U00011839-\U0001183a\U0001193d-\U00011943"
    "\U000119e0-\U00011aff\U00011d42-\U00011d97\U00011f41-\U00011f42\U00016100-\U0001613f\U00016d40-\U00016d7f"
    "\U00016ff0-\U00016ff1\U0001e08f\U0001e130-\U0001e136\U0001e2ae-\U0001e2ef\U0001e4ec-\U0001e4ef"
    "\U0001e5ee-\U0001e5ef\U0001e6e3-\U0001e6f5]"
)
"""Marks that Unicode 10 and later brought: HF `tokenizers` 0.23 normalizes by older tables than gigatoken does. Found
by comparing every character in seven surroundings."""

_BYTE_LETTERS = frozenset(map(chr, (*range(33, 127), *range(161, 173), *range(174, 324))))
"""What GPT-2's byte-level vocabularies write bytes as."""


def unproven_field(tokenizer: TokenizerFile, special_in_text: str = "parse") -> str | None:
    """Return the first thing in a file that gigatoken is not proven to honour, in words; None if there is none."""
    fields = msgspec.json.decode(tokenizer.json)
    return next(_unproven(fields, tokenizer.added_tokens, special_in_text), None)


def _unproven(fields: dict[str, Any], added: Sequence[AddedToken], special_in_text: str) -> Iterator[str]:
    model = fields["model"]
    yield from (f"the field {name!r}" for name in fields.keys() - _TOP - {"model"})
    yield from (f"the field model.{name}" for name in model.keys() - _MODEL)
    if model.get("type") != "BPE":
        yield f"model.type {model.get('type')!r}"
        return  # what follows is of BPE
    if not isinstance(model.get("vocab"), dict):
        yield "a vocabulary that is no object"
        return
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            yield f"model.{name} {model[name]!r}"
    if model.get("byte_fallback"):
        yield from _unproven_pieces(fields)
    else:
        yield from _unproven_byte_level(fields)
    yield from _unproven_ids(model["vocab"], added)
    yield from _unproven_merges(model)
    yield from _unproven_added_tokens(added, bool(fields.get("normalizer")), special_in_text)


def _unproven_pieces(fields: dict[str, Any]) -> Iterator[str]:
    """SentencePiece's kind: Llama 2, Gemma."""
    model, normalizer, pre_tokenizer = fields["model"], fields.get("normalizer"), fields.get("pre_tokenizer")
    if model.get("ignore_merges"):
        yield "model.ignore_merges with byte_fallback"
    if lacking := sorted(_BYTE_PIECES - model["vocab"].keys()):
        yield f"a vocabulary without {lacking[0]}, with byte_fallback"
    if normalizer in _PIECE_NORMALIZERS:
        if pre_tokenizer not in (None, SPLIT_SPACES):
            yield f"the pre_tokenizer {_shown(pre_tokenizer)}"
    elif normalizer is not None:
        yield f"the normalizer {_shown(normalizer)}"
    elif not _is_metaspace(pre_tokenizer):
        yield f"the pre_tokenizer {_shown(pre_tokenizer)} without a normalizer"


def _is_metaspace(step: Any) -> bool:
    return isinstance(step, dict) and {**step, "prepend_scheme": "", "split": True} == {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "",
        "split": True,
    }


def _unproven_byte_level(fields: dict[str, Any]) -> Iterator[str]:
    """GPT-2's kind: every byte is a letter of the vocabulary."""
    vocab, normalizer = fields["model"]["vocab"], fields.get("normalizer")
    if not set().union(*vocab) <= _BYTE_LETTERS:
        own = {token["content"] for token in fields.get("added_tokens") or []}
        odd = next((piece for piece in vocab if not set(piece) <= _BYTE_LETTERS and piece not in own), None)
        if odd is not None:
            yield f"the piece {odd!r}, which is not written in bytes"
    if not vocab.keys() >= _BYTE_LETTERS:
        yield "a vocabulary without every byte"
    if normalizer not in (None, *_NFC):
        yield f"the normalizer {_shown(normalizer)}"
    pre_tokenizer = fields.get("pre_tokenizer")
    if not _is_proven_byte_split(pre_tokenizer):
        yield f"the pre_tokenizer {_shown(pre_tokenizer)}"


def _is_proven_byte_split(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    if step.get("type") == "ByteLevel":
        return bool(_without_offsets({"use_regex": True, **step}) == _BYTES | {"use_regex": True})
    steps = step.get("pretokenizers")
    if step.keys() != {"type", "pretokenizers"} or step["type"] != "Sequence" or not steps:
        return False
    *splits, last = steps
    return _without_offsets(last) == _BYTES and any(
        splits == [{"type": "Split", "pattern": {"Regex": regex}, **how} for regex in regexes]
        for regexes in SPLITS
        for how in (_KEPT_APART, *([_KEPT_ALONE] if len(regexes) == 1 else []))
    )


def _without_offsets(step: Any) -> Any:
    return {name: value for name, value in step.items() if name != "trim_offsets"} if isinstance(step, dict) else step


def _unproven_ids(vocab: dict[str, int], added: Sequence[AddedToken]) -> Iterator[str]:
    """Yield ids that HF `tokenizers` would not keep: it numbers added tokens that the vocabulary lacks by itself."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        yield "a vocabulary whose ids have holes or occur twice"
    largest = -1
    for token in added:
        expected = vocab.get(token.content, max(len(vocab), largest + 1))
        if token.id != expected:
            yield f"the id {token.id} of the added token {token.content!r}"
        largest = max(largest, token.id)
    if len({token.content for token in added}) < len(added):
        yield "an added token that is there twice"


def _unproven_merges(model: dict[str, Any]) -> Iterator[str]:
    """They are many, so all are looked at together."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not set(map(type, merges)) <= {str, list}:
        yield "merges that are no list of pairs"
        return
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if not set(map(len, pairs)) <= {2} or not set(map(type, itertools.chain(*pairs))) <= {str}:
        yield "merges that are no pairs of pieces"
        return
    if len(set(pairs)) < len(pairs):
        yield "a merge that is there twice"
    known = model["vocab"].keys() - (_BYTE_PIECES if model.get("byte_fallback") else set())
    if not known.issuperset(itertools.chain(*pairs)) or not known.issuperset(map("".join, pairs)):
        yield "a merge of what are no pieces"


def _unproven_added_tokens(added: Sequence[AddedToken], normalizes: bool, special_in_text: str) -> Iterator[str]:
    for token in added:
        if not token.content:
            yield "an empty added token"
        if token.single_word:
            yield f"single_word of the added token {token.content!r}"
        if token.normalized and (normalizes or special_in_text == "text"):
            yield f"the added token {token.content!r} in normalized text"
    if len({token.normalized for token in added}) > 1:
        yield "added tokens of which some are looked for in normalized text"


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}..."

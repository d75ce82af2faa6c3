"""Encode, stage 3: the text of a span → one token array and a length per row.

Engines sit behind one protocol. The fast one takes only tokenizers that it is proven to honour, and is checked
while it runs: the first documents of a run, and a sample of the others, are encoded by the reference engine too
and must give the same tokens.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.encode_hf import CannotEncodeError, HFEngine, refuse_fatal
from tokenmill.errors import AuditError, SourceError, TokenizerError
from tokenmill.layout import TokenArray, smallest_dtype, token_dtype
from tokenmill.options import OnBadRows
from tokenmill.spans import Texts
from tokenmill.tokenizer import TokenizerFile

NULL, EMPTY, SPECIAL, BAD = 1, 2, 4, 8
"""Row flags: no value; a value of no characters; a document that holds a control-token string; a row that is
not what its format says."""

AUDIT_FIRST_NBYTES = 1 << 20
"""Of text at the beginning of a run, whose documents are all audited, so that a small corpus is checked too."""
AUDIT_ONE_IN = 1_000
"""Bytes of text beyond that, of which one is audited."""
AUDIT_ADDED_PER_SPAN = 8
AUDIT_MAX_NBYTES = 1 << 18
"""Of longer documents as much is audited, on its own: the reference engine's memory grows with a document."""

PROBE = (
    "Hello world",
    " Hello",
    "  two  spaces\n\n\ttab",
    "naïve café — “quotes” … 日本語 текст العربية",
    "\U0001f469\u200d\U0001f680 \x00 \ufeff e\u0301",
    "def f(x):\n    return x ** 2  # 3.14159e-10",
)
"""Fixed strings whose ids the manifest keeps: a library that changed its mind is found at start."""

_EVERY_BYTE = tuple(map(chr, (*range(0x100), *range(0x100, 0x800, 0x40), *range(0x800, 0xD800, 0x1000))))
_EVERY_BYTE += tuple(map(chr, range(0x10000, 0x110000, 0x40000)))
"""Characters that between them have every byte of UTF-8, at least every first one."""
PROBE_WIDE = (
    *_EVERY_BYTE,
    "".join(_EVERY_BYTE),
    *(" " * n + "x" + "\n" * n + "\t" * n + "\r\n" * n + "\u3000" * n + "y" + " " * n for n in range(1, 9)),
    *("1" * n + "." + "0" * n + " " + "7" * n + "a" for n in range(1, 9)),
    "٣٤٥ ½²Ⅷ① 一二三 1,234,567.89 0x1F 1e-10",
    "I'm you're he's we'll they'd I've can't I'M YOU'RE HE'S WE'LL THEY'D I'VE CAN'T 'ſ ''s 's'S",
    "don’t l'été “it's” rock'n'roll x's 3's _'s\n's",
    "漢字かなカナ한국어ไทยहिन्दी עברית العربية Ελληνικά русский 中文，标点。「引号」",
    "e\u0301\u0327 n\u0303o a\u0300\u0301\u0302 \u0301x \u093f\u0915 क्षि",
    "ﬁ ﬂ Ａ １ ㍿ ½ ſ K Å İ ı ß ẞ Ǆ ǅ ǆ",
    "\U0001f469\U0001f3fd\u200d\U0001f4bb \U0001f1e9\U0001f1ea ☺️ ❤ \u200b\u200e\u2028\u2029\x85\xa0\x1c\x0b\x0c",
    "snake_case CamelCase HTTPServer a.b->c::d(e)[f]{g} /* x */ // y\n\t<tag attr='v'/> $1 & @me #tag ~/p\\q|r^s`t`",
    "<0x41> <0xFF> ▁ ▁▁a Ġ Ċ",
)
"""Strings that both engines must give the same ids for, before a run begins; the tokenizer's own are added."""


class Engine(Protocol):
    """Texts to ids. `encode` takes no nulls and is called from several threads."""

    name: str
    version: str
    doubtful: str | None
    """Documents in which this regular expression matches must be encoded by the reference engine."""

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...


class ProbeError(AuditError):
    """The engines disagree before anything was made: the reference engine can take over."""


class EncodedSpan(NamedTuple):
    """What a span became."""

    tokens: TokenArray
    """All its documents' tokens, each ended by EOS, in row order."""
    lengths: NDArray[np.int64]
    """Tokens of each row, EOS included, shape `(rows,)`; 0 where the row yields no document."""
    flags: NDArray[np.uint8]
    """NULL, EMPTY, SPECIAL or BAD of each row, shape `(rows,)`."""
    text_nbytes: int
    audited: int
    """Documents the reference engine encoded as well."""
    bad: Mapping[int, str]
    """Why, of each row that is BAD, by its place in the span."""
    retries: int = 0
    """Requests for the text that failed and were tried again, where it was read elsewhere."""


class Encoder:
    """A tokenizer ready to encode spans; threads share one.

    Args:
        tokenizer: as its file says; `tokenizer` of the encoder has the ids that the engine gives.
        engine: `gigatoken`, `hf`, or `auto`: gigatoken where it is proven to honour all of the tokenizer.
        special_in_text: `parse` or `text`, as of the recipe.
        dtype: `uint16` or `uint32`, of the tokens made; `auto`: the smaller that holds all ids.

    Raises:
        TokenizerError: the engine cannot take the tokenizer, or the dtype cannot hold its ids.
    """

    def __init__(self, tokenizer: TokenizerFile, *, engine: str, special_in_text: str, dtype: str) -> None:
        self.tokenizer = tokenizer
        self._special_in_text = special_in_text
        self._loading = threading.Lock()
        self.notes: list[str] = []
        """What a user should know of the choice of engine, and of ids that are not those in the file."""
        self.engine = self._choose(engine)
        needed = smallest_dtype(self.tokenizer.vocab_size)
        if needed == "uint32" and dtype == "uint16":
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: {self.tokenizer.vocab_size} ids do not fit dtype uint16 (65536)",
                next_step="use --dtype uint32, or auto",
            )
        self.dtype = token_dtype(needed if dtype == "auto" else dtype)
        self._settings = self.tokenizer, self.engine.name, special_in_text, self.dtype.name
        self._added = _any_of([token.content for token in self.tokenizer.added_tokens])
        self._special = _any_of([token.content for token in self.tokenizer.added_tokens if token.special])
        self._audit_credit = float(AUDIT_FIRST_NBYTES)
        """Bytes of text that may be audited now."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuilt, self._settings

    @functools.cached_property
    def _loaded_reference(self) -> HFEngine:
        return HFEngine(self.tokenizer, special_in_text=self._special_in_text)

    @property
    def _reference(self) -> HFEngine:
        """Loaded when first needed: the fast engine can be at work meanwhile."""
        with self._loading:
            return self._loaded_reference

    def _choose(self, engine: str) -> Engine:
        """The engine; the tokenizer is then as the engine has it."""
        try:
            fast = _gigatoken(self.tokenizer, self._special_in_text)
        except TokenizerError as error:
            if engine == "gigatoken":
                raise
            refuse_fatal(self.tokenizer, self._probe_wide())
            if engine == "auto":
                self.notes.append(f"{error.message}; HF tokenizers encodes, about ten times slower, same bytes")
        else:
            if engine != "hf":
                return fast
        found = self._reference.resolved(self.tokenizer)
        before = self.tokenizer
        if found.eos_id != before.eos_id:
            self.notes.append(
                f"tokenizer {before.name}: its file gives {before.eos_token!r} the id {before.eos_id}, "
                f"{HFEngine.version} gives it {found.eos_id} as it loads the file: {found.eos_id} is used"
            )
        elif {(t.id, t.content) for t in found.added_tokens} != {(t.id, t.content) for t in before.added_tokens}:
            self.notes.append(
                f"tokenizer {before.name}: {HFEngine.version} gives added tokens other ids than its file does as it "
                "loads it: those of the library are used"
            )
        self.tokenizer = found
        return self._reference

    def encode(self, texts: Texts, *, where: str, first_row: int, on_bad_rows: OnBadRows = "error") -> EncodedSpan:
        """Encode the rows of one span.

        Args:
            texts: the rows.
            where: the source file, for messages.
            first_row: row of `texts.array[0]` in that file.
            on_bad_rows: `error`, or `skip` to flag them BAD.

        Raises:
            SourceError: a row is bad, or not UTF-8.
            AuditError: the engines disagree on a document.
            TokenizerError: the tokenizer has no ids for a document.
        """
        strings, bad = _validated(texts)
        if bad and on_bad_rows == "error":
            row = min(bad)
            raise SourceError(
                f"{where}: row {first_row + row}: {bad[row]}",
                next_step="mend the file, or skip such rows with --on-bad-rows skip, and run the same command again",
            )
        flags = np.zeros(len(strings), np.uint8)
        flags[pc.equal(pc.binary_length(strings), 0).fill_null(False).to_numpy(zero_copy_only=False)] = EMPTY
        if strings.null_count:
            flags[strings.is_null().to_numpy(zero_copy_only=False)] = NULL
        flags[list(bad)] = BAD
        rows = np.flatnonzero(flags == 0)
        documents = strings if len(rows) == len(strings) else strings.take(pa.array(rows))
        special = self._matches(documents, self._special)
        flags[rows[special]] = SPECIAL

        try:
            ids, offsets = self._encode_documents(documents, special)
        except CannotEncodeError as error:  # by the reference engine, which encodes all documents then
            raise TokenizerError(
                f"{where}: row {first_row + int(rows[error.row])}: {HFEngine.version} cannot encode it: {error}",
                next_step="give a tokenizer that has an unknown token or covers every character, or leave the row out",
            ) from None
        if len(ids) and int(ids.max()) >= self.tokenizer.vocab_size:
            raise TokenizerError(
                f"{where}: token id {int(ids.max())} outside the vocabulary of {self.tokenizer.vocab_size}",
                next_step="use --engine-tokenizer hf, and report this tokenizer",
            )
        audited = self._audit(documents, ids, offsets, rows + first_row, where)
        lengths = np.zeros(len(strings), np.int64)
        lengths[rows] = np.diff(offsets) + 1
        return EncodedSpan(self._with_eos(ids, offsets), lengths, flags, strings.nbytes, audited, bad)

    def _encode_documents(
        self, documents: pa.LargeStringArray, special: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode; what the fast engine gives no sure ids for goes to the reference.

        That is, under the policy `text`, documents that hold a control-token string, and those it calls doubtful.
        """
        ids, offsets = self.engine.encode(documents)
        if self.engine.name == HFEngine.name:
            return ids, offsets
        routed = special if self._special_in_text == "text" else np.empty(0, np.int64)
        routed = np.union1d(routed, self._matches(documents, self.engine.doubtful))
        if len(routed) == 0:
            return ids, offsets
        pieces = [ids[offsets[i] : offsets[i + 1]] for i in range(len(documents))]
        routed_ids, routed_offsets = self._reference.encode(documents.take(pa.array(routed)))
        for n, i in enumerate(routed):
            pieces[i] = routed_ids[routed_offsets[n] : routed_offsets[n + 1]]
        new_offsets = np.zeros_like(offsets)
        np.cumsum([len(piece) for piece in pieces], out=new_offsets[1:])
        return np.concatenate(pieces), new_offsets

    def _with_eos(self, ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> TokenArray:
        """Cast, and put EOS behind each document, in one pass off the GIL."""
        documents = len(offsets) - 1
        tokens = np.empty(len(ids) + documents, self.dtype)
        ends = offsets[1:] + np.arange(documents)
        is_text = np.ones(len(tokens), np.bool_)
        is_text[ends] = False
        tokens[is_text] = ids
        tokens[ends] = self.tokenizer.eos_id
        return tokens

    def _audit(
        self,
        documents: pa.LargeStringArray,
        ids: NDArray[np.uint32],
        offsets: NDArray[np.int64],
        rows: NDArray[np.int64],
        where: str,
    ) -> int:
        """Encode a sample with the reference engine; how many documents that were."""
        if self.engine.name == HFEngine.name or len(documents) == 0:
            return 0
        chosen = self._chosen_for_audit(documents, rows)
        is_long = pc.binary_length(documents).to_numpy()[chosen] > AUDIT_MAX_NBYTES
        whole = chosen[~is_long]
        pairs = [(int(i), ids[offsets[i] : offsets[i + 1]]) for i in whole]
        texts = documents.take(pa.array(whole, pa.int64()))
        for i in chosen[is_long].tolist():
            beginning = documents[i].as_py().encode()[:AUDIT_MAX_NBYTES].decode(errors="ignore")
            text = pa.array([beginning], pa.large_string())
            pairs.append((i, self._encode_documents(text, self._matches(text, self._special))[0]))
            texts = pa.concat_arrays([texts, text])
        expected, bounds = self._reference.encode(texts)
        for n, (i, found) in enumerate(pairs):
            wanted = expected[bounds[n] : bounds[n + 1]]
            if not np.array_equal(found, wanted):
                raise _disagreement(f"{where}, row {rows[i]}", self.engine, found, wanted, kind=AuditError)
        return len(pairs)

    def _chosen_for_audit(self, documents: pa.LargeStringArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Documents to audit: as many as the text seen so far allows, and the first that hold an added token."""
        sizes = np.minimum(pc.binary_length(documents).to_numpy(), AUDIT_MAX_NBYTES)
        # Fibonacci hashing spreads consecutive rows evenly.
        order = np.argsort(rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15), kind="stable")
        with self._loading:
            self._audit_credit += int(sizes.sum()) / AUDIT_ONE_IN
            sampled = order[np.cumsum(sizes[order]) <= self._audit_credit]
            self._audit_credit -= int(sizes[sampled].sum())
        return np.union1d(sampled, self._matches(documents, self._added)[:AUDIT_ADDED_PER_SPAN])

    def require_equal_engines(self) -> None:
        """The fast engine must give what the reference does for strings made to tell them apart.

        Raises:
            ProbeError: it does not.
        """
        if self.engine.name == HFEngine.name:
            return
        texts = pa.array([*PROBE, *self._probe_wide()], pa.large_string())
        found, offsets = self._encode_documents(texts, self._matches(texts, self._special))
        wanted, bounds = self._reference.encode(texts)
        if np.array_equal(found, wanted) and np.array_equal(offsets, bounds):
            return
        for i, text in enumerate(texts.to_pylist()):
            pair = found[offsets[i] : offsets[i + 1]], wanted[bounds[i] : bounds[i + 1]]
            if not np.array_equal(*pair):
                raise _disagreement(f"the probe {text!r:.60}", self.engine, *pair, kind=ProbeError)

    def _probe_wide(self) -> list[str]:
        """Strings that show what an engine does not honour: added tokens alone, inside a word, apart, and twice."""
        own = [
            text
            for token in self.tokenizer.added_tokens
            for text in (token.content, f"a{token.content}b", f"a {token.content} b", token.content * 2)
        ]
        return [*PROBE_WIDE, *own]

    @functools.cached_property
    def probe(self) -> dict[str, list[int]]:
        """Ids of the fixed strings, and of each of the first control tokens inside a text."""
        inside = [f"a{token.content}b {token.content}" for token in self.tokenizer.added_tokens[:8]]
        return self.ids_of([*PROBE, *inside])

    def ids_of(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each text; texts that the tokenizer has no ids for are left out."""
        found: dict[str, list[int]] = {}
        for text in texts:
            array = pa.array([text], pa.large_string())
            with contextlib.suppress(CannotEncodeError):
                found[text] = self._encode_documents(array, self._matches(array, self._special))[0].tolist()
        return found

    def decode(self, tokens: TokenArray) -> str:
        """The text of some tokens, control tokens shown."""
        return self._reference.decode(tokens.tolist())

    @staticmethod
    def _matches(documents: pa.LargeStringArray, pattern: str | None) -> NDArray[np.int64]:
        """Positions of the documents in which `pattern` occurs."""
        if pattern is None or len(documents) == 0:
            return np.empty(0, np.int64)
        return np.flatnonzero(pc.match_substring_regex(documents, pattern).to_numpy(zero_copy_only=False))


def _rebuilt(tokenizer: TokenizerFile, engine: str, special_in_text: str, dtype: str) -> Encoder:
    return Encoder(tokenizer, engine=engine, special_in_text=special_in_text, dtype=dtype)


def _any_of(strings: list[str]) -> str | None:
    """A regular expression for any of `strings` (RE2 looks for their common first bytes at memory speed)."""
    return "|".join(map(re.escape, strings)) if strings else None


def _disagreement(
    where: str, engine: Engine, found: NDArray[np.uint32], wanted: NDArray[np.uint32], *, kind: type[AuditError]
) -> AuditError:
    shared = min(len(found), len(wanted))
    differs = np.flatnonzero(found[:shared] != wanted[:shared])
    at = int(differs[0]) if len(differs) else shared
    return kind(
        f"{where}: {engine.version} and {HFEngine.version} disagree from token {at}: "
        f"expected {wanted[at : at + 8].tolist()}, found {found[at : at + 8].tolist()}",
        next_step="run again with --engine-tokenizer hf (slower), and report the document to gigatoken",
    )


def _validated(texts: Texts) -> tuple[pa.LargeStringArray, dict[int, str]]:
    """As large strings, known to be UTF-8 (parquet does not promise it, gigatoken relies on it), and the bad rows."""
    array, bad = texts.array, dict(texts.bad)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        strings = array.cast(pa.large_string())  # checks what was binary
        if not _is_binary(array.type):
            strings.validate(full=True)
    except pa.ArrowInvalid:
        values = array.cast(pa.large_binary()).to_pylist()
        for row, value in enumerate(values):
            if value is not None and not _is_utf8(value):
                bad[row] = "the text is not valid UTF-8"
                values[row] = None
        strings = pa.array(values, pa.large_binary()).cast(pa.large_string())
    return strings, bad


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _gigatoken(tokenizer: TokenizerFile, special_in_text: str) -> Engine:
    """The fast engine, if it can do what is asked."""
    from tokenmill.encode_gigatoken import GigatokenEngine

    return GigatokenEngine(tokenizer, special_in_text)

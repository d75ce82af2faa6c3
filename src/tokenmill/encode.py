"""Encode, stage 3: the text of a span → one token array and a length per row.

Engines sit behind one protocol. The fast one is checked while it runs: a deterministic sample of
documents is encoded by the reference engine too and must give the same tokens.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.encode_hf import HFEngine
from tokenmill.errors import AuditError, SourceError, TokenizerError
from tokenmill.layout import TokenArray, smallest_dtype, token_dtype
from tokenmill.options import OnBadRows
from tokenmill.spans import Texts
from tokenmill.tokenizer import TokenizerFile

NULL, EMPTY, SPECIAL, BAD = 1, 2, 4, 8
"""Row flags: no value; a value of no characters; a document that holds a control-token string; a row that is
not what its format says."""

AUDIT_ONE_IN = 1_000
AUDIT_ADDED_PER_SPAN = 8
AUDIT_MAX_NBYTES = 1 << 18
"""Longer documents are not audited: the reference engine's memory grows with a document."""

PROBE = (
    "Hello world",
    " Hello",
    "  two  spaces\n\n\ttab",
    "naïve café — “quotes” … 日本語 текст العربية",
    "\U0001f469\u200d\U0001f680 \x00 \ufeff e\u0301",
    "def f(x):\n    return x ** 2  # 3.14159e-10",
)
"""Fixed strings whose ids the manifest keeps: a library that changed its mind is found at start."""


class Engine(Protocol):
    """Texts to ids. `encode` takes no nulls and is called from several threads."""

    name: str
    version: str

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...


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
        engine: `gigatoken`, `hf`, or `auto`: gigatoken where it takes the tokenizer.
        dtype: `uint16` or `uint32`, of the tokens made.

    Raises:
        TokenizerError: the engine cannot take the tokenizer, or the dtype cannot hold its ids.
    """

    def __init__(self, tokenizer: TokenizerFile, *, engine: str, special_in_text: str, dtype: str) -> None:
        needed = smallest_dtype(tokenizer.vocab_size)
        if needed == "uint32" and dtype == "uint16":
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} ids do not fit dtype uint16 (65536)",
                next_step="use --dtype uint32, or auto",
            )
        self.tokenizer = tokenizer
        self.dtype = token_dtype(dtype)
        self._settings = tokenizer, engine, special_in_text, dtype
        self._special_in_text = special_in_text
        self._loading = threading.Lock()
        self.engine = self._choose(engine)
        self._added = _any_of([token.content for token in tokenizer.added_tokens])
        self._special = _any_of([token.content for token in tokenizer.added_tokens if token.special])

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
        if engine == "hf":
            return self._reference
        try:
            return _gigatoken(self.tokenizer, self._special_in_text)
        except TokenizerError:
            if engine == "gigatoken":
                raise
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

        ids, offsets = self._encode_documents(documents, special)
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
        """Encode; under the policy `text`, documents that hold a control-token string go to the reference."""
        ids, offsets = self.engine.encode(documents)
        if self._special_in_text == "parse" or self.engine.name == HFEngine.name or len(special) == 0:
            return ids, offsets
        pieces = [ids[offsets[i] : offsets[i + 1]] for i in range(len(documents))]
        routed_ids, routed_offsets = self._reference.encode(documents.take(pa.array(special)))
        for n, i in enumerate(special):
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
        # Fibonacci hashing spreads consecutive rows evenly, the same for every span size.
        sampled = np.flatnonzero(
            (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % AUDIT_ONE_IN == 0
        )
        chosen = np.union1d(sampled, self._matches(documents, self._added)[:AUDIT_ADDED_PER_SPAN])
        if len(chosen):
            sizes = pc.binary_length(documents).to_numpy()[chosen]
            chosen = chosen[sizes <= AUDIT_MAX_NBYTES]
        if len(chosen) == 0:
            return 0
        expected, bounds = self._reference.encode(documents.take(pa.array(chosen)))
        for n, i in enumerate(chosen):
            found = ids[offsets[i] : offsets[i + 1]]
            wanted = expected[bounds[n] : bounds[n + 1]]
            if not np.array_equal(found, wanted):
                raise _disagreement(f"{where}, row {rows[i]}", self.engine, self._reference, found, wanted)
        return len(chosen)

    @functools.cached_property
    def probe(self) -> dict[str, list[int]]:
        """Ids of the fixed strings, and of each of the first control tokens inside a text.

        Raises:
            TokenizerError: the reference engine cannot take the tokenizer.
            AuditError: the engines disagree.
        """
        inside = [f"a{token.content}b {token.content}" for token in self.tokenizer.added_tokens[:8]]
        texts = pa.array([*PROBE, *inside], pa.large_string())
        special = self._matches(texts, self._special)
        found, offsets = self._encode_documents(texts, special)
        wanted, bounds = self._reference.encode(texts)
        if not (np.array_equal(found, wanted) and np.array_equal(offsets, bounds)):
            raise _disagreement("the probe", self.engine, self._reference, found, wanted)
        return {text: found[offsets[i] : offsets[i + 1]].tolist() for i, text in enumerate(texts.to_pylist())}

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
    where: str, engine: Engine, reference: Engine, found: NDArray[np.uint32], wanted: NDArray[np.uint32]
) -> AuditError:
    shared = min(len(found), len(wanted))
    differs = np.flatnonzero(found[:shared] != wanted[:shared])
    at = int(differs[0]) if len(differs) else shared
    return AuditError(
        f"{where}: {engine.version} and {reference.version} disagree from token {at}: "
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
    if special_in_text == "text" and any(token.special and token.normalized for token in tokenizer.added_tokens):
        raise TokenizerError(
            f"tokenizer {tokenizer.name}: its control tokens match normalized text, which only HF tokenizers "
            "can leave unparsed",
            next_step="use --engine-tokenizer hf (or auto)",
        )
    from tokenmill.encode_gigatoken import GigatokenEngine

    return GigatokenEngine(tokenizer)

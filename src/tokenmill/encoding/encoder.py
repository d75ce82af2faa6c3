"""Encode, stage 3: the text of one or several spans → one token array and a length per row.

Backends sit behind one protocol. The fast one takes only tokenizers that it is proven to honour, and is checked
while it runs: the first documents of a run, and a sample of the others, are encoded by the reference backend too
and must give the same tokens.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.corpus.reader import Texts, concatenate
from tokenmill.dataroot.layout import smallest_dtype
from tokenmill.dataroot.npy import TokenArray, token_dtype
from tokenmill.encoding.framing import Fim, join_ids, take_apart
from tokenmill.encoding.hf import CannotEncodeError, HFBackend, refuse_fatal
from tokenmill.encoding.long_documents import LONG_NBYTES, Cut, cut_document
from tokenmill.encoding.text_hash import text_hashes
from tokenmill.encoding.tokenizer import TokenizerFile
from tokenmill.errors import AuditError, SourceError, TokenizerError
from tokenmill.options import OnBadRows

NULL, EMPTY, SPECIAL, BAD = 1, 2, 4, 8
"""Row flags: no value; a value of no characters; a document that holds a control-token string; a row that is
not what its format says."""

AUDIT_FIRST_NBYTES = 1 << 20
"""Size of the text at the beginning of a run whose documents are all audited, so that a small corpus is checked too."""
AUDIT_ONE_IN = 1_000
"""Bytes of text beyond that, of which one is audited."""
AUDIT_ADDED_PER_BATCH = 32
AUDIT_MAX_NBYTES = 1 << 18
"""Longest text that is audited of a document: the memory of the reference backend grows with it."""

_LEADS = ("\n", "\x02", "\u263a", "|")
"""Tried in this order as `Fim.lead`."""
_AFTER_LEADS = ("ntry", " x", "\n", "\n\n", "9", "é", "_a", "|", "\u263a", "\t", "漢")

_KEPT = 2
"""Tokenizers that stay loaded, for the next run of the process."""
_AGREED: weakref.WeakSet[Backend] = weakref.WeakSet()
"""Those of them that were found to agree with the reference backend."""

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
"""Strings that both backends must give the same ids for, before a run begins; the tokenizer's own are added."""


class Backend(Protocol):
    """Texts to ids. `encode` takes no nulls and is called from several threads."""

    name: str
    version: str
    doubtful: str | None
    """Documents in which this regular expression matches must be encoded by the reference backend."""
    cut: Cut | None
    """How a long document may be cut so that its pieces have its tokens; None if it may not."""

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...


class ProbeError(AuditError):
    """The backends disagree before anything was made: the reference backend can take over."""


class SpanTexts(NamedTuple):
    """The text of a span, and where it is from."""

    texts: Texts
    where: str
    """The source file, for messages."""
    first_row: int
    """Row of `texts.array[0]` in that file."""


class EncodedBatch(NamedTuple):
    """What the rows of one span, or of several spans after each other, became."""

    tokens: TokenArray
    """All its documents' tokens, each ended by EOS, and begun by BOS if the recipe says so, in row order."""
    lengths: NDArray[np.int64]
    """Tokens of each row, EOS included, shape `(rows,)`; 0 where the row yields no document."""
    flags: NDArray[np.uint8]
    """NULL, EMPTY, SPECIAL or BAD of each row, shape `(rows,)`."""
    text_xxh3: NDArray[np.uint64]
    """XXH3-64 of the text of each row, shape `(rows,)`; 0 where the row yields no document."""
    text_nbytes: int
    audited: int
    """Documents the reference backend encoded as well."""
    bad: Mapping[int, str]
    """Why, of each row that is BAD, by its place in the batch."""
    metadata: pa.Table | None = None
    """A row for each, in one chunk; None where the recipe names no metadata columns."""
    retries: int = 0
    """Requests for the text that failed and were tried again, where it was read elsewhere."""


class Encoder:
    """A tokenizer ready to encode spans; threads share one.

    Args:
        tokenizer: as its file says; `tokenizer` of the encoder has the ids that the backend gives.
        backend: `gigatoken`, `hf`, or `auto`: gigatoken where it is proven to honour all of the tokenizer.
        special_in_text: `parse` or `text`, as of the recipe.
        dtype: `uint16` or `uint32`, of the tokens made; `auto`: the smaller that holds all ids.

    Raises:
        TokenizerError: the backend cannot take the tokenizer, or the dtype cannot hold its ids.
    """

    def __init__(self, tokenizer: TokenizerFile, *, backend: str, special_in_text: str, dtype: str) -> None:
        self.tokenizer = tokenizer
        self._special_in_text = special_in_text
        self._loading = threading.Lock()
        self.notes: list[str] = []
        """What a user should know of the choice of backend, and of ids that are not those in the file."""
        self.backend = self._choose(backend)
        needed = smallest_dtype(self.tokenizer.vocab_size)
        if needed == "uint32" and dtype == "uint16":
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: {self.tokenizer.vocab_size} ids do not fit dtype uint16 (65536)",
                next_step="use --dtype uint32, or auto",
            )
        self.dtype = token_dtype(needed if dtype == "auto" else dtype)
        self._settings = self.tokenizer, self.backend.name, special_in_text, self.dtype.name
        self._added = _any_of([token.content for token in self.tokenizer.added_tokens])
        self._special = _any_of([token.content for token in self.tokenizer.added_tokens if token.special])
        if self.tokenizer.fim is not None and not self.tokenizer.fim.lead:
            self.tokenizer = self.tokenizer._replace(fim=self._with_lead(self.tokenizer.fim))
        self._audit_credit = float(AUDIT_FIRST_NBYTES)
        """Bytes of text that may be audited now."""

    def _with_lead(self, fim: Fim) -> Fim:
        """Return how documents are taken apart, with a lead if the tokenizer needs one.

        Raises:
            TokenizerError: it does, and none of those tried serves.
        """
        first = self.ids_of(["n"])["n"][0]
        if not self._reference.name_of(first).startswith(("\u2581", "\u0120")):
            return fim
        for lead in _LEADS:
            found = self.ids_of([lead, *(lead + text for text in _AFTER_LEADS)])
            ids = found.get(lead, [])
            if ids and all(found.get(lead + text, [])[: len(ids)] == ids for text in _AFTER_LEADS):
                return fim._replace(lead=lead, lead_ids=tuple(ids))
        raise TokenizerError(
            f"tokenizer {self.tokenizer.name}: it puts a blank before every text that it encodes, and so before each "
            "part of a document that is taken apart",
            next_step="give a tokenizer that puts none there for fill in the middle",
        )

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuilt, self._settings

    @functools.cached_property
    def _loaded_reference(self) -> HFBackend:
        return _load_reference(self.tokenizer, self._special_in_text)

    @property
    def _reference(self) -> HFBackend:
        """Loaded when first needed: the fast backend can be at work meanwhile."""
        with self._loading:
            return self._loaded_reference

    def _choose(self, backend: str) -> Backend:
        """Return the backend; the tokenizer is then as the backend has it."""
        try:
            fast = load_gigatoken(self.tokenizer, self._special_in_text)
        except TokenizerError as error:
            if backend == "gigatoken":
                raise
            refuse_fatal(self.tokenizer, self._probe_wide())
            if backend == "auto":
                self.notes.append(f"{error.message}; HF tokenizers encodes, about ten times slower, same bytes")
        else:
            if backend != "hf":
                return fast
        found = self._reference.resolved(self.tokenizer)
        before = self.tokenizer
        if found.eos_id != before.eos_id:
            self.notes.append(
                f"tokenizer {before.name}: its file gives {before.eos_token!r} the id {before.eos_id}, "
                f"{HFBackend.version} gives it {found.eos_id} as it loads the file: {found.eos_id} is used"
            )
        elif {(t.id, t.content) for t in found.added_tokens} != {(t.id, t.content) for t in before.added_tokens}:
            self.notes.append(
                f"tokenizer {before.name}: {HFBackend.version} gives added tokens other ids than its file does as it "
                "loads it: those of the library are used"
            )
        self.tokenizer = found
        return self._reference

    def encode(self, texts: Texts, *, where: str, first_row: int, on_bad_rows: OnBadRows = "error") -> EncodedBatch:
        """Encode the rows of one span; like `encode_batch`."""
        return self.encode_batch([SpanTexts(texts, where, first_row)], on_bad_rows=on_bad_rows)

    def encode_batch(
        self,
        spans: Sequence[SpanTexts],
        *,
        on_bad_rows: OnBadRows = "error",
        pool: ThreadPoolExecutor | None = None,
    ) -> EncodedBatch:
        """Encode the rows of spans in one call of the backend, which costs 5 ms and begins with cold caches.

        Args:
            spans: one or more; their rows are encoded one after the other.
            on_bad_rows: `error`, or `skip` to flag them BAD.
            pool: encodes the pieces of long documents; None: this thread does.

        Raises:
            SourceError: a row is bad, or not UTF-8.
            AuditError: the backends disagree on a document.
            TokenizerError: the tokenizer has no ids for a document.
        """
        origin = _RowOrigin(spans)
        strings, bad = validated_texts([span.texts for span in spans])
        if bad and on_bad_rows == "error":
            row = min(bad)
            raise SourceError(
                f"{origin.name(row)}: {bad[row]}",
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
        hashes = np.zeros(len(strings), np.uint64)
        hashes[rows] = text_hashes(documents)
        pieces = take_apart(documents, hashes[rows], bos_id=self.tokenizer.bos_id, fim=self.tokenizer.fim)
        if pieces.texts is not documents:
            special = self._matches(pieces.texts, self._special)
        rows_of = rows[pieces.document]

        encoded: list[tuple[NDArray[Any], NDArray[np.int64], int]] = []
        for first, end, is_long in self._runs(pieces.texts):
            run = pieces.texts.slice(first, end - first)
            if is_long:
                encoded.append(self._encode_long(run, rows_of[first:end], origin, pool))
            else:
                of_run = special[(special >= first) & (special < end)] - first
                encoded.append(self._encode_run(run, of_run, rows_of[first:end], origin))
        ids, counts, audited = zip(*encoded, strict=True)
        joined, of_pieces = ids[0] if len(ids) == 1 else np.concatenate(ids), np.concatenate(counts)
        if self.tokenizer.fim is not None:
            joined, of_pieces, odd = pieces.without_leads(joined, of_pieces, self.tokenizer.fim.lead_ids)
            if odd is not None:
                raise TokenizerError(
                    f"{origin.name(int(rows_of[odd]))}: the tokenizer joins what is put before a part of it "
                    f"({self.tokenizer.fim.lead!r}) with the part",
                    next_step="leave the row out, or give a tokenizer that puts no blank before a text",
                )
        tokens, of_documents = pieces.framed(joined, of_pieces, eos_id=self.tokenizer.eos_id, dtype=self.dtype)
        lengths = np.zeros(len(strings), np.int64)
        lengths[rows] = of_documents
        metadata = [span.texts.metadata for span in spans if span.texts.metadata is not None]
        kept = pa.concat_tables(metadata).combine_chunks() if metadata else None
        return EncodedBatch(tokens, lengths, flags, hashes, strings.nbytes, sum(audited), bad, kept)

    def _runs(self, documents: pa.LargeStringArray) -> Iterator[tuple[int, int, bool]]:
        """Yield the bounds of runs of documents that are encoded together, and whether it is one that is cut."""
        long: list[int] = []
        if self.backend.cut is not None and documents.nbytes > LONG_NBYTES:
            long = np.flatnonzero(pc.binary_length(documents).to_numpy() > LONG_NBYTES).tolist()
        begin = 0
        for at in long:
            if at > begin:
                yield begin, at, False
            yield at, at + 1, True
            begin = at + 1
        if begin < len(documents) or not long:
            yield begin, len(documents), False

    def _encode_run(
        self,
        documents: pa.LargeStringArray,
        special: NDArray[np.int64],
        rows: NDArray[np.int64],
        origin: _RowOrigin,
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], int]:
        """Return the ids of texts, how many each has, and how many texts were audited."""
        try:
            ids, offsets = self.encode_documents(documents, special)
        except CannotEncodeError as error:  # by the reference backend, which encodes all documents then
            raise TokenizerError(
                f"{origin.name(int(rows[error.row]))}: {HFBackend.version} cannot encode it: {error}",
                next_step="give a tokenizer that has an unknown token or covers every character, or leave the row out",
            ) from None
        self._check_range(ids, lambda at: origin.name(int(rows[np.searchsorted(offsets, at, side="right") - 1])))
        added = special if self._added == self._special else self._matches(documents, self._added)
        chosen = np.union1d(self._sample(documents, origin.rows(rows)), added[:AUDIT_ADDED_PER_BATCH])
        audited = self._audit(documents, ids, offsets, chosen, lambda row: origin.name(int(rows[row])))
        return ids, np.diff(offsets), audited

    def _encode_long(
        self,
        document: pa.LargeStringArray,
        rows: NDArray[np.int64],
        origin: _RowOrigin,
        pool: ThreadPoolExecutor | None,
    ) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        """Do as `_encode_run` for one text, which is cut."""

        def encode(group: tuple[pa.LargeStringArray, slice]) -> NDArray[Any]:
            strings, are_pieces = group
            ids, offsets = self.encode_documents(strings, self._matches(strings, self._special))
            self._check_range(ids, lambda at: origin.name(int(rows[0])))
            bounds = list(itertools.pairwise(offsets.tolist()))[are_pieces]
            pieces = [ids[begin:end] for begin, end in bounds]
            return np.concatenate(pieces, dtype=self.dtype, casting="unsafe")

        assert self.backend.cut is not None
        groups = cut_document(document, self.backend.cut)
        encoded = list(map(encode, groups) if pool is None else pool.map(encode, groups))
        tokens = np.concatenate(encoded)
        chosen = self._sample(document, origin.rows(rows))
        audited = self._audit(
            document, np.empty(0, np.uint32), np.zeros(2, np.int64), chosen, lambda row: origin.name(int(rows[row]))
        )
        return tokens, np.array([len(tokens)]), audited

    def _check_range(self, ids: NDArray[np.uint32], name: Callable[[int], str]) -> None:
        """Require that ids are of the vocabulary; `name` says what the one at a position belongs to."""
        if len(ids) and int(ids.max()) >= self.tokenizer.vocab_size:
            at = int(ids.argmax())
            raise TokenizerError(
                f"{name(at)}: token id {int(ids[at])} outside the vocabulary of {self.tokenizer.vocab_size}",
                next_step="use --tokenizer-backend hf, and report this tokenizer",
            )

    def encode_documents(
        self, documents: pa.LargeStringArray, special: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode; what the fast backend gives no sure ids for goes to the reference.

        That is, under the policy `text`, documents that hold a control-token string, and those it calls doubtful.
        """
        ids, offsets = self.backend.encode(documents)
        if self.backend.name == HFBackend.name:
            return ids, offsets
        routed = special if self._special_in_text == "text" else np.empty(0, np.int64)
        routed = np.union1d(routed, self._matches(documents, self.backend.doubtful))
        if len(routed) == 0:
            return ids, offsets
        pieces = [ids[offsets[i] : offsets[i + 1]] for i in range(len(documents))]
        routed_ids, routed_offsets = self._reference.encode(documents.take(pa.array(routed)))
        for n, i in enumerate(routed):
            pieces[i] = routed_ids[routed_offsets[n] : routed_offsets[n + 1]]
        return join_ids(pieces)

    def _audit(
        self,
        documents: pa.LargeStringArray,
        ids: NDArray[np.uint32],
        offsets: NDArray[np.int64],
        chosen: NDArray[np.int64],
        name: Callable[[int], str],
    ) -> int:
        """Encode the documents that are `chosen` with the reference backend, too; how many that were.

        `name` returns what messages call one of them.
        """
        if self.backend.name == HFBackend.name or len(chosen) == 0:
            return 0
        is_long = pc.binary_length(documents).to_numpy()[chosen] > AUDIT_MAX_NBYTES
        whole, long = chosen[~is_long], chosen[is_long]
        texts = documents.take(pa.array(whole, pa.int64()))
        found = [ids[offsets[row] : offsets[row + 1]] for row in whole.tolist()]
        for row in long.tolist():
            text = pa.array([_beginning(documents, row)], pa.large_string())
            texts = pa.concat_arrays([texts, text])
            found.append(self.encode_documents(text, self._matches(text, self._special))[0])
        wrong = _first_difference(*join_ids(found), *self._reference.encode(texts))
        if wrong is not None:
            row = int(np.concatenate([whole, long])[wrong.text])
            raise _disagreement(name(row), self.backend, wrong, kind=AuditError)
        return len(chosen)

    def _sample(self, documents: pa.LargeStringArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Choose documents, which are `rows` of their files, to audit: as many as the text seen so far allows."""
        sizes = np.minimum(pc.binary_length(documents).to_numpy(), AUDIT_MAX_NBYTES)
        # Fibonacci hashing spreads consecutive rows evenly.
        keys = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        nbytes = int(sizes.sum())
        with self._loading:
            self._audit_credit += nbytes / AUDIT_ONE_IN
            # Of many documents only the few that come first are put in order.
            few = 64 + int(2 * self._audit_credit * len(sizes) / max(1, nbytes))
            candidates = np.arange(len(sizes)) if few >= len(sizes) else np.argpartition(keys, few)[:few]
            order = candidates[np.argsort(keys[candidates], kind="stable")]
            sampled = order[np.cumsum(sizes[order]) <= self._audit_credit]
            self._audit_credit -= int(sizes[sampled].sum())
        return sampled

    def require_equal_backends(self) -> None:
        """The fast backend must give what the reference does for strings made to tell them apart.

        Raises:
            ProbeError: it does not.
        """
        if self.backend.name == HFBackend.name:
            return
        if self.backend in _AGREED:
            return
        texts = pa.array([*PROBE, *self._probe_wide()], pa.large_string())
        found, offsets = self.encode_documents(texts, self._matches(texts, self._special))
        wrong = _first_difference(found, offsets, *self._reference.encode(texts))
        if wrong is not None:
            text = texts[wrong.text].as_py()
            raise _disagreement(f"the probe {text!r:.60}", self.backend, wrong, kind=ProbeError)
        _AGREED.add(self.backend)

    def _probe_wide(self) -> list[str]:
        """Return strings that show what a backend does not honour: added tokens alone, in a word, apart, and twice."""
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
        """Return ids of each text; texts that the tokenizer has no ids for are left out."""
        wanted = list(texts)
        if not wanted:
            return {}
        array = pa.array(wanted, pa.large_string())
        try:
            ids, offsets = self.encode_documents(array, self._matches(array, self._special))
        except CannotEncodeError as error:
            return self.ids_of(wanted[: error.row] + wanted[error.row + 1 :])
        return {text: ids[offsets[i] : offsets[i + 1]].tolist() for i, text in enumerate(wanted)}

    def decode(self, tokens: TokenArray) -> str:
        """Return the text of some tokens, control tokens shown."""
        return self._reference.decode(tokens.tolist())

    @staticmethod
    def _matches(documents: pa.LargeStringArray, pattern: str | None) -> NDArray[np.int64]:
        """Return positions of the documents in which `pattern` occurs."""
        if pattern is None or len(documents) == 0:
            return np.empty(0, np.int64)
        return np.flatnonzero(pc.match_substring_regex(documents, pattern).to_numpy(zero_copy_only=False))


def _rebuilt(tokenizer: TokenizerFile, backend: str, special_in_text: str, dtype: str) -> Encoder:
    return Encoder(tokenizer, backend=backend, special_in_text=special_in_text, dtype=dtype)


def _any_of(strings: list[str]) -> str | None:
    """Return a regular expression for any of `strings` (RE2 looks for their common first bytes at memory speed)."""
    return "|".join(map(re.escape, strings)) if strings else None


class _Difference(NamedTuple):
    """Ids that two backends give for one text."""

    text: int
    """Its position."""
    found: NDArray[np.uint32]
    expected: NDArray[np.uint32]


def _first_difference(
    found: NDArray[np.uint32],
    found_offsets: NDArray[np.int64],
    expected: NDArray[np.uint32],
    expected_offsets: NDArray[np.int64],
) -> _Difference | None:
    """Return the first text for which two backends give other ids; None if there is none."""
    if np.array_equal(found_offsets, expected_offsets) and np.array_equal(found, expected):
        return None
    of_each = (np.split(ids, bounds[1:-1]) for ids, bounds in ((found, found_offsets), (expected, expected_offsets)))
    differences = (_Difference(text, *pair) for text, pair in enumerate(zip(*of_each, strict=True)))
    return next(each for each in differences if not np.array_equal(each.found, each.expected))


def _disagreement(where: str, backend: Backend, wrong: _Difference, *, kind: type[AuditError]) -> AuditError:
    _, found, wanted = wrong
    shared = min(len(found), len(wanted))
    differs = np.flatnonzero(found[:shared] != wanted[:shared])
    at = int(differs[0]) if len(differs) else shared
    return kind(
        f"{where}: {backend.version} and {HFBackend.version} disagree from token {at}: "
        f"expected {wanted[at : at + 8].tolist()}, found {found[at : at + 8].tolist()}",
        next_step="run again with --tokenizer-backend hf (slower), and report the document to gigatoken",
    )


class _RowOrigin:
    """Where the rows of a batch are from."""

    def __init__(self, spans: Sequence[SpanTexts]) -> None:
        self._spans = spans
        self._ends = np.cumsum([len(span.texts.array) for span in spans])
        begins = np.concatenate([[0], self._ends[:-1]])
        self._shifts: NDArray[np.int64] = np.array([span.first_row for span in spans], np.int64) - begins

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, of rows of the batch, their numbers in their files."""
        shifts: NDArray[np.int64] = self._shifts[np.searchsorted(self._ends, rows, side="right")]
        return rows + shifts

    def name(self, row: int) -> str:
        """Return what messages call a row of the batch."""
        span = int(np.searchsorted(self._ends, row, side="right"))
        return f"{self._spans[span].where}: row {row + int(self._shifts[span])}"


def validated_texts(spans: Sequence[Texts]) -> tuple[pa.LargeStringArray, dict[int, str]]:
    """Return the rows of all spans as large strings that are known to be UTF-8, and the bad ones among them.

    Parquet does not promise UTF-8, and gigatoken relies on it.
    """
    bad: dict[int, str] = {}
    first = 0
    for texts in spans:
        bad.update({first + row: reason for row, reason in texts.bad.items()})
        first += len(texts.array)
    if len({texts.array.type for texts in spans}) == 1:
        strings, not_text = _strings(concatenate([texts.array for texts in spans]))
        return strings, bad | not_text
    pieces, first = [], 0
    for texts in spans:
        piece, not_text = _strings(texts.array)
        bad.update({first + row: reason for row, reason in not_text.items()})
        pieces.append(piece)
        first += len(piece)
    return pa.concat_arrays(pieces), bad


def _strings(array: pa.Array) -> tuple[pa.LargeStringArray, dict[int, str]]:
    """Return `array` as large strings, null where it is not UTF-8, and these rows with the reason."""
    bad: dict[int, str] = {}
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


def _beginning(documents: pa.LargeStringArray, row: int) -> str:
    """Return the first `AUDIT_MAX_NBYTES` of a text."""
    _, offsets, data = documents.buffers()
    begin = int(np.frombuffer(offsets, np.int64)[documents.offset + row])
    return bytes(memoryview(data)[begin : begin + AUDIT_MAX_NBYTES]).decode(errors="ignore")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


@functools.lru_cache(maxsize=_KEPT)
def _load_reference(tokenizer: TokenizerFile, special_in_text: str) -> HFBackend:
    return HFBackend(tokenizer, special_in_text=special_in_text)


@functools.lru_cache(maxsize=_KEPT)
def load_gigatoken(tokenizer: TokenizerFile, special_in_text: str) -> Backend:
    """Return the fast backend, if it can do what is asked."""
    from tokenmill.encoding.gigatoken import GigatokenBackend

    return GigatokenBackend(tokenizer, special_in_text)

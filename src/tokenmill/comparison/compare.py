"""Compare: tokenizers on one sample of a corpus: what they make of its text, how fast, and how large the whole gets."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.comparison.sample import Sample, take_sample
from tokenmill.corpus.corpus import find_corpus
from tokenmill.corpus.reader import Texts
from tokenmill.dataroot.layout import smallest_dtype
from tokenmill.encoding.encoder import SPECIAL, Encoder, SpanTexts
from tokenmill.encoding.hf import HFBackend
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.errors import RecipeError, TokenizerError
from tokenmill.loading.stats import NULL
from tokenmill.options import MOST_GROUPS, StoreOptions
from tokenmill.recipe import Recipe
from tokenmill.redact import escape_surrogates

SAMPLE_NBYTES = 16 << 20
_TIMED_NBYTES = 1_000_000
_BACK_NBYTES = 2 << 20
"""Text that is decoded again, to see whether it comes back."""
_MOST_LOST = 0.01
"""Share of documents that may come back changed before a comparison is refused."""
_LONGEST = 8
_Z = 1.959964
"""95% of a normal distribution lie within so many standard deviations."""


class Estimate(msgspec.Struct):
    """A ratio, and where it lies with 95% confidence, as the documents of a sample are drawn."""

    value: float
    low: float | None
    high: float | None
    """None: there are too few documents to tell."""

    @property
    def text(self) -> str:
        """As a person reads it."""
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} \u00b1 {(self.high - self.low) / 2:.3f}"


class LongToken(msgspec.Struct):
    """One of the longest tokens that occur."""

    id: int
    text: str
    nbytes: int
    count: int


class TokenizerFigures(msgspec.Struct, kw_only=True):
    """What a tokenizer makes of the sample."""

    name: str
    sha256: str
    vocab_size: int
    engine: str
    tokens: int
    """Without EOS."""
    bytes_per_token: Estimate
    characters_per_token: Estimate
    relative_tokens: Estimate
    """Tokens per token of the first tokenizer, of the same documents: below 1 is shorter."""
    by_source: dict[str, Estimate]
    """Bytes per token of the source files with the most text in the sample."""
    by_value: dict[str, dict[str, Estimate]]
    """Bytes per token of each metadata column's values with the most text."""
    used_ids: int
    """Different ids that occur."""
    byte_share: float
    """Share of tokens that are a part of a character: byte fallback, or bytes that no longer token joins."""
    unknown_share: float
    """Share of tokens that stand for text that the vocabulary has no token for."""
    longest: list[LongToken]
    lost_share: float
    """Share of documents that do not come back when their tokens are decoded."""
    lost_example: str
    """The first difference; empty if there is none."""
    projected_tokens: int
    """Tokens of the whole corpus, EOS included."""
    dtype: str
    projected_nbytes: int
    seconds: float
    """To encode the sample."""
    tokens_per_second: float
    nbytes_per_second: float


class Comparison(msgspec.Struct, kw_only=True):
    """Tokenizers side by side."""

    corpus: str
    corpus_files: int
    corpus_documents: int
    """Estimates, as is the size of the text."""
    corpus_text_nbytes: int
    documents: int
    """Documents of the sample; the figures below are of the sample, too."""
    nbytes: int
    characters: int
    tokenizers: list[TokenizerFigures]
    notes: list[str] = []


def compare_tokenizers(
    tokenizers: Sequence[str],
    dataset: str | Sequence[str],
    *,
    text_column: str = "text",
    text_separator: str | None = None,
    metadata_columns: Sequence[str] = (),
    sample_nbytes: int = SAMPLE_NBYTES,
    lossy: bool = False,
    store: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
) -> Comparison:
    """Encode a sample of a corpus, the same each time, with each tokenizer.

    Args:
        tokenizers: directories, `tokenizer.json` files, or names of the hub.
        dataset: the corpus, as of a recipe; likewise `text_column`, `text_separator`, `metadata_columns`.
        sample_nbytes: size of the text that is encoded, about.
        lossy: compare tokenizers that do not keep the text, too.
        store: how to reach a corpus that is not local.

    Raises:
        TokenizerError: a tokenizer cannot be loaded, or loses text, and `lossy` is not set.
        SourceError: the corpus cannot be read.
        RecipeError: there is nothing to compare, or a metadata column means nothing.
    """
    if not tokenizers:
        raise RecipeError("no tokenizer to compare", next_step="name one or more tokenizers")
    if repeated := [name for name in tokenizers if list(tokenizers).count(name) > 1]:
        raise RecipeError(f"tokenizer {repeated[0]} is named twice", next_step="name each once")
    try:
        columns = Recipe(dataset="", tokenizer="", metadata_columns=tuple(metadata_columns)).metadata
    except ValueError as error:
        raise RecipeError(f"metadata_columns: {error}", next_step="write [NAME=]PATH[:TYPE]") from None
    encoders = [
        Encoder(load_tokenizer(name, needs_eos=False), backend="auto", special_in_text="parse", dtype="uint32")
        for name in tokenizers
    ]
    corpus = find_corpus(dataset, text_column, text_separator, store, metadata=columns)
    try:
        sample = take_sample(corpus, sample_nbytes)
    finally:
        corpus.close()
    sizes = _Sizes(
        pc.binary_length(sample.texts).to_numpy().astype(np.int64),
        pc.utf8_length(sample.texts).to_numpy().astype(np.int64),
        sample.weight,
    )
    found: list[TokenizerFigures] = []
    first: NDArray[np.int64] | None = None
    for encoder in encoders:
        figures, tokens = _measure(encoder, sample, sizes, first)
        first = tokens if first is None else first
        found.append(figures)
        if figures.lost_share > _MOST_LOST and not lossy:
            raise TokenizerError(
                f"tokenizer {figures.name}: {figures.lost_share:.1%} of the documents do not come back from its "
                f"tokens, so its figures are of less text than the others': {figures.lost_example}",
                next_step="leave it out, or say --lossy (lossy=True) to compare it all the same",
            )
    notes = [note for encoder in encoders for note in encoder.notes]
    notes += [
        f"{each.name}: {each.lost_share:.2%} of the documents do not come back from its tokens: {each.lost_example}"
        for each in found
        if each.lost_share
    ]
    notes += [f"{path}: rows were left out: {reason}" for path, reason in list(sample.bad.items())[:MOST_GROUPS]]
    columns_of: Any = sample.metadata
    for name in columns_of.column_names if columns_of is not None else ():
        if columns_of[name].null_count == len(columns_of):
            notes.append(f"no document of the sample has a value for the metadata column {name}")
    if int(sizes.nbytes.sum()) < _TIMED_NBYTES:
        notes.append(f"speeds are of less than {_TIMED_NBYTES / 1e6:.0f} MB of text, and so are hardly comparable")
    if sample.is_from_beginnings:
        notes.append("files that are not parquet gave their first documents: the intervals do not know of the others")
    return Comparison(
        corpus=escape_surrogates(corpus.location.name),
        corpus_files=sample.corpus_files,
        corpus_documents=round(float(sizes.weight.sum())),
        corpus_text_nbytes=round(float(np.dot(sizes.weight, sizes.nbytes))),
        documents=len(sample.texts),
        nbytes=int(sizes.nbytes.sum()),
        characters=int(sizes.characters.sum()),
        tokenizers=found,
        notes=notes,
    )


class _Sizes(NamedTuple):
    """Sizes of each document of the sample; arrays of shape `(documents,)`."""

    nbytes: NDArray[np.int64]
    characters: NDArray[np.int64]
    weight: NDArray[np.float64]
    """How many documents of the corpus each stands for."""


def _measure(
    encoder: Encoder, sample: Sample, sizes: _Sizes, first: NDArray[np.int64] | None
) -> tuple[TokenizerFigures, NDArray[np.int64]]:
    tokenizer = encoder.tokenizer
    reference = HFBackend(tokenizer, special_in_text="parse")
    encoded = encoder.encode_batch([SpanTexts(Texts(sample.texts), tokenizer.name, 0)])
    tokens = encoded.lengths - 1
    ends = np.cumsum(encoded.lengths)
    ids: NDArray[np.uint32] = np.delete(encoded.tokens, ends - 1).astype(np.uint32)  # without EOS
    seconds = _seconds(encoder, sample.texts)
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    used = np.flatnonzero(counts)
    texts = reference.texts_of(used.tolist())
    is_part = np.array([text is None for text in texts], bool)
    nbytes = reference.nbytes_of(used.tolist(), texts)
    lost_share, example = _lost(reference, sample.texts, ids, ends - np.arange(1, len(ends) + 1), encoded.flags)
    total = int(tokens.sum())
    projected = round(float(np.dot(sizes.weight, tokens + 1)))
    dtype = smallest_dtype(tokenizer.vocab_size)
    unknown = reference.unknown_id()
    longest = np.argsort(-nbytes, kind="stable")[:_LONGEST].tolist()
    by_value: dict[str, dict[str, Estimate]] = {}
    metadata: Any = sample.metadata
    for name in metadata.column_names if metadata is not None else ():
        values = metadata[name].combine_chunks()
        keys = pa.DictionaryArray.from_arrays(*_encoded(values)) if len(values) else None
        if keys is not None:
            labels = [NULL if value is None else str(value) for value in keys.dictionary.to_pylist()]
            by_value[name] = _by_group(keys.indices.to_numpy(), labels, sizes, tokens)
    figures = TokenizerFigures(
        name=escape_surrogates(tokenizer.name),
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        engine=encoder.backend.version,
        tokens=total,
        bytes_per_token=ratio(sizes.nbytes, tokens, sizes.weight),
        characters_per_token=ratio(sizes.characters, tokens, sizes.weight),
        relative_tokens=Estimate(1.0, 1.0, 1.0) if first is None else ratio(tokens, first, sizes.weight),
        by_source=_by_group(sample.file, sample.paths, sizes, tokens),
        by_value=by_value,
        used_ids=len(used),
        byte_share=float(counts[used][is_part].sum() / max(1, total)),
        unknown_share=0.0 if unknown is None else float(counts[unknown] / max(1, total)),
        longest=[LongToken(int(used[at]), texts[at] or "", int(nbytes[at]), int(counts[used[at]])) for at in longest],
        lost_share=lost_share,
        lost_example=example,
        projected_tokens=projected,
        dtype=dtype,
        projected_nbytes=projected * (2 if dtype == "uint16" else 4),
        seconds=round(seconds, 4),
        tokens_per_second=round(total / seconds),
        nbytes_per_second=round(int(sizes.nbytes.sum()) / seconds),
    )
    return figures, tokens


def ratio(above: NDArray[np.int64], below: NDArray[np.int64], weight: NDArray[np.float64] | None = None) -> Estimate:
    """Return the ratio of two sums over documents, with its confidence interval.

    The variance is that of a ratio estimator over documents (W. G. Cochran, Sampling Techniques, 1977, section 6.4): of
    what documents differ from the ratio by, each as often as its `weight` says (None: once).
    """
    weight = np.ones(len(above)) if weight is None else weight
    n, total = len(above), float(np.dot(weight, below))
    if total == 0:
        return Estimate(0.0, None, None)
    value = float(np.dot(weight, above)) / total
    if n < 2:
        return Estimate(value, None, None)
    apart = weight * (above - value * below)
    reach = _Z * math.sqrt(n / (n - 1) * float(np.dot(apart, apart))) / total
    return Estimate(value, value - reach, value + reach)


def _by_group(
    group: NDArray[np.int64], names: Sequence[str], sizes: _Sizes, tokens: NDArray[np.int64]
) -> dict[str, Estimate]:
    text = np.bincount(group, sizes.nbytes * sizes.weight, minlength=len(names))
    largest = np.argsort(-text, kind="stable")[:MOST_GROUPS].tolist()
    inside = {each: group == each for each in largest if text[each]}
    return {names[each]: ratio(sizes.nbytes[here], tokens[here], sizes.weight[here]) for each, here in inside.items()}


def _encoded(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return values as indices into the different ones, null being one of them."""
    found = values.dictionary_encode(null_encoding="encode")
    return found.indices, found.dictionary


def _seconds(encoder: Encoder, texts: pa.LargeStringArray) -> float:
    """Return how long the backend alone takes, the better of two times: the first one has cold caches."""
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        encoder.backend.encode(texts)
        taken.append(time.perf_counter() - begin)
    return max(1e-9, min(taken))


def _lost(
    reference: HFBackend,
    texts: pa.LargeStringArray,
    ids: NDArray[np.uint32],
    ends: NDArray[np.int64],
    flags: NDArray[np.uint8],
) -> tuple[float, str]:
    """Return which share of documents do not come back from their tokens, and the first difference.

    Documents with control-token strings are not asked: what is a control token is not text.
    """
    asked = np.random.default_rng(0).permutation(np.flatnonzero((flags & SPECIAL) == 0))  # from all over the sample
    sizes = np.cumsum(pc.binary_length(texts).to_numpy()[asked])
    asked = np.sort(asked[: max(1, int(np.searchsorted(sizes, _BACK_NBYTES)))])
    begins = np.concatenate([[0], ends[:-1]])
    back = reference.decode_batch([ids[begins[at] : ends[at]].tolist() for at in asked.tolist()])
    lost, example = 0, ""
    for text, found in zip(texts.take(pa.array(asked)).to_pylist(), back, strict=True):
        if text != found:
            lost += 1
            example = example or _difference(text, found)
    return lost / max(1, len(asked)), example


def _difference(text: str, found: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), min(len(text), len(found)))
    begin = max(0, at - 10)
    return f"{text[begin : at + 10]!r} became {found[begin : at + 10]!r}"

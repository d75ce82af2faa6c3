"""Statistics of a data root: lengths, frequencies, duplicate samples. Reads only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.encoding.hf import HFBackend
from tokenmill.encoding.tokenizer import MAX_IDS
from tokenmill.errors import DataRootError, TokenizerError
from tokenmill.loading.data_root import DataRoot, TokenStream
from tokenmill.loading.provenance import open_backend
from tokenmill.loading.view import OpenView, open_root
from tokenmill.options import MAX_VALUES, OnBytes
from tokenmill.recipe import SIDECAR_COLUMNS

CHUNK_TOKENS = 1 << 22
_RESIDENT_NBYTES = 256 << 20
_POINT = 0x9E3779B97F4A7C15
"""Where the polynomial of `token_hashes` is evaluated; any large odd number would do."""
NULL = "(null)"
"""Key of tokens whose documents have no value."""
_TOP = 20
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_LISTED_DUPLICATES = 10


class TokenCount(msgspec.Struct):
    """How often a token occurs."""

    id: int
    count: int
    name: str | None
    """As the vocabulary writes it; None where the tokenizer is not at hand."""
    text: str | None = None
    """What it adds to a text; None for a part of a character, and where the tokenizer is not at hand."""


class LengthBin(msgspec.Struct, array_like=True):
    """Documents of about one length; written as `[low, high, documents, tokens]`."""

    low: int
    """Fewest tokens, EOS included."""
    high: int
    """One more than the most."""
    documents: int
    tokens: int


class Duplicates(msgspec.Struct):
    """Sample ids that occur more than once."""

    ids: int
    """Different ids that do."""
    samples: int
    """Samples that could be left out without losing an id."""
    without_tokens: int
    """Ids that cover no tokens, as half of those of `templar-v1` do; not counted above."""
    first: list[list[int]]
    """Some of them, as lists of samples."""


class RepeatedTexts(msgspec.Struct):
    """Documents with the same text, found by `text_xxh3` and confirmed by their tokens."""

    texts: int
    """Different texts that occur more than once."""
    documents: int
    """Documents that could be left out without losing a text."""


class Stats(msgspec.Struct, kw_only=True):
    """Figures of a data root's documents and tokens. None: not known without a manifest, or not consolidated."""

    tokens: int
    distinct_ids: int
    id_min: int
    id_max: int
    id_mean: float
    top: list[TokenCount]
    vocab_size: int | None
    documents: int | None
    document_tokens: dict[str, float] | None
    """Percentiles, EOS included, and the mean."""
    document_histogram: list[LengthBin] | None
    """Four bins for each doubling of the length."""
    tokens_by_source: dict[str, int] | None
    """As far as they are in the stream. Of a mixture, those of its data roots, whatever their weight."""
    text_nbytes_by_source: dict[str, int] | None
    """Bytes of the text, in UTF-8, that these tokens stand for; None where the tokenizer is not at hand."""
    tokens_by_value: dict[str, dict[str, int] | None] | None
    """Tokens by value of each metadata column, `NULL` where there is none; None for a column with more than
    `options.MAX_VALUES` of them."""
    rank_frequency: list[tuple[int, int]]
    """Ranks of tokens, the most frequent being 1, and how often that token occurs; about 30 to a factor of ten."""
    control_tokens: list[TokenCount] | None
    """Control tokens that stand in the text: EOS and BOS without those that surround documents, and not of views that
    draw or pack samples; None where the tokenizer is not at hand."""
    duplicates: Duplicates | None
    repeated_texts: RepeatedTexts | None
    """None where the sidecars have no hashes of text."""


def stats(root: Path, *, on_progress: OnBytes = lambda done, total: None) -> Stats:
    """Read every token and every sidecar.

    Raises:
        DataRootError: the data root is not finished.
    """
    found = open_root(root)
    stream = _opened(found)
    if stream.tokens == 0:
        raise DataRootError(f"{root}: has no tokens", next_step="give another data root")
    counts = token_counts(stream.chunks(CHUNK_TOKENS), stream.tokens, stream.dtype.itemsize, on_progress)
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(counts[used], kind="stable")[::-1][:_TOP]]
    backend = _backend_of(found)
    figures = _document_figures(found, backend)
    tokens = int(counts.sum())  # without padding
    return Stats(
        tokens=tokens,
        distinct_ids=len(used),
        id_min=int(used[0]),
        id_max=int(used[-1]),
        id_mean=float(np.dot(counts, np.arange(len(counts), dtype=np.float64)) / tokens),
        top=_token_counts(frequent, counts, backend),
        vocab_size=found.tokenizer.vocab_size if found.tokenizer else None,
        documents=found.document_count,
        document_tokens=figures.percentiles,
        document_histogram=figures.histogram,
        tokens_by_source=figures.tokens,
        text_nbytes_by_source=figures.text_nbytes,
        tokens_by_value=figures.by_value,
        rank_frequency=_rank_frequency(counts),
        control_tokens=_control_tokens(found, counts, backend),
        duplicates=_duplicates(found),
        repeated_texts=_repeated_texts(found),
    )


def token_counts(
    chunks: Iterable[NDArray[Any]],
    tokens: int,
    itemsize: int,
    on_progress: OnBytes = lambda done, total: None,
) -> NDArray[np.int64]:
    """Return how often each id occurs in chunks of tokens, shape `(largest id + 1,)`."""
    counts = np.zeros(1, np.int64)
    done = 0
    for chunk in chunks:
        if len(chunk) and int(chunk.max()) >= MAX_IDS:
            at = int(np.argmax(chunk >= MAX_IDS))
            raise DataRootError(
                f"token {done + at} of the stream: expected an id below {MAX_IDS}, found {int(chunk[at])}",
                next_step="the file is damaged, or its tokens have another dtype: run tokenmill verify",
            )
        found = np.bincount(chunk)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        done += len(chunk)
        on_progress(done * itemsize, tokens * itemsize)
    return counts


def _opened(found: DataRoot | OpenView) -> Any:
    """Return the stream of tokens, to be read from end to end: what was read is not read again soon."""
    stream = found.tokens()
    stream.limit_resident(_RESIDENT_NBYTES)
    return stream


class _DocumentFigures(NamedTuple):
    """What `Stats` says of documents; None where nothing is known of them."""

    percentiles: dict[str, float] | None = None
    histogram: list[LengthBin] | None = None
    tokens: dict[str, int] | None = None
    text_nbytes: dict[str, int] | None = None
    by_value: dict[str, dict[str, int] | None] | None = None


def _document_figures(found: DataRoot | OpenView, backend: HFBackend | None) -> _DocumentFigures:
    if found.tokenizer is None:
        return _DocumentFigures()
    lengths: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    """Different lengths, and how often they occur."""
    by_source: Counter[str] = Counter()
    by_value: dict[str, dict[str, int] | None] = {}
    text_nbytes: Counter[str] = Counter()
    nbytes_of = _nbytes_of_ids(found, backend)
    for table, stream in _tables(found):
        lengths.append(np.unique(table["tokens"].to_numpy(), return_counts=True))
        tokens = np.minimum(table["tokens"].to_numpy(), stream.tokens - table["start"].to_numpy())
        in_stream = pa.array(tokens)
        by_source.update(_sums_by(table["source"], in_stream))
        if nbytes_of is not None:
            text_nbytes.update(_sums_by(table["source"], pa.array(_text_nbytes(table, stream, nbytes_of))))
        for column in table.column_names:
            if column not in SIDECAR_COLUMNS and (before := by_value.setdefault(column, {})) is not None:
                sums = Counter(before)
                sums.update(_sums_by(table[column], in_stream))
                by_value[column] = dict(sums) if len(sums) <= MAX_VALUES else None
    length, which = np.unique(np.concatenate([each for each, _ in lengths]), return_inverse=True)
    documents = np.bincount(which, np.concatenate([each for _, each in lengths])).astype(np.int64)
    return _DocumentFigures(
        percentiles(length, documents) | {"mean": float(np.dot(length, documents) / documents.sum())},
        _histogram(length, documents),
        dict(sorted(by_source.items())),
        dict(sorted(text_nbytes.items())) if nbytes_of is not None else None,
        by_value,
    )


def _sums_by(keys: pa.ChunkedArray, values: pa.ChunkedArray | pa.Array) -> dict[str, int]:
    """Return the sum of the values of each key: `NULL`, text as it is, and others as JSON writes them."""
    sums = pa.table({"key": keys, "value": values}).group_by("key").aggregate([("value", "sum")])
    found: Counter[str] = Counter()
    for key, value in zip(sums["key"].to_pylist(), sums["value_sum"].to_pylist(), strict=True):
        found[NULL if key is None else key if isinstance(key, str) else json.dumps(key)] += value
    return found


def percentiles(lengths: NDArray[np.int64], documents: NDArray[np.int64]) -> dict[str, float]:
    """Return percentiles as `np.percentile` does of all documents, from how many there are of each length."""
    ends = np.cumsum(documents)
    position = np.array(_PERCENTILES) / 100 * (int(ends[-1]) - 1)
    low, high = (lengths[np.searchsorted(ends, edge(position), side="right")] for edge in (np.floor, np.ceil))
    found = low + (high - low) * (position - np.floor(position))
    return dict(zip(map(str, _PERCENTILES), found.tolist(), strict=True))


def _histogram(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> list[LengthBin]:
    """Count documents by length, in bins whose edges are powers of the fourth root of 2, rounded up."""
    steps = int(np.ceil(np.log2(int(lengths.max()) + 1) * 4)) + 1
    edges = np.unique(np.ceil(2 ** (np.arange(steps + 1) / 4)).astype(np.int64))
    which = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(which, counts, minlength=len(edges)).astype(np.int64)
    tokens = np.bincount(which, lengths * counts, minlength=len(edges)).astype(np.int64)
    columns = (edges[:-1], edges[1:], documents[:-1], tokens[:-1])
    return [LengthBin(*row) for row in zip(*(column.tolist() for column in columns), strict=True) if row[2]]


def _nbytes_of_ids(found: DataRoot | OpenView, backend: HFBackend | None) -> NDArray[np.int64] | None:
    """Return the bytes of text that each id stands for, and a 0 for those after the last, shape `(vocab_size + 1,)`.

    What surrounds documents is no text.
    """
    recorded = found.tokenizer
    if backend is None or recorded is None:
        return None
    ids = list(range(recorded.vocab_size))
    nbytes = np.append(backend.nbytes_of(ids, backend.texts_of(ids)), 0)
    framing = [recorded.eos_id, recorded.bos_id, *(recorded.fim_ids or ())]
    nbytes[[token for token in framing if token is not None and token < len(ids)]] = 0
    return nbytes


def _text_nbytes(table: pa.Table, stream: TokenStream, nbytes_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes of text of each document of a sidecar, shape `(documents,)`."""
    starts = table["start"].to_numpy()
    ends = np.minimum(starts + table["tokens"].to_numpy(), stream.tokens)
    found = np.empty(len(starts), np.int64)
    first = 0
    while first < len(starts):
        begin = int(starts[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + CHUNK_TOKENS, side="right")))
        if int(ends[first]) - begin > CHUNK_TOKENS:  # a piece at a time
            pieces = range(begin, int(ends[first]), CHUNK_TOKENS)
            chunks = (stream.read(at, min(at + CHUNK_TOKENS, int(ends[first]))) for at in pieces)
            found[first] = sum(int(nbytes_of[np.minimum(chunk, len(nbytes_of) - 1)].sum()) for chunk in chunks)
            first += 1
            continue
        tokens = stream.read(begin, int(ends[last - 1]))
        sums = np.concatenate([[0], np.cumsum(nbytes_of[np.minimum(tokens, len(nbytes_of) - 1)])])
        found[first:last] = sums[ends[first:last] - begin] - sums[starts[first:last] - begin]
        first = last
    return found


def _rank_frequency(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    ranked = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.round(10 ** np.arange(0, np.log10(len(ranked)) + 1 / 30, 1 / 30)).astype(np.int64))
    ranks = np.unique(np.append(ranks[ranks <= len(ranked)], len(ranked)))
    return list(zip(ranks.tolist(), ranked[ranks - 1].tolist(), strict=True))


def _token_counts(ids: NDArray[np.int64], counts: NDArray[np.int64], backend: HFBackend | None) -> list[TokenCount]:
    tokens = ids.tolist()
    texts = backend.texts_of(tokens) if backend is not None else [None] * len(tokens)
    return [
        TokenCount(token, int(counts[token]), backend.name_of(token) if backend is not None else None, text)
        for token, text in zip(tokens, texts, strict=True)
    ]


def _control_tokens(
    found: DataRoot | OpenView, counts: NDArray[np.int64], backend: HFBackend | None
) -> list[TokenCount] | None:
    recorded = found.tokenizer
    if backend is None or recorded is None:
        return None
    inside = counts.copy()
    around = {recorded.eos_id: _ended(found, recorded.eos_id), recorded.bos_id: found.document_count or 0}
    for token, times in (around | {token: int(inside.max()) for token in recorded.fim_ids or ()}).items():
        if token is not None:
            inside[token : token + 1] -= times
    ids = [token for token in backend.control_ids() if token < len(inside) and inside[token] > 0]
    return _token_counts(np.array(sorted(ids, key=lambda token: -inside[token]), np.int64), inside, backend)


def _ended(found: DataRoot | OpenView, eos_id: int) -> int:
    """Return how many EOS end documents; of views that draw or pack samples, more than there can be."""
    documents = found.document_count or 0
    if isinstance(found, OpenView):
        return documents if found.view.packing == "concat" and not found.view.stages else 1 << 62
    stream = found.tokens()
    return documents - int(stream.read(stream.tokens - 1, stream.tokens)[0] != eos_id)


def _tables(found: DataRoot | OpenView) -> Iterator[tuple[pa.Table, TokenStream]]:
    """Yield the sidecars, without documents that are not in a view, and the tokens that they speak of."""
    if isinstance(found, OpenView):
        documents = found.documents()
        for number, source in enumerate(found.sources):
            stream = _opened(source)
            yield from ((table, stream) for table in documents.tables_of(number))
    else:
        stream = _opened(found)
        yield from ((table, stream) for table in found.documents().tables())


def _repeated_texts(found: DataRoot | OpenView) -> RepeatedTexts | None:
    roots = found.sources if isinstance(found, OpenView) else [found]
    if not all(root.manifest is not None and root.manifest.documents_version > 1 for root in roots):
        return None
    every = np.empty(found.document_count or 0, np.uint64)
    at = 0
    for table, _ in _tables(found):
        every[at : at + len(table)] = table["text_xxh3"].to_numpy()
        at += len(table)
    hashes = every[:at]
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del every, hashes
    found_again: list[NDArray[np.uint64]] = []
    for table, stream in _tables(found) if len(repeated) else ():
        text, starts, lengths = (table[name].to_numpy() for name in ("text_xxh3", "start", "tokens"))
        place = np.minimum(np.searchsorted(repeated, text), len(repeated) - 1)
        again = repeated[place] == text
        ends = np.minimum(starts[again] + lengths[again], stream.tokens)
        found_again.append(np.stack([text[again], token_hashes(stream, starts[again], ends)]))
    if not found_again:
        return RepeatedTexts(texts=0, documents=0)
    pairs = np.concatenate(found_again, axis=1)
    pairs = pairs[:, np.lexsort(pairs)]
    begins = np.flatnonzero(np.concatenate([[True], (pairs[:, 1:] != pairs[:, :-1]).any(axis=0), [True]]))
    several = np.diff(begins)
    several = several[several > 1]
    return RepeatedTexts(texts=len(several), documents=int(several.sum()) - len(several))


def token_hashes(stream: TokenStream, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of the tokens of each document, which lie in the order of the stream, shape `(documents,)`.

    It is the polynomial of the tokens, and their number, at a fixed odd number, modulo 2**64: enough to confirm that
    documents with one hash of their text are the same.
    """
    found = np.empty(len(starts), np.uint64)
    lengths = ends - starts
    powers = np.multiply.accumulate(np.full(min(CHUNK_TOKENS, int(lengths.max(initial=0))) + 1, _POINT, np.uint64))
    first = 0
    while first < len(starts):
        begin = int(starts[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + CHUNK_TOKENS, side="right")))
        if int(lengths[first]) > CHUNK_TOKENS:
            digest = hashlib.sha256(stream.read(begin, int(ends[first])).tobytes()).digest()
            found[first] = int.from_bytes(digest[:8], "little")
        else:
            some = lengths[first:last]
            offsets = np.cumsum(some) - some
            within = np.arange(int(some.sum())) - np.repeat(offsets, some)
            places = within + np.repeat(starts[first:last] - begin, some)
            terms = stream.read(begin, int(ends[last - 1]))[places] * powers[within]
            found[first:last] = np.add.reduceat(terms, offsets) + some.astype(np.uint64) * powers[some]
        first = last
    return found


def _backend_of(found: DataRoot | OpenView) -> HFBackend | None:
    """Return the reference backend; figures are of use without it, too."""
    if found.tokenizer is None:
        return None
    try:
        return open_backend(found)
    except TokenizerError:
        return None


def _duplicates(found: DataRoot | OpenView) -> Duplicates | None:
    record = found.record
    if record is None or not record.complete:
        return None
    covered = min(record.samples, -(-record.tokens_nbytes // record.window_nbytes))
    ids = np.array(found.sample_ids()[:covered])
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    bounds = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if covered else np.empty(0, np.int64)
    sizes = np.diff(np.append(bounds, covered))
    repeated = np.flatnonzero(sizes > 1)
    first = [sorted(order[bounds[i] : bounds[i] + sizes[i]].tolist()) for i in repeated[:_LISTED_DUPLICATES]]
    return Duplicates(
        ids=len(repeated),
        samples=int((sizes[repeated] - 1).sum()),
        without_tokens=record.samples - covered,
        first=sorted(first),
    )

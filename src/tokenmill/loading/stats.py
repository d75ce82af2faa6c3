"""Statistics of a data root: lengths, frequencies, duplicate samples. Reads only."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.encoding.tokenizer import MAX_IDS
from tokenmill.errors import DataRootError, TokenizerError
from tokenmill.loading.data_root import DataRoot, TokenStream
from tokenmill.loading.provenance import open_backend
from tokenmill.loading.view import OpenView, open_root
from tokenmill.options import OnBytes

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_TOKENS = 1 << 22
_TOP = 20
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_LISTED_DUPLICATES = 10


class TokenCount(msgspec.Struct):
    """How often a token occurs."""

    id: int
    count: int
    name: str | None
    """As the vocabulary writes it; None where the tokenizer is not at hand."""


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
    tokens_by_source: dict[str, int] | None
    duplicates: Duplicates | None
    repeated_texts: RepeatedTexts | None
    """None where the sidecars have no hashes of text."""


def stats(root: Path, *, on_progress: OnBytes = lambda done, total: None) -> Stats:
    """Read every token and every sidecar.

    Raises:
        DataRootError: the data root is not finished.
    """
    found = open_root(root)
    stream = found.tokens()
    if stream.tokens == 0:
        raise DataRootError(f"{root}: has no tokens", next_step="give another data root")
    counts = token_counts(stream.chunks(_CHUNK_TOKENS), stream.tokens, stream.dtype.itemsize, on_progress)
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(counts[used], kind="stable")[::-1][:_TOP]]
    lengths, by_source = _document_figures(found)
    tokens = int(counts.sum())  # without padding
    return Stats(
        tokens=tokens,
        distinct_ids=len(used),
        id_min=int(used[0]),
        id_max=int(used[-1]),
        id_mean=float(np.dot(counts, np.arange(len(counts), dtype=np.float64)) / tokens),
        top=[
            TokenCount(token, int(counts[token]), name)
            for token, name in zip(frequent.tolist(), _names(found, frequent.tolist()), strict=True)
        ],
        vocab_size=found.tokenizer.vocab_size if found.tokenizer else None,
        documents=found.document_count,
        document_tokens=lengths,
        tokens_by_source=by_source,
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


def _document_figures(found: DataRoot | OpenView) -> tuple[dict[str, float] | None, dict[str, int] | None]:
    if found.tokenizer is None:
        return None, None
    lengths: list[NDArray[np.int64]] = []
    by_source: Counter[str] = Counter()
    for table in found.documents().tables():
        lengths.append(table["tokens"].to_numpy())
        sums = table.group_by("source").aggregate([("tokens", "sum")])
        by_source.update(dict(zip(sums["source"].to_pylist(), sums["tokens_sum"].to_pylist(), strict=True)))
    every = np.concatenate(lengths)
    figures = dict(zip(map(str, _PERCENTILES), np.percentile(every, _PERCENTILES).tolist(), strict=True))
    return figures | {"mean": float(every.mean())}, dict(sorted(by_source.items()))


def _tables(found: DataRoot | OpenView) -> Iterator[tuple[pa.Table, TokenStream]]:
    """Yield the sidecars, without documents that are not in a view, and the tokens that they speak of."""
    if isinstance(found, OpenView):
        documents = found.documents()
        for number, source in enumerate(found.sources):
            stream = source.tokens()
            yield from ((table, stream) for table in documents.tables_of(number))
    else:
        stream = found.tokens()
        yield from ((table, stream) for table in found.documents().tables())


def _repeated_texts(found: DataRoot | OpenView) -> RepeatedTexts | None:
    roots = found.sources if isinstance(found, OpenView) else [found]
    if not all(root.manifest is not None and root.manifest.documents_version > 1 for root in roots):
        return None
    hashes = np.sort(np.concatenate([table["text_xxh3"].to_numpy() for table, _ in _tables(found)]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    counts: Counter[tuple[int, bytes]] = Counter()
    for table, stream in _tables(found) if len(repeated) else ():
        hashes, starts, lengths = (table[name].to_numpy() for name in ("text_xxh3", "start", "tokens"))
        for at in np.flatnonzero(np.isin(hashes, repeated, kind="sort")).tolist():
            start = int(starts[at])
            tokens = stream.read(start, min(start + int(lengths[at]), stream.tokens))
            counts[int(hashes[at]), hashlib.sha256(tokens.tobytes()).digest()] += 1
    several = [count for count in counts.values() if count > 1]
    return RepeatedTexts(texts=len(several), documents=sum(several) - len(several))


def _names(found: DataRoot | OpenView, ids: list[int]) -> list[str | None]:
    """Return tokens as the vocabulary writes them; figures are of use without it, too."""
    if found.tokenizer is None:
        return [None] * len(ids)
    try:
        backend = open_backend(found)
    except TokenizerError:
        return [None] * len(ids)
    return [backend.name_of(token) for token in ids]


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

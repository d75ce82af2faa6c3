"""Order quality: how far the order of documents is from a random one. Reads sidecars only.

Each measure stands beside what a random permutation of the same documents gives, and beside what a shuffle through a
buffer gives, as `pretokenize` makes it of the same documents in the order of the corpus.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.corpus.order import file_order, row_order
from tokenmill.errors import DataRootError
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.documents import file_numbers
from tokenmill.loading.samplers import permute
from tokenmill.loading.view import OpenView, open_root, sample_key

BUFFER_SIZE, SEED = 10_000, 42
"""Size and seed of the buffer that is compared with: what recipes have by default."""
_WINDOWS = 32
"""Windows of tokens, at least, in which source files are counted."""
_LEAST_EXPECTED = 5
"""Documents of a file in a window, in the mean; rarer files are counted together."""
_PUSHED = 1 << 20
"""Documents that go through the buffer at once."""
_SIGMAS = 2.576
"""99% of a normal distribution lie within so many standard deviations."""


class Measure(msgspec.Struct):
    """A figure of an order of documents."""

    name: str
    found: float
    random: float
    """What a random permutation gives in the mean; 99 of 100 lie between `low` and `high`."""
    low: float
    high: float
    buffer: float
    """What a shuffle through a buffer gives."""

    @property
    def is_random(self) -> bool:
        """Whether a random permutation would give as much."""
        return self.low <= self.found <= self.high


class OrderQuality(msgspec.Struct, kw_only=True):
    """How far the order of documents is from a random one."""

    documents: int
    window_tokens: int
    """Size of the windows in which source files are counted: a power of two."""
    measures: list[Measure]


class DocumentOrder(NamedTuple):
    """Documents in some order; arrays of shape `(documents,)`."""

    file: NDArray[np.int32]
    """Number of the source file, in the order of their names; of documents in the order of the corpus, as all here."""
    tokens: NDArray[np.int64]
    identity: NDArray[np.uint64] | None
    """Hash of the text; None where there are none."""
    place: NDArray[np.int64]
    """Which of them comes when."""


def order_quality(root: Path) -> OrderQuality:
    """Measure the order of the documents of a data root or a view; 60 bytes of memory a document.

    Raises:
        DataRootError: it is not finished, has no documents sidecars, or fewer than three documents.
    """
    found = open_root(root)
    order = order_of(found)
    if len(order.file) < 3:
        raise DataRootError(f"{root}: an order needs three documents or more", next_step="give a larger data set")
    window = 1 << max(0, (int(order.tokens.sum()) // _WINDOWS).bit_length() - 1)
    ours = measured(order, window)
    shuffled = order._replace(place=_through_buffer(order.file))
    pairs = zip(ours, measured(shuffled, window), strict=True)
    measures = [msgspec.structs.replace(measure, buffer=other.found) for measure, other in pairs]
    return OrderQuality(documents=len(order.file), window_tokens=window, measures=measures)


def order_of(found: DataRoot | OpenView) -> DocumentOrder:
    """Return the documents of a data root or a view in their order.

    Raises:
        DataRootError: the view draws samples by weight, or packs documents, so that they are in no order.
    """
    if isinstance(found, OpenView) and (found.view.stages or found.view.packing != "concat"):
        raise DataRootError(
            f"{found.root}: its documents are in no order: samples are drawn by weight, or packed",
            next_step="ask for the order of its data roots, or of a view without weights and packing",
        )
    file, row, tokens, identity = _of_view(found) if isinstance(found, OpenView) else _of_root(found)
    corpus = np.lexsort((row, file))
    del row  # one column after the other: all of them twice would be the most memory that anything here takes
    file = file[corpus]
    tokens = tokens[corpus]
    identity = None if identity is None else identity[corpus]
    place = np.empty(len(corpus), np.int64)
    place[corpus] = np.arange(len(corpus))
    return DocumentOrder(file, tokens, identity, place)


def measured(order: DocumentOrder, window: int) -> list[Measure]:
    """Return the measures of an order, without what a buffer gives; `window` is in tokens."""
    distance = None if order.identity is None else _duplicate_distance(order.identity[order.place])
    file = order.file[order.place]
    every = [_neighbours(file), _windows(file, order.tokens[order.place], window), _correlation(order.place), distance]
    return [measure for measure in every if measure is not None]


class _Stored(NamedTuple):
    """Documents as they are stored; arrays of shape `(documents,)`, as those of `DocumentOrder`."""

    file: NDArray[np.int32]
    row: NDArray[np.int64]
    tokens: NDArray[np.int64]
    identity: NDArray[np.uint64] | None


def _of_root(found: DataRoot) -> _Stored:
    numbers = {path: number for number, path in enumerate(sorted(file.path for file in found.files))}
    documents = found.documents()  # raises where there is no manifest
    total = found.document_count or 0
    file, row, tokens = np.empty(total, np.int32), np.empty(total, np.int64), np.empty(total, np.int64)
    identity: NDArray[np.uint64] | None = np.empty(total, np.uint64)
    at = 0
    for table in documents.tables():
        here = slice(at, at + len(table))
        file[here] = file_numbers(table, numbers)
        if len(table) and int(file[here].min()) < 0:
            raise DataRootError(
                f"{found.root}: a documents sidecar names a source file that the manifest does not list",
                next_step="run tokenmill verify on the data root",
            )
        row[here], tokens[here] = table["row"].to_numpy(), table["tokens"].to_numpy()
        if "text_xxh3" not in table.column_names:
            identity = None
        elif identity is not None:
            identity[here] = table["text_xxh3"].to_numpy()
        at += len(table)
    return _Stored(file, row, tokens, identity)


def _of_view(found: OpenView) -> _Stored:
    index = found.open_index()
    starts = index.begins[:-1].copy()
    if found.view.shuffle == "samples":
        whole = starts < found.view.samples * found.seq_len
        samples = (starts[whole] // found.seq_len).astype(np.uint64)
        moved = permute(samples, found.view.samples, sample_key(found.view.seed), inverse=True).astype(np.int64)
        starts[whole] = moved * found.seq_len + starts[whole] % found.seq_len
    rank = np.argsort(np.argsort(starts, kind="stable"), kind="stable")
    by_place = np.argsort(index.places, kind="stable")
    file = np.empty(len(rank), np.int32)
    row, tokens = (np.empty(len(rank), np.int64) for _ in range(2))
    identity = np.empty(len(rank), np.uint64)
    base = files = 0
    has_hashes = True
    for source, root in zip(found.view.sources, found.sources, strict=True):
        part = _of_root(root)
        here = by_place[np.searchsorted(index.places[by_place], base) :]
        here = here[: int(np.searchsorted(index.places[here], base + source.tokens))]
        begins = np.cumsum(part.tokens) - part.tokens
        at = np.searchsorted(begins, index.places[here] - base)
        to = rank[here]
        file[to], row[to], tokens[to] = part.file[at] + files, part.row[at], part.tokens[at]
        if part.identity is None:
            has_hashes = False
        else:
            identity[to] = part.identity[at]
        base, files = base + source.tokens, files + len(root.files)
    return _Stored(file, row, tokens, identity if has_hashes else None)


def _through_buffer(file: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return documents, sorted by file, in the order in which they leave the buffer."""
    files, counts = np.unique(file, return_counts=True)
    starts = np.cumsum(counts) - counts
    sequence = file_order(len(files), kind="buffer", seed=SEED)
    read = np.concatenate([np.arange(starts[each], starts[each] + counts[each]) for each in sequence.tolist()])
    order = row_order("buffer", seed=SEED, buffer_size=BUFFER_SIZE)
    counts = np.diff([*range(0, len(read), _PUSHED), len(read)])
    emitted: NDArray[np.int64] = np.concatenate(
        [read[order.push(int(count))] for count in counts] + [read[order.finish()]]
    )
    return emitted


def _measure(name: str, found: float, mean: float, deviation: float) -> Measure:
    reach = _SIGMAS * deviation
    return Measure(name, found, mean, mean - reach, mean + reach, math.nan)


def _neighbours(file: NDArray[np.int32]) -> Measure:
    """The share of neighbours from one file; runs of equal ones have a known mean and variance (W. A. Wallis 1952)."""
    n = len(file)
    counts = np.bincount(file).astype(float)
    squares, cubes = float((counts**2).sum()), float((counts**3).sum())
    runs = (n * (n + 1.0) - squares) / n
    variance = (squares * (squares + n * (n + 1.0)) - 2.0 * n * cubes - float(n) ** 3) / (float(n) ** 2 * (n - 1.0))
    found = float(np.mean(file[1:] == file[:-1]))
    deviation = math.sqrt(max(0.0, variance)) / (n - 1)
    return _measure("neighbours from one source file", found, (n - runs) / (n - 1), deviation)


def _windows(file: NDArray[np.int32], tokens: NDArray[np.int64], window: int) -> Measure:
    """Pearson's chi-square of how many documents of each file begin in each window, by its degrees of freedom."""
    which = (np.cumsum(tokens) - tokens) // window
    windows = int(which[-1]) + 1
    per_file = np.bincount(file)
    rare = per_file < _LEAST_EXPECTED * windows
    number = np.where(rare, 0, np.cumsum(~rare))  # rare files together are number 0
    kinds = int(number.max()) + 1
    table = np.bincount(which * kinds + number[file], minlength=windows * kinds).reshape(windows, kinds).astype(float)
    table = table[:, table.sum(0) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    freedom = (windows - 1) * (table.shape[1] - 1)
    name = f"chi-square of source files in windows of {window:,} tokens, by degrees of freedom"
    if freedom == 0:
        return _measure(name, 1.0, 1.0, 0.0)
    chi_square = float(((table - expected) ** 2 / np.maximum(expected, 1e-12)).sum())
    return _measure(name, chi_square / freedom, 1.0, math.sqrt(2.0 / freedom))


def _correlation(place: NDArray[np.int64]) -> Measure:
    """Spearman's rank correlation of the position in the corpus with the position in the order."""
    n = len(place)
    apart = (place - np.arange(n)).astype(np.float64)
    found = 1.0 - 6.0 * float(np.dot(apart, apart)) / (n * (float(n) ** 2 - 1.0))
    return _measure("rank correlation with the order of the corpus", found, 0.0, 1.0 / math.sqrt(n - 1))


def _duplicate_distance(identity: NDArray[np.uint64]) -> Measure | None:
    """The mean distance of a document from the next one of the same text; None if no text occurs twice."""
    n = len(identity)
    ranked = np.argsort(identity, kind="stable")
    identity = identity[ranked]
    same = identity[1:] == identity[:-1]
    if not same.any():
        return None
    distances = np.diff(ranked)[same]
    sizes = np.diff(np.flatnonzero(np.concatenate([[True], ~same, [True]]))).astype(float)
    sizes = sizes[sizes > 1]
    gaps = sizes - 1.0
    mean = float((gaps * (n + 1.0) / (sizes + 1.0)).sum() / gaps.sum())
    # The span of g places among n, drawn without order, has this variance; its gaps are as many less one.
    spans = (n + 1.0) * (n - sizes) * 2.0 * (sizes - 1.0) / ((sizes + 1.0) ** 2 * (sizes + 2.0))
    deviation = math.sqrt(float(spans.sum())) / float(gaps.sum())
    return _measure("mean distance of a text from its next occurrence", float(distances.mean()), mean, deviation)

"""Framing: the tokens around a document's text (BOS, EOS), and fill in the middle. Ids, never text.

Fill in the middle: M. Bavarian and others, "Efficient Training of Language Models to Fill in the Middle" (2022). A
document is cut at two characters, and its parts are encoded by themselves and put in another order between sentinels,
so that a model learns to write what is missing: `PREFIX prefix SUFFIX suffix MIDDLE middle`, or, in the order
suffix-prefix-middle, `PREFIX SUFFIX suffix MIDDLE prefix middle`. What becomes of a document depends on its text and
the seed alone. `docs/format.md` states the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from tokenmill.encoding.splitmix import GOLDEN, mix64

_MOST_HEAD = 3


class Fim(NamedTuple):
    """How documents are taken apart."""

    rate: float
    """Share of the documents."""
    spm_rate: float
    """Share of those whose order is suffix, prefix, middle."""
    seed: int
    tokens: tuple[str, str, str]
    """Sentinels: prefix, middle, suffix."""
    ids: tuple[int, int, int]
    lead: str = ""
    """What comes before middle and suffix while they are encoded: for tokenizers that begin every text that they encode
    with a blank of their own, which stands before this then; its ids are taken away again."""
    lead_ids: tuple[int, ...] = ()


class Pieces(NamedTuple):
    """Texts to encode by themselves, in the order in which their tokens lie; arrays of shape `(pieces,)`."""

    texts: pa.LargeStringArray
    document: NDArray[np.int64]
    """Which document each is of; every document has one at least."""
    heads: NDArray[np.int64] | None
    """Ids that come before each, shape `(pieces, 3)`; after those, -1. None where nothing does."""
    has_lead: NDArray[np.bool_] | None = None
    """Whether its text begins with `Fim.lead`, shape `(pieces,)`; None where none does."""

    def without_leads(
        self, ids: NDArray[Any], counts: NDArray[np.int64], lead_ids: Sequence[int]
    ) -> tuple[NDArray[Any], NDArray[np.int64], int | None]:
        """Return ids and counts without those of leads, and a piece whose lead has other ids, if there is one."""
        if self.has_lead is None:
            return ids, counts, None
        pieces = np.flatnonzero(self.has_lead)
        at = (np.cumsum(counts) - counts)[pieces, None] + np.arange(len(lead_ids))
        short = counts[pieces] < len(lead_ids)
        wrong = short | (ids[np.minimum(at, max(0, len(ids) - 1))] != np.array(lead_ids)).any(axis=1)
        if wrong.any():
            return ids, counts, int(pieces[np.argmax(wrong)])
        kept = np.ones(len(ids), np.bool_)
        kept[at.reshape(-1)] = False
        return ids[kept], counts - self.has_lead * len(lead_ids), None

    def framed(
        self, ids: NDArray[Any], counts: NDArray[np.int64], *, eos_id: int, dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the tokens of all documents, and how many each has.

        Args:
            ids: of the pieces, one after the other.
            counts: ids of each piece.
            eos_id: ends each document.
            dtype: of the tokens.
        """
        head = np.zeros(len(counts), np.int64)
        if self.heads is not None:
            head = np.count_nonzero(self.heads >= 0, axis=1)
        is_last = np.append(self.document[1:] != self.document[:-1], True)[: len(counts)]
        sizes = head + counts + is_last
        ends = np.cumsum(sizes)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
        is_text = np.ones(len(tokens), np.bool_)
        for column in range(_MOST_HEAD if self.heads is not None else 0):
            assert self.heads is not None
            pieces = np.flatnonzero(head > column)
            at = ends[pieces] - sizes[pieces] + column
            tokens[at], is_text[at] = self.heads[pieces, column], False
        last = ends[is_last] - 1
        tokens[last], is_text[last] = eos_id, False
        tokens[is_text] = ids
        return tokens, np.diff(np.concatenate([[0], ends[is_last]]))


def join_ids(pieces: Iterable[ArrayLike]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the ids of all pieces one after the other, and where each begins: shapes `(tokens,)`, `(pieces + 1,)`."""
    arrays = [np.asarray(piece, np.uint32) for piece in pieces]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, np.uint32), *arrays]), offsets


def take_apart(
    documents: pa.LargeStringArray, hashes: NDArray[np.uint64], *, bos_id: int | None, fim: Fim | None
) -> Pieces:
    """Return what is to be encoded of documents, whose texts have these hashes (`text_xxh3`)."""
    count = len(documents)
    number = np.arange(count)
    if bos_id is None and fim is None:
        return Pieces(documents, number, None)
    heads = np.full((count, _MOST_HEAD), -1, np.int64)
    if bos_id is not None:
        heads[:, 0] = bos_id
    if fim is None or count == 0:
        return Pieces(documents, number, heads)
    draws = fim_draws(hashes, fim.seed)
    chosen = np.flatnonzero(draws[0] < fim.rate)
    if len(chosen) == 0:
        return Pieces(documents, number, heads)
    some = documents.take(pa.array(chosen))
    lengths = pc.utf8_length(some).to_numpy().astype(np.float64)
    cuts = np.sort(np.minimum(np.floor(draws[1:3, chosen] * (lengths + 1)), lengths), axis=0).astype(np.int64)
    is_spm = draws[3, chosen] < fim.spm_rate
    prefix_id, middle_id, suffix_id = fim.ids
    begins = [] if bos_id is None else [bos_id]
    parts: list[tuple[list[str], list[list[int]]]] = []
    lead = fim.lead
    for text, low, high, spm in zip(some.to_pylist(), *cuts.tolist(), is_spm.tolist(), strict=True):
        prefix, middle, suffix = text[:low], text[low:high], text[high:]
        middle, suffix = lead + middle if middle else "", lead + suffix if suffix else ""
        if spm:
            parts.append(([suffix, prefix, middle], [[*begins, prefix_id, suffix_id], [middle_id], []]))
        else:
            parts.append(([prefix, suffix, middle], [[*begins, prefix_id], [suffix_id], [middle_id]]))
    repeats = np.ones(count, np.int64)
    repeats[chosen] = 3
    document = np.repeat(number, repeats)
    is_apart = np.repeat(repeats, repeats) == 3
    heads = heads[document]
    heads[is_apart] = [[*ids, -1, -1, -1][:_MOST_HEAD] for _, of in parts for ids in of]
    texts = [text for of, _ in parts for text in of]
    source = pa.concat_arrays([documents, pa.array(texts, pa.large_string())])
    at = document.copy()
    at[is_apart] = count + np.arange(len(texts))
    has_lead = None
    if lead:
        has_lead = np.zeros(len(at), np.bool_)
        has_lead[is_apart] = [
            bool(text) and number != spm
            for (of, _), spm in zip(parts, is_spm.tolist(), strict=True)
            for number, text in enumerate(of)
        ]
    return Pieces(source.take(pa.array(at)), document, heads, has_lead)


def fim_draws(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Return four numbers from 0 to below 1 for each text, shape `(4, texts)`: outputs of SplitMix64.

    Whether it is taken apart, two cuts as shares of its characters, and its order.
    """
    found = np.empty((4, len(hashes)))
    for number in range(4):
        mixed = mix64(hashes + np.uint64((seed + number + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF))
        found[number] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def put_together(
    ids: Sequence[int], fim_ids: tuple[int, int, int], *, bos_id: int | None, eos_id: int
) -> list[list[int]] | None:
    """Return the ids of a document's parts, prefix, middle, suffix; None if it was not taken apart.

    In the order suffix, prefix, middle nothing says where the prefix ends, so the first two are one part.
    """
    body = list(ids)
    if body[:1] == [bos_id]:
        del body[0]
    if body[-1:] == [eos_id]:
        del body[-1]
    prefix_id, middle_id, suffix_id = fim_ids
    if body[:1] != [prefix_id] or middle_id not in body or suffix_id not in body:
        return None
    middle = body.index(middle_id)
    if body[1] == suffix_id:
        return [body[middle + 1 :], body[2:middle]]
    suffix = body.index(suffix_id)
    return [body[1:suffix], body[middle + 1 :], body[suffix + 1 : middle]]

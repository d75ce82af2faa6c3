"""Sample: a corpus → some of its documents, the same ones each time. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenmill.corpus.choice import format_of
from tokenmill.corpus.corpus import Corpus
from tokenmill.corpus.reader import Span, SpanReader, Texts, concatenate
from tokenmill.encoding.encoder import validated_texts
from tokenmill.errors import SourceError

_MOST_FILES = 256
_PLACES = 4
"""Places of a file that documents are taken from, where it can be read from the middle."""
_SPAN_ROWS = 32


class Sample(NamedTuple):
    """Documents of a corpus."""

    texts: pa.LargeStringArray
    """None is null or empty; shape `(documents,)`."""
    file: NDArray[np.int64]
    """Which of `paths` each comes from."""
    paths: list[str]
    metadata: pa.Table | None
    """A row for each; None where no columns are asked for."""
    corpus_files: int
    weight: NDArray[np.float64]
    """How many documents of the corpus each stands for, shape `(documents,)`."""
    is_from_beginnings: bool
    """Whether files that cannot be read from the middle gave their first documents only."""
    bad: dict[str, str]
    """The reason of the first bad row of each file that has rows left out for being bad."""


def take_sample(corpus: Corpus, nbytes: int) -> Sample:
    """Take about `nbytes` of text, from each file as much as is its share of the text, as far as can be told.

    Parquet files give documents from several places, others their first ones.

    Raises:
        SourceError: a file is damaged, or there is no text.
    """
    count = len(corpus.files)
    chosen = [i * count // min(count, _MOST_FILES) for i in range(min(count, _MOST_FILES))]
    scale = sum(each.nbytes for each in corpus.files) / max(1, sum(corpus.files[index].nbytes for index in chosen))
    held = [corpus.open(index, span_rows=_SPAN_ROWS).figures() for index in chosen]
    share = nbytes / max(1, sum(figures.text_nbytes for figures in held))
    texts: list[pa.Array] = []
    metadata: list[pa.Table] = []
    file: list[int] = []
    weight: list[float] = []
    bad_rows: dict[str, str] = {}
    is_cut = False
    for number, (index, figures) in enumerate(zip(chosen, held, strict=True)):
        if figures.rows == 0:
            continue
        reader, is_parquet = corpus.open(index, span_rows=_SPAN_ROWS), format_of(corpus.files[index].path) == "parquet"
        looked_at = kept = 0
        for found in _read(reader, max(1.0, figures.text_nbytes * share), from_middle=is_parquet):
            strings, bad = validated_texts([found])
            has_text = pc.greater(pc.binary_length(strings), 0).fill_null(False).to_numpy(zero_copy_only=False).copy()
            has_text[list(bad)] = False
            if bad:
                bad_rows.setdefault(corpus.files[index].path, next(iter(bad.values())))
            texts.append(strings.filter(pa.array(has_text)))
            looked_at, kept = looked_at + len(strings), kept + len(texts[-1])
            if found.metadata is not None:
                metadata.append(found.metadata.filter(pa.array(has_text)))
        is_cut = is_cut or (not is_parquet and looked_at < figures.rows)
        file += [number] * kept
        weight += [scale * figures.rows / max(1, looked_at)] * kept
    if not file:
        found_bad = "".join(f"; {path}: {reason}" for path, reason in list(bad_rows.items())[:3])
        names = corpus.name_of(corpus.files[0].path) if count == 1 else f"{corpus.location.name}: {count} files"
        raise SourceError(
            f"{names}: no text in what was looked at{found_bad}",
            next_step="give files that have text; another column than 'text' is named with --text-column",
        )
    return Sample(
        concatenate(texts).cast(pa.large_string()),
        np.array(file, np.int64),
        [corpus.files[index].path for index in chosen],
        pa.concat_tables(metadata) if metadata else None,
        count,
        np.array(weight, np.float64),
        is_cut,
        bad_rows,
    )


def _read(reader: SpanReader, nbytes: float, *, from_middle: bool) -> Iterator[Texts]:
    """Yield the texts of some spans of a file until they are `nbytes`, or a little more."""
    if not from_middle:
        read = 0
        for span in reader.spans():
            yield (found := reader.read(span))
            read += found.array.nbytes
            if read >= nbytes:
                return
        return
    spans = list(reader.spans())
    each = max(1.0, sum(span.text_nbytes for span in spans) / max(1, len(spans)))
    wanted = min(len(spans), max(1, round(nbytes / each)))
    places = min(_PLACES, wanted)
    chosen: list[Span] = []
    for place in range(places):
        first = place * len(spans) // places
        chosen += spans[first : first + -(-wanted // places)]
    chosen = sorted(set(chosen))
    reader.keep_only(chosen)
    for span in chosen:
        reader.prefetch(span)
        yield reader.read(span)

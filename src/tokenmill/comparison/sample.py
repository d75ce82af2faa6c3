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
    corpus_documents: int
    """Estimate, as is the size of their text."""
    corpus_text_nbytes: int
    is_from_beginnings: bool
    """Whether files that cannot be read from the middle gave their first documents only."""
    bad: dict[str, str]
    """Of files with rows that were left out for being bad, the reason of the first one."""


def take_sample(corpus: Corpus, nbytes: int) -> Sample:
    """Take about `nbytes` of text, from each file as much as is its share of the corpus.

    Parquet files give documents from several places, others their first ones.

    Raises:
        SourceError: a file is damaged, or there is no text.
    """
    count = len(corpus.files)
    chosen = [i * count // min(count, _MOST_FILES) for i in range(min(count, _MOST_FILES))]
    sizes = np.array([corpus.files[index].nbytes for index in chosen], np.float64)
    scale = sum(file.nbytes for file in corpus.files) / max(1.0, float(sizes.sum()))
    wanted = np.maximum(1.0, sizes / max(1.0, sizes.sum()) * nbytes)
    texts: list[pa.Array] = []
    metadata: list[pa.Table] = []
    file: list[int] = []
    documents = text_nbytes = 0.0
    bad_rows: dict[str, str] = {}
    is_cut = False
    for number, index in enumerate(chosen):
        figures = corpus.open(index, span_rows=_SPAN_ROWS).figures()
        if figures.rows == 0:
            continue
        reader = corpus.open(index, span_rows=_SPAN_ROWS)
        looked_at = held = kept = 0
        for found in _read(reader, wanted[number], from_middle=format_of(corpus.files[index].path) == "parquet"):
            strings, bad = validated_texts([found])
            has_text = pc.greater(pc.binary_length(strings), 0).fill_null(False).to_numpy(zero_copy_only=False).copy()
            has_text[list(bad)] = False
            if bad:
                bad_rows.setdefault(corpus.files[index].path, next(iter(bad.values())))
            texts.append(strings.filter(pa.array(has_text)))
            looked_at, kept = looked_at + len(strings), kept + len(texts[-1])
            held += pc.sum(pc.binary_length(texts[-1])).as_py() or 0
            file += [number] * len(texts[-1])
            if found.metadata is not None:
                metadata.append(found.metadata.filter(pa.array(has_text)))
        is_cut = is_cut or looked_at < figures.rows
        documents += scale * figures.rows * kept / max(1, looked_at)
        text_nbytes += scale * figures.rows * held / max(1, looked_at)
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
        round(documents),
        round(text_nbytes),
        is_cut and any(format_of(corpus.files[index].path) != "parquet" for index in chosen),
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

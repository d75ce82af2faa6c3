"""Preflight: what a run will read, make and need, estimated from footers and a small sample.

Decides nothing about bytes; `pretokenize` refuses early when the disk cannot hold the result.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from tokenmill.corpus.choice import format_of
from tokenmill.corpus.corpus import Corpus
from tokenmill.corpus.reader import Figures, SpanReader, Texts
from tokenmill.encoding.encoder import Encoder
from tokenmill.errors import SourceError, StorageError
from tokenmill.pipeline.driver import BATCH_NBYTES, BATCHES_AHEAD
from tokenmill.pipeline.local import BATCHES_QUEUED
from tokenmill.recipe import Recipe

_FOOTERS = 16
_SAMPLES = 3
_SAMPLE_ROWS = 32
_SAMPLE_TEXT_NBYTES = 1 << 18
_SIDECAR_NBYTES_PER_DOCUMENT = 16
_BASE_MEMORY_NBYTES = 400 << 20
"""Interpreter, libraries and two tokenizers, measured."""
_MEMORY_PER_TEXT = 4
"""Bytes in use per byte of text being encoded, measured."""

SHARDS_PASSING = 5
"""Shards on a disk that they only pass through: one each written, published and sent, and two that wait for that."""


class Preflight(msgspec.Struct, frozen=True):
    """A plan's figures. Those named `estimated_*` come from a sample."""

    files: int
    source_nbytes: int
    rows: int
    rows_exact: bool
    """Whether all rows were counted; else `rows` is extrapolated."""
    estimated_corpus_tokens: int
    tokens: int
    """To be written: the corpus, or `total_tokens` if that is less."""
    done_tokens: int
    """Made by an earlier run."""
    shards: int
    dtype: str
    disk_needed_nbytes: int
    """Beyond what finished shards of an earlier run already take."""
    disk_free_nbytes: int
    estimated_memory_nbytes: int
    estimated_seconds: float
    notes: list[str] = []
    """What a user should know of the corpus and the tokenizer."""


def preflight(
    recipe: Recipe, corpus: Corpus, encoder: Encoder, root: Path, *, workers: int, done_tokens: int = 0
) -> Preflight:
    """Read some footers, encode a few rows, look at the disk.

    Raises:
        SourceError: the corpus has no rows, or a file is not usable.
    """
    sizes = [file.nbytes for file in corpus.files]
    probed = _spread(len(sizes), _FOOTERS)
    opened = [corpus.open(index, span_rows=_SAMPLE_ROWS) for index in probed]
    held = [file.figures() for file in opened]
    scale = sum(sizes) / max(1, sum(sizes[index] for index in probed))
    rows = round(sum(figures.rows for figures in held) * scale)
    if recipe.text_separator is None and all(format_of(file.path) == "text" for file in corpus.files):
        rows = len(sizes)  # each is a document
    text_nbytes = sum(figures.text_nbytes for figures in held) * scale
    if rows == 0:
        raise SourceError(
            f"{corpus.location.name}: {len(sizes)} files with no rows at all",
            next_step="give the directory of a corpus that has text",
        )
    sample = _sample([pair for pair in zip(opened, held, strict=True) if pair[1].rows], encoder)
    if sample.told_nbytes * 4 < sample.held_nbytes:  # a dictionary holds repeated texts once
        text_nbytes = rows * sample.held_nbytes / sample.rows
    corpus_tokens = round(text_nbytes * sample.tokens_per_nbyte)
    tokens = min(corpus_tokens, recipe.total_tokens or corpus_tokens)
    itemsize = encoder.dtype.itemsize
    share = tokens / max(1, corpus_tokens)
    sidecar_nbytes = _SIDECAR_NBYTES_PER_DOCUMENT + sample.metadata_nbytes
    disk = (tokens - done_tokens) * itemsize + round(rows * share * sidecar_nbytes)
    empty = [column.name for column in corpus.metadata if column.name not in sample.filled_columns]
    doubts = [f"no row that was looked at has a value for the metadata columns {', '.join(empty)}"] if empty else []
    return Preflight(
        files=len(sizes),
        source_nbytes=sum(sizes),
        rows=rows,
        rows_exact=len(probed) == len(sizes) and all(figures.exact for figures in held),
        estimated_corpus_tokens=corpus_tokens,
        tokens=tokens,
        done_tokens=done_tokens,
        shards=-(-tokens // recipe.shard_size),
        dtype=encoder.dtype.name,
        disk_needed_nbytes=max(0, disk),
        disk_free_nbytes=shutil.disk_usage(_existing(root)).free,
        estimated_memory_nbytes=_BASE_MEMORY_NBYTES
        + round(min(text_nbytes, (workers + BATCHES_QUEUED + BATCHES_AHEAD) * BATCH_NBYTES) * _MEMORY_PER_TEXT)
        + round(_held_rows(recipe, rows, text_nbytes / rows) * corpus_tokens / rows * itemsize),
        estimated_seconds=max(0, tokens - done_tokens) / (sample.tokens_per_second * workers),
        notes=[*corpus.notes, *encoder.notes, *doubts],
    )


def check_disk(plan: Preflight, root: Path, *, shards_at_once: int | None = None) -> None:
    """Refuse what will not fit, with a tenth allowed for the estimate.

    Args:
        plan: of the run.
        root: the data root.
        shards_at_once: how many are on the disk at a time; None: all.

    Raises:
        StorageError: the data root's disk is too small.
    """
    needed = plan.disk_needed_nbytes
    if shards_at_once is not None:
        needed = min(needed, needed * shards_at_once // max(1, plan.shards))
    if needed * 0.9 > plan.disk_free_nbytes:
        raise StorageError(
            f"{root}: the disk cannot hold the result: about {needed / 1e9:.2f} GB needed, "
            f"{plan.disk_free_nbytes / 1e9:.2f} GB free",
            next_step="make room, choose another directory, or take less with --total-tokens",
        )


class _Sample(NamedTuple):
    rows: int
    """Rows of the files that were looked at, not only the rows that were read."""
    told_nbytes: float
    """Text of these files, by what they say."""
    held_nbytes: float
    """The same, by their first rows."""
    metadata_nbytes: float
    """Mean size of a row's metadata."""
    filled_columns: set[str]
    """Metadata columns that have a value somewhere."""
    tokens_per_nbyte: float
    tokens_per_second: float
    """Tokens per second of one thread."""


def _sample(filled: list[tuple[SpanReader, Figures]], encoder: Encoder) -> _Sample:
    """Encode the first rows of a few files."""
    rows = sampled_rows = encoded_nbytes = tokens = metadata_nbytes = 0
    held_nbytes = told_nbytes = 0.0
    filled_columns: set[str] = set()
    seconds = 0.0
    for index in _spread(len(filled), _SAMPLES):
        file, figures = filled[index]
        found = file.sample()
        text = found.array
        shortened = _beginnings(text)
        begin = time.perf_counter()
        encoded = encoder.encode(Texts(shortened), where=file.name, first_row=0, on_bad_rows="skip")
        seconds += time.perf_counter() - begin
        rows += len(text)
        nbytes = encoded.text_nbytes if shortened is text else text.nbytes
        held_nbytes += figures.rows * nbytes / max(1, len(text))
        told_nbytes += figures.text_nbytes
        sampled_rows += figures.rows
        encoded_nbytes += encoded.text_nbytes
        tokens += len(encoded.tokens)
        if found.metadata is not None:
            metadata_nbytes += found.metadata.nbytes
            filled_columns |= {name for name in found.metadata.column_names if found.metadata[name].drop_null()}
    return _Sample(
        sampled_rows,
        told_nbytes,
        held_nbytes,
        metadata_nbytes / rows,
        filled_columns,
        tokens / max(1, encoded_nbytes),
        max(1, tokens) / max(1e-9, seconds),
    )


def _beginnings(texts: pa.Array) -> pa.Array:
    """Return texts without what is too long to be encoded for an estimate."""
    if texts.nbytes <= _SAMPLE_TEXT_NBYTES * len(texts) or pa.types.is_dictionary(texts.type):
        return texts
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    pieces = pc.binary_slice(texts.cast(binary.get(texts.type, texts.type)), 0, _SAMPLE_TEXT_NBYTES)
    return pa.array([None if p is None else p.decode(errors="ignore") for p in pieces.to_pylist()], pa.large_string())


def _held_rows(recipe: Recipe, rows: int, row_nbytes: float) -> float:
    """Return rows whose tokens are in memory: a batch stays until its last row leaves the shuffle."""
    if recipe.order == "sequential":
        return 0
    batch_rows = max(1.0, BATCH_NBYTES / max(1.0, row_nbytes))
    return min(rows, recipe.buffer_size * (1 + math.log(batch_rows)))


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` indices spread evenly over `count`."""
    return sorted({i * count // min(count, wanted) for i in range(min(count, wanted))})


def _existing(path: Path) -> Path:
    """Return the nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path

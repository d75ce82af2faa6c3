"""Provenance: the text of a sample, where it came from, and which samples hold a row of the source. Reads only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from tokenmill.encoding.framing import put_together
from tokenmill.encoding.hf import HFBackend
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.errors import QueryError, TokenizerError
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.documents import DocumentPart
from tokenmill.loading.view import OpenView, open_root

_MOST_LISTED = 10
"""Samples with the same id."""


class DocumentSlice(msgspec.Struct):
    """The part of a document that lies among some tokens."""

    source: str
    row: int
    begin: int
    """Its first token among them, counted in the whole stream; likewise `end`, one past the last."""
    end: int
    document_begin: int
    """The same, counted in the document."""
    document_end: int
    document_tokens: int
    """Number of tokens of the whole document, EOS included."""
    text_xxh3: str | None = None
    """Hash of its text, as 16 hexadecimal digits; None where the sidecar has none."""
    metadata: dict[str, object] = {}
    """Values of the metadata columns of the recipe, by name."""


class Provenance(msgspec.Struct):
    """Tokens of the stream and the documents they belong to."""

    sample: int | None
    """The sample that holds all of them; None if none does."""
    sample_id: str | None
    """As 16 hexadecimal digits of the integer; None where the data root is not consolidated."""
    begin: int
    end: int
    documents: list[DocumentSlice]


def where_sample(root: Path, sample: int) -> Provenance:
    """Return where the tokens of a sample come from.

    Raises:
        QueryError: there is no such sample.
        DataRootError: the data root has no manifest, or is not finished.
    """
    found = open_root(root)
    begin, end = _sample_tokens(found, sample)
    return Provenance(sample, _id_of(found, sample), begin, end, _document_slices(found, begin, end))


def where_token(root: Path, token: int) -> Provenance:
    """Return where a token of the stream comes from; raises as `where_sample`."""
    return where_range(open_root(root), token, token + 1)


def where_range(found: DataRoot | OpenView, begin: int, end: int) -> Provenance:
    """Return where tokens `begin` to before `end` of the stream come from; raises as `where_sample`."""
    stream = found.tokens()
    stream.read(begin, end)  # raises for tokens after the end
    sample = begin // found.seq_len
    is_inside = (end - 1) // found.seq_len == sample < stream.tokens // found.seq_len
    number, name = (sample, _id_of(found, sample)) if is_inside else (None, None)
    return Provenance(number, name, begin, end, _document_slices(found, begin, end))


def where_sample_id(root: Path, sample_id: str) -> list[Provenance]:
    """Return where the samples with an id come from, one for each (the same text may occur twice)."""
    found = open_root(root)
    try:
        number = int(sample_id, 16)
        wanted = np.uint64(number)
    except (ValueError, OverflowError):
        raise QueryError(
            f"sample id {sample_id!r}: expected up to 16 hexadecimal digits", next_step="see: tokenmill show --sample"
        ) from None
    samples = np.flatnonzero(found.sample_ids() == wanted).tolist()
    if not samples:
        raise QueryError(f"{root}: no sample has the id {number:016x}", next_step="check the id and the data root")
    return [where_sample(root, sample) for sample in samples[:_MOST_LISTED]]


class Samples(msgspec.Struct):
    """The samples that hold a source row."""

    source: str
    row: int
    begin: int | None
    """Its first token, counted in the whole stream; None in a view that puts samples in an order of their own."""
    end: int | None
    samples: list[int]
    """Numbers of the whole samples; tokens after the last whole sample are in none."""


def where_row(root: Path, source: str, row: int) -> Samples:
    """Return the samples that hold a row of a source file; raises as `where_sample`."""
    found = open_root(root)
    index = found.documents()
    file = next((file for file in found.files if file.path == source), None)
    if file is None:
        raise QueryError(
            f"{source}: not a source file of this data set, which has {len(found.files)}, "
            f"such as {found.files[0].path}",
            next_step="give the path as the manifest lists it, relative to the corpus, in a view after NAME/",
        )
    hit = index.find_row(source, row)
    if hit is None:
        if file.rows is not None and row >= file.rows:
            raise QueryError(
                f"row {row} of {source}: the file has {file.rows} rows",
                next_step=f"ask for one from 0 to {file.rows - 1}" if file.rows else "ask for a row of another file",
            )
        rows = "which was not reached" if file.rows is None else f"which has {file.rows} rows"
        raise QueryError(
            f"row {row} of {source}, {rows}, is in no sample: it has no text, lies after the end of the stream, or is "
            "left out of the view",
            next_step="ask for another row; the ledger (tokenmill info) has the counts",
        )
    document, samples = hit
    if isinstance(found, OpenView) and found.cuts_documents:
        return Samples(source, row, None, None, samples)
    end = min(document.start + document.tokens, found.tokens().tokens)
    return Samples(source, row, document.start, end, samples)


class Token(NamedTuple):
    """A token as a person reads it."""

    id: int
    text: str
    """What it adds to the text; empty while a character is not whole."""


class Sample(NamedTuple):
    """A sample as a person reads it."""

    place: Provenance
    tokens: list[Token]
    originals: tuple[str | None, ...] = ()
    """The original text of each document that was taken apart for fill in the middle and is at hand as a whole."""


def show(root: Path, sample: int) -> Sample:
    """Return the text of a sample, token by token.

    Raises:
        QueryError: there is no such sample.
        TokenizerError: the tokenizer is not at hand, or is not the one that made the tokens.
        DataRootError: the data root has no manifest, or is not finished.
    """
    (shown,) = show_samples(open_root(root), [sample])
    return shown


def show_samples(found: DataRoot | OpenView, samples: Sequence[int], *, limit: int | None = None) -> Iterator[Sample]:
    """Yield the text of samples, of each the first `limit` tokens; in ascending order they are found fastest.

    Raises:
        QueryError, TokenizerError, DataRootError: as `show`.
    """
    stream, backend = found.tokens(), open_backend(found)
    stretches = []
    for sample in samples:
        begin, end = _sample_tokens(found, sample)
        stretches.append((begin, end if limit is None else min(end, begin + limit)))
    of_all = found.documents().parts_of(stretches)
    for sample, (begin, end), parts in zip(samples, stretches, of_all, strict=True):
        place = Provenance(sample, _id_of(found, sample), begin, end, [_slice_of(part) for part in parts])
        tokens = stream.read(begin, end).tolist()
        documents = [tokens[part.begin - begin : part.end - begin] for part in parts]
        pieces = [piece for ids in documents for piece in backend.pieces(ids)]
        pieces += [""] * (len(tokens) - len(pieces))  # padding
        originals = tuple(_original(found, backend, part) for part in place.documents)
        yield Sample(place, [Token(*both) for both in zip(tokens, pieces, strict=True)], originals)


def _original(found: DataRoot | OpenView, backend: HFBackend, part: DocumentSlice) -> str | None:
    """Return the text of a document as it was before it was taken apart; None if it was not, or is not whole here."""
    recorded = found.tokenizer
    begin, end = part.begin - part.document_begin, part.end + part.document_tokens - part.document_end
    is_whole = (begin, end) == (part.begin, part.end) or isinstance(found, DataRoot)
    if recorded is None or recorded.fim_ids is None or not is_whole or end > found.tokens().tokens:
        return None
    ids = found.tokens().read(begin, end).tolist()
    parts = put_together(ids, recorded.fim_ids, bos_id=recorded.bos_id, eos_id=recorded.eos_id)
    if parts is None:
        return None
    return backend.decode([token for each in parts for token in each])


def open_backend(found: DataRoot | OpenView) -> HFBackend:
    """Return the reference backend with the tokenizer that made the tokens of a data root.

    Raises:
        TokenizerError: the tokenizer is not at hand, or is another one.
    """
    recorded = found.tokenizer
    assert recorded is not None
    tokenizer = load_tokenizer(recorded.name, eos_token=found.eos_token, revision=recorded.revision)
    if tokenizer.sha256 != recorded.sha256:
        raise TokenizerError(
            f"tokenizer {recorded.name}: is not the one that made {found.root}: expected tokenizer.json sha256 "
            f"{recorded.sha256}, found {tokenizer.sha256}",
            next_step="put the tokenizer back where it was",
        )
    return HFBackend(tokenizer, special_in_text="parse")


def _sample_tokens(found: DataRoot | OpenView, sample: int) -> tuple[int, int]:
    samples = found.tokens().tokens // found.seq_len
    if not 0 <= sample < samples:
        raise QueryError(
            f"sample {sample}: the data set has {samples} samples of {found.seq_len} tokens",
            next_step=f"ask for one from 0 to {samples - 1}" if samples else "consolidate it with a shorter --seq-len",
        )
    return sample * found.seq_len, (sample + 1) * found.seq_len


def _id_of(found: DataRoot | OpenView, sample: int) -> str | None:
    if found.record is None or not found.record.complete:
        return None
    return f"{int(found.sample_ids()[sample]):016x}"


def _readable(value: object) -> object:
    """Return a value as JSON has it, which has no word for numbers that are none, or have no end."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _document_slices(found: DataRoot | OpenView, begin: int, end: int) -> list[DocumentSlice]:
    return [_slice_of(part) for part in found.documents().parts_between(begin, end)]


def _slice_of(part: DocumentPart) -> DocumentSlice:
    document, first, last = part
    return DocumentSlice(
        document.source,
        document.row,
        first,
        last,
        first - document.start,
        last - document.start,
        document.tokens,
        None if document.text_xxh3 is None else f"{document.text_xxh3:016x}",
        {name: _readable(value) for name, value in document.metadata.items()},
    )

"""Look: questions a person has about a data root, and their answers as data. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill import layout
from tokenmill.documents import Document
from tokenmill.encode_hf import HFEngine
from tokenmill.errors import DataRootError, QueryError, TokenizerError
from tokenmill.journal import elsewhere
from tokenmill.load import DataRoot, open_root
from tokenmill.manifest import Consolidated, FileLedger, Manifest, TokenizerRecord
from tokenmill.options import StoreOptions
from tokenmill.recipe import Recipe
from tokenmill.redact import printable
from tokenmill.tokenizer import MAX_IDS, load_tokenizer

_CHUNK_TOKENS = 1 << 22
_TOP = 20
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_LISTED_DUPLICATES = 10


class ShardInfo(msgspec.Struct):
    """A shard, or the stretch of `tokens.bin` that holds its tokens."""

    name: str
    tokens: int
    documents: int
    sha256: str


class Info(msgspec.Struct, kw_only=True):
    """What a data root is and how it was made."""

    root: str
    complete: bool
    stored_as: list[str]
    """`shards`, `tokens.bin`, or both."""
    tokens: int
    dtype: str
    documents: int | None
    """None where there is no manifest; likewise below."""
    recipe: Recipe | None
    fingerprint: str | None
    tokenizer: TokenizerRecord | None
    software: dict[str, str]
    files: int | None
    source_nbytes: int | None
    ledger: list[FileLedger]
    shards: list[ShardInfo]
    consolidated: Consolidated | None
    notes: list[str] = []
    """What a user should know of the corpus and the tokenizer."""
    elsewhere: dict[str, str] = {}
    """Files that are not here on purpose, by name, and the store that has them."""


def info(root: Path | str, store: StoreOptions = StoreOptions()) -> Info:  # noqa: B008  # immutable
    """What is recorded of a data root, finished or not, here or in a bucket (`s3://BUCKET/PREFIX`); reads no token.

    Raises:
        DataRootError: nothing is recorded.
        StorageError: the bucket cannot be read.
    """
    if "://" in str(root):
        return _info_of_store(str(root), store)
    here = Path(root)
    found = open_root(here)
    return _info(
        printable(here),
        found.manifest,
        found.record,
        {path.name for path in here.glob("*") if path.is_file()},
        elsewhere(here),
    )


def _info_of_store(url: str, options: StoreOptions) -> Info:
    from tokenmill.downloads import stored_records  # needs what a local data root does not
    from tokenmill.stores import open_store

    store = open_store(url, options)
    present = store.files()
    manifest, record = stored_records(store, present)
    if manifest is None and record is None:
        raise DataRootError(
            f"{url}: expected {layout.MANIFEST} or {layout.CONSOLIDATED} there, found neither",
            next_step="check the URL; it must be that of a data set which tokenmill upload sent",
        )
    return _info(url, manifest, record, set(present), {})


def _info(
    root: str, manifest: Manifest | None, record: Consolidated | None, present: set[str], gone: dict[str, str]
) -> Info:
    stored = [layout.TOKENS] if layout.TOKENS in present and record and record.complete else []
    if any(layout.shard_index(name) is not None for name in present):
        stored.insert(0, "shards")
    if record is not None and manifest is not None:
        record = msgspec.structs.replace(record, shards=[])  # the manifest's own, listed below
    if manifest is not None:
        shards = [
            ShardInfo(layout.shard_name(shard.index), shard.tokens, shard.documents, shard.sha256)
            for shard in manifest.shards
        ]
    else:
        copied = record.shards if record else []
        shards = [ShardInfo(layout.shard_name(i), shard.tokens, 0, shard.sha256) for i, shard in enumerate(copied)]
    return Info(
        root=root,
        complete=manifest.complete if manifest else record is not None and record.complete,
        stored_as=stored,
        tokens=manifest.tokens if manifest else record.tokens if record else 0,
        dtype=manifest.recipe.dtype if manifest else record.dtype if record else "",
        documents=manifest.documents if manifest else None,
        recipe=manifest.recipe if manifest else None,
        fingerprint=manifest.fingerprint if manifest else None,
        tokenizer=msgspec.structs.replace(manifest.tokenizer, probe={}) if manifest else None,
        software=manifest.software if manifest else {},
        files=len(manifest.files) if manifest else None,
        source_nbytes=sum(file.nbytes for file in manifest.files) if manifest else None,
        ledger=manifest.ledger if manifest else [],
        shards=shards,
        consolidated=record,
        notes=manifest.notes if manifest else [],
        elsewhere=dict(sorted(gone.items())),
    )


class Stretch(msgspec.Struct):
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
    """Of the whole document, EOS included."""


class Place(msgspec.Struct):
    """Tokens of the stream and the documents they belong to."""

    sample: int | None
    sample_id: str | None
    """As 16 hexadecimal digits of the integer; None where the data root is not consolidated."""
    begin: int
    end: int
    documents: list[Stretch]


def where_sample(root: Path, sample: int) -> Place:
    """Where the tokens of a sample come from.

    Raises:
        QueryError: there is no such sample.
        DataRootError: the data root has no manifest, or is not finished.
    """
    found = open_root(root)
    begin, end = _sample_tokens(found, sample)
    return Place(sample, _id_of(found, sample), begin, end, _stretches(found, begin, end))


def where_token(root: Path, token: int) -> Place:
    """Where a token of the stream comes from; raises as `where_sample`."""
    found = open_root(root)
    found.tokens().read(token, token + 1)  # refuses one behind the end
    sample = token // found.seq_len
    if sample >= found.tokens().tokens // found.seq_len:
        return Place(None, None, token, token + 1, _stretches(found, token, token + 1))
    return Place(sample, _id_of(found, sample), token, token + 1, _stretches(found, token, token + 1))


def where_sample_id(root: Path, sample_id: str) -> list[Place]:
    """Where the samples with an id come from, one for each (the same text may occur twice)."""
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
    return [where_sample(root, sample) for sample in samples[:_LISTED_DUPLICATES]]


class Samples(msgspec.Struct):
    """The samples that hold a source row."""

    source: str
    row: int
    begin: int
    end: int
    samples: list[int]
    """Those that are whole; tokens behind the last whole sample are in none."""


def where_row(root: Path, source: str, row: int) -> Samples:
    """The samples that hold a row of a source file; raises as `where_sample`."""
    found = open_root(root)
    index = found.documents()
    assert found.manifest is not None
    file = next((file for file in found.manifest.files if file.path == source), None)
    if file is None:
        raise QueryError(
            f"{source}: not a source file of this data set, which has {len(found.manifest.files)}, "
            f"such as {found.manifest.files[0].path}",
            next_step="give the path as the manifest lists it, relative to the corpus",
        )
    document = index.of_row(source, row)
    if document is None:
        rows = "which was not reached" if file.rows is None else f"which has {file.rows} rows"
        raise QueryError(
            f"row {row} of {source}, {rows}, is in no sample: it has no text, or lies behind the end of the stream",
            next_step="ask for another row; the ledger (tokenmill info) has the counts",
        )
    end = min(document.start + document.tokens, found.manifest.tokens)
    whole = found.manifest.tokens // found.seq_len
    samples = range(document.start // found.seq_len, min(whole, (end - 1) // found.seq_len + 1))
    return Samples(source, row, document.start, end, list(samples))


class Token(NamedTuple):
    """A token as a person reads it."""

    id: int
    text: str
    """What it adds to the text; empty while a character is not whole."""


class Sample(NamedTuple):
    """A sample as a person reads it."""

    place: Place
    tokens: list[Token]


def show(root: Path, sample: int) -> Sample:
    """The text of a sample, token by token.

    Raises:
        QueryError: there is no such sample.
        TokenizerError: the tokenizer is not at hand, or is not the one that made the tokens.
        DataRootError: the data root has no manifest, or is not finished.
    """
    found = open_root(root)
    place = where_sample(root, sample)
    tokens = found.tokens().read(place.begin, place.end).tolist()
    engine = _engine(found)
    documents = [tokens[part.begin - place.begin : part.end - place.begin] for part in place.documents]
    pieces = [piece for ids in documents for piece in engine.pieces(ids)]
    return Sample(place, [Token(*both) for both in zip(tokens, pieces, strict=True)])


def _engine(found: DataRoot) -> HFEngine:
    """The reference engine with the tokenizer that made the tokens."""
    assert found.manifest is not None
    recorded = found.manifest.tokenizer
    tokenizer = load_tokenizer(recorded.name, eos_token=found.manifest.recipe.eos_token, revision=recorded.revision)
    if tokenizer.sha256 != recorded.sha256:
        raise TokenizerError(
            f"tokenizer {recorded.name}: is not the one that made {found.root}: expected tokenizer.json sha256 "
            f"{recorded.sha256}, found {tokenizer.sha256}",
            next_step="put the tokenizer back where it was",
        )
    return HFEngine(tokenizer, special_in_text="parse")


def _sample_tokens(found: DataRoot, sample: int) -> tuple[int, int]:
    samples = found.tokens().tokens // found.seq_len
    if not 0 <= sample < samples:
        raise QueryError(
            f"sample {sample}: the data set has {samples} samples of {found.seq_len} tokens",
            next_step=f"ask for one from 0 to {samples - 1}" if samples else "consolidate it with a shorter --seq-len",
        )
    return sample * found.seq_len, (sample + 1) * found.seq_len


def _id_of(found: DataRoot, sample: int) -> str | None:
    if found.record is None or not found.record.complete:
        return None
    return f"{int(found.sample_ids()[sample]):016x}"


def _stretches(found: DataRoot, begin: int, end: int) -> list[Stretch]:
    def stretch(document: Document) -> Stretch:
        first, last = max(begin, document.start), min(end, document.start + document.tokens)
        return Stretch(
            document.source,
            document.row,
            first,
            last,
            first - document.start,
            last - document.start,
            document.tokens,
        )

    return [stretch(document) for document in found.documents().between(begin, end)]


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


def stats(root: Path, *, show: Callable[[int, int], None] = lambda done, total: None) -> Stats:
    """Read every token and every sidecar.

    Raises:
        DataRootError: the data root is not finished.
    """
    found = open_root(root)
    stream = found.tokens()
    if stream.tokens == 0:
        raise DataRootError(f"{root}: has no tokens", next_step="give another data root")
    counts = token_counts(stream.chunks(_CHUNK_TOKENS), stream.tokens, stream.dtype.itemsize, show)
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(counts[used], kind="stable")[::-1][:_TOP]]
    lengths, by_source = _document_figures(found)
    return Stats(
        tokens=stream.tokens,
        distinct_ids=len(used),
        id_min=int(used[0]),
        id_max=int(used[-1]),
        id_mean=float(np.dot(counts, np.arange(len(counts), dtype=np.float64)) / stream.tokens),
        top=[
            TokenCount(token, int(counts[token]), name)
            for token, name in zip(frequent.tolist(), _names(found, frequent.tolist()), strict=True)
        ],
        vocab_size=found.manifest.tokenizer.vocab_size if found.manifest else None,
        documents=found.manifest.documents if found.manifest else None,
        document_tokens=lengths,
        tokens_by_source=by_source,
        duplicates=_duplicates(found),
    )


def token_counts(
    chunks: Iterable[NDArray[Any]],
    tokens: int,
    itemsize: int,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.int64]:
    """How often each id occurs in chunks of tokens, shape `(largest id + 1,)`."""
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
        show(done * itemsize, tokens * itemsize)
    return counts


def _document_figures(found: DataRoot) -> tuple[dict[str, float] | None, dict[str, int] | None]:
    if found.manifest is None:
        return None, None
    index = found.documents()
    lengths: list[NDArray[np.int64]] = []
    by_source: Counter[str] = Counter()
    for shard in range(len(found.manifest.shards)):
        table = index.sidecar(shard)
        lengths.append(table["tokens"].to_numpy())
        sums = table.group_by("source").aggregate([("tokens", "sum")])
        by_source.update(dict(zip(sums["source"].to_pylist(), sums["tokens_sum"].to_pylist(), strict=True)))
    every = np.concatenate(lengths)
    figures = dict(zip(map(str, _PERCENTILES), np.percentile(every, _PERCENTILES).tolist(), strict=True))
    return figures | {"mean": float(every.mean())}, dict(sorted(by_source.items()))


def _names(found: DataRoot, ids: list[int]) -> list[str | None]:
    """Tokens as the vocabulary writes them; figures are of use without it, too."""
    if found.manifest is None:
        return [None] * len(ids)
    try:
        engine = _engine(found)
    except TokenizerError:
        return [None] * len(ids)
    return [engine.name_of(token) for token in ids]


def _duplicates(found: DataRoot) -> Duplicates | None:
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

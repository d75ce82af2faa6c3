"""Pipeline: the only module that wires the stages together.

The driver keeps a bounded number of spans in flight, feeds their row counts to the order and their
lengths to the window, and hands parts of shards to the writer.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from tokenmill import layout, storage
from tokenmill import manifest as manifests
from tokenmill.encode import EncodedSpan, Encoder
from tokenmill.engine import Lookahead, TaskEngine, ThreadEngine, available_cores
from tokenmill.errors import SourceChangedError, StorageError
from tokenmill.locations import without_secrets
from tokenmill.manifest import Consolidated, Cursor, FileRecord, Manifest, ShardRecord, TokenizerRecord
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.order import Rows, file_order, row_order
from tokenmill.pack import Window, cut
from tokenmill.preflight import Preflight, check_disk, preflight
from tokenmill.proof import Proof, choose_scheme, is_whole, prove
from tokenmill.recipe import Recipe, checked
from tokenmill.resume import (
    agree_on_probe,
    consumed,
    missing_ranges,
    refuse_foreign,
    refuse_inside,
    refuse_other,
    refuse_other_form,
    set_damaged_aside,
    set_lost_aside,
)
from tokenmill.source import Corpus, find_corpus
from tokenmill.spans import Span, SpanReader
from tokenmill.stores import BucketStore, FolderStore, open_store
from tokenmill.tokenizer import load_tokenizer
from tokenmill.tokens_file import TokensFile, forget, reopen, require_defined
from tokenmill.uploads import Sender
from tokenmill.writer import Writer

_NO_OPTIONS = StoreOptions()

SHARDS_PASSING = 5
"""On a disk that shards only pass through: in the making, being published, being sent, and one waiting for each."""

_BLOCK_ROWS = 256
"""Rows handed to the writer at once: about a megabyte of tokens, also when the shuffle's buffer is emptied."""


class Progress(NamedTuple):
    """Where a run is, for whoever shows it."""

    tokens: int
    """Of the data set, earlier runs included."""
    documents: int
    shard: int
    """The one being written."""
    window_nbytes: int
    """Encoded tokens that wait for their turn in the order."""
    retries: int
    """Requests to a store that failed and were tried again."""


class Summary(msgspec.Struct, kw_only=True):
    """What a run did."""

    root: str
    status: str
    """`complete`, `already complete`."""
    tokens: int
    documents: int
    shards: int
    dtype: str
    new_tokens: int
    """Made by this run."""
    seconds: float
    tokens_per_second: float
    rows: int
    skipped_null: int
    skipped_empty: int
    skipped_bad: int
    """Rows that are not what their format says; `skipped.jsonl` lists them."""
    retries: int
    """Requests to a store that failed and were tried again."""
    special_documents: int
    """Documents that hold a control-token string."""
    audited_documents: int
    engine: str
    remade: list[str]
    """Files of an earlier run that were missing or not what the manifest says."""
    uploaded_to: str | None = None
    proof: Proof | None = None
    """Of `tokens.bin` and `sample_ids.bin`, where there are such."""


class Prepared(NamedTuple):
    """A recipe with its corpus found and its tokenizer loaded."""

    recipe: Recipe
    """`dtype` and `eos_token` resolved."""
    corpus: Corpus
    encoder: Encoder


class Workload(NamedTuple):
    """How a run goes about it; changes no byte."""

    workers: int
    span_rows: int | None
    on_bad_rows: OnBadRows


class Destination(NamedTuple):
    """A bucket that the data set goes to as it is made."""

    sender: Sender
    keep_local: bool
    """Whether shards stay here once they are there."""


class _Job(NamedTuple):
    """A run on a data root, whose lock is held."""

    root: Path
    manifest: Manifest
    prepared: Prepared
    workload: Workload
    destination: Destination | None = None


Show = Callable[[Progress], None]


def prepare(
    recipe: Recipe, *, engine_tokenizer: str = "auto", revision: str | None = None, store: StoreOptions = _NO_OPTIONS
) -> Prepared:
    """Find the corpus, load the tokenizer, resolve what the recipe leaves open.

    Args:
        revision: the commit of the tokenizer's repository; None takes what its name says.
        store: how to reach the corpus.

    Raises:
        RecipeError, SourceError, TokenizerError: as those stages say.
    """
    recipe = checked(recipe)
    corpus = find_corpus(recipe.dataset, recipe.text_column, recipe.text_separator, store)
    tokenizer = load_tokenizer(recipe.tokenizer, eos_token=recipe.eos_token, revision=revision)
    dtype = layout.smallest_dtype(tokenizer.vocab_size) if recipe.dtype == "auto" else recipe.dtype
    encoder = Encoder(tokenizer, engine=engine_tokenizer, special_in_text=recipe.special_in_text, dtype=dtype)
    dataset = without_secrets(recipe.dataset)
    resolved = msgspec.structs.replace(recipe, dataset=dataset, dtype=dtype, eos_token=tokenizer.eos_token)
    return Prepared(resolved, corpus, encoder)


def plan(
    recipe: Recipe,
    root: Path,
    *,
    workers: int | None = None,
    engine_tokenizer: str = "auto",
    consolidated: bool = False,
    store: StoreOptions = _NO_OPTIONS,
) -> tuple[Prepared, Preflight]:
    """What `pretokenize` would do, without doing it; raises what it would raise before it begins."""
    manifest, prepared = _agree(recipe, root, engine_tokenizer, store, consolidated=consolidated)
    _ = prepared.encoder.probe  # what a run would stop at
    done_tokens = manifest.tokens if manifest else 0
    return prepared, preflight(*prepared, root, workers=workers or available_cores(), done_tokens=done_tokens)


def pretokenize(
    recipe: Recipe,
    root: Path | str,
    *,
    workers: int | None = None,
    span_rows: int | None = None,
    engine_tokenizer: str = "auto",
    consolidated: bool = False,
    id_scheme: layout.IdScheme | None = None,
    on_bad_rows: OnBadRows = "error",
    store: StoreOptions = _NO_OPTIONS,
    upload_to: str | None = None,
    keep_local: bool = True,
    show: Show = lambda progress: None,
    begin: Callable[[Preflight], None] = lambda plan: None,
) -> Summary:
    """Make, or go on making, the data set of `recipe` in `root`.

    Args:
        recipe: what defines the bytes.
        root: the data root; made if it does not exist.
        workers: encode threads; None takes every core.
        span_rows: rows per span; None lets their text decide.
        engine_tokenizer: `auto`, `gigatoken` or `hf`.
        consolidated: write `tokens.bin` and `sample_ids.bin` at once, and no shard files.
        id_scheme: of the sample ids then; None takes the recipe's (see `proof.choose_scheme`).
        on_bad_rows: what is not JSON, or not UTF-8, is an `error`, or counted and listed in `skipped.jsonl`
            (`skip`).
        store: how to reach a corpus that is not local, and `upload_to`.
        upload_to: `s3://BUCKET/PREFIX` that gets each shard as it is finished, the manifest last.
        keep_local: whether shards and their documents stay here once they are there.
        show: called from the driver's thread as parts are handed to the writer.
        begin: called once with the preflight, before anything is made.

    Raises:
        TokenmillError: one of `errors.py`; finished shards stay and the same call goes on from them.
    """
    started = time.monotonic()
    root = Path(root)
    storage.make_root(root)
    workload = Workload(workers or available_cores(), span_rows, on_bad_rows)
    with storage.held(root):
        begun, prepared = _agree(recipe, root, engine_tokenizer, store, consolidated=consolidated)
        manifest = begun or _new_manifest(prepared)
        destination = _destination(root, manifest, upload_to, store, keep_local=keep_local, consolidated=consolidated)
        job = _Job(root, manifest, prepared, workload, destination)
        storage.remove_partials(root)
        if begun is None:
            (root / layout.SKIPPED).unlink(missing_ok=True)
        if consolidated:
            return _pretokenize_consolidated(job, id_scheme, show, begin, started)
        if begun is None:
            forget(root)
        if manifest.complete and (record := consumed(root)) is not None:
            return _summary(job, "already complete", manifest.tokens, started, proof=prove(root, record, manifest))
        remade = set_damaged_aside(root, manifest, destination.sender.was_sent if destination else lambda name: False)
        done, audited, status = manifest.tokens, 0, "already complete"
        if manifest.complete and not remade:
            agree_on_probe(root, manifest, prepared.encoder)
            manifests.save_if_changed(root, manifest)  # modification times, if the root was copied
        else:
            audited, status = _make(job, None, show, begin), "complete"
        _send_all(job)
        return _summary(job, status, done, started, audited=audited, remade=remade)


def _destination(
    root: Path,
    manifest: Manifest,
    upload_to: str | None,
    store: StoreOptions,
    *,
    keep_local: bool,
    consolidated: bool,
) -> Destination | None:
    if upload_to is None:
        if not keep_local:
            raise StorageError("shards are to go nowhere and not to stay", next_step="name a bucket with --upload-to")
        return None
    opened = open_store(upload_to, store)
    if not isinstance(opened, BucketStore):
        raise StorageError(f"{upload_to}: expected s3://BUCKET/PREFIX", next_step="for a directory, make it there")
    if consolidated and not keep_local:
        raise StorageError(
            f"{layout.TOKENS} is one file, which grows to the end of the run: it cannot leave piece by piece",
            next_step="leave out --consolidated or --keep-local no",
        )
    return Destination(Sender(root, opened, manifest), keep_local)


def _send_shard(job: _Job, record: ShardRecord) -> None:
    """Send a finished shard to where the data set goes, and let it go here if so wanted."""
    assert job.destination is not None
    shard, documents = layout.shard_name(record.index), layout.documents_name(record.index)
    here = FolderStore(job.root)
    job.destination.sender.send_file(here.file(documents), record.documents_sha256)
    job.destination.sender.send_file(here.file(shard), record.sha256)
    if not job.destination.keep_local:
        _remove(job.root, shard, documents)


def _remove(root: Path, *names: str) -> None:
    for name in names:
        with storage.reported(root / name):
            (root / name).unlink(missing_ok=True)


def _send_all(job: _Job) -> None:
    """Send what is not there yet of a finished data set, the manifest last."""
    if job.destination is None:
        return
    job.destination.sender.send(FolderStore(job.root).files())
    if not job.destination.keep_local:
        for record in job.manifest.shards:
            _remove(job.root, layout.shard_name(record.index), layout.documents_name(record.index))


def _pretokenize_consolidated(
    job: _Job, id_scheme: layout.IdScheme | None, show: Show, begin: Callable[[Preflight], None], started: float
) -> Summary:
    """Straight to `tokens.bin`; shards are only stretches of it, recorded as they become durable."""
    root, manifest, recipe = job.root, job.manifest, job.prepared.recipe
    before = manifests.load_consolidated(root)
    wanted = Consolidated(
        dtype=manifest.stored_dtype,
        seq_len=recipe.seq_len,
        id_scheme=id_scheme
        or (before.id_scheme if before else choose_scheme(recipe, tokens=None, seq_len=recipe.seq_len)),
    )
    if manifest.complete and before is not None and is_whole(root, before) and before.settings == wanted.settings:
        _send_all(job)
        return _summary(job, "already complete", manifest.tokens, started, proof=prove(root, before, manifest))
    manifests.save_consolidated(root, wanted)
    reopen(root)
    audited, status = 0, "already complete"
    with TokensFile(root, wanted) as file:
        remade = set_lost_aside(root, manifest, file)
        file.begin(None)
        done = manifest.tokens
        if remade or not manifest.complete:
            audited, status = _make(job, file, show, begin), "complete"
        require_defined(wanted.id_scheme, file.nbytes)
        proof = prove(root, file.seal(), manifest)
        if proof.passed:
            file.publish()
    if proof.passed:
        manifests.save_consolidated(root, proof.record)
        _send_all(job)
    return _summary(job, status, done, started, audited=audited, remade=remade, proof=proof)


def _make(job: _Job, file: TokensFile | None, show: Show, begin: Callable[[Preflight], None]) -> int:
    """Make what the manifest does not prove; documents audited."""
    job.manifest.complete = False
    # The checks take as long as loading the reference engine does: encode the first spans meanwhile.
    with ThreadPoolExecutor(1, thread_name_prefix="check") as aside:
        checks = aside.submit(_check, job)
        return _run(job, file, show, lambda: begin(checks.result()))


def _agree(
    recipe: Recipe, root: Path, engine_tokenizer: str, store: StoreOptions, *, consolidated: bool
) -> tuple[Manifest | None, Prepared]:
    """The manifest of a data root that was begun, if it was, and what must agree with it, prepared."""
    manifest = manifests.load(root)
    if manifest is None:
        refuse_foreign(root)
    elif not manifest.is_begun:  # nothing made yet: nothing to agree with
        manifest = None
    if manifest is not None and manifest.recipe.dataset == without_secrets(recipe.dataset):
        store = store._replace(revision=manifest.source_revision)
    prepared = prepare(recipe, engine_tokenizer=engine_tokenizer, revision=_pinned(manifest, recipe), store=store)
    refuse_inside(root, prepared.recipe, prepared.corpus)
    if manifest is not None:
        refuse_other(root, manifest, *prepared)
        refuse_other_form(root, manifest, manifests.load_consolidated(root), consolidated=consolidated)
    return manifest, prepared


def _pinned(manifest: Manifest | None, recipe: Recipe) -> str | None:
    """The hub commit that an earlier run resolved the recipe's tokenizer to."""
    if manifest is None or manifest.tokenizer.name != recipe.tokenizer:
        return None
    return manifest.tokenizer.revision


def _check(job: _Job) -> Preflight:
    """What must hold before a byte is written; then the data root is ours."""
    agree_on_probe(job.root, job.manifest, job.prepared.encoder)
    figures = preflight(*job.prepared, job.root, workers=job.workload.workers, done_tokens=job.manifest.tokens)
    check_disk(figures, job.root, shards_at_once=None if _stays(job) else SHARDS_PASSING)
    job.manifest.software = _software(job.prepared.encoder)
    manifests.save(job.root, job.manifest)
    return figures


def _stays(job: _Job) -> bool:
    return job.destination is None or job.destination.keep_local


def _summary(
    job: _Job,
    status: str,
    done_before: int,
    started: float,
    *,
    audited: int = 0,
    remade: Sequence[str] = (),
    proof: Proof | None = None,
) -> Summary:
    manifest = job.manifest
    seconds = time.monotonic() - started
    new_tokens = manifest.tokens - done_before
    return Summary(
        root=str(job.root),
        status=status,
        tokens=manifest.tokens,
        documents=manifest.documents,
        shards=len(manifest.shards),
        dtype=manifest.recipe.dtype,
        new_tokens=new_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(new_tokens / seconds),
        rows=sum(entry.rows - entry.unused for entry in manifest.ledger),
        skipped_null=sum(entry.null for entry in manifest.ledger),
        skipped_empty=sum(entry.empty for entry in manifest.ledger),
        skipped_bad=sum(entry.bad for entry in manifest.ledger),
        retries=job.prepared.corpus.location.retrier.count,
        special_documents=sum(entry.special for entry in manifest.ledger),
        audited_documents=audited,
        engine=job.prepared.encoder.engine.version,
        remade=list(remade),
        uploaded_to=job.destination.sender.name if job.destination else None,
        proof=proof,
    )


def _new_manifest(prepared: Prepared) -> Manifest:
    recipe, corpus, encoder = prepared
    tokenizer = encoder.tokenizer
    return Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=TokenizerRecord(
            tokenizer.name,
            tokenizer.revision,
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.eos_id,
            probe={},
        ),
        software=_software(encoder),
        files=[FileRecord(file.path, file.nbytes, etag=file.etag) for file in corpus.files],
        source_revision=corpus.location.revision,
    )


def _software(encoder: Encoder) -> dict[str, str]:
    names = ("tokenmill", "numpy", "pyarrow", "tokenizers")
    return {name: version(name) for name in names} | {"engine": encoder.engine.version}


def _run(job: _Job, file: TokensFile | None, show: Show, before_writing: Callable[[], None]) -> int:
    """Make every shard the manifest does not prove; documents audited."""
    engine = ThreadEngine(job.workload.workers)
    sends = job.destination is not None and file is None
    published = functools.partial(_send_shard, job) if sends else None
    writer = Writer(job.root, job.manifest, job.prepared.encoder.dtype, file, published=published)
    audited = 0
    ranges = missing_ranges(job.manifest)
    drivers = [_Driver(job, first, end, engine, writer=writer, show=show) for first, end in ranges]
    try:
        if drivers:
            drivers[0].start()
        before_writing()
        for number, driver in enumerate(drivers):
            if number:
                driver.start()
            driver.run()
            audited += driver.audited
        writer.close()
    except BaseException:
        job.prepared.corpus.location.close()
        if job.destination is not None:
            job.destination.sender.stop()
        engine.shutdown()
        writer.abandon()
        raise
    finally:
        for driver in drivers:
            driver.close()
    engine.shutdown()
    manifests.balance(job.root, job.manifest)
    writer.skipped.settle(sum(entry.bad for entry in job.manifest.ledger))
    manifests.complete(job.root, job.manifest)
    return audited


class _Reading(NamedTuple):
    """A span on its way through the run."""

    first_row: int
    """In reading order over all files."""
    file: int
    span: Span
    source: SpanReader


class _Passed(NamedTuple):
    """A source file whose rows the order took without its being opened."""

    first_row: int
    """In reading order over all files; likewise `end`, one past its last."""
    end: int
    file: int


class _Driver:
    """Makes shards `first` to `end` (None: to the end of the stream)."""

    def __init__(
        self, job: _Job, first: int, end: int | None, engine: TaskEngine, *, writer: Writer, show: Show
    ) -> None:
        recipe, self._corpus, self._encoder = job.prepared
        self._recipe = recipe
        self._manifest = job.manifest
        self._workload = job.workload
        self._engine = engine
        self._writer = writer
        self._show = show
        self._order = row_order(recipe.order, seed=recipe.seed, buffer_size=recipe.buffer_size)
        self._window = Window()
        self._first = first
        size, total = recipe.shard_size, recipe.total_tokens
        self._stop = min(filter(None, (total, end and end * size)), default=None)
        self._cursor = job.manifest.cursor(first)
        self._position = job.manifest.position(first) - self._cursor.offset
        """Token of the stream at which the next row starts."""
        self._emitted = self._cursor.position
        """Rows emitted before it."""
        self._work: Lookahead[tuple[_Reading, int]] | None = None
        self._in_flight: deque[tuple[_Reading, int, Future[EncodedSpan]]] = deque()
        self.audited = 0

    def start(self) -> None:
        """Replay the order up to the first shard and submit the first spans."""
        self._rest, again, readings = self._replay(self._cursor)
        self._again = len(again)
        self._work = Lookahead(self._plan_work(again, readings), 2 * self._engine.workers)
        self._submit_ahead()

    def close(self) -> None:
        """Read no more."""
        if self._work is not None:
            self._work.close()

    def run(self) -> None:
        """Go on to the end, handing parts to the writer."""
        self._writer.begin()
        encoded = self._encoded()
        for reading, pending, span in itertools.islice(encoded, self._again):
            self._hold(reading, pending, span)
        self._emit(self._rest)
        for reading, pending, span in encoded:
            self._hold(reading, pending, span)
            self._emit(self._order.push(reading.span.rows))
            if self._at_stop():
                return
        self._emit(self._order.finish())
        if not self._at_stop():
            self._writer.end_of_corpus(Cursor(self._emitted))

    def _at_stop(self) -> bool:
        return self._stop is not None and self._position >= self._stop

    def _readings(self, files: Sequence[int], first_row: int = 0) -> Iterator[_Reading]:
        """Every span of some files in reading order; they are opened as they are reached."""
        for index in files:
            source = self._corpus.open(index, span_rows=self._workload.span_rows)
            self._count_rows(index, source)
            for span in source.spans():
                yield _Reading(first_row, index, span, source)
                first_row += span.rows
            self._count_rows(index, source)

    def _count_rows(self, index: int, source: SpanReader) -> None:
        """A file's rows, once they are known, must be those an earlier run found."""
        record = self._manifest.files[index]
        if None not in (record.rows, source.rows) and record.rows != source.rows:
            raise SourceChangedError(
                f"{source.name}: the source changed since this data root was begun: expected {record.rows} rows, "
                f"found {source.rows}",
                next_step="restore the file, or start in another directory",
            )
        record.rows = source.rows if record.rows is None else record.rows

    def _pass_files(self, files: Sequence[int], cursor: Cursor) -> tuple[list[_Passed], int]:
        """Run the order over the first files without opening them, as far as their rows were counted before.

        Returns those files, all of whose emitted rows lie before `cursor`, and how many were emitted.
        """
        passed: list[_Passed] = []
        first_row = emitted = 0
        for index in files:
            rows = self._manifest.files[index].rows
            if rows is None or emitted + rows > cursor.position:
                break
            emitted += len(self._order.push(rows))
            passed.append(_Passed(first_row, first_row + rows, index))
            first_row += rows
        return passed, emitted

    def _replay(self, cursor: Cursor) -> tuple[Rows, list[tuple[_Reading, int]], Iterator[_Reading]]:
        """Run the order, without text, up to `cursor`.

        Returns the rows from the cursor on that are emitted already; the spans that hold those and the rows
        still in the order, each with how many of its rows that is; and the spans that come then.
        """
        files = file_order(len(self._corpus.files), kind=self._recipe.order, seed=self._recipe.seed).tolist()
        whole, emitted = self._pass_files(files, cursor)
        first_row = whole[-1].end if whole else 0
        readings = self._readings(files[len(whole) :], first_row)
        passed: list[_Reading] = []
        rest: Rows = np.empty(0, np.int64)
        while emitted <= cursor.position and cursor != Cursor():
            reading = next(readings, None)
            rows = self._order.finish() if reading is None else self._order.push(reading.span.rows)
            emitted += len(rows)
            rest = rows[max(0, len(rows) - (emitted - cursor.position)) :]
            if reading is None:
                break
            reading.source.drop(reading.span)
            passed.append(reading)
        wanted = np.concatenate([rest, self._order.held()])
        for begin, end, file in whole:
            if np.any((wanted >= begin) & (wanted < end)):
                passed += self._readings([file], begin)
        passed.sort(key=lambda reading: reading.first_row)
        if not passed:
            return rest, [], readings
        starts = np.array([reading.first_row for reading in passed], np.int64)
        pending = np.bincount(np.searchsorted(starts, wanted, side="right") - 1, minlength=len(passed))
        return rest, [(reading, int(pending[i])) for i, reading in enumerate(passed) if pending[i]], readings

    def _plan_work(
        self, again: list[tuple[_Reading, int]], readings: Iterator[_Reading]
    ) -> Iterator[tuple[_Reading, int]]:
        """What to encode, in reading order: a span, and how many of its rows will be emitted."""
        for index, group in itertools.groupby(again, key=lambda work: work[0].file):
            needed = list(group)
            source = self._corpus.open(index, span_rows=self._workload.span_rows)
            source.keep_only([reading.span for reading, _ in needed])
            for reading, pending in needed:
                source.prefetch(reading.span)
                yield reading._replace(source=source), pending
        for reading in readings:
            reading.source.prefetch(reading.span)
            yield reading, reading.span.rows

    def _submit_ahead(self) -> None:
        """Keep a bounded number of spans with the engine."""
        assert self._work is not None
        for reading, pending in itertools.islice(self._work, 2 * self._engine.workers + 1 - len(self._in_flight)):
            future = self._engine.submit(_encode_span, reading, self._encoder, self._workload.on_bad_rows)
            self._in_flight.append((reading, pending, future))

    def _encoded(self) -> Iterator[tuple[_Reading, int, EncodedSpan]]:
        """Spans in reading order, as they are encoded."""
        while self._in_flight:
            reading, pending, future = self._in_flight.popleft()
            encoded = future.result()
            self._submit_ahead()
            yield reading, pending, encoded

    def _hold(self, reading: _Reading, pending: int, encoded: EncodedSpan) -> None:
        self._window.add(reading.first_row, reading.file, reading.span.first_row, encoded, pending=pending)
        self._writer.skipped.learn(reading.file, reading.span.first_row, encoded.bad)
        self.audited += encoded.audited

    def _emit(self, rows: Rows) -> None:
        """Hand rows to the writer in blocks, cut into parts."""
        for at in range(0, len(rows), _BLOCK_ROWS):
            if self._at_stop():
                return
            block = self._window.take(rows[at : at + _BLOCK_ROWS])
            token, row = self._position, 0
            for part in cut(token, block.length, shard_size=self._recipe.shard_size, stop=self._stop):
                row = part.end
                next_cursor = Cursor(self._emitted + part.end - (part.cut_at > 0), part.cut_at)
                if part.shard >= self._first:
                    self._writer.append(block, part, token, next_cursor)
                token += part.tokens
            self._position += block.tokens
            self._emitted += len(block)
            if not self._at_stop():
                self._writer.append_idle(block.rows(row, len(block)))
            self._show(
                Progress(
                    self._writer.tokens,
                    self._writer.documents,
                    token // self._recipe.shard_size,
                    self._window.nbytes,
                    self._corpus.location.retrier.count,
                )
            )


def _encode_span(reading: _Reading, encoder: Encoder, on_bad_rows: OnBadRows) -> EncodedSpan:
    source, span = reading.source, reading.span
    return encoder.encode(source.read(span), where=source.name, first_row=span.first_row, on_bad_rows=on_bad_rows)

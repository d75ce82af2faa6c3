"""Pipeline: the only module that wires the stages together."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenmill import layout, storage
from tokenmill import manifest as manifests
from tokenmill.choice import RULES, format_of
from tokenmill.driver import Driver, Show, Site
from tokenmill.encode import Encoder, ProbeError
from tokenmill.engine import ClusterEngine, ThreadEngine, available_cores
from tokenmill.errors import StorageError
from tokenmill.locations import without_secrets
from tokenmill.manifest import Consolidated, FileRecord, Manifest, ShardRecord, TokenizerRecord
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.preflight import Preflight, check_disk, preflight
from tokenmill.proof import Proof, choose_scheme, is_whole, prove
from tokenmill.recipe import Recipe, checked
from tokenmill.redact import printable
from tokenmill.resume import (
    agree_on_probe,
    consumed,
    damaged_sidecars,
    missing_ranges,
    refuse_foreign,
    refuse_inside,
    refuse_lost_sidecars,
    refuse_other,
    refuse_other_form,
    set_damaged_aside,
    set_lost_aside,
)
from tokenmill.source import Corpus, find_corpus
from tokenmill.stores import BucketStore, FolderStore, open_store
from tokenmill.supply import TaskSupply, ThreadSupply
from tokenmill.task_writer import TaskWriter
from tokenmill.tasks import MadeShard, Target, Work
from tokenmill.tokenizer import load_tokenizer
from tokenmill.tokens_file import TokensFile, forget, reopen, require_defined
from tokenmill.uploads import Sender
from tokenmill.writer import Recorder, Writer

say = logging.getLogger("tokenmill.say")
"""What a user should see at once."""

_NO_OPTIONS = StoreOptions()

SHARDS_PASSING = 5
"""On a disk that shards only pass through: in the making, being published, being sent, and one waiting for each."""

_BLOCK_ROWS = 256
"""Rows handed to the writer at once: about a megabyte of tokens, also when the shuffle's buffer is emptied."""

_CLUSTER_BLOCK_ROWS = 16_384
"""Only their lengths are here."""


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
    notes: list[str] = []
    """What a user should know of the corpus and the tokenizer."""
    proof: Proof | None = None
    """Of `tokens.bin` and `sample_ids.bin`, where there are such."""


class Prepared(NamedTuple):
    """A recipe with its corpus found and its tokenizer loaded."""

    recipe: Recipe
    """`dtype` and `eos_token` resolved."""
    corpus: Corpus
    encoder: Encoder

    @property
    def notes(self) -> list[str]:
        """What a user should know of what was found."""
        return [*self.corpus.notes, *self.encoder.notes]


class Workload(NamedTuple):
    """How a run goes about it; changes no byte."""

    workers: int
    span_rows: int | None
    on_bad_rows: OnBadRows


class Destination(NamedTuple):
    """A bucket that the data set goes to as it is made."""

    url: str
    sender: Sender
    keep_local: bool
    """Whether shards stay here once they are there."""


class _Job(NamedTuple):
    """A run on a data root, whose lock is held."""

    root: Path
    manifest: Manifest
    prepared: Prepared
    workload: Workload
    destination: Destination | None
    engine: ClusterEngine | None
    """Where spans are encoded and shards written; None: here."""
    store: StoreOptions


def prepare(
    recipe: Recipe,
    *,
    engine_tokenizer: str = "auto",
    revision: str | None = None,
    store: StoreOptions = _NO_OPTIONS,
    only: Sequence[str] | None = None,
) -> Prepared:
    """Find the corpus, load the tokenizer, resolve what the recipe leaves open.

    Args:
        revision: the commit of the tokenizer's repository; None takes what its name says.
        store: how to reach the corpus.
        only: files of the corpus, if it was chosen before; None lets `choice` choose.

    Raises:
        RecipeError, SourceError, TokenizerError: as those stages say.
    """
    recipe = checked(recipe)
    corpus = find_corpus(recipe.dataset, recipe.text_column, recipe.text_separator, store, only=only)
    tokenizer = load_tokenizer(recipe.tokenizer, eos_token=recipe.eos_token, revision=revision)
    encoder = Encoder(tokenizer, engine=engine_tokenizer, special_in_text=recipe.special_in_text, dtype=recipe.dtype)
    dataset = without_secrets(recipe.dataset)
    resolved = msgspec.structs.replace(recipe, dataset=dataset, dtype=encoder.dtype.name, eos_token=tokenizer.eos_token)
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
    try:
        prepared.encoder.require_equal_engines()
    except ProbeError:
        if engine_tokenizer != "auto":
            raise
        manifest, prepared = _agree(recipe, root, "hf", store, consolidated=consolidated)
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
    engine: ClusterEngine | None = None,
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
        engine: a cluster to encode and write on (`tokenmill.ray.RayEngine`); None does it here. `root` must be on
            storage that all its machines share, unless shards do not stay there.
        show: called from the driver's thread as parts are handed to the writer.
        begin: called once with the preflight, before anything is made.

    Raises:
        TokenmillError: one of `errors.py`; finished shards stay and the same call goes on from them.
    """
    root = Path(root)
    storage.make_root(root)
    if engine is not None:
        workers = engine.workers
    attempt = functools.partial(
        _attempt,
        recipe,
        root,
        Workload(workers or available_cores(), span_rows, on_bad_rows),
        consolidated=consolidated,
        id_scheme=id_scheme,
        store=store,
        upload_to=upload_to,
        keep_local=keep_local,
        engine=engine,
        show=show,
        begin=begin,
    )
    try:
        return attempt(engine_tokenizer)
    except ProbeError as error:  # raised before anything is made
        if engine_tokenizer != "auto":
            raise
        say.warning("%s; HF tokenizers encodes instead, about ten times slower", error.message)
        return attempt("hf")


def _attempt(
    recipe: Recipe,
    root: Path,
    workload: Workload,
    engine_tokenizer: str,
    *,
    consolidated: bool,
    id_scheme: layout.IdScheme | None,
    store: StoreOptions,
    upload_to: str | None,
    keep_local: bool,
    engine: ClusterEngine | None,
    show: Show,
    begin: Callable[[Preflight], None],
) -> Summary:
    started = time.monotonic()
    with storage.held(root), _held(engine, root, upload_to):
        begun, prepared = _agree(recipe, root, engine_tokenizer, store, consolidated=consolidated)
        manifest = begun or _new_manifest(prepared)
        destination = _destination(root, manifest, upload_to, store, keep_local=keep_local, consolidated=consolidated)
        job = _Job(root, manifest, prepared, workload, destination, engine, store)
        storage.remove_partials(root)
        if begun is None:
            (root / layout.SKIPPED).unlink(missing_ok=True)
        if consolidated:
            return _pretokenize_consolidated(job, id_scheme, show, begin, started)
        if begun is None:
            forget(root)
        if manifest.complete and (record := consumed(root)) is not None:
            refuse_lost_sidecars(root, manifest)
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


@contextlib.contextmanager
def _held(engine: ClusterEngine | None, root: Path, upload_to: str | None) -> Iterator[None]:
    """A lock on the data root holds where file systems carry locks; the cluster's own holds on all its machines."""
    with contextlib.ExitStack() as leases:
        if engine is not None:
            leases.enter_context(engine.held(str(root.resolve())))
            if upload_to is not None:
                leases.enter_context(engine.held(upload_to.rstrip("/")))
        yield


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
    return Destination(upload_to, Sender(root, opened, manifest), keep_local)


def _send_shard(job: _Job, record: ShardRecord) -> None:
    """Send a finished shard to where the data set goes, and let it go here if so wanted."""
    assert job.destination is not None
    shard, documents = layout.shard_name(record.index), layout.documents_name(record.index)
    here = FolderStore(job.root)
    job.destination.sender.send_file(here.file(documents), record.documents_sha256)
    job.destination.sender.send_file(here.file(shard), record.sha256)
    if not job.destination.keep_local:
        _remove(job.root, shard, documents)
        job.destination.sender.note_gone(shard, documents)


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
        names = [
            name(record.index) for record in job.manifest.shards for name in (layout.shard_name, layout.documents_name)
        ]
        _remove(job.root, *names)
        job.destination.sender.note_gone(*names)


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
    is_done = manifest.complete and before is not None and is_whole(root, before) and before.settings == wanted.settings
    if is_done and before is not None and not damaged_sidecars(root, manifest):
        _send_all(job)
        return _summary(job, "already complete", manifest.tokens, started, proof=prove(root, before, manifest))
    manifests.save_consolidated(root, wanted)
    reopen(root)
    audited, status = 0, "already complete"
    with TokensFile(root, wanted) as file:
        remade = set_lost_aside(root, manifest, file, with_gaps=job.engine is not None)
        if job.engine is None:  # else the tasks write wherever a shard is missing
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
    chosen_before = manifest is not None and manifest.source_rules < RULES
    prepared = prepare(
        recipe,
        engine_tokenizer=engine_tokenizer,
        revision=_pinned(manifest, recipe),
        store=store,
        only=[file.path for file in manifest.files] if manifest is not None and chosen_before else None,
    )
    refuse_inside(root, prepared.recipe, prepared.corpus)
    encoder = prepared.encoder
    if manifest is not None and encoder.notes and "gigatoken" in manifest.software.get("engine", ""):
        encoder.notes.append(
            f"{root}: its shards so far were encoded by {manifest.software['engine']}, which is no longer trusted with "
            "this tokenizer: prove them with tokenmill verify --deep"
        )
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
    job.prepared.encoder.require_equal_engines()
    agree_on_probe(job.root, job.manifest, job.prepared.encoder)
    figures = preflight(*job.prepared, job.root, workers=job.workload.workers, done_tokens=job.manifest.tokens)
    if job.engine is None or _stays(job):  # else nothing comes here but the manifest
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
        root=printable(job.root),
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
        notes=[*job.prepared.notes, *_after_notes(job)],
        proof=proof,
    )


def _after_notes(job: _Job) -> list[str]:
    """What shows only when the corpus was read."""
    recipe, manifest = job.prepared.recipe, job.manifest
    notes = []
    texts = [file for file in manifest.files if format_of(file.path) == "text"]
    separator = recipe.text_separator
    if separator is not None and texts and all(file.rows is not None and file.rows <= 1 for file in texts):
        notes.append(f"--text-separator {separator!r} divides none of {len(texts):,} text files: each is one document")
    if recipe.total_tokens is not None and manifest.tokens < recipe.total_tokens:
        notes.append(
            f"--total-tokens {recipe.total_tokens:,}: the corpus ended after {manifest.tokens:,} tokens, "
            f"{recipe.total_tokens - manifest.tokens:,} short of that"
        )
    return notes


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
        source_rules=RULES,
        notes=prepared.notes,
        source_revision=corpus.location.revision,
    )


def _software(encoder: Encoder) -> dict[str, str]:
    names = ("tokenmill", "numpy", "pyarrow", "tokenizers")
    return {name: version(name) for name in names} | {"engine": encoder.engine.version}


def _run(job: _Job, file: TokensFile | None, show: Show, before_writing: Callable[[], None]) -> int:
    """Make every shard the manifest does not prove; documents audited."""
    recorder = Recorder(job.root, job.manifest)
    site = _here(job, file, recorder) if job.engine is None else _elsewhere(job, job.engine, file, recorder)
    audited = 0
    ranges = missing_ranges(job.manifest)
    corpus = job.prepared.corpus
    drivers = [Driver(corpus, job.manifest, site, first=first, end=end, show=show) for first, end in ranges]
    try:
        if drivers:
            drivers[0].start()
        before_writing()
        for number, driver in enumerate(drivers):
            if number:
                driver.start()
            driver.run()
            audited += driver.audited
        site.writer.close()
    except BaseException:
        job.prepared.corpus.location.close()
        if job.destination is not None:
            job.destination.sender.stop()
        site.stop()
        site.writer.abandon()
        raise
    finally:
        for driver in drivers:
            driver.close()
    site.stop()
    manifests.balance(job.root, job.manifest)
    recorder.skipped.settle(sum(entry.bad for entry in job.manifest.ledger))
    manifests.complete(job.root, job.manifest)
    return audited


def _here(job: _Job, file: TokensFile | None, recorder: Recorder) -> Site:
    engine = ThreadEngine(job.workload.workers)
    corpus, encoder, workload = job.prepared.corpus, job.prepared.encoder, job.workload
    supply = ThreadSupply(corpus, encoder, engine, on_bad_rows=workload.on_bad_rows, span_rows=workload.span_rows)
    sends = job.destination is not None and file is None
    published = functools.partial(_send_shard, job) if sends else None
    writer = Writer(job.root, job.manifest, encoder.dtype, recorder, tokens_file=file, published=published)
    return Site(supply, writer, _BLOCK_ROWS, engine.shutdown, lambda nbytes: True, lambda: False, lambda nbytes: "")


def _elsewhere(job: _Job, engine: ClusterEngine, file: TokensFile | None, recorder: Recorder) -> Site:
    recipe, corpus, encoder = job.prepared
    sends = job.destination is not None and file is None
    target = Target(
        root=job.root.absolute(),
        dtype=job.manifest.stored_dtype,
        paths=tuple(entry.path for entry in job.manifest.files),
        shard_size=recipe.shard_size,
        is_one_file=file is not None,
        upload_to=job.destination.url if job.destination is not None and sends else None,
        store=job.store,
        keep_local=_stays(job),
        run=uuid.uuid4().hex,
    )
    storage.write_whole(job.root / layout.RUN, target.run.encode())
    work = Work(corpus, encoder, job.workload.on_bad_rows, job.workload.span_rows, target)
    shared = engine.share(work.packed())

    def made(shard: MadeShard) -> None:
        corpus.location.retrier.count += shard.retries
        for sent in shard.sent:
            assert job.destination is not None
            job.destination.sender.adopt(sent)

    writer = TaskWriter(job.manifest, engine, shared, target, recorder, tokens_file=file, made=made)
    return Site(
        TaskSupply(work, shared, engine),
        writer,
        _CLUSTER_BLOCK_ROWS,
        lambda: _leave(engine, job.root),
        lambda nbytes: nbytes + writer.nbytes <= engine.memory_nbytes,
        writer.await_one,
        lambda nbytes: f"{engine.describe()}, {(nbytes + writer.nbytes) / 1e9:.2f} GB of tokens in its store",
    )


def _leave(engine: ClusterEngine, root: Path) -> None:
    engine.drop()
    (root / layout.RUN).unlink(missing_ok=True)

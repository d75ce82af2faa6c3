"""Pretokenize: one run from a corpus to a data root."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.earlier_run import set_damaged_aside
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import Consolidated
from tokenmill.dataroot.proof import choose_scheme, is_whole, prove
from tokenmill.dataroot.tokens_file import TokensFile, forget, reopen, require_defined
from tokenmill.encoding.encoder import ProbeError
from tokenmill.options import OnBadRows, StoreOptions, available_cores
from tokenmill.pipeline.cluster_engine import ClusterEngine
from tokenmill.pipeline.driver import BATCH_ROWS, Driver
from tokenmill.pipeline.executor import Executor
from tokenmill.pipeline.job import Job, RunInputs, RunOptions, load_agreeing, open_destination
from tokenmill.pipeline.local import ThreadExecutor
from tokenmill.pipeline.preflight import SHARDS_PASSING, Preflight, check_disk, preflight
from tokenmill.pipeline.resume import (
    agree_on_probe,
    consumed,
    damaged_sidecars,
    missing_ranges,
    refuse_lost_sidecars,
    set_lost_aside,
)
from tokenmill.pipeline.summary import Made, Summary, summarize
from tokenmill.progress import OnProgress, Progress, run_display
from tokenmill.recipe import Recipe
from tokenmill.shards import ledger
from tokenmill.shards.recorder import Recorder

say = logging.getLogger("tokenmill.say")
"""What a user should see at once."""

_NO_OPTIONS = StoreOptions()
OnPlan = Callable[[Preflight], None]


def plan(
    recipe: Recipe,
    root: Path,
    *,
    workers: int | None = None,
    tokenizer_backend: str = "auto",
    consolidated: bool = False,
    store: StoreOptions = _NO_OPTIONS,
    only_new: Sequence[Path | str] = (),
) -> tuple[RunInputs, Preflight]:
    """Return what `pretokenize` would do, without doing it; raise what it would raise before it begins."""
    earlier = [Path(each) for each in only_new]
    manifest, inputs = load_agreeing(
        recipe, root, tokenizer_backend, store, consolidated=consolidated, only_new=earlier
    )
    try:
        inputs.encoder.require_equal_backends()
    except ProbeError:
        if tokenizer_backend != "auto":
            raise
        manifest, inputs = load_agreeing(recipe, root, "hf", store, consolidated=consolidated, only_new=earlier)
    done_tokens = manifest.tokens if manifest else 0
    return inputs, preflight(*inputs, root, workers=workers or available_cores(), done_tokens=done_tokens)


def pretokenize(
    recipe: Recipe,
    root: Path | str,
    *,
    workers: int | None = None,
    span_rows: int | None = None,
    tokenizer_backend: str = "auto",
    consolidated: bool = False,
    id_scheme: layout.IdScheme | None = None,
    on_bad_rows: OnBadRows = "error",
    store: StoreOptions = _NO_OPTIONS,
    upload_to: str | None = None,
    keep_local: bool = True,
    engine: ClusterEngine | None = None,
    only_new: Sequence[Path | str] = (),
    on_progress: OnProgress = lambda progress: None,
    on_plan: OnPlan = lambda plan: None,
    progress: bool = False,
) -> Summary:
    """Make the data set of `recipe` in `root`, or continue an earlier run.

    Args:
        recipe: defines the bytes.
        root: the data root; made if it does not exist.
        workers: number of encoding threads; None takes every core.
        span_rows: rows of a span; None lets their text decide.
        tokenizer_backend: `auto`, `gigatoken` or `hf`.
        consolidated: write `tokens.bin` and `sample_ids.bin` at once, and no shard files.
        id_scheme: scheme of the sample ids in that case; None takes the recipe's (see `proof.choose_scheme`).
        on_bad_rows: whether a row that is not JSON, or not UTF-8, is an `error`, or is counted and listed in
            `skipped.jsonl` (`skip`).
        store: how to reach a corpus that is not local, and `upload_to`.
        upload_to: `s3://BUCKET/PREFIX` that gets each shard as it is finished, and the manifest last.
        keep_local: whether shards and their sidecars stay in `root` once they are in the bucket.
        engine: a cluster that encodes and writes (`tokenmill.ray.RayEngine`); None uses threads of this process. `root`
            must be on storage that all its machines share, unless shards do not stay there.
        only_new: earlier data roots of the same corpus: their files are left out. Which files are in is recorded, so
            that a run which continues takes the same.
        on_progress: called from the driver's thread as a phase begins and as rows are handed over for writing.
        on_plan: called once with the plan, before anything is made.
        progress: show on standard error, or in the notebook, what the command line shows.

    Raises:
        TokenmillError: one of `errors.py`. Finished shards stay, and the same call continues after them.
    """
    root = Path(root)
    atomic.make_root(root)
    if engine is not None:
        workers = engine.workers
    with _shown(on_progress, on_plan, progress=progress) as (show, show_plan):
        options = RunOptions(
            workers or available_cores(),
            span_rows,
            consolidated,
            id_scheme,
            on_bad_rows,
            store,
            upload_to,
            keep_local,
            engine,
            [Path(each) for each in only_new],
            show,
            show_plan,
        )
        try:
            return _pretokenize(recipe, root, tokenizer_backend, options)
        except ProbeError as error:  # raised before anything is made
            if tokenizer_backend != "auto":
                raise
            say.warning("%s; HF tokenizers encodes instead, about ten times slower", error.message)
            return _pretokenize(recipe, root, "hf", options)


@contextlib.contextmanager
def _shown(on_progress: OnProgress, on_plan: OnPlan, *, progress: bool) -> Iterator[tuple[OnProgress, OnPlan]]:
    """Show progress, if wanted, besides telling the caller of it."""
    if not progress:
        yield on_progress, on_plan
        return
    with run_display() as shown:

        def tell(now: Progress) -> None:
            shown.show(now)
            on_progress(now)

        def tell_plan(plan: Preflight) -> None:
            shown.expect(plan.tokens)
            on_plan(plan)

        yield tell, tell_plan


def _pretokenize(recipe: Recipe, root: Path, tokenizer_backend: str, options: RunOptions) -> Summary:
    started = time.monotonic()
    consolidated = options.consolidated
    options.on_progress(Progress(phase="looking at the corpus and the tokenizer"))
    with lock_data_root(root), _hold_on_cluster(root, options):
        begun, inputs = load_agreeing(
            recipe, root, tokenizer_backend, options.store, consolidated=consolidated, only_new=options.only_new
        )
        manifest = begun or inputs.new_manifest()
        job = Job(root, manifest, inputs, options, open_destination(root, manifest, options))
        atomic.remove_partials(root)
        if begun is None:
            atomic.remove(root, layout.SKIPPED)
        if consolidated:
            return _pretokenize_consolidated(job, started)
        if begun is None:
            forget(root)
        if manifest.complete and (record := consumed(root)) is not None:
            refuse_lost_sidecars(root, manifest)
            return summarize(job, "already complete", manifest.tokens, started, proof=prove(root, record, manifest))
        was_sent = job.destination.sender.was_sent if job.destination else lambda name: False
        if begun is not None:
            job.enter_phase("checking what an earlier run made")
        remade = set_damaged_aside(root, manifest, was_sent)
        done, made, status = manifest.tokens, None, "already complete"
        if manifest.complete and not remade:
            agree_on_probe(root, manifest, inputs.encoder)
            manifests.save_if_changed(root, manifest)  # modification times, if the root was copied
        else:
            made, status = _make(job, None), "complete"
        _send(job)
        return summarize(job, status, done, started, made=made, remade=remade)


@contextlib.contextmanager
def _hold_on_cluster(root: Path, options: RunOptions) -> Iterator[None]:
    """Hold the cluster's own lock on what is written: the lock of a file system may not hold on all its machines."""
    with contextlib.ExitStack() as leases:
        if options.engine is not None:
            leases.enter_context(options.engine.hold(str(root.resolve())))
            if options.upload_to is not None:
                leases.enter_context(options.engine.hold(options.upload_to.rstrip("/")))
        yield


def _pretokenize_consolidated(job: Job, started: float) -> Summary:
    """Write `tokens.bin` directly; shards are ranges of it, recorded as they become durable."""
    root, manifest, recipe = job.root, job.manifest, job.inputs.recipe
    before = manifests.load_consolidated(root)
    wanted = Consolidated(
        dtype=manifest.stored_dtype,
        seq_len=recipe.seq_len,
        id_scheme=job.options.id_scheme
        or (before.id_scheme if before else choose_scheme(recipe, tokens=None, seq_len=recipe.seq_len)),
    )
    is_done = manifest.complete and before is not None and is_whole(root, before) and before.settings == wanted.settings
    if is_done and before is not None and not damaged_sidecars(root, manifest):
        _send(job)
        return summarize(job, "already complete", manifest.tokens, started, proof=prove(root, before, manifest))
    manifests.save_consolidated(root, wanted)
    reopen(root)
    made, status = None, "already complete"
    with TokensFile(root, wanted) as file:
        remade = set_lost_aside(root, manifest, file, with_gaps=job.options.engine is not None)
        if job.options.engine is None:  # else the tasks write wherever a shard is missing
            file.begin(None)
        done = manifest.tokens
        if remade or not manifest.complete:
            made, status = _make(job, file), "complete"
        require_defined(wanted.id_scheme, file.nbytes)
        job.enter_phase("finishing the sample ids and digests")
        proof = prove(root, file.seal(), manifest)
        if proof.passed:
            file.publish()
    if proof.passed:
        manifests.save_consolidated(root, proof.record)
        _send(job)
    return summarize(job, status, done, started, made=made, remade=remade, proof=proof)


def _send(job: Job) -> None:
    """Send what the bucket lacks, if the data set goes to one."""
    if job.destination is not None:
        job.enter_phase("sending what the bucket lacks")
        job.destination.send_all()


def _make(job: Job, file: TokensFile | None) -> Made:
    """Make what the manifest does not prove."""
    job.manifest.complete = False
    job.enter_phase("checking the tokenizer, the plan and the disk")
    # The checks take as long as loading the reference backend does: the first spans are encoded meanwhile.
    with ThreadPoolExecutor(1, thread_name_prefix="check") as aside:
        checks = aside.submit(_check, job)
        return _make_shards(job, file, before_writing=lambda: job.options.on_plan(checks.result()))


def _check(job: Job) -> Preflight:
    """Check what must hold before a byte is written, and make the data root ours."""
    job.inputs.encoder.require_equal_backends()
    agree_on_probe(job.root, job.manifest, job.inputs.encoder)
    figures = preflight(*job.inputs, job.root, workers=job.options.workers, done_tokens=job.manifest.tokens)
    if job.options.engine is None or job.keeps_shards:  # else only the manifest comes to this disk
        check_disk(figures, job.root, shards_at_once=None if job.keeps_shards else SHARDS_PASSING)
    job.manifest.software = job.inputs.software()
    manifests.save(job.root, job.manifest)
    return figures


def _make_shards(job: Job, file: TokensFile | None, *, before_writing: Callable[[], None]) -> Made:
    """Make every shard that the manifest does not prove."""
    recorder = Recorder(job.root, job.manifest)
    executor = _open_executor(job, file, recorder)
    corpus = job.inputs.corpus
    drivers = [
        Driver(
            len(corpus.files),
            job.manifest,
            executor,
            first=first,
            end=end,
            batch_rows=job.options.span_rows or BATCH_ROWS,
            on_progress=job.options.on_progress,
        )
        for first, end in missing_ranges(job.manifest)
    ]
    try:
        if drivers:
            drivers[0].start()
        before_writing()
        for number, driver in enumerate(drivers):
            if number:
                driver.start()
            driver.run()
        finishing = Progress(executor.tokens, executor.documents, phase="finishing the last shards")
        job.options.on_progress(finishing)
        executor.finish()
    except BaseException:
        corpus.close()
        if job.destination is not None:
            job.destination.sender.stop()
        executor.abandon()
        raise
    finally:
        for driver in drivers:
            driver.close()
    ledger.balance(job.root, job.manifest)
    job.manifest.skipped_sha256 = recorder.skipped.settle(sum(entry.bad for entry in job.manifest.ledger))
    ledger.complete(job.root, job.manifest)
    return Made(sum(driver.audited for driver in drivers), executor.retries)


def _open_executor(job: Job, file: TokensFile | None, recorder: Recorder) -> Executor:
    (recipe, corpus, encoder), options = job.inputs, job.options
    sends = job.destination is not None and file is None
    if options.engine is None:
        return ThreadExecutor(
            job.root,
            job.manifest,
            corpus,
            encoder,
            recorder,
            workers=options.workers,
            on_bad_rows=options.on_bad_rows,
            span_rows=options.span_rows,
            tokens_file=file,
            on_recorded=job.destination.send_shard if job.destination is not None and sends else None,
        )
    from tokenmill.pipeline.cluster import ClusterExecutor  # loads the clients of buckets, too
    from tokenmill.pipeline.tasks import TaskContext

    context = TaskContext(
        corpus,
        encoder,
        options.on_bad_rows,
        options.span_rows,
        root=job.root.absolute(),
        shard_size=recipe.shard_size,
        is_one_file=file is not None,
        upload_to=options.upload_to if sends else None,
        store=options.store,
        keep_local=job.keeps_shards,
    )
    sender = job.destination.sender if job.destination is not None else None
    return ClusterExecutor(context, job.manifest, options.engine, recorder, tokens_file=file, sender=sender)

"""Consolidate, stage 6: shards → `tokens.bin` + `sample_ids.bin` + `consolidated.json`, in one pass.

Every shard is read once; copying, both SHA-256 and sample ids go side by side. `consolidated.json`
lists the shards that are durable in `tokens.bin`: what a restart adopts, and what `consume` may delete.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.inventory import Shard, find_shards_of, gap, refuse_foreign_tokens
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import Consolidated, CopiedShard, Manifest
from tokenmill.dataroot.proof import DEFAULT_SEQ_LEN, Check, Proof, choose_scheme, is_whole, prove
from tokenmill.dataroot.tokens_file import CHUNK_NBYTES, TokensFile, reopen, require_defined
from tokenmill.errors import DataRootError, StorageError
from tokenmill.options import OnBytes
from tokenmill.progress import also_shown

log = logging.getLogger("tokenmill")

_BUFFERS = 10
"""Chunks in memory: more than wait for the hashes, so that reading and writing continue."""
JOURNAL_NBYTES = 1 << 30
"""Copied between two entries in `consolidated.json`: what a kill costs."""


class ConsolidationReport(msgspec.Struct, kw_only=True):
    """What a consolidation did."""

    root: str
    status: str
    """`complete`, `already complete`, or `failed`: nothing was published then."""
    proof: Proof
    consumed: int
    """Shards this run deleted."""
    adopted_nbytes: int
    """Size of the tokens that an earlier run had stored."""
    seconds: float


def consolidate(
    root: Path | str,
    *,
    seq_len: int | None = None,
    dtype: str | None = None,
    id_scheme: layout.IdScheme | None = None,
    consume: bool = False,
    validate: bool = True,
    published: str | None = None,
    workers: int | None = None,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> ConsolidationReport:
    """Make `tokens.bin` and `sample_ids.bin` from the shards of a data root, or continue an earlier run.

    Args:
        root: the data root, with or without a manifest.
        seq_len: tokens per sample; None takes the recipe's, or 2048.
        dtype: what the shards must hold (`uint8`, `uint16`, `uint32`); None takes what they hold.
        id_scheme: of the sample ids; None takes `templar-v1` for the published Templar data set, else `blake2b-64`.
        consume: delete each shard once its bytes are durable in `tokens.bin` and recorded.
        validate: compare with the manifest and with published digests.
        published: without a manifest, the built-in recipe whose published digests must be met.
        workers: processes that make sample ids; None takes the cores, at most 4.
        on_progress: called as bytes are done.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        DataRootError: nothing to consolidate, shards that do not belong together, or files of another data set.
        RecipeError: the id scheme is undefined for this many tokens.
        StorageError: the disk is full or not writable. What is durable stays; the same call continues after it.
    """
    started = time.monotonic()
    root = Path(root)
    if not root.is_dir():
        raise DataRootError(f"{root}: no such directory", next_step="give the directory that holds the shards")
    with lock_data_root(root):
        manifest, record = manifests.load(root), manifests.load_consolidated(root)
        if manifest is not None and not manifest.complete:
            raise DataRootError(
                f"{root}: its shards are not all made yet: {manifest.tokens} tokens so far",
                next_step="run the tokenmill pretokenize command that began it again, then consolidate",
            )
        if record is None:
            refuse_foreign_tokens(root)
        shards = find_shards_of(root, manifest, record, dtype)
        wanted = _settle(shards, manifest, record, seq_len=seq_len, id_scheme=id_scheme)
        require_defined(wanted.id_scheme, wanted.tokens_nbytes)
        job = Consolidation(root, manifest, shards, wanted, validate=validate, published=published)
        if record is not None and _is_done(root, record, wanted) and not (consume and job.has_shards):
            return job.report("already complete", job.prove(record), started)
        with also_shown(on_progress, wanted=progress) as tell:
            return job.run(consume=consume, workers=workers, on_progress=tell, started=started)


def _settle(
    shards: list[Shard],
    manifest: Manifest | None,
    record: Consolidated | None,
    *,
    seq_len: int | None,
    id_scheme: layout.IdScheme | None,
) -> Consolidated:
    """Return what to make: as asked for, else as an interrupted run had it, else as the recipe says."""
    recipe = manifest.recipe if manifest else None
    tokens = sum(shard.tokens for shard in shards)
    length = seq_len or (record.seq_len if record else recipe.seq_len if recipe else DEFAULT_SEQ_LEN)
    if id_scheme is None and record is not None and record.seq_len == length:
        id_scheme = record.id_scheme
    return Consolidated(
        dtype=shards[0].dtype,
        seq_len=length,
        id_scheme=id_scheme or choose_scheme(recipe, tokens=tokens, seq_len=length),
        tokens=tokens,
        samples=tokens // length,
        shards=record.shards if record else [],
    )


def _is_done(root: Path, record: Consolidated, wanted: Consolidated) -> bool:
    return is_whole(root, record) and record.tokens == wanted.tokens and record.settings == wanted.settings


class Consolidation:
    """One consolidation; the data root's lock is held."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest | None,
        shards: list[Shard],
        record: Consolidated,
        *,
        validate: bool,
        published: str | None,
    ) -> None:
        self._root = root
        self._manifest = manifest
        self._shards = shards
        self._record = record
        self._validate = validate
        self._published = published
        self._checks: list[Check] = []
        self._consumed = 0
        self._adopted_nbytes = 0

    @property
    def has_shards(self) -> bool:
        """Whether there are shard files at all."""
        return any(shard.present for shard in self._shards)

    def run(self, *, consume: bool, workers: int | None, on_progress: OnBytes, started: float) -> ConsolidationReport:
        manifests.save_consolidated(self._root, self._record)
        reopen(self._root)
        with TokensFile(self._root, self._record, workers=workers) as file:
            self._adopt(file, on_progress)
            self._check_disk(file, consume)
            file.begin(None if consume else self._record.tokens_nbytes)
            self._copy(file, consume, on_progress)
            proof = self.prove(file.seal())
            if not proof.passed:
                self._withdraw(file)
                return self.report("failed", proof, started)
            file.publish()
        manifests.save_consolidated(self._root, proof.record)
        log.info("consolidated: %s", msgspec.json.encode(proof.record).decode())
        return self.report("complete", proof, started)

    def _adopt(self, file: TokensFile, on_progress: OnBytes) -> None:
        """Take over the shards an earlier run stored, as far as they are what they must be."""
        copied, self._record.shards = self._record.shards, []
        for index, shard in enumerate(self._shards):
            known = self._stored_digest(shard, copied[index] if index < len(copied) else None)
            nbytes = shard.tokens * self._record.itemsize
            stored = known is not None and file.stored_nbytes >= file.nbytes + nbytes
            found = file.digest(shard.header, nbytes) if stored else None
            if found is None or found != known:
                if not shard.present:
                    raise DataRootError(
                        f"{shard.path.name} was consumed, but {file.partial} does not hold it at byte {file.nbytes}: "
                        f"expected sha256 {known}, found {found or 'the end of the file'}",
                        next_step="put the shard back (download or make it again), then run the same command again",
                    )
                break
            file.adopt(nbytes)
            self._compare(shard, found)
            self._record.shards.append(CopiedShard(shard.tokens, found, shard.mtime_ns or 0))
            on_progress(file.nbytes, self._record.tokens_nbytes)
        self._adopted_nbytes = file.nbytes
        lost = next((shard for shard in self._shards[len(self._record.shards) :] if not shard.present), None)
        if lost is not None:
            raise gap(self._root, self._shards.index(lost), {})

    def _stored_digest(self, shard: Shard, copied: CopiedShard | None) -> str | None:
        """Return what `tokens.bin` should hold of a shard; None if it must be copied (again)."""
        if not shard.present:
            return copied.sha256 if copied else shard.sha256
        if copied is None or copied.mtime_ns != shard.mtime_ns:
            return None
        if self._validate and shard.sha256 not in (None, copied.sha256):
            return None
        return copied.sha256

    def _compare(self, shard: Shard, found: str) -> bool:
        """Note the check of a shard against the manifest; whether it may be relied upon."""
        if shard.sha256 is None or not self._validate:
            return True
        self._checks.append(Check(f"{shard.path.name} sha256", shard.sha256, found))
        return shard.sha256 == found

    def _check_disk(self, file: TokensFile, consume: bool) -> None:
        left = self._record.tokens_nbytes - file.nbytes
        # With `consume`, the shard that is being copied is the only one that is there twice.
        needed = min(left, max(shard.tokens for shard in self._shards) * self._record.itemsize) if consume else left
        # Room that an earlier run claimed belongs to this run, and is released only afterwards.
        free = shutil.disk_usage(self._root).free + max(0, file.allocated_nbytes - file.nbytes)
        if needed > free:
            raise StorageError(
                f"{self._root}: the disk cannot hold {layout.TOKENS}: {needed / 1e9:.2f} GB needed, "
                f"{free / 1e9:.2f} GB free",
                next_step="make room, or give --consume: each shard is then deleted once it is in tokens.bin",
            )

    def _copy(self, file: TokensFile, consume: bool, on_progress: OnBytes) -> None:
        reliable = all(check.passed for check in self._checks)
        journaled = file.nbytes
        waiting = list(self._record.shards)
        if consume and reliable:
            self.retire(self._shards[: len(waiting)])
        with ThreadPoolExecutor(1, thread_name_prefix="shard-sha256") as hashing:
            copier = _Copier(file, self._record.itemsize, hashing)
            for index in range(len(waiting), len(self._shards)):
                shard = self._shards[index]
                found = copier.copy(shard, lambda: on_progress(file.nbytes, self._record.tokens_nbytes))
                reliable = self._compare(shard, found) and reliable
                waiting.append(CopiedShard(shard.tokens, found, shard.mtime_ns or 0))
                if reliable and (consume or file.nbytes - journaled >= JOURNAL_NBYTES):
                    file.sync()
                    self._record.shards = list(waiting)
                    manifests.save_consolidated(self._root, self._record)
                    journaled = file.nbytes
                    if consume:
                        self.retire([shard])
        self._record.shards = waiting

    def retire(self, shards: list[Shard]) -> None:
        """Delete shards that are durable in `tokens.bin` and recorded."""
        for shard in shards:
            if shard.present:
                with atomic.translate_write_errors(shard.path):
                    shard.path.unlink(missing_ok=True)
                self._consumed += 1

    def _withdraw(self, file: TokensFile) -> None:
        """After a failed validation: as it was before, unless what is stored is the only copy."""
        if self._consumed or not all(shard.present for shard in self._shards):
            return
        file.discard()

    def prove(self, record: Consolidated) -> Proof:
        """Return what was compared, if anything is to be."""
        if not self._validate:
            return Proof(record=record, checks=[], against="")
        return prove(self._root, record, self._manifest, shards=self._checks, published=self._published)

    def report(self, status: str, proof: Proof, started: float) -> ConsolidationReport:
        return ConsolidationReport(
            root=str(self._root),
            status=status,
            proof=proof,
            consumed=self._consumed,
            adopted_nbytes=self._adopted_nbytes,
            seconds=round(time.monotonic() - started, 3),
        )


class _Copier:
    """Reads shards into a few buffers that take turns."""

    def __init__(self, file: TokensFile, itemsize: int, hashing: ThreadPoolExecutor) -> None:
        self._file = file
        self._itemsize = itemsize
        self._hashing = hashing
        self._buffers = [memoryview(bytearray(CHUNK_NBYTES)) for _ in range(_BUFFERS)]
        self._in_use: list[list[Future[None]]] = [[] for _ in range(_BUFFERS)]
        self._turn = 0

    def copy(self, shard: Shard, progressed: Callable[[], None]) -> str:
        """Append a shard's tokens; the SHA-256 of its file."""
        sha256 = hashlib.sha256(shard.header)
        left = shard.tokens * self._itemsize
        last: Future[None] | None = None
        with atomic.translate_read_errors(shard.path), shard.path.open("rb", buffering=0) as source:
            source.seek(len(shard.header))
            while left:
                buffer, in_use = self._buffers[self._turn], self._in_use[self._turn]
                for future in in_use:
                    future.result()
                count = source.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise DataRootError(
                        f"{shard.path}: ended {left} bytes early: it changed while it was read",
                        next_step="make sure that nothing else writes there, then run the same command again",
                    )
                data = buffer[:count]
                last = self._hashing.submit(sha256.update, data)
                self._in_use[self._turn] = [last, self._file.append(data)]
                self._turn = (self._turn + 1) % _BUFFERS
                left -= count
                progressed()
        if last is not None:
            last.result()
        return sha256.hexdigest()

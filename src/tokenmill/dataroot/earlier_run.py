"""Earlier run: what another run left in a directory, and which of its shards are what the manifest records."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.manifest import Manifest, ShardRecord
from tokenmill.errors import DataRootError

log = logging.getLogger("tokenmill")


def refuse_foreign(root: Path) -> None:
    """A directory without a manifest must hold nothing we would write over."""
    patterns = (layout.SHARD_GLOB, layout.DOCUMENTS_GLOB, layout.TOKENS, layout.SAMPLE_IDS)
    found = next((path for pattern in patterns for path in root.glob(pattern)), None)
    if found is not None:
        raise DataRootError(
            f"{root}: {found.name} is there but no {layout.MANIFEST}: the directory holds another data set",
            next_step="choose another directory, or move those files away",
        )


def set_damaged_aside(
    root: Path,
    manifest: Manifest,
    was_sent: Callable[[str], bool] = lambda name: False,
    *,
    sidecars_alone: bool = False,
) -> list[str]:
    """Move the records of shards whose files are missing, torn or foreign to `damaged`; those files' names.

    A shard whose size and modification time are as recorded is trusted; another is hashed. One that is not
    here but `was_sent` to a store, which has it still, is not missing. With `sidecars_alone`, tokens are elsewhere.
    """
    names: list[str] = []
    records, manifest.shards, manifest.tokens, manifest.documents = manifest.shards, [], 0, 0
    for record in records:
        itemsize = npy.token_dtype(manifest.recipe.dtype).itemsize
        name = damaged_sidecar(root, record) if sidecars_alone else _damaged_file(root, record, itemsize, was_sent)
        if name is None:
            manifest.add(record)
        else:
            names.append(name)
            manifest.damaged.append(record)
            log.warning("%s is missing or not the file the manifest records; its shard will be made again", name)
    return names


def _damaged_file(root: Path, record: ShardRecord, itemsize: int, was_sent: Callable[[str], bool]) -> str | None:
    shard, documents = layout.shard_name(record.index), layout.documents_name(record.index)
    if not (root / shard).exists() and was_sent(shard) and was_sent(documents):
        return None
    try:
        stat = (root / shard).stat()
    except FileNotFoundError:
        return shard
    if stat.st_size != layout.NPY_HEADER_NBYTES + record.tokens * itemsize:
        return shard
    if stat.st_mtime_ns != record.mtime_ns:
        if sha256_of(root / shard) != record.sha256:
            return shard
        record.mtime_ns = stat.st_mtime_ns
    return damaged_sidecar(root, record)


def damaged_sidecar(root: Path, record: ShardRecord) -> str | None:
    """Return the documents sidecar of a shard if it is missing, or not what the manifest records."""
    documents = layout.documents_name(record.index)
    is_whole = (root / documents).is_file() and sha256_of(root / documents) == record.documents_sha256
    return None if is_whole else documents


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

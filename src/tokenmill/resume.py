"""Resume: what an earlier run left → what is still to make. Reads only.

A shard counts as done only if the manifest has its record and the file is the one recorded.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from tokenmill import layout
from tokenmill.manifest import Manifest, ShardRecord

log = logging.getLogger("tokenmill")


def drop_damaged(root: Path, manifest: Manifest) -> list[str]:
    """Strike shards from the manifest whose files are missing, torn or foreign; those files' names.

    A shard whose size and modification time are as recorded is trusted; another is hashed.
    """
    damaged: list[str] = []
    kept: list[ShardRecord] = []
    for record in manifest.shards:
        name = _damaged_file(root, record, layout.token_dtype(manifest.recipe.dtype).itemsize)
        if name is None:
            kept.append(record)
        else:
            damaged.append(name)
            log.warning("%s is missing or not the file the manifest records; its shard will be made again", name)
    manifest.shards, manifest.tokens, manifest.documents = [], 0, 0
    for record in kept:
        manifest.add(record)
    return damaged


def _damaged_file(root: Path, record: ShardRecord, itemsize: int) -> str | None:
    shard, documents = layout.shard_name(record.index), layout.documents_name(record.index)
    try:
        stat = (root / shard).stat()
    except FileNotFoundError:
        return shard
    if stat.st_size != layout.NPY_HEADER_NBYTES + record.tokens * itemsize:
        return shard
    if stat.st_mtime_ns != record.mtime_ns and _sha256(root / shard) != record.sha256:
        return shard
    if not (root / documents).is_file() or _sha256(root / documents) != record.documents_sha256:
        return documents
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing_ranges(manifest: Manifest) -> list[tuple[int, int | None]]:
    """Runs of shards to make, as `(first, end)`; the last is open-ended unless `total_tokens` are there.

    A gap between finished shards is made alone; the rest is made from the last shard's cursor on.
    """
    present = [shard.index for shard in manifest.shards]
    ranges: list[tuple[int, int | None]] = []
    expected = 0
    for index in present:
        if index > expected:
            ranges.append((expected, index))
        expected = index + 1
    total = manifest.recipe.total_tokens
    if total is None or expected * manifest.recipe.shard_size < total:
        ranges.append((expected, None))
    return ranges

"""Single shard: the first shard of a data set alone, to try things on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.inventory import read_header
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.loading.stats import token_counts
from tokenmill.recipe import Recipe

_SUFFICIENT = 0.9
"""Share of the wanted size: a shard that large is kept, as the original script does."""
_CHUNK_TOKENS = 1 << 22


class ShardStatistics(msgspec.Struct):
    """What the tokens of a shard are like."""

    path: str
    tokens: int
    nbytes: int
    dtype: str
    id_min: int
    id_max: int
    unique_ids: int
    id_mean: float


def first_shard(recipe: Recipe) -> Recipe:
    """Return the same recipe, ended after its first shard."""
    return msgspec.structs.replace(
        recipe, total_tokens=min(recipe.shard_size, recipe.total_tokens or recipe.shard_size)
    )


def existing_tokens(root: Path) -> int | None:
    """Return tokens of the shard that is there; None if none is, or if the run that makes it did not come to its end.

    Raises:
        DataRootError: the file is not a shard.
    """
    path = root / layout.shard_name(0)
    manifest = manifests.load(root)
    if manifest is not None and not manifest.complete:
        return None
    return read_header(path).tokens if path.is_file() else None


def is_sufficient(tokens: int, recipe: Recipe) -> bool:
    """Return whether a shard of so many tokens need not be made again."""
    return tokens >= recipe.shard_size * _SUFFICIENT


def make_way(root: Path, recipe: Recipe) -> None:
    """Remove a smaller test shard that tokenmill made by the same recipe, so that a larger one can be made.

    Anything else is left alone: `pretokenize` will say what is in its way.
    """
    if not (root / layout.MANIFEST).exists():
        return
    with lock_data_root(root):
        manifest = manifests.load(root)
        if manifest is None or len(manifest.shards) != 1 or manifests.load_consolidated(root) is not None:
            return
        size = {"shard_size": recipe.shard_size, "total_tokens": recipe.total_tokens}
        same = msgspec.structs.replace(manifest.recipe, **size)
        open_fields = {"dtype": same.dtype, "eos_token": same.eos_token}
        open_fields |= {
            name: getattr(same, name)
            for name in ("bos_token", "fim_tokens")
            if getattr(recipe, name) is None and (recipe.bos, recipe.fim_rate) == (same.bos, same.fim_rate)
        }
        resolved = msgspec.structs.replace(recipe, **open_fields)
        if manifest.recipe.shard_size >= recipe.shard_size or resolved.difference(same) is not None:
            return
        for name in (layout.shard_name(0), layout.documents_name(0), layout.MANIFEST):
            with atomic.translate_write_errors(root / name):
                (root / name).unlink(missing_ok=True)


def shard_statistics(path: Path) -> ShardStatistics:
    """Read a shard through once."""
    tokens = np.load(path, mmap_mode="r")
    chunks = (tokens[at : at + _CHUNK_TOKENS] for at in range(0, len(tokens), _CHUNK_TOKENS))
    counts = token_counts(chunks, len(tokens), tokens.itemsize)
    used = np.flatnonzero(counts)
    return ShardStatistics(
        path=str(path),
        tokens=len(tokens),
        nbytes=path.stat().st_size,
        dtype=tokens.dtype.name,
        id_min=int(used[0]),
        id_max=int(used[-1]),
        unique_ids=len(used),
        id_mean=float(np.dot(counts, np.arange(len(counts), dtype=np.float64)) / len(tokens)),
    )

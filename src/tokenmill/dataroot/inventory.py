"""Inventory: the shards that a data root has, as found, and whether they belong together. Reads only.

Every header is looked at before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenmill.dataroot import atomic, layout, npy
from tokenmill.dataroot.manifest import Consolidated, CopiedShard, Manifest
from tokenmill.errors import DataRootError


class Shard(NamedTuple):
    """A shard of the data set, on its own or only in `tokens.bin`."""

    path: Path
    header: bytes
    dtype: layout.DTypeName
    tokens: int
    mtime_ns: int | None
    """Modification time of its file; None where only `tokens.bin` has the shard."""
    sha256: str | None
    """What the whole file must be, if anything says so."""

    @property
    def present(self) -> bool:
        """Whether it has a file."""
        return self.mtime_ns is not None


def refuse_foreign_tokens(root: Path) -> None:
    """Files of these names that we have no record of are another data set's."""
    for name in (layout.TOKENS, layout.SAMPLE_IDS):
        for path in (root / name, root / (name + layout.PARTIAL_SUFFIX)):
            if path.exists():
                raise DataRootError(
                    f"{path}: is there, but no {layout.CONSOLIDATED} says what it is",
                    next_step="move it away, or choose another directory: it is not overwritten",
                )


def find_shards_of(
    root: Path, manifest: Manifest | None, record: Consolidated | None, dtype: str | None
) -> list[Shard]:
    """Return every shard of the data root, those that only `tokens.bin` still has included; all are looked at first."""
    present = _find_shards(root, dtype)
    copied = record.shards if record else []
    if manifest is not None:
        known = [CopiedShard(shard.tokens, shard.sha256, shard.mtime_ns) for shard in manifest.shards]
        extra = next((index for index in sorted(present) if index >= len(known)), None)
        if extra is not None:
            raise DataRootError(
                f"{root}: {layout.shard_name(extra)} is not in {layout.MANIFEST}, which has {len(known)} shards",
                next_step="move it away: it is not of this data set",
            )
        needed = len(known)
        kind: layout.DTypeName | None = manifest.stored_dtype
    else:
        known, kind = copied, record.dtype if record else None
        needed = max([len(copied), *(index + 1 for index in present)])
    if dtype is not None and kind is not None and dtype != kind:
        raise DataRootError(f"{root}: expected tokens of {dtype}, found {kind}", next_step=f"give --token-dtype {kind}")
    shards: list[Shard] = []
    for index in range(needed):
        expected = known[index] if index < len(known) else None
        shard = present.get(index)
        if shard is None:
            if record is None or expected is None or kind is None:
                raise gap(root, index, present)
            header = npy.npy_header(np.dtype(kind), expected.tokens)
            shards.append(Shard(root / layout.shard_name(index), header, kind, expected.tokens, None, expected.sha256))
            continue
        if expected is not None and shard.tokens != expected.tokens:
            raise DataRootError(
                f"{shard.path}: expected {expected.tokens} tokens, found {shard.tokens}",
                next_step="fetch or make the shard again",
            )
        shards.append(shard._replace(sha256=expected.sha256 if expected and manifest else None))
    if not shards:
        raise DataRootError(
            f"{root}: no shards (train_000000.npy, ...) in it", next_step="give the directory that holds them"
        )
    _refuse_mixed(shards)
    return shards


def _find_shards(root: Path, dtype: str | None) -> dict[int, Shard]:
    shards: dict[int, Shard] = {}
    for path in sorted(root.glob(layout.SHARD_GLOB)):
        index = layout.shard_index(path.name)
        if index is None:
            raise DataRootError(
                f"{path}: expected a name like {layout.shard_name(0)}: its place in the data set cannot be told",
                next_step="rename it, or move it away",
            )
        header = read_header(path)
        if dtype is not None and header.dtype != dtype:
            raise DataRootError(
                f"{path}: expected tokens of {dtype}, found {header.dtype}",
                next_step=f"give --token-dtype {header.dtype}",
            )
        data = npy.npy_header(np.dtype(header.dtype), header.tokens)
        shards[index] = Shard(path, data, header.dtype, header.tokens, path.stat().st_mtime_ns, None)
    return shards


def read_header(path: Path) -> npy.NpyHeader:
    """Return the header of a shard; the file must be as long as it says, and written as `numpy.save` does."""
    again = "fetch or make the shard again"
    with atomic.translate_read_errors(path):
        with path.open("rb") as file:
            data = file.read(layout.NPY_HEADER_NBYTES)
        nbytes = path.stat().st_size
    try:
        header = npy.parse_npy_header(data)
    except ValueError as error:
        raise DataRootError(f"{path}: not a shard: {error}", next_step=again) from None
    if data != npy.npy_header(np.dtype(header.dtype), header.tokens):
        raise DataRootError(
            f"{path}: expected the {layout.NPY_HEADER_NBYTES}-byte header that numpy.save writes, found another",
            next_step="write it again: numpy.save(path, numpy.load(path))",
        )
    expected = header.nbytes + header.tokens * np.dtype(header.dtype).itemsize
    if nbytes != expected:
        raise DataRootError(
            f"{path}: expected {expected} bytes for {header.tokens} tokens of {header.dtype}, found {nbytes}",
            next_step=again,
        )
    return header


def gap(root: Path, index: int, present: dict[int, Shard]) -> DataRootError:
    """Return the error for a shard that is missing."""
    after = next((other for other in sorted(present) if other > index), None)
    found = "nothing after it" if after is None else layout.shard_name(after)
    return DataRootError(
        f"{root}: expected {layout.shard_name(index)}, found {found}",
        next_step="fetch or make the missing shards: a gap would shift every sample after it",
    )


def _refuse_mixed(shards: list[Shard]) -> None:
    """All of one dtype; all of one size but the last, which may be smaller; none empty."""
    kinds = [shard.dtype for shard in shards]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise DataRootError(
            f"{shards[other].path}: expected tokens of {kinds[0]} as in {shards[0].path.name}, found {kinds[other]}",
            next_step="shards of one data set have one dtype: fetch or make the odd one again",
        )
    size = shards[0].tokens
    for i, shard in enumerate(shards):
        is_last = i == len(shards) - 1
        if shard.tokens == size or (is_last and 0 < shard.tokens < size):
            continue
        raise DataRootError(
            f"{shard.path}: expected {'at most ' if is_last else ''}{size} tokens as in {shards[0].path.name}, "
            f"found {shard.tokens}",
            next_step="shards of one data set have one size, but for the last: fetch or make the odd one again",
        )

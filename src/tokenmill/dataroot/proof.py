"""Proof: what finished files must be, and whether they are. Reads only.

What is compared with is the manifest and, for a data set that others have too, its published digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot import sample_ids as ids
from tokenmill.dataroot.manifest import Consolidated, Manifest
from tokenmill.recipe import Recipe, load_recipe

DEFAULT_SEQ_LEN = 2048
_SPOT_CHECKS = 64


class Published(NamedTuple):
    """A data set that others have: what its files must be."""

    tokens: int
    tokens_sha256: str
    samples: int
    sample_ids_sha256: str


PUBLISHED = {
    "templar-150b": Published(
        161_061_273_600,
        "4c53d81b27b059e83b0cde7f97fc9877572cf5081eb0a2ebec9b0fc00e79a931",
        78_643_200,
        "95dcefad84cae66784a09e938d5136dcb32b326243b67389d7ca82fc3cce3f3f",
    )
}
"""By built-in recipe; the figures are those of the Templar project's own consolidation script."""


class Check(msgspec.Struct):
    """Something that must hold."""

    name: str
    expected: str
    found: str

    @property
    def passed(self) -> bool:
        return self.expected == self.found


class Proof(msgspec.Struct, kw_only=True):
    """What finished files are, and what was compared."""

    record: Consolidated
    checks: list[Check]
    against: str
    """What the checks compared with, as words; empty if with nothing."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def prove(
    root: Path,
    record: Consolidated,
    manifest: Manifest | None,
    *,
    shards: Sequence[Check] = (),
    published: str | None = None,
) -> Proof:
    """Compare what is stored, published or still to be, with what says what it must be.

    Args:
        root: the data root.
        record: of the finished files.
        manifest: of the data root, if it has one.
        shards: checks of the shards, made while they were read.
        published: without a manifest, the built-in recipe whose published digests must be met.
    """
    checks = [*shards]
    if manifest is not None:
        checks.append(Check("tokens.bin tokens", str(manifest.tokens), str(record.tokens)))
    checks += spot_checks(root, record)
    name = published_name(manifest, published, tokens=record.tokens)
    if name is not None:
        checks += published_checks(PUBLISHED[name], record)
    sources = [layout.MANIFEST] if manifest else []
    sources += [f"the published digests of {name}"] if name else []
    return Proof(record=record, checks=checks, against=" and ".join(sources))


def is_whole(root: Path, record: Consolidated) -> bool:
    """Return whether both files are recorded as complete and have their sizes."""
    paths = {root / layout.TOKENS: record.tokens_nbytes, root / layout.SAMPLE_IDS: record.sample_ids_nbytes}
    return record.complete and all(p.is_file() and p.stat().st_size == nbytes for p, nbytes in paths.items())


def is_unmodified(recipe: Recipe, name: str) -> bool:
    """Return whether a resolved recipe is the built-in one, every field."""
    builtin = load_recipe(name)
    return msgspec.structs.replace(recipe, eos_token=builtin.eos_token) == builtin


def choose_scheme(recipe: Recipe | None, *, tokens: int | None, seq_len: int) -> layout.IdScheme:
    """`templar-v1` for the unmodified recipe, or for shards without a manifest of its very size; else `blake2b-64`."""
    is_templar = (
        is_unmodified(recipe, "templar-150b") if recipe is not None else tokens == PUBLISHED["templar-150b"].tokens
    )
    return "templar-v1" if is_templar and seq_len == DEFAULT_SEQ_LEN else "blake2b-64"


def published_name(manifest: Manifest | None, asked: str | None, *, tokens: int) -> str | None:
    """Return the built-in recipe whose published digests the data must meet, if any."""
    if manifest is not None:
        return next((name for name in PUBLISHED if is_unmodified(manifest.recipe, name)), None)
    return asked or next((name for name, known in PUBLISHED.items() if known.tokens == tokens), None)


def published_checks(known: Published, record: Consolidated) -> list[Check]:
    """Return what others have against what was made; their ids only if ours are of the same scheme."""
    checks = [
        Check("tokens.bin tokens", str(known.tokens), str(record.tokens)),
        Check("tokens.bin sha256", known.tokens_sha256, record.tokens_sha256),
    ]
    if (record.seq_len, record.id_scheme) != (DEFAULT_SEQ_LEN, "templar-v1"):
        return checks
    return [
        *checks,
        Check("sample_ids.bin ids", str(known.samples), str(record.samples)),
        Check("sample_ids.bin sha256", known.sample_ids_sha256, record.sample_ids_sha256),
    ]


def spot_checks(root: Path, record: Consolidated) -> list[Check]:
    """Return sizes as stored, and ids spread over the file made again from the stored tokens."""
    tokens, sample_ids = (
        path if path.exists() else path.with_name(path.name + layout.PARTIAL_SUFFIX)
        for path in (root / layout.TOKENS, root / layout.SAMPLE_IDS)
    )
    window = record.window_nbytes
    agree = wanted = 0
    with tokens.open("rb") as data, sample_ids.open("rb") as stored:
        for sample in sorted(
            {i * record.samples // _SPOT_CHECKS for i in range(_SPOT_CHECKS)} if record.samples else ()
        ):
            data.seek(sample * window)
            stored.seek(sample * layout.ID_NBYTES)
            made = ids.sample_ids(data.read(window), window) or ids.EMPTY_ID
            agree += made == stored.read(layout.ID_NBYTES)
            wanted += 1
    return [
        Check("tokens.bin bytes", str(record.tokens_nbytes), str(tokens.stat().st_size)),
        Check("sample_ids.bin bytes", str(record.sample_ids_nbytes), str(sample_ids.stat().st_size)),
        Check("sample ids made again", f"{wanted} of {wanted}", f"{agree} of {wanted}"),
    ]

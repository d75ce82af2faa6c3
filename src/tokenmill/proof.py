"""Proof: what finished files must be, and whether they are. Reads only.

What is compared with is the manifest and, for a data set that others have too, its published digests.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenmill import ids, layout
from tokenmill.manifest import Consolidated, Manifest
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


def is_unmodified(recipe: Recipe, name: str) -> bool:
    """Whether a resolved recipe is the built-in one, every field."""
    builtin = load_recipe(name)
    return msgspec.structs.replace(recipe, eos_token=builtin.eos_token) == builtin


def choose_scheme(recipe: Recipe | None, *, tokens: int | None, seq_len: int) -> layout.IdScheme:
    """`templar-v1` for the unmodified recipe, or for shards without a manifest of its very size; else `blake2b-64`."""
    is_templar = (
        is_unmodified(recipe, "templar-150b") if recipe is not None else tokens == PUBLISHED["templar-150b"].tokens
    )
    return "templar-v1" if is_templar and seq_len == DEFAULT_SEQ_LEN else "blake2b-64"


def published_name(manifest: Manifest | None, asked: str | None, *, tokens: int) -> str | None:
    """The built-in recipe whose published digests the data must meet, if any."""
    if manifest is not None:
        return next((name for name in PUBLISHED if is_unmodified(manifest.recipe, name)), None)
    return asked or next((name for name, known in PUBLISHED.items() if known.tokens == tokens), None)


def published_checks(known: Published, record: Consolidated) -> list[Check]:
    """What others have against what was made; the tokens first."""
    return [
        Check("tokens.bin tokens", str(known.tokens), str(record.tokens)),
        Check("tokens.bin sha256", known.tokens_sha256, record.tokens_sha256),
        Check("sample_ids.bin ids", str(known.samples), str(record.samples)),
        Check("sample_ids.bin sha256", known.sample_ids_sha256, record.sample_ids_sha256),
    ]


def spot_checks(root: Path, record: Consolidated) -> list[Check]:
    """Sizes as stored, and ids spread over the file made again from the stored tokens."""
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

"""View record: `view.json`, which says what a view is, from which data roots, and the digests of its index."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import VERSION, Manifest, Natural, load_record
from tokenmill.errors import DataRootError
from tokenmill.recipe import Positive

Shuffle = Literal["documents", "samples", "none"]
Split = Literal["train", "validation"]
Identity = Literal["text", "tokens"]
"""What the hash of a document is made of: its text, or, where the data root has no hashes of text, its tokens."""


class SourceRecord(msgspec.Struct, kw_only=True):
    """A data root of a view, pinned, and what became of its documents."""

    name: str
    root: str
    """Its directory; relative to the view's if it was given as a relative path."""
    tokens: Natural
    """Number of tokens of its stream."""
    pin: str
    """SHA-256 that `pin_of` makes of its shards."""
    identity: Identity
    where: str | None = None
    removed: list[str] = []
    """Entries of the removal list: a hash of 16 hexadecimal digits, or a row and its source file."""
    documents: Natural = 0
    """Documents of the data root."""
    taken: Natural = 0
    """Documents of it that are in the view."""
    left_out: dict[str, int] = {}
    """The other documents, by reason."""


class ViewRecord(msgspec.Struct, kw_only=True):
    """All of `view.json`."""

    version: int = VERSION
    seq_len: Positive
    seed: Natural = 0
    shuffle: Shuffle = "documents"
    holdout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    split: Split = "train"
    duplicates: Literal["keep", "first"] = "keep"
    dtype: layout.DTypeName
    """Of the tokens of all its sources."""
    tokenizer_sha256: str
    """Of the `tokenizer.json` that made all its sources."""
    sources: list[SourceRecord]
    documents: Natural
    tokens: Natural
    """Number of tokens of its documents; those after the last whole sample are in no sample."""
    notes: list[str] = []
    """What a user should know of it."""
    begins_sha256: str = ""
    places_sha256: str = ""
    digests: dict[str, str] = {}
    """SHA-256 of every other field, as in the manifest."""

    @property
    def samples(self) -> int:
        """Number of whole samples."""
        return self.tokens // self.seq_len

    @property
    def samples_sha256(self) -> str:
        """SHA-256 of all that defines the samples, wherever the data roots lie; what a receipt names."""
        order = [self.shuffle, self.seed] if self.shuffle == "samples" else []
        pins = [source.pin for source in self.sources]
        defined = [self.seq_len, self.begins_sha256, self.places_sha256, pins, order]
        return hashlib.sha256(msgspec.json.encode(defined)).hexdigest()


def load_view(folder: Path) -> ViewRecord | None:
    """Load the record of a view; None if the directory is none.

    Raises:
        DataRootError: it cannot be read, is not ours, or was changed.
    """
    return load_record(folder / layout.VIEW, ViewRecord)


def source_root(folder: Path, source: SourceRecord) -> Path:
    """Return the directory of a source."""
    return folder / source.root  # an absolute path stays as it is


def pin_of(manifest: Manifest) -> str:
    """SHA-256 of the SHA-256 of every shard of a data root: what a view relies on."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()


def require_pinned(root: Path, manifest: Manifest | None, source: SourceRecord) -> Manifest:
    """Return the manifest of a source, which must be the data root that the view was built from.

    Raises:
        DataRootError: it is not there, or is another one.
    """
    if manifest is None:
        raise DataRootError(
            f"{root}: source {source.name!r} of the view: expected a data root, found no {layout.MANIFEST}",
            next_step="put the data root back where it was when the view was built, or build the view again",
        )
    if not manifest.complete or pin_of(manifest) != source.pin:
        raise DataRootError(
            f"{root}: source {source.name!r} of the view is another data root than it was built from: expected shards "
            f"with the digest {source.pin}, found {pin_of(manifest)}",
            next_step="put that data root back, or build the view again",
        )
    return manifest

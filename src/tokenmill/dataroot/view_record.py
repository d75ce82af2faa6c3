"""View record: `view.json`, which says what a view is, from which data roots, and the digests of its index."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import VERSION, Manifest, Natural, load_record
from tokenmill.errors import DataRootError
from tokenmill.recipe import Positive

Shuffle = Literal["documents", "samples", "none"]
Split = Literal["train", "validation"]
Packing = Literal["concat", "best-fit"]
Identity = Literal["text", "tokens"]
"""What the hash of a document is made of: its text, or, where the data root has no hashes of text, its tokens."""


def most_samples(max_epochs: float, samples: int) -> int:
    """Return how many samples of a source may come: `max_epochs` is the decimal that the user wrote."""
    return int(Fraction(repr(max_epochs)) * samples)


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
    max_epochs: float | None = None
    """In a mixture: how often each of its samples may come."""
    span: Natural = 0
    """In a mixture: tokens of its documents, padding included."""
    samples: Natural = 0
    """In a mixture: samples of one epoch."""


class StageRecord(msgspec.Struct, kw_only=True):
    """A stage of a mixture."""

    samples: Natural
    shares: dict[str, Natural]
    """Samples of each source among `layout.SCHEDULE_PERIOD`; sources without any are left out."""
    taken: dict[str, Natural]
    """Samples of each of these sources in the whole stage."""


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
    """Data type of the tokens of all its sources."""
    tokenizer_sha256: str
    """SHA-256 of the `tokenizer.json` that made all its sources."""
    sources: list[SourceRecord]
    documents: Natural
    tokens: Natural
    """Number of tokens of its documents; those after the last whole sample are in no sample."""
    notes: list[str] = []
    """What a user should know of it."""
    packing: Packing = "concat"
    padding: Natural = 0
    """Tokens of padding in the samples of one epoch."""
    padding_id: Natural | None = None
    """What padding is: EOS."""
    index_entries: Natural | None = None
    """Entries of the index, where they are not the documents: pieces of documents, and padding."""
    cut: Natural = 0
    """Documents that `best-fit` cuts, as they are longer than a sample."""
    stages: list[StageRecord] = []
    """The stages of a mixture; empty for other views."""
    begins_sha256: str = ""
    places_sha256: str = ""
    schedule_sha256: str = ""
    digests: dict[str, str] = {}
    """SHA-256 of every other field, as in the manifest."""

    @property
    def samples(self) -> int:
        """Number of whole samples; of a mixture, those of all stages."""
        if self.stages:
            return sum(stage.samples for stage in self.stages)
        return (self.tokens + self.padding) // self.seq_len

    @property
    def entries(self) -> int:
        """Number of entries of the index."""
        return self.documents if self.index_entries is None else self.index_entries

    @property
    def shuffles_samples(self) -> bool:
        """Whether samples are put in a random order, in a mixture those of each source and epoch."""
        draws = self.packing == "best-fit" or bool(self.stages)
        return self.shuffle == "samples" or (draws and self.shuffle == "documents")

    @property
    def index_sha256(self) -> dict[str, str]:
        """SHA-256 of the files of the index, by name."""
        found = {layout.VIEW_BEGINS: self.begins_sha256, layout.VIEW_PLACES: self.places_sha256}
        return found | ({layout.VIEW_SCHEDULE: self.schedule_sha256} if self.stages else {})

    @property
    def samples_sha256(self) -> str:
        """SHA-256 of all that defines the samples, wherever the data roots lie; what a receipt names."""
        order: list[object] = [self.shuffle, self.seed] if self.shuffles_samples else []
        if self.packing != "concat":
            order += [self.packing, self.padding_id]
        if self.stages:
            order += [self.schedule_sha256, [stage.samples for stage in self.stages]]
            order += [[source.name, source.span] for source in self.sources]
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

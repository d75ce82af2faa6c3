"""Info: what a data root is and how it was made, from its records. Reads no token."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.manifest import Consolidated, FileLedger, Manifest, TokenizerRecord
from tokenmill.errors import DataRootError
from tokenmill.options import StoreOptions
from tokenmill.recipe import Recipe
from tokenmill.redact import escape_surrogates
from tokenmill.transfer.journal import elsewhere


class ShardInfo(msgspec.Struct):
    """A shard, or the stretch of `tokens.bin` that holds its tokens."""

    name: str
    tokens: int
    documents: int
    sha256: str


class Info(msgspec.Struct, kw_only=True):
    """What a data root is and how it was made."""

    root: str
    complete: bool
    stored_as: list[str]
    """`shards`, `tokens.bin`, or both."""
    tokens: int
    dtype: str
    documents: int | None
    """None where there is no manifest; likewise below."""
    recipe: Recipe | None
    fingerprint: str | None
    tokenizer: TokenizerRecord | None
    software: dict[str, str]
    files: int | None
    source_nbytes: int | None
    ledger: list[FileLedger]
    shards: list[ShardInfo]
    consolidated: Consolidated | None
    notes: list[str] = []
    """What a user should know of the corpus and the tokenizer."""
    elsewhere: dict[str, str] = {}
    """Files that are not here on purpose, by name, and the store that has them."""


def info(root: Path | str, store: StoreOptions = StoreOptions()) -> Info:  # noqa: B008  # immutable
    """Return what is recorded of a data root, finished or not, in a directory or a bucket (`s3://BUCKET/PREFIX`).

    Raises:
        DataRootError: nothing is recorded.
        StorageError: the bucket cannot be read.
    """
    if "://" in str(root):
        return _info_of_store(str(root), store)
    here = Path(root)
    return _info(
        escape_surrogates(here),
        *manifests.load_records(here),
        {path.name for path in here.glob("*") if path.is_file()},
        elsewhere(here),
    )


def _info_of_store(url: str, options: StoreOptions) -> Info:
    from tokenmill.transfer.download import stored_records  # needs what a local data root does not
    from tokenmill.transfer.stores import open_store

    store = open_store(url, options)
    present = store.files()
    manifest, record, _ = stored_records(store, present)
    if manifest is None and record is None:
        raise DataRootError(
            f"{url}: expected {layout.MANIFEST} or {layout.CONSOLIDATED} there, found neither",
            next_step="check the URL; it must be that of a data set which tokenmill upload sent",
        )
    return _info(url, manifest, record, set(present), {})


def _info(
    root: str, manifest: Manifest | None, record: Consolidated | None, present: set[str], gone: dict[str, str]
) -> Info:
    stored = [layout.TOKENS] if layout.TOKENS in present and record and record.complete else []
    if any(layout.shard_index(name) is not None for name in present):
        stored.insert(0, "shards")
    if record is not None and manifest is not None:
        record = msgspec.structs.replace(record, shards=[])  # the manifest's own, listed below
    if manifest is not None:
        shards = [
            ShardInfo(layout.shard_name(shard.index), shard.tokens, shard.documents, shard.sha256)
            for shard in manifest.shards
        ]
    else:
        copied = record.shards if record else []
        shards = [ShardInfo(layout.shard_name(i), shard.tokens, 0, shard.sha256) for i, shard in enumerate(copied)]
    return Info(
        root=root,
        complete=manifest.complete if manifest else record is not None and record.complete,
        stored_as=stored,
        tokens=manifest.tokens if manifest else record.tokens if record else 0,
        dtype=manifest.recipe.dtype if manifest else record.dtype if record else "",
        documents=manifest.documents if manifest else None,
        recipe=manifest.recipe if manifest else None,
        fingerprint=manifest.fingerprint if manifest else None,
        tokenizer=msgspec.structs.replace(manifest.tokenizer, probe={}) if manifest else None,
        software=manifest.software if manifest else {},
        files=len(manifest.files) if manifest else None,
        source_nbytes=sum(file.nbytes for file in manifest.files) if manifest else None,
        ledger=manifest.ledger if manifest else [],
        shards=shards,
        consolidated=record,
        notes=manifest.notes if manifest else [],
        elsewhere=dict(sorted(gone.items())),
    )

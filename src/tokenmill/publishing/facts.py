"""Facts: what a card and a Croissant file say of a data root, all of it from its records and sidecars. Reads only."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Consolidated, Manifest, TokenizerRecord, load_records
from tokenmill.errors import DataRootError
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.view import open_view
from tokenmill.publishing.domains import URL_COLUMN, Domains, count_domains
from tokenmill.redact import escape_surrogates
from tokenmill.remote.hub import SITE

_MOST_DOMAINS = 1_000


class Lineage(NamedTuple):
    """Something that the data set was made from."""

    name: str
    url: str | None
    """Where it is, if it is on the web."""


class Facts(NamedTuple):
    """What is known of a finished data root."""

    name: str
    description: str
    license: str | None
    url: str | None
    manifest: Manifest
    record: Consolidated | None
    files: dict[str, tuple[int, str]]
    """Size and SHA-256 of each file, by its name."""
    lineage: list[Lineage]
    domains: Domains | None
    """None where no column of URLs was kept."""

    @property
    def tokenizer(self) -> TokenizerRecord:
        """What made the tokens."""
        return self.manifest.tokenizer

    @property
    def tokenizer_url(self) -> str | None:
        """Where the tokenizer is, if it is on the hub."""
        if self.tokenizer.revision is None:
            return None
        return f"{SITE}/{self.tokenizer.name}/tree/{self.tokenizer.revision}"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return self.manifest.fingerprint

    @property
    def software(self) -> dict[str, str]:
        """Versions that made it."""
        return self.manifest.software

    @property
    def dtype(self) -> str:
        """Data type of a stored token."""
        return self.manifest.stored_dtype


def find_facts(root: Path, *, name: str | None, license: str | None, url: str | None) -> Facts:
    """Find what is known of a data root.

    Raises:
        DataRootError: it is not finished, has no manifest, or is a view.
    """
    if root.is_dir() and open_view(root) is not None:
        raise DataRootError(
            f"{root}: is a view, whose tokens lie in its data roots",
            next_step="make it a data root of its own with tokenmill view write, and describe that",
        )
    manifest, record = load_records(root)
    if manifest is None or not manifest.complete:
        raise DataRootError(
            f"{root}: expected a finished data root with {layout.MANIFEST}, found "
            f"{'an unfinished one' if manifest else 'none'}",
            next_step="run tokenmill pretokenize to its end",
        )
    record = record if record is not None and record.complete else None
    found = DataRoot(root, manifest, record)
    columns = manifest.recipe.metadata
    has_urls = any((column.name, column.kind) == (URL_COLUMN, "string") for column in columns)
    samples = f", as samples of {record.seq_len:,}" if record is not None else ""
    return Facts(
        name=escape_surrogates(name or root.resolve().name),
        description=(
            f"{manifest.tokens:,} tokens of {manifest.documents:,} documents ({manifest.stored_dtype}){samples}, made "
            f"by tokenmill with the tokenizer {short_name(manifest.tokenizer.name)}."
        ),
        license=license,
        url=url,
        manifest=manifest,
        record=record,
        files=_files(root, manifest, record),
        lineage=_lineage(manifest),
        domains=count_domains(found, most=_MOST_DOMAINS) if has_urls else None,
    )


def _files(root: Path, manifest: Manifest, record: Consolidated | None) -> dict[str, tuple[int, str]]:
    """Return every file of the data set that is here, by its records; the records themselves are hashed."""
    known: dict[str, str] = {}
    if record is not None:
        known |= {layout.TOKENS: record.tokens_sha256, layout.SAMPLE_IDS: record.sample_ids_sha256}
    for shard in manifest.shards:
        known |= {
            layout.shard_name(shard.index): shard.sha256,
            layout.documents_name(shard.index): shard.documents_sha256,
        }
    if manifest.skipped_sha256 is not None:
        known[layout.SKIPPED] = manifest.skipped_sha256
    for name in (layout.MANIFEST, layout.CONSOLIDATED):
        if (root / name).is_file():
            known[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    if record is not None and not any((root / layout.shard_name(shard.index)).exists() for shard in manifest.shards):
        for shard in manifest.shards:  # they are in `tokens.bin`
            del known[layout.shard_name(shard.index)]
    if lacking := [name for name in known if not (root / name).is_file()]:
        raise DataRootError(
            f"{root}: {lacking[0]} is missing, which its records name ({len(lacking)} such files)",
            next_step="run tokenmill verify on the data root, or download the rest of it",
        )
    return {name: ((root / name).stat().st_size, sha256) for name, sha256 in known.items()}


def _lineage(manifest: Manifest) -> list[Lineage]:
    if manifest.imported is not None:
        return [Lineage(f"{manifest.imported.format} files of {short_name(manifest.imported.source)}", None)]
    if manifest.view is not None:
        return [Lineage(f"data root {name}, shards {pin}", None) for name, pin in manifest.view.sources.items()]
    dataset = manifest.recipe.dataset
    return [_source(entry, manifest.source_revision) for entry in ([dataset] if isinstance(dataset, str) else dataset)]


def _source(entry: str, revision: str | None) -> Lineage:
    """Return where a corpus is; of a local one the name alone, as its path tells others nothing and may be private."""
    scheme, mark, rest = entry.partition("://")
    if scheme == "file":
        return Lineage(short_name(rest), None)
    if scheme == "hf" or (not mark and revision is not None):
        match = re.match(r"(?:datasets/)?([\w.-]+/[\w.-]+)", rest if mark else entry)
        name = match[1] if match else entry
        at = revision or "main"
        return Lineage(f"data set {name} of the Hugging Face hub at {at}", f"{SITE}/datasets/{name}/tree/{at}")
    if scheme in ("http", "https"):
        return Lineage(entry, entry)
    return Lineage(entry.partition("?")[0] if mark else short_name(entry), None)


def short_name(path: str) -> str:
    """Return the last part of a local path; a name of the hub as it is."""
    path = escape_surrogates(path)
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path

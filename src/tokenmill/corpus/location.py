"""Location: where the files of a corpus are: local paths, `hf://`, `s3://`, `https://`.

`locate` turns what `--dataset` says into a `Location`, which lists files in path order, each with its size and
identity, and opens them as Arrow reads them. Remote files are read by range; nothing is kept on disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from tokenmill.corpus.choice import format_of
from tokenmill.errors import SourceError
from tokenmill.options import StoreOptions
from tokenmill.redact import redact_url
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.remote.urls import local_path

MEND = "mend, replace or exclude the file, then run the same command again"

HUB_NAME = re.compile(r"(?!.{97})\w[\w.-]*/(?![.-])[\w.-]*\w(?<!\.git)(@[\w./-]+)?")
"""What the hub lets a data set be called: OWNER/NAME of up to 96 characters, without -- or .. in it."""


class SourceFile(msgspec.Struct, frozen=True):
    """A file of the corpus."""

    path: str
    """Relative to the corpus, with `/`: what records and messages call it."""
    nbytes: int
    etag: str | None = None
    """What identifies its content where a store says so: a digest, an ETag."""


class Location(Protocol):
    """Where a corpus is."""

    name: str
    """What messages call it; a file of it is `{name}/{path}`."""
    revision: str | None
    """The commit that is read, if it is a hub's."""
    notes: list[str]
    """What `files` left out, in words."""
    opens_at_once: int
    """Number of files that are worth opening at the same time."""

    @property
    def retries(self) -> int:
        """Number of requests that failed and were tried again."""
        ...

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        """By path: what `choice` makes of what is there; or, of that, those of the paths in `only` that exist."""
        ...

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> Path | RemoteFile:
        """Return what Arrow opens: a local path, or a remote file that fetches `planned` stretches ahead."""
        ...

    def require_unchanged(self, file: SourceFile) -> None:
        """A file must be the one that was listed, also on another machine; a remote one is held to that as it is read.

        Raises:
            SourceChangedError: it is not.
        """
        ...

    def close(self) -> None:
        """Close connections; callers that wait for one get an error."""
        ...


def locate(dataset: Sequence[str], options: StoreOptions) -> Location:
    """Find what `dataset` means: local paths and globs, an `hf://` data set or hub name, an `s3://` prefix, or URLs.

    Raises:
        SourceError: nothing there.
    """
    if not dataset:
        raise SourceError("the list of source files is empty", next_step="name the corpus with --dataset")
    kinds = {_scheme(entry) for entry in dataset}
    if len(kinds) > 1:
        raise SourceError(
            f"one corpus cannot be in several kinds of place: {', '.join(sorted(kinds))}",
            next_step="give --dataset paths of one kind only",
        )
    kind = kinds.pop()
    if kind in ("http", "https"):
        from tokenmill.corpus.web import WebFiles

        return WebFiles(dataset)
    if kind in ("hf", "s3") and len(dataset) > 1:
        raise SourceError(
            f"{kind}:// takes one --dataset, found {len(dataset)}", next_step="give one, with a glob if need be"
        )
    if kind == "hf":
        from tokenmill.corpus.hub_dataset import HubDataset

        return HubDataset(dataset[0], options)
    if kind == "s3":
        from tokenmill.corpus.bucket import BucketObjects

        return BucketObjects(dataset[0], options)
    if kind != "file":
        raise SourceError(
            f"{dataset[0]}: no corpus is read from {kind}://", next_step="use a path, hf://, s3:// or https://"
        )
    from tokenmill.corpus.local import LocalFiles

    return LocalFiles([local_path(entry) for entry in dataset])


def _scheme(entry: str) -> str:
    scheme, mark, _ = entry.partition("://")
    if mark:
        return scheme.lower()
    return "hf" if _is_hub_name(entry) else "file"


def _is_hub_name(entry: str) -> bool:
    """Return whether it can mean a data set of the hub: no file of that name and no folder of that owner exist here."""
    named = HUB_NAME.fullmatch(entry) is not None and not re.search(r"--|\.\.", entry) and not format_of(entry)
    return named and not os.path.lexists(entry) and not Path(entry.partition("/")[0]).is_dir()


def without_secrets(dataset: str | Sequence[str]) -> str | tuple[str, ...]:
    """Return the same, without what may be a credential in a URL: user, password, query."""
    if not isinstance(dataset, str):
        return tuple(redact_url(entry) for entry in dataset)
    return redact_url(dataset)


def file_gone_error(name: str) -> SourceError:
    """Return a file that was there and no longer is."""
    return SourceError(f"{name}: the file is gone", next_step="restore it, then run the same command again")

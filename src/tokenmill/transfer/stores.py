"""Stores: a folder of files, of this machine or of a bucket, as transfers see it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from tokenmill.dataroot import layout
from tokenmill.dataroot.atomic import translate_read_errors
from tokenmill.errors import StorageError
from tokenmill.options import StoreOptions
from tokenmill.redact import escape_surrogates, redact_url
from tokenmill.remote import etag as etags
from tokenmill.remote.retry import Retrier, call_with_retries
from tokenmill.remote.s3 import Bucket, S3Object
from tokenmill.remote.urls import local_path, parse_s3_url

T = TypeVar("T")

OURS = (layout.LOCK, layout.RUN, layout.LOG, layout.TRANSFERS)
"""Belong to a directory, not to the data set in it."""

_NAME_NBYTES = 255
"""Longest name in a path, as UTF-8, that file systems of Linux and macOS take."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class StoredFile(NamedTuple):
    """A file of a store."""

    path: str
    """Relative to the store, with `/`."""
    nbytes: int
    etag: str
    """Another one means other bytes."""


class Store(Protocol):
    """Where files are. What is asked of it is tried again as `retry.Retrier` says, and raises `StorageError`."""

    name: str
    retrier: Retrier

    def files(self) -> dict[str, StoredFile]:
        """By path, sorted."""
        ...

    def read(self, file: StoredFile, offset: int, nbytes: int, into: bytearray | None = None) -> bytes | bytearray:
        """Return bytes of a file that is still the one listed, in `into` if that serves."""
        ...

    def part_sizes(self, file: StoredFile) -> list[int]:
        """Return the likely sizes of the parts that its ETag was made of; empty if there are none."""
        ...


def checked_path(path: str, store: str) -> str:
    """Check that a path stays below the folder it is joined to, on any system, and return it.

    Raises:
        StorageError: it would leave it.
    """
    parts = path.split("/")
    if (
        "\\" in path
        or _CONTROL.search(path)
        or any(part in ("", ".", "..") for part in parts)
        or re.match(r"[A-Za-z]:", path)
    ):
        raise StorageError(
            f"{store}: refused the name {path!r}: it would leave the data root",
            next_step="rename it there, or leave it out with --exclude",
        )
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        raise StorageError(
            f"{store}: refused the name {escape_surrogates(path)!r}: it is not UTF-8",
            next_step="rename it there, or leave it out with --exclude",
        ) from None
    if longest > _NAME_NBYTES:
        raise StorageError(
            f"{store}: refused the name {path!r:.80}...: expected names of at most {_NAME_NBYTES} bytes, "
            f"found {longest}",
            next_step="rename it there, or leave it out with --exclude",
        )
    return path


class FolderStore:
    """A directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        self.retrier = Retrier()

    def files(self) -> dict[str, StoredFile]:
        """Return all regular files, links followed; none of what belongs to the directory only."""
        if not self.root.is_dir():
            raise StorageError(f"{self.root}: no such directory", next_step="check the path")
        found = {}
        for folder, folders, names in os.walk(self.root, onerror=_refuse_folder):
            folders.sort()
            for name in names:
                relative = Path(folder, name).relative_to(self.root).as_posix()
                if relative in OURS or relative.endswith(layout.PARTIAL_SUFFIX) or not Path(folder, name).is_file():
                    continue
                found[relative] = self.file(relative)
        return dict(sorted(found.items()))

    def file(self, path: str) -> StoredFile:
        """One of them."""
        with translate_read_errors(self.root / path):
            stat = (self.root / path).stat()
        return StoredFile(path, stat.st_size, str(stat.st_mtime_ns))

    def read(self, file: StoredFile, offset: int, nbytes: int, into: bytearray | None = None) -> bytes:
        path = self.root / file.path
        with translate_read_errors(path), path.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(nbytes)
        if len(data) != nbytes:
            raise StorageError(
                f"{path}: expected {file.nbytes} bytes, found {offset + len(data)}",
                next_step="something else writes to it: wait, then run the same command again",
            )
        return data

    def part_sizes(self, file: StoredFile) -> list[int]:
        return []


def _refuse_folder(error: OSError) -> None:
    raise StorageError(
        f"{error.filename}: cannot be listed: {error.strerror}",
        next_step="make the folder readable, or move it away",
    )


class BucketStore:
    """All below a prefix of a bucket."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        from tokenmill.remote.http import HttpClient

        name, prefix = parse_s3_url(url, StorageError, "correct the URL")
        self.name = url.rstrip("/")
        self.retrier = Retrier()
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.bucket = Bucket(name, HttpClient(), endpoint_url=options.endpoint_url, anonymous=options.anonymous)

    def ask(self, what: str, task: Callable[[], T]) -> T:
        """Return the result of a task on the bucket."""
        return call_with_retries(
            f"{self.name}/{what}".rstrip("/"),
            self.retrier,
            task,
            kind=StorageError,
            changed=StorageError,
            login="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (a session may have expired)",
        )

    def key(self, path: str) -> str:
        return self.prefix + path

    def files(self) -> dict[str, StoredFile]:
        found = {}
        for each in self.bucket.objects(self.prefix, lambda page: self.ask("", page)):
            path = each.key.removeprefix(self.prefix)
            if path and not path.endswith("/") and path not in OURS:  # folders are shown as empty objects
                found[path] = StoredFile(path, each.nbytes, each.etag)
        return dict(sorted(found.items()))

    def read(self, file: StoredFile, offset: int, nbytes: int, into: bytearray | None = None) -> bytearray:
        found = S3Object(self.key(file.path), file.nbytes, file.etag)
        return self.ask(file.path, lambda: self.bucket.read(found, offset, nbytes, into))

    def part_sizes(self, file: StoredFile) -> list[int]:
        likely = etags.likely_part_nbytes(file.etag, file.nbytes)
        if not likely:
            return []
        told = self.ask(file.path, lambda: self.bucket.first_part_nbytes(self.key(file.path)))
        return likely if told is None else [told]


def open_store(url: str, options: StoreOptions) -> FolderStore | BucketStore:
    """Open what `url` means: `s3://BUCKET/PREFIX`, `file://` or a path.

    Raises:
        StorageError: none of these, or no credentials.
    """
    scheme, mark, _ = url.partition("://")
    if mark and scheme == "s3":
        return BucketStore(url, options)
    if mark and scheme != "file":
        raise StorageError(
            f"{redact_url(url)}: no data root is kept at {scheme}://", next_step="use s3://, file:// or a path"
        )
    return FolderStore(Path(local_path(url)))

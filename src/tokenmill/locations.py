"""Locations: where the files of a corpus are, listed and opened: local paths, `hf://`, `s3://`, `https://`.

In: what `--dataset` says. Out: files in path order, each with its size and identity, opened as Arrow
reads them. What is remote is read by range; nothing is kept on disk.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import msgspec

from tokenmill import hub
from tokenmill.errors import SourceChangedError, SourceError, StorageError
from tokenmill.options import StoreOptions
from tokenmill.ranges import RemoteFile
from tokenmill.retry import AnswerError, Retrier, asked
from tokenmill.spans import gone
from tokenmill.train_split import matching, train_files

T = TypeVar("T")

MEND = "mend, replace or exclude the file, then run the same command again"

FORMATS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
"""Suffixes by format. A folder is searched for the first format it has a file of; `.json` alone may be
anything, and is JSON Lines only where it is named."""

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
_MAGIC = re.compile(r"[*?[]")


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
    retrier: Retrier

    def files(self) -> list[SourceFile]:
        """By path."""
        ...

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> Path | RemoteFile:
        """What Arrow opens: a local path, or a remote file that fetches `planned` stretches ahead."""
        ...

    def require_unchanged(self, file: SourceFile) -> None:
        """A file must be the one that was listed, also on another machine; a remote one is held to that as it is read.

        Raises:
            SourceChangedError: it is not.
        """
        ...

    def close(self) -> None:
        """Let go of connections and of whoever waits for them."""
        ...


def format_of(path: str) -> str | None:
    """The format a file's name says; None if none of ours."""
    name = path.lower()
    if name.endswith(".json"):
        return "jsonl"
    return next((kind for kind, suffixes in FORMATS.items() if name.endswith(suffixes)), None)


def locate(dataset: Sequence[str], options: StoreOptions) -> Location:
    """Where `dataset` is: local paths and globs, one `hf://` data set or hub name, one `s3://` prefix, or URLs.

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
        return _WebFiles(dataset)
    if kind in ("hf", "s3") and len(dataset) > 1:
        raise SourceError(
            f"{kind}:// takes one --dataset, found {len(dataset)}", next_step="give one, with a glob if need be"
        )
    if kind == "hf":
        return _HubFiles(dataset[0], options)
    if kind == "s3":
        return _BucketFiles(dataset[0], options)
    if kind != "file":
        raise SourceError(
            f"{dataset[0]}: no corpus is read from {kind}://", next_step="use a path, hf://, s3:// or https://"
        )
    return _LocalFiles([_local(entry) for entry in dataset])


def _scheme(entry: str) -> str:
    scheme, mark, _ = entry.partition("://")
    if mark:
        return scheme.lower()
    named = _HUB_NAME.fullmatch(entry) and not Path(entry).exists() and not format_of(entry)
    return "hf" if named else "file"


def _local(entry: str) -> str:
    return urllib.parse.unquote(entry.removeprefix("file://")) if entry.startswith("file://") else entry


def without_secrets(dataset: str | Sequence[str]) -> str | tuple[str, ...]:
    """The same, without what may be a credential in a URL: user, password, query."""
    if not isinstance(dataset, str):
        return tuple(str(without_secrets(entry)) for entry in dataset)
    if _scheme(dataset) not in ("http", "https"):
        return dataset
    url = _split(dataset)
    return urllib.parse.urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise SourceError(f"not a URL: {error}", next_step="correct --dataset") from None


def _first_format(name: str, paths: Iterable[str]) -> list[str]:
    """Those of the first format there is any file of."""
    by_format: dict[str | None, list[str]] = {}
    for path in paths:
        by_format.setdefault(None if path.lower().endswith(".json") else format_of(path), []).append(path)
    found = next((by_format[kind] for kind in FORMATS if kind in by_format), None)
    if found is None:
        suffixes = " ".join(f"*{suffix}" for suffix in itertools.chain(*FORMATS.values()))
        raise SourceError(
            f"{name}: no file of a known format in it (looked for {suffixes})",
            next_step="give the directory that holds them",
        )
    return found


def _refuse_unknown(paths: Iterable[str]) -> None:
    unknown = next((path for path in paths if format_of(path) is None), None)
    if unknown is not None:
        raise SourceError(
            f"{unknown}: expected one of {', '.join(itertools.chain(*FORMATS.values()))}, found "
            f"{Path(unknown).suffix or 'no suffix'}",
            next_step="name files of these formats only, for example with the glob '*.parquet'",
        )


class _LocalFiles:
    """Files of this machine: directories (searched recursively, links followed), globs, files."""

    revision: str | None = None

    def __init__(self, patterns: list[str]) -> None:
        self.retrier = Retrier()
        self._mtimes: dict[str, int] = {}
        """In ns, as listed."""
        self.root, self._paths = self._expand(patterns)
        self.name = str(self.root)

    def files(self) -> list[SourceFile]:
        found = []
        for name in sorted({path.relative_to(self.root).as_posix() for path in self._paths}):
            try:
                stat = (self.root / name).stat()
            except OSError as error:
                raise SourceError(f"{self.root / name}: {error.strerror}", next_step=MEND) from None
            found.append(SourceFile(name, stat.st_size))
            self._mtimes[name] = stat.st_mtime_ns
        return found

    def require_unchanged(self, file: SourceFile) -> None:
        path, expected = self.root / file.path, (file.nbytes, self._mtimes[file.path])
        try:
            stat = path.stat()
        except OSError:
            raise gone(str(path)) from None
        if (stat.st_size, stat.st_mtime_ns) != expected:
            raise SourceChangedError(
                f"{path}: on {socket.gethostname()} it is not the file that was listed: expected {expected[0]} bytes "
                f"of time {expected[1]}, found {stat.st_size} of {stat.st_mtime_ns}",
                next_step="every machine must see the same files, and nothing may change them while the run goes on",
            )

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> Path:
        return self.root / file.path

    def close(self) -> None:
        """Nothing is kept."""

    def _expand(self, patterns: list[str]) -> tuple[Path, list[Path]]:
        """The folder names are relative to, and the files."""
        if len(patterns) == 1 and Path(patterns[0]).is_dir():
            root = Path(patterns[0]).absolute()
            return root, _files_below(root)
        paths: list[Path] = []
        for pattern in patterns:
            if Path(pattern).is_dir():
                paths.extend(_files_below(Path(pattern).absolute()))
                continue
            matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
            named = [Path(match).absolute() for match in matches if not Path(match).is_dir()]
            if not named:
                raise SourceError(
                    f"{pattern}: no such file or directory, and no file matches it",
                    next_step="check the path given with --dataset",
                )
            paths.extend(named)
        _refuse_unknown(map(str, paths))
        return Path(os.path.commonpath([path.parent for path in paths])), paths


def _files_below(root: Path) -> list[Path]:
    """Every file that is named like one of ours, links followed; a dangling one is found to be so later."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(f"{folder}/{name}") not in seen]
        seen.update(os.path.realpath(f"{folder}/{name}") for name in folders)
        found.extend(os.path.join(folder, name) for name in names)  # noqa: PTH118  # names are many
    return [Path(path) for path in _first_format(str(root), found)]


class _Remote:
    """What remote locations share: connections, retries, errors."""

    name: str
    login: str
    """What to do when the store wants other credentials."""
    own: ClassVar[frozenset[str]] = frozenset({"retrier", "http", "pool"})
    """Attributes that stay in this process."""

    def __init__(self) -> None:
        self.connect()

    def require_unchanged(self, file: SourceFile) -> None:
        """Every range is compared as it is read."""

    def connect(self) -> None:
        """Make what is this process's own, credentials from its environment included."""
        from tokenmill.http import CONNECTIONS, HttpClient  # costs what a local corpus need not pay

        self.retrier = Retrier()
        self.http = HttpClient()
        self.pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")

    def __getstate__(self) -> dict[str, object]:
        """What another process needs to read the same files: no connection, and no credential but those in URLs."""
        return {name: value for name, value in self.__dict__.items() if name not in self.own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.connect()

    def opened(
        self, file: SourceFile, read: Callable[[int, int], bytearray], planned: Iterable[tuple[int, int]]
    ) -> RemoteFile:
        def fetch(offset: int, nbytes: int) -> bytearray:
            return self.asked(f"{self.name}/{file.path}", lambda: read(offset, nbytes))

        return RemoteFile(file.nbytes, fetch, self.pool, planned)

    def close(self) -> None:
        self.retrier.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def asked(self, what: str, task: Callable[[], T]) -> T:
        """The result of a task, transient faults tried again.

        Raises:
            SourceError: refused, gone, or still failing.
            SourceChangedError: no longer what was listed.
        """
        try:
            return asked(what, self.retrier, task, kind=SourceError, changed=SourceChangedError, login=self.login)
        except StorageError as error:
            raise SourceError(error.message, next_step=error.next_step) from None


class _WebFiles(_Remote):
    """Files of web servers, by URL; a query (a signature, say) is used and never recorded."""

    login = "the URL must carry what the server wants: get a fresh one"
    revision: str | None = None

    def __init__(self, urls: Sequence[str]) -> None:
        super().__init__()
        self.name = "https:/" if all(url.lower().startswith("https") for url in urls) else "http:/"
        self._urls: dict[str, str] = {}
        for url in urls:
            parts = _split(url)
            path = parts.netloc.rpartition("@")[2] + urllib.parse.unquote(parts.path)
            if self._urls.setdefault(path, url) != url:
                raise SourceError(
                    f"{path}: named by two URLs that differ only in what is not recorded",
                    next_step="give each file a path of its own, or download them first",
                )
        _refuse_unknown(self._urls)

    def files(self) -> list[SourceFile]:
        found = []
        for path, url in sorted(self._urls.items()):
            head = self.asked(f"{self.name}/{path}", lambda url=url: self.http.head(url))  # type: ignore[misc]
            # A weak ETag is no identity of bytes.
            strong = head.etag if head.etag and not head.etag.startswith("W/") else None
            found.append(SourceFile(path, head.nbytes, strong))
        return found

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        url = self._urls[file.path]

        def read(offset: int, nbytes: int) -> bytearray:
            return self.http.read(url, offset, nbytes, total=file.nbytes, etag=file.etag)[0]

        return self.opened(file, read, planned)


class _HubFiles(_Remote):
    """A data set of the hub at one commit: its split `train`, or the files that a path or a glob names."""

    login = "set HF_TOKEN to a token that may read the data set (it may have expired)"
    own = _Remote.own | {"_headers", "_elsewhere", "_lock"}

    def __init__(self, dataset: str, options: StoreOptions) -> None:
        super().__init__()
        name, revision, self._path = _hub_parts(dataset)
        self._repository = hub.open_dataset(name, options.revision or revision, self.retrier)
        self.revision: str | None = self._repository.commit
        self.name = f"hf://datasets/{name}@{self.revision}"

    def connect(self) -> None:
        super().connect()
        self._headers = hub.headers()
        self._elsewhere: dict[str, str] = {}
        """Where the hub sent us for a file; saves asking it again for every range."""
        self._lock = threading.Lock()

    def files(self) -> list[SourceFile]:
        by_path = {file.path: file for file in self._repository.files}
        place = f"{self.name}/{self._path}".rstrip("/")
        if _MAGIC.search(self._path):
            chosen = matching(self._path, by_path)
            _refuse_unknown(chosen)
        elif self._path:
            chosen = _first_format(place, _below(self._path, by_path))
        else:
            chosen = _first_format(place, train_files(self._repository.name, self._repository.card, by_path))
        if not chosen:
            raise SourceError(f"{place}: no file there", next_step="check the path in the repository")
        return [SourceFile(path, by_path[path].nbytes, by_path[path].etag) for path in sorted(chosen)]

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        return self.opened(file, lambda offset, nbytes: self._read(file, offset, nbytes), planned)

    def _read(self, file: SourceFile, offset: int, nbytes: int) -> bytearray:
        direct = self._elsewhere.get(file.path)
        if direct is not None:
            try:
                return self.http.read(direct, offset, nbytes, total=file.nbytes)[0]
            except AnswerError:  # such URLs are good for a while
                with self._lock:
                    self._elsewhere.pop(file.path, None)
        url = self._repository.url(file.path)
        data, final = self.http.read(url, offset, nbytes, total=file.nbytes, headers=self._headers)
        if urllib.parse.urlsplit(final).netloc != urllib.parse.urlsplit(url).netloc:
            with self._lock:
                self._elsewhere[file.path] = final
        return data


def _hub_parts(dataset: str) -> tuple[str, str | None, str]:
    """Name, revision and path in the repository."""
    rest = dataset.removeprefix("hf://").removeprefix("datasets/")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(refs/[\w-]+/[^/]+|[^/]+))?(?:/(.*))?", rest)
    if match is None or (dataset.startswith("hf://") and not dataset.startswith("hf://datasets/")):
        raise SourceError(
            f"{dataset}: expected hf://datasets/OWNER/NAME[@REVISION][/PATH]",
            next_step="correct --dataset",
        )
    revision = urllib.parse.unquote(match[2]) if match[2] else None
    return match[1], revision, (match[3] or "").strip("/")


def _below(path: str, paths: Iterable[str]) -> list[str]:
    """The file of that path, or all below that folder."""
    return [other for other in paths if other == path or other.startswith(path.rstrip("/") + "/") or not path]


class _BucketFiles(_Remote):
    """Objects of a bucket: one, all below a prefix, or those that a glob means."""

    login = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (a session may have expired)"
    own = _Remote.own | {"_bucket"}
    revision: str | None = None

    def __init__(self, url: str, options: StoreOptions) -> None:
        name, _, key = url.partition("://")[2].partition("/")
        if not name:
            raise SourceError(f"{url}: expected s3://BUCKET/PREFIX", next_step="correct --dataset")
        self._place = name, options.endpoint_url, options.anonymous
        super().__init__()
        magic = _MAGIC.search(key)
        fixed = key[: magic.start()].rpartition("/")[0] if magic else key.rstrip("/")
        listed = self.asked(url, lambda: list(self._bucket.objects(fixed)))
        if magic:
            keys = set(matching(key, [each.key for each in listed]))
            found = [each for each in listed if each.key in keys]
        else:
            found = [each for each in listed if each.key in _below(fixed, [each.key])]
        self._objects = {each.key: each for each in found if each.nbytes or not each.key.endswith("/")}
        if not self._objects:
            raise SourceError(f"{url}: no object there", next_step="check the name, and --endpoint-url")
        self._is_named = key in self._objects or magic is not None
        if self._is_named:
            _refuse_unknown(self._objects)
            fixed = os.path.commonpath([os.path.dirname(other) for other in self._objects])  # noqa: PTH120
        self._prefix = f"{fixed}/" if fixed else ""
        self.name = f"s3://{name}/{fixed}".rstrip("/")

    def connect(self) -> None:
        from tokenmill.s3 import Bucket

        super().connect()
        name, endpoint_url, anonymous = self._place
        opened = functools.partial(Bucket, name, self.http, endpoint_url=endpoint_url, anonymous=anonymous)
        self._bucket = self.asked(f"s3://{name}", opened)

    def files(self) -> list[SourceFile]:
        by_path = {key.removeprefix(self._prefix): found for key, found in self._objects.items()}
        chosen = list(by_path) if self._is_named else _first_format(self.name, by_path)
        return [SourceFile(path, by_path[path].nbytes, by_path[path].etag) for path in sorted(chosen)]

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        from tokenmill.s3 import S3Object

        found = S3Object(self._prefix + file.path, file.nbytes, file.etag or "")
        return self.opened(file, lambda offset, nbytes: self._bucket.read(found, offset, nbytes), planned)

"""Locations: where the files of a corpus are, listed and opened: local paths, `hf://`, `s3://`, `https://`.

In: what `--dataset` says. Out: files in path order, each with its size and identity, opened as Arrow
reads them. What is remote is read by range; nothing is kept on disk.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import socket
import stat
import threading
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from tokenmill import etags, hub
from tokenmill.choice import choose, format_of, listed, refuse_unknown
from tokenmill.errors import SourceChangedError, SourceError, StorageError, TokenmillError
from tokenmill.local_listing import MAGIC, expand, once, walk
from tokenmill.options import StoreOptions
from tokenmill.ranges import RemoteFile
from tokenmill.redact import redacted_url
from tokenmill.retry import AnswerError, Retrier, asked
from tokenmill.spans import gone
from tokenmill.train_split import matching

log = logging.getLogger("tokenmill.say")
"""What a user should see at once."""

T = TypeVar("T")

MEND = "mend, replace or exclude the file, then run the same command again"

_HUB_NAME = re.compile(r"(?!.{97})\w[\w.-]*/(?![.-])[\w.-]*\w(?<!\.git)(@[\w./-]+)?")
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
    retrier: Retrier
    notes: list[str]
    """What `files` left out, in words."""

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        """By path: what `choice` makes of what is there; or, of that, those of the paths in `only` that exist."""
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
    return "hf" if _is_hub_name(entry) else "file"


def _is_hub_name(entry: str) -> bool:
    """Whether it can mean a data set of the hub: nothing of that name, and no folder of that owner's name, is here."""
    named = _HUB_NAME.fullmatch(entry) is not None and not re.search(r"--|\.\.", entry) and not format_of(entry)
    return named and not os.path.lexists(entry) and not Path(entry.partition("/")[0]).is_dir()


def _local(entry: str) -> str:
    return urllib.parse.unquote(entry.removeprefix("file://")) if entry.startswith("file://") else entry


def without_secrets(dataset: str | Sequence[str]) -> str | tuple[str, ...]:
    """The same, without what may be a credential in a URL: user, password, query."""
    if not isinstance(dataset, str):
        return tuple(redacted_url(entry) for entry in dataset)
    return redacted_url(dataset)


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # a wrong one is found when it is asked for
    except ValueError:  # its text repeats the URL
        raise SourceError(f"{redacted_url(url)}: not a URL", next_step="correct --dataset") from None
    return parts


class _LocalFiles:
    """Files of this machine: directories (searched recursively, links followed), globs, files."""

    revision: str | None = None

    def __init__(self, patterns: list[str]) -> None:
        self.retrier = Retrier()
        self.notes: list[str] = []
        self._mtimes: dict[str, int] = {}
        """In ns, as listed."""
        self.root, self._paths = self._expand(patterns)
        self.name = _shown(str(self.root))

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        names = sorted({_name(path.relative_to(self.root)) for path in self._paths})
        if only is not None:
            names = [name for name in sorted(only) if (self.root / name).is_file()]
        found = []
        for name in names:
            try:
                status = (self.root / name).stat()
            except OSError as error:
                raise SourceError(f"{self.root / name}: {error.strerror}", next_step=MEND) from None
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{self.root / name}: expected a file, found something else", next_step=MEND)
            found.append(SourceFile(name, status.st_size))
            self._mtimes[name] = status.st_mtime_ns
        return found

    def require_unchanged(self, file: SourceFile) -> None:
        path, expected = self.root / file.path, (file.nbytes, self._mtimes[file.path])
        try:
            status = path.stat()
        except OSError:
            raise gone(str(path)) from None
        if (status.st_size, status.st_mtime_ns) != expected:
            raise SourceChangedError(
                f"{path}: on {socket.gethostname()} it is not the file that was listed: expected {expected[0]} bytes "
                f"of time {expected[1]}, found {status.st_size} of {status.st_mtime_ns}",
                next_step="every machine must see the same files, and nothing may change them while the run goes on",
            )

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> Path:
        return self.root / file.path

    def close(self) -> None:
        """Nothing is kept."""

    def _expand(self, patterns: list[str]) -> tuple[Path, list[Path]]:
        """The folder names are relative to, and the files."""
        try:
            if len(patterns) == 1 and Path(patterns[0]).is_dir():
                root = Path(patterns[0]).absolute()
                return root, self._below(root)
            paths: list[Path] = []
            for pattern in patterns:
                if Path(pattern).is_dir():
                    paths.extend(self._below(Path(pattern).absolute()))
                else:
                    named = _named(pattern)
                    refuse_unknown(map(str, named))
                    paths.extend(named)
        except OSError as error:
            raise SourceError(
                f"{error.filename}: cannot be listed: {error.strerror}",
                next_step="make the folder readable, or name the files that are meant with --dataset",
            ) from None
        paths, repeated = once(paths)
        self._note_repeated([str(path) for path in repeated])
        return Path(os.path.commonpath([path.parent for path in paths])), paths

    def _below(self, root: Path) -> list[Path]:
        listing = walk(root)
        readme = root / "README.md"
        card = _card(readme) if "README.md" in listing.files else None
        chosen, notes = choose(_name(root), map(_checked_name, [*listing.files, *listing.hidden]), card)
        self.notes += notes
        self._note_repeated(listing.repeated)
        return [root / path for path in chosen]

    def _note_repeated(self, links: list[str]) -> None:
        if links:
            self.notes.append(f"left out are links to what is read already, {len(links):,}: {listed(links)}")


def _named(pattern: str) -> list[Path]:
    """The file of that name, else those that a glob means."""
    if Path(pattern).is_file():
        return [Path(pattern).absolute()]
    found = expand(pattern) if MAGIC.search(pattern) else []
    if not found:
        hub = f"; for the data set of the hub, give hf://datasets/{pattern}" if _HUB_NAME.fullmatch(pattern) else ""
        raise SourceError(
            f"{_shown(pattern)}: no such file or directory, and no file matches it",
            next_step=f"check the path given with --dataset{hub}",
        )
    return found


def _name(path: Path) -> str:
    return _checked_name(path.as_posix())


def _checked_name(name: str) -> str:
    """A file's name, which records can hold.

    Raises:
        SourceError: it is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(
            f"{_shown(name)}: the name is not UTF-8", next_step="rename the file or folder, or leave it out with a glob"
        ) from None
    return name


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _card(readme: Path) -> dict[str, Any]:
    """What a repository's `README.md` says of its files; empty if it has no YAML."""
    try:
        text = readme.read_text("utf-8", "replace")
    except OSError:
        return {}
    return hub.card_of(text) if text.startswith("---") else {}


class _Remote:
    """What remote locations share: connections, retries, errors."""

    name: str
    login: str
    """What to do when the store wants other credentials."""
    own: ClassVar[frozenset[str]] = frozenset({"retrier", "http", "pool"})
    """Attributes that stay in this process."""

    def __init__(self) -> None:
        self.notes: list[str] = []
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
        refuse_unknown(self._urls)

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        found = []
        for path, url in sorted(self._urls.items()):
            head = self.asked(f"{self.name}/{path}", lambda url=url: self.http.head(url))  # type: ignore[misc]
            # A weak ETag is no identity of bytes.
            strong = head.etag if head.etag and not etags.is_weak(head.etag) else None
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
        retrier = self.retrier
        if "://" not in dataset:  # it may be a path that was mistyped: say so, and do not wait for a network for long
            log.warning("%s: no such file or directory here; asking the hub for hf://datasets/%s", dataset, dataset)
            retrier = Retrier(tries=2)
        try:
            self._repository = hub.open_dataset(name, options.revision or revision, retrier)
        except SourceError as error:
            if retrier is self.retrier:
                raise
            raise SourceError(
                f"{dataset}: no such file or directory; and as hf://datasets/{dataset}: {error.message}",
                next_step=f"check the path given with --dataset; if the hub is meant: {error.next_step}",
            ) from None
        self.revision: str | None = self._repository.commit
        self.name = f"hf://datasets/{name}@{self.revision}"

    def connect(self) -> None:
        super().connect()
        self._headers = hub.headers()
        self._elsewhere: dict[str, str] = {}
        """Where the hub sent us for a file; saves asking it again for every range."""
        self._lock = threading.Lock()

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        by_path = {file.path: file for file in self._repository.files}
        place = f"{self.name}/{self._path}".rstrip("/")
        if only is not None:
            chosen = [path for path in only if path in by_path]
        elif self._path in by_path:
            refuse_unknown([self._path])
            chosen = [self._path]
        elif MAGIC.search(self._path):
            chosen = matching(self._path, by_path)
            refuse_unknown(chosen)
        else:
            below = f"{self._path}/" if self._path else ""
            inside = [path.removeprefix(below) for path in by_path if path.startswith(below)]
            if not inside:
                raise SourceError(f"{place}: no file there", next_step="check the path in the repository")
            found, self.notes = choose(place, inside, {} if below else self._repository.card)
            chosen = [below + path for path in found]
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
        try:
            data, final = self.http.read(url, offset, nbytes, total=file.nbytes, headers=self._headers)
        except AnswerError as error:
            if error.status != 403 or error.host in ("", urllib.parse.urlsplit(url).netloc):
                raise hub.explained(error, self._repository.name) from None
            # The content network refuses what the hub has just signed: a signature that was too old, or not yet known.
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


class _BucketFiles(_Remote):
    """Objects of a bucket: one, all below a prefix, or those that a glob means."""

    login = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (a session may have expired)"
    own = _Remote.own | {"_bucket"}
    revision: str | None = None

    def __init__(self, url: str, options: StoreOptions) -> None:
        name, key = bucket_and_key(url, SourceError, "correct --dataset")
        self._place = name, options.endpoint_url, options.anonymous
        super().__init__()
        magic = MAGIC.search(key)
        fixed = key[: magic.start()].rpartition("/")[0] if magic else key.rstrip("/")
        listed = self._bucket.objects(fixed, lambda page: self.asked(url, page))
        objects = {each.key: each for each in listed if each.nbytes or not each.key.endswith("/")}
        self._is_named = True
        if key in objects:
            keys = [key]
        elif magic:
            keys = matching(key, objects)
        else:
            self._is_named = False
            keys = [other for other in objects if other.startswith(f"{fixed}/") or not fixed]
        if not keys:
            raise SourceError(f"{url}: no object there", next_step="check the name, and --endpoint-url")
        if self._is_named:
            refuse_unknown(keys)
            fixed = _common_folder(keys)
        self._objects = {key: objects[key] for key in keys}
        self._prefix = f"{fixed}/" if fixed else ""
        self.name = f"s3://{name}/{fixed}".rstrip("/")

    def connect(self) -> None:
        from tokenmill.s3 import Bucket

        super().connect()
        name, endpoint_url, anonymous = self._place
        opened = functools.partial(Bucket, name, self.http, endpoint_url=endpoint_url, anonymous=anonymous)
        self._bucket = self.asked(f"s3://{name}", opened)

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        by_path = {key.removeprefix(self._prefix): found for key, found in self._objects.items()}
        if only is not None:
            chosen = [path for path in only if path in by_path]
        else:
            for path in filter(format_of, by_path):
                _refuse_dots(self.name, path)
            chosen, self.notes = (list(by_path), []) if self._is_named else choose(self.name, by_path)
        return [SourceFile(path, by_path[path].nbytes, by_path[path].etag) for path in sorted(chosen)]

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        from tokenmill.s3 import S3Object

        found = S3Object(self._prefix + file.path, file.nbytes, file.etag or "")
        return self.opened(file, lambda offset, nbytes: self._bucket.read(found, offset, nbytes), planned)


def bucket_and_key(url: str, kind: type[TokenmillError], next_step: str) -> tuple[str, str]:
    """The parts of `s3://BUCKET/KEY`.

    Raises:
        TokenmillError: of that kind, where there is no bucket, or something that cannot be one.
    """
    name, _, key = url.partition("://")[2].partition("/")
    if re.search(r"[@:]", name) or redacted_url(url) != url:
        raise kind(
            f"{redacted_url(url)}: a URL must hold no credentials",
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and give s3://BUCKET/PREFIX",
        )
    if not name:
        raise kind(f"{url}: expected s3://BUCKET/PREFIX", next_step=next_step)
    return name, key


def _common_folder(keys: Sequence[str]) -> str:
    """The longest `/`-separated beginning that all keys share, without their last parts."""
    folders = [key.split("/")[:-1] for key in keys]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in shared)


def _refuse_dots(name: str, path: str) -> None:
    if any(part in (".", "..") for part in path.split("/")):
        raise SourceError(
            f"{name}/{path}: a name with '.' or '..' between slashes cannot be asked for over HTTP",
            next_step="rename the object, or leave it out with a glob",
        )

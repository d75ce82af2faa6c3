"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
import threading
import urllib.parse
from collections.abc import Collection, Iterable

from tokenmill.corpus.choice import choose, refuse_unknown
from tokenmill.corpus.local_listing import MAGIC
from tokenmill.corpus.location import SourceFile
from tokenmill.corpus.remote_location import RemoteLocation
from tokenmill.corpus.train_split import matching
from tokenmill.errors import SourceError
from tokenmill.options import StoreOptions
from tokenmill.remote import hub
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.remote.retry import AnswerError, Retrier

log = logging.getLogger("tokenmill.say")
"""Messages that a user should see at once."""


class HubDataset(RemoteLocation):
    """A data set of the hub at one commit: its split `train`, or the files that a path or a glob names."""

    login = "set HF_TOKEN to a token that may read the data set (it may have expired)"
    own = RemoteLocation.own | {"_headers", "_elsewhere", "_lock"}

    def __init__(self, dataset: str, options: StoreOptions) -> None:
        super().__init__()
        name, revision, self._path = _hub_parts(dataset)
        retrier = self.retrier
        if "://" not in dataset:  # it may be a path that was mistyped: say so, and do not wait for a network for long
            log.warning("%s: no such file or directory here; asking the hub for hf://datasets/%s", dataset, dataset)
            retrier = Retrier(tries=2)
        try:
            self.repository = hub.open_dataset(name, options.revision or revision, retrier)
        except SourceError as error:
            if retrier is self.retrier:
                raise
            raise SourceError(
                f"{dataset}: no such file or directory; and as hf://datasets/{dataset}: {error.message}",
                next_step=f"check the path given with --dataset; if the hub is meant: {error.next_step}",
            ) from None
        self.revision: str | None = self.repository.commit
        self.name = f"hf://datasets/{name}@{self.revision}"

    def connect(self) -> None:
        super().connect()
        self._headers = hub.headers()
        self._elsewhere: dict[str, str] = {}
        """Where the hub sent us for a file; saves asking it again for every range."""
        self._lock = threading.Lock()

    def files(self, only: Collection[str] | None = None) -> list[SourceFile]:
        by_path = {file.path: file for file in self.repository.files}
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
            found, self.notes = choose(place, inside, {} if below else self.repository.card)
            chosen = [below + path for path in found]
        if not chosen:
            raise SourceError(f"{place}: no file there", next_step="check the path in the repository")
        return [SourceFile(path, by_path[path].nbytes, by_path[path].etag) for path in sorted(chosen)]

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        return self.remote_file(file, lambda offset, nbytes: self._read(file, offset, nbytes), planned)

    def _read(self, file: SourceFile, offset: int, nbytes: int) -> bytearray:
        direct = self._elsewhere.get(file.path)
        if direct is not None:
            try:
                return self.http.read(direct, offset, nbytes, total=file.nbytes)[0]
            except AnswerError:  # such URLs are good for a while
                with self._lock:
                    self._elsewhere.pop(file.path, None)
        url = self.repository.url(file.path)
        try:
            data, final = self.http.read(url, offset, nbytes, total=file.nbytes, headers=self._headers)
        except AnswerError as error:
            if error.status != 403 or error.host in ("", urllib.parse.urlsplit(url).netloc):
                raise hub.explain_answer(error, self.repository.name) from None
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

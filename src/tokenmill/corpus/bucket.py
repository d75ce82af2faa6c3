"""Objects of a bucket."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Sequence

from tokenmill.corpus.choice import choose, format_of, refuse_unknown
from tokenmill.corpus.local_listing import MAGIC
from tokenmill.corpus.location import SourceFile
from tokenmill.corpus.remote_location import RemoteLocation
from tokenmill.corpus.train_split import matching
from tokenmill.errors import SourceError
from tokenmill.options import StoreOptions
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.remote.s3 import Bucket, S3Object
from tokenmill.remote.urls import parse_s3_url


class BucketObjects(RemoteLocation):
    """Objects of a bucket: one, all below a prefix, or those that a glob means."""

    login = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (a session may have expired)"
    own = RemoteLocation.own | {"_bucket"}
    revision: str | None = None

    def __init__(self, url: str, options: StoreOptions) -> None:
        name, key = parse_s3_url(url, SourceError, "correct --dataset")
        self._place = name, options.endpoint_url, options.anonymous
        super().__init__()
        magic = MAGIC.search(key)
        fixed = key[: magic.start()].rpartition("/")[0] if magic else key.rstrip("/")
        listed = self._bucket.objects(fixed, lambda page: self.request(url, page))
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
        super().connect()
        name, endpoint_url, anonymous = self._place
        opened = functools.partial(Bucket, name, self.http, endpoint_url=endpoint_url, anonymous=anonymous)
        self._bucket = self.request(f"s3://{name}", opened)

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
        found = S3Object(self._prefix + file.path, file.nbytes, file.etag or "")
        return self.remote_file(file, lambda offset, nbytes: self._bucket.read(found, offset, nbytes), planned)


def _common_folder(keys: Sequence[str]) -> str:
    """Return the longest `/`-separated beginning that all keys share, without their last parts."""
    folders = [key.split("/")[:-1] for key in keys]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in shared)


def _refuse_dots(name: str, path: str) -> None:
    if any(part in (".", "..") for part in path.split("/")):
        raise SourceError(
            f"{name}/{path}: a name with '.' or '..' between slashes cannot be asked for over HTTP",
            next_step="rename the object, or leave it out with a glob",
        )

"""Files of web servers, by URL."""

from __future__ import annotations

import urllib.parse
from collections.abc import Collection, Iterable, Sequence

from tokenmill.corpus.choice import refuse_unknown
from tokenmill.corpus.location import SourceFile
from tokenmill.corpus.remote_location import RemoteLocation
from tokenmill.errors import SourceError
from tokenmill.remote import etag as etags
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.remote.urls import split_web_url


class WebFiles(RemoteLocation):
    """Files of web servers, by URL; a query (a signature, say) is used and never recorded."""

    login = "the URL must carry what the server wants: get a fresh one"
    revision: str | None = None

    def __init__(self, urls: Sequence[str]) -> None:
        super().__init__()
        self.name = "https:/" if all(url.lower().startswith("https") for url in urls) else "http:/"
        self._urls: dict[str, str] = {}
        for url in urls:
            parts = split_web_url(url)
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
            head = self.request(f"{self.name}/{path}", lambda url=url: self.http.head(url))  # type: ignore[misc]
            # A weak ETag is no identity of bytes.
            strong = head.etag if head.etag and not etags.is_weak(head.etag) else None
            found.append(SourceFile(path, head.nbytes, strong))
        return found

    def open(self, file: SourceFile, planned: Iterable[tuple[int, int]] = ()) -> RemoteFile:
        url = self._urls[file.path]

        def read(offset: int, nbytes: int) -> bytearray:
            return self.http.read(url, offset, nbytes, total=file.nbytes, etag=file.etag)[0]

        return self.remote_file(file, read, planned)

"""S3 stores as some are, in this process."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from http.server import BaseHTTPRequestHandler

LINE = b'{"text": "some text"}\n'


class Bucket(BaseHTTPRequestHandler):
    """An S3 store as some are: ETags as `written`, pages of ten keys, faults on demand."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    sizes: dict[str, int]
    """Of the parts an object was sent in."""
    written = staticmethod(lambda etag: f'"{etag}"')
    fault = staticmethod(lambda method, path: None)
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        key = urllib.parse.unquote(parts.path).removeprefix("/bucket").lstrip("/")
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        fault = self.fault(self.command, self.path)
        if fault is not None:
            status, code, headers = fault
            self._answer(status, f"<Error><Code>{code}</Code></Error>".encode(), headers)
        elif self.command == "PUT":
            self.objects[key] = data
            self._answer(200, b"", {"ETag": self._etag(key)})
        elif "list-type" in query:
            self._list(query)
        elif key not in self.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._object(key, query)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def _etag(self, key: str) -> str:
        data, size = self.objects[key], self.sizes.get(key)
        if size is None:
            return self.written(hashlib.md5(data).hexdigest())
        digests = [hashlib.md5(data[at : at + size]).digest() for at in range(0, len(data), size)]
        return self.written(f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}")

    def _list(self, query: dict[str, str]) -> None:
        keys = [key for key in sorted(self.objects) if key.startswith(query.get("prefix", ""))]
        at = int(query.get("continuation-token", "0"))
        page = keys[at : at + 10]
        more = at + 10 < len(keys)
        body = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size><ETag>{self._etag(key)}</ETag></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{at + 10}</NextContinuationToken>" if more else ""
        truncated = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        self._answer(200, f"<ListBucketResult>{truncated}{token}{body}</ListBucketResult>".encode())

    def _object(self, key: str, query: dict[str, str]) -> None:
        data, size = self.objects[key], self.sizes.get(key)
        headers = {"ETag": self._etag(key)}
        if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        elif "partNumber" in query and size is not None:
            headers |= {"x-amz-mp-parts-count": str(-(-len(data) // size))}
            self._answer(206, data[:size], headers)
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            self._answer(206, data[begin:end], headers)
        else:
            self._answer(200, data, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def bucket(**fields: object) -> type[Bucket]:
    return type("Store", (Bucket,), {"objects": {}, "sizes": {}, "asked": [], **fields})

"""HTTP: bytes of a URL by range, and back; the one module that imports `requests`.

Each request is tried once: what the next try may not meet is a `TransientError`, so that the caller decides on
retries. Nothing received is believed before its length is what was asked for.
"""

from __future__ import annotations

import io
import logging
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter

from tokenmill.remote import etag as etags
from tokenmill.remote.certificates import CANNOT_VERIFY, ca_bundle
from tokenmill.remote.retry import (
    AnswerError,
    ChangedError,
    TransientError,
    is_limit,
    is_transient,
    run_within,
    stated_wait,
)

CONNECTIONS = 16

CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0
"""Without a single byte; and for all that comes before the body of an answer."""
SLOWEST_NBYTES_PER_SECOND = 1 << 16
"""A connection that is slower for long is given up for a new one."""

_CHUNK_NBYTES = 1 << 17
_BLOCK_NBYTES = 1 << 18
_SHORT_NBYTES = 1 << 16


class Head(NamedTuple):
    """What a server says of a file."""

    nbytes: int
    etag: str | None
    """As sent, quotes included."""
    url: str
    """Where redirects led."""


class HttpClient:
    """Connections that are kept and shared by threads; proxies and certificates come from the environment."""

    def __init__(self) -> None:
        # It would print URLs, and signed ones are credentials; what matters is raised and logged here.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)
        self._session = _Session()
        self._session.verify = ca_bundle() or True
        self._session.headers["Accept-Encoding"] = "identity"
        adapter = _Adapter(pool_connections=CONNECTIONS, pool_maxsize=CONNECTIONS)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def trust(self, configured: str | None) -> None:
        """Take over what a configuration file says of certificates, where no variable does."""
        self._session.verify = ca_bundle(configured) or True

    def head(self, url: str, headers: Mapping[str, str] | None = None) -> Head:
        """Size and identity of a file.

        Raises:
            TransientError, AnswerError: the file was not described.
        """
        # A range of one byte: servers that answer HEAD wrongly, or not at all, are many.
        response = self._send("GET", url, {"Range": "bytes=0-0", **(headers or {})})
        try:
            if response.status_code == 416:  # there is no first byte
                return Head(0, response.headers.get("ETag"), response.url)
            self._refuse(response)
            nbytes = _total(response)
            if nbytes is None:
                raise AnswerError(response.status_code, "neither Content-Range nor Content-Length says how large it is")
            return Head(nbytes, response.headers.get("ETag"), response.url)
        finally:
            response.close()

    def read(
        self,
        url: str,
        offset: int,
        nbytes: int,
        *,
        total: int,
        etag: str | None = None,
        headers: Mapping[str, str] | None = None,
        into: bytearray | None = None,
    ) -> tuple[bytearray, str]:
        """Return bytes `offset` to `offset + nbytes` of a file of `total`, and the URL that redirects led to.

        `into`, if it has that size, holds them then: fresh memory costs as much as receiving does.

        Raises:
            TransientError: a fault on the way, or a body of another length.
            AnswerError: refused.
            ChangedError: another size, or another ETag than `etag`.
        """
        if nbytes == 0:
            return bytearray(), url
        asked = {"Range": f"bytes={offset}-{offset + nbytes - 1}", **(headers or {})}
        if etag is not None and etag == etags.canonical(etag):
            asked["If-Match"] = etag
        response = self._send("GET", url, asked)
        try:
            if response.status_code in (412, 416):
                raise ChangedError(f"HTTP {response.status_code}: it is another file now")
            self._refuse(response)
            if response.status_code != 206 and (offset, nbytes) != (0, total):
                raise AnswerError(response.status_code, "the server does not serve ranges of a file")
            sent = response.headers.get("Content-Range", "")
            if response.status_code == 206 and _total(response) not in (None, total):
                raise ChangedError(f"expected {total} bytes, found {_total(response)}")
            if response.status_code == 206 and not sent.startswith(f"bytes {offset}-{offset + nbytes - 1}/"):
                raise TransientError(f"{_host(url)}: expected {asked['Range']}, found {sent!r:.80}")
            seen = response.headers.get("ETag")
            if etag is not None and seen is None and "If-Match" not in asked:
                raise TransientError(f"{_host(url)}: the answer has no ETag to tell whether it is the same file")
            if etag is not None and seen is not None and not etags.same(seen, etag):
                raise ChangedError(f"expected ETag {etag}, found {seen}")
            return _body(response, nbytes, into), response.url
        finally:
            response.close()

    def put(self, url: str, data: bytes, headers: Mapping[str, str] | None = None) -> str:
        """Send `data`; the ETag of the answer.

        Raises:
            TransientError, AnswerError: as `read`.
        """
        response = self._send("PUT", url, headers or {}, data)
        try:
            self._refuse(response)
            return response.headers.get("ETag", "")
        finally:
            _drain(response)
            response.close()

    def _send(self, method: str, url: str, headers: Mapping[str, str], data: bytes | None = None) -> requests.Response:
        url, login = _without_login(url)
        seconds = CONNECT_SECONDS + STALL_SECONDS + len(data or b"") / SLOWEST_NBYTES_PER_SECOND

        def send() -> requests.Response:
            return self._session.request(
                method,
                url,
                auth=login or _no_auth,
                data=io.BytesIO(data) if data else data,  # in blocks: a timeout is for each, not for all
                headers=dict(headers),
                stream=True,
                verify=self._session.verify,
                timeout=(CONNECT_SECONDS, STALL_SECONDS),
            )

        try:
            return run_within(seconds, send, _host(url))
        except requests.exceptions.SSLError as error:
            reason = f"no trusted connection to {_host(url)}: {_reason(error)}"
            raise AnswerError(0, reason, next_step=CANNOT_VERIFY) from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise TransientError(f"{_host(url)}: {_reason(error)}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise AnswerError(0, f"{_host(url)}: {_reason(error)}") from None

    @staticmethod
    def _refuse(response: requests.Response) -> None:
        if response.status_code in (200, 206):
            return
        code = _code(response)
        if is_transient(response.status_code, code):
            reason = f"{_host(response.url)}: HTTP {response.status_code} {code or response.reason}"
            limited = is_limit(response.status_code, code)
            raise TransientError(reason, stated_wait(response.headers), limited=limited)
        raise AnswerError(response.status_code, code or response.reason, code=code, host=_host(response.url))


class _Adapter(HTTPAdapter):
    """Sends bodies in blocks that are worth a system call."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, blocksize=_BLOCK_NBYTES)


class _Session(requests.Session):
    """Follows redirects without looking up the other host in .netrc."""

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        if self.should_strip_auth(  # type: ignore[no-untyped-call]
            str(response.request.url), str(prepared_request.url)
        ):
            prepared_request.headers.pop("Authorization", None)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave requests as they are: a .netrc must not add a second signature to a signed URL."""
    return request


def _without_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return a URL without its user and password, and these."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    name, _, password = user.partition(":")
    login = urllib.parse.unquote(name), urllib.parse.unquote(password)
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), login


def _body(response: requests.Response, nbytes: int, into: bytearray | None) -> bytearray:
    """Return exactly `nbytes`, in bounded time."""
    body, found = into if into is not None and len(into) == nbytes else bytearray(nbytes), 0
    began = time.monotonic()
    limit = STALL_SECONDS + nbytes / SLOWEST_NBYTES_PER_SECOND
    host = _host(response.url)
    try:
        while chunk := response.raw.read1(_CHUNK_NBYTES):
            if found + len(chunk) <= nbytes:
                body[found : found + len(chunk)] = chunk
            found += len(chunk)
            if time.monotonic() - began > limit or found > nbytes:
                break
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise TransientError(f"{host}: after {found} of {nbytes} bytes: {_reason(error)}") from None
    if found != nbytes:
        seconds = time.monotonic() - began
        raise TransientError(f"{host}: expected {nbytes} bytes, found {found} in {seconds:.0f} s")
    return body


def _drain(response: requests.Response) -> None:
    """Read a short answer to its end, so that the connection can be used again."""
    try:
        _short(response)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise TransientError(f"{_host(response.url)}: {_reason(error)}") from None


def _short(response: requests.Response) -> bytes:
    """Return the beginning of a body, as much of it as comes in bounded time."""
    body = b""
    began = time.monotonic()
    while len(body) < _SHORT_NBYTES and time.monotonic() - began < STALL_SECONDS:
        chunk = response.raw.read1(_SHORT_NBYTES - len(body))
        if not chunk:
            break
        body += chunk
    return body


def _total(response: requests.Response) -> int | None:
    """Size of the whole file, by the headers of a part of it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not total and response.status_code == 200:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _code(response: requests.Response) -> str:
    """Return the error code of S3 or the hub; empty elsewhere. The rest of an answer may repeat the request."""
    if hub := response.headers.get("X-Error-Code", ""):
        return hub if re.fullmatch(r"\w{1,64}", hub) else ""
    try:
        found = re.search(rb"<Code>(\w{1,64})</Code>", _short(response))
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    return found[1].decode() if found else ""


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _reason(error: BaseException) -> str:
    """Return the innermost cause: outer ones repeat the URL, which may hold a signature."""
    while True:
        inner = next((part for part in (*error.args, error.__cause__) if isinstance(part, BaseException)), None)
        inner = inner or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return type(error).__name__

"""The command line of moto's S3 server, which is here as strict with what it receives as S3 is: HOST, PORT.

moto itself stores whatever arrives of a body. S3 refuses one that is shorter than its header says, or of another MD5
than the request was signed with.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from moto.backends import get_backend
from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple


class Strict:
    """Asks `application` only what S3 would accept."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/forget-all":
            for of_account in get_backend("s3").values():
                for backend in of_account.values():
                    backend.reset()
            start_response("204 No Content", [])
            return []
        if environ["REQUEST_METHOD"] == "PUT":
            data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(data)
            if code := self._reason_against(environ, data):
                start_response("400 Bad Request", [("Content-Type", "application/xml"), ("Connection", "close")])
                return [f"<Error><Code>{code}</Code></Error>".encode()]
        return self._application(environ, start_response)

    @staticmethod
    def _reason_against(environ: dict[str, Any], data: bytes) -> str | None:
        if len(data) != int(environ.get("CONTENT_LENGTH") or 0):
            return "IncompleteBody"
        stated = environ.get("HTTP_CONTENT_MD5")
        signed = urllib.parse.parse_qs(environ["QUERY_STRING"]).get("X-Amz-SignedHeaders", [""])[0]
        if stated is None and "content-md5" not in signed:
            return None
        return None if stated == base64.b64encode(hashlib.md5(data).digest()).decode() else "BadDigest"


class KeepAlive(MotoRequestHandler):
    """Connections that stay, as those of S3 do, and no log: half of what the server would take of the processor."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


if __name__ == "__main__":
    run_simple(
        sys.argv[1],
        int(sys.argv[2]),
        Strict(create_backend_app("s3")),
        threaded=True,
        request_handler=KeepAlive,
    )

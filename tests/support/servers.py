"""Servers on loopback: the hub's HTTP API, a content network behind it, plain files, and faults on demand; S3."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import REPOSITORY

Fault = str
"""What happens to a request: see `Handler.answer`."""


class Site:
    """Data sets by name and commit, and what is to go wrong."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        """Files of a data set at a commit."""
        self.branches: dict[tuple[str, str], str] = {}
        self.fault: Callable[[int, str], Fault | None] = lambda number, path: None
        self.log: list[tuple[str, str, int]] = []
        """Method, path with query, body bytes sent."""
        self.token: str | None = None
        """What private data sets want."""
        self.cdn = ""
        """Base URL of the content network; empty: files come from the hub itself."""
        self._lock = threading.Lock()
        self._count = 0

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch."""
        digest = hashlib.sha1(json.dumps([(p, hashlib.sha1(d).hexdigest()) for p, d in sorted(files.items())]).encode())
        commit = digest.hexdigest()
        self.commits[name, commit] = files
        self.branches[name, branch] = commit
        return commit

    def next(self, path: str) -> Fault | None:
        with self._lock:
            self._count += 1
            number = self._count
        return self.fault(number, path)

    def file(self, name: str, revision: str, path: str) -> bytes | None:
        commit = self.branches.get((name, revision), revision)
        return self.commits.get((name, commit), {}).get(path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        if match := re.fullmatch(r"api/datasets/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"api/datasets/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._model(match[1], match[2], match[3])
        elif match := re.fullmatch(r"(?:cdn/)?datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._simple(404, b"")

    do_HEAD = do_GET  # noqa: N815

    def _info(self, name: str, revision: str) -> None:
        fault = self.site.next(self.path)
        commit = self.site.branches.get((name, revision), revision)
        if fault in ("429", "503"):
            self._simple(int(fault), b"", {"Retry-After": "0"})
        elif name.startswith("private/") and self.headers.get("Authorization") != f"Bearer {self.site.token}":
            self._simple(401, b"", {"X-Error-Code": "GatedRepo"})
        elif (name, commit) not in self.site.commits:
            self._simple(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            self._simple(200, json.dumps({"id": name, "sha": commit, "siblings": []}).encode())

    def _tree(self, name: str, revision: str) -> None:
        files = self.site.commits[name, self.site.branches.get((name, revision), revision)]
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            | (
                {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                if path.endswith(".parquet")
                else {}
            )
            for path, data in sorted(files.items())
        ]
        folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
        entries += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
        self._simple(200, json.dumps(entries).encode())

    def _model(self, name: str, revision: str, path: str) -> None:
        """A file of a model's repository, as the hub's own download asks for it."""
        commit = self.site.branches.get((f"models/{name}", revision), revision)
        data = self.site.file(f"models/{name}", revision, path)
        if data is None:
            self._simple(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self._simple(200, data, headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        data = self.site.file(name, revision, path)
        at_cdn = self.path.startswith("/cdn/")
        if not at_cdn and name.startswith("private/"):
            if self.headers.get("Authorization") != f"Bearer {self.site.token}":
                self._simple(401, b"")
                return
        elif at_cdn and "Authorization" in self.headers:
            self._simple(400, b"two ways to sign in")
            return
        if data is None:
            self._simple(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif self.site.cdn and not at_cdn and path != "README.md":
            self._simple(302, b"", {"Location": f"{self.site.cdn}/cdn{self.path}?signature=s"})
        else:
            self.answer(data, self.site.next(self.path))

    def answer(self, data: bytes, fault: Fault | None) -> None:
        """A file, or the range asked for, as the fault lets it."""
        if fault is not None and fault.isdecimal():
            self._simple(int(fault), b"no", {"Retry-After": "1"} if fault == "429" else {})
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
            return
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        begin, end, status = 0, len(data), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end, status = int(match[1]), min(int(match[2]) + 1, len(data)), 206
        body = data[begin:end]
        total = len(data) + 1 if fault == "grown" else len(data)
        declared = len(body) - 1 if fault == "wrong_length" and body else len(body)
        self.send_response(status)
        self.send_header("ETag", '"another"' if fault == "changed" else etag)
        self.send_header("Content-Length", str(declared))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("truncate", "wrong_length"):
            self.close_connection = True
            body = body[: len(body) // 2] if fault == "truncate" else body
        with contextlib.suppress(OSError):  # the client gave up
            if fault == "drip":
                for at in range(len(body)):
                    self.wfile.write(body[at : at + 1])
                    time.sleep(0.02)
            else:
                self.wfile.write(body)
        self.site.log.append((self.command, self.path, len(body)))

    def _simple(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()


def serving(site: Site) -> contextlib.AbstractContextManager[str]:
    """The site's base URL; closed at the end."""
    return listening(type("SiteHandler", (Handler,), {"site": site}))


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The base URL of a server of such requests; closed at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


_idle: list[str] = []
"""Endpoints of moto that nobody uses: it takes two seconds to start one."""
_started = contextlib.ExitStack()
atexit.register(_started.close)


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of moto's S3 server, in a process of its own, with nothing in it but a bucket `bucket`."""
    if not _idle:
        port = free_port()
        line = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("strict_s3.py")), "127.0.0.1", str(port)]
        smaller = os.environ | {"S3_UPLOAD_PART_MIN_SIZE": "1024"}  # parts of 5 MB would make slow tests
        _idle.append(_started.enter_context(_process(line, port, smaller)))
    endpoint = _idle.pop()
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/forget-all", method="POST")).close()
    s3_client(endpoint).create_bucket(Bucket="bucket")
    yield endpoint
    _idle.append(endpoint)


@contextlib.contextmanager
def s3rver(folder: Path) -> Iterator[str]:
    """The same, of another implementation (npm's s3rver); skips where it is missing."""
    beside = shutil.which("s3rver", path=str(REPOSITORY / ".venv" / "node_modules" / ".bin"))
    program = beside or shutil.which("s3rver")
    if program is None:
        pytest.skip("s3rver is not at hand: npm install --prefix .venv s3rver")
    port = free_port()
    line = [program, "-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", "bucket"]
    with _process(line, port, dict(os.environ)) as endpoint:
        yield endpoint


@contextlib.contextmanager
def _process(line: list[str], port: int, env: dict[str, str]) -> Iterator[str]:
    """A server that is ready when its port answers; killed at the end."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(line, stdout=quiet, stderr=quiet, env=env) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
"""Of an environment in which only the loopback server is spoken to."""


@functools.lru_cache
@functools.cache
def s3_client(endpoint: str):
    """A client of the real library, to look at what a bucket holds."""
    import botocore.session

    session = botocore.session.Session()
    return session.create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


class Proxy:
    """A TCP proxy before a server that, at random, resets, truncates, corrupts, stalls, or answers 503 itself.

    Args:
        target: URL of the server.
    """

    KINDS = ("reset", "truncate", "corrupt", "corrupt", "corrupt", "stall", "503")
    STALL_SECONDS = 0.35

    def __init__(self, target: str) -> None:
        parts = urllib.parse.urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.rng = random.Random(0)
        self.rate = 0.0
        """Faults per chunk of at most 16 KB."""
        self.faults: list[str] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            for source, sink, is_request in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, is_request), daemon=True).start()

    def _fault(self) -> str | None:
        with self._lock:
            if self.rng.random() >= self.rate:
                return None
            self.faults.append(self.rng.choice(self.KINDS))
            return self.faults[-1]

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                fault = self._fault()
                if fault == "corrupt":
                    at, flip = self.rng.randrange(len(data)), 1 << self.rng.randrange(8)
                    data = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
                elif fault == "stall":
                    time.sleep(self.STALL_SECONDS)
                elif fault == "truncate":
                    sink.sendall(data[: len(data) // 2])
                    break
                elif fault == "503" and is_request:
                    body = b"<Error><Code>SlowDown</Code></Error>"
                    head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                    source.sendall(head.encode() + body)
                    break
                elif fault == "reset":
                    for end in (source, sink):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

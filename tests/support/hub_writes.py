"""A hub on loopback that takes data sets: the part of its protocol that `huggingface_hub` uses without Xet storage."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class LoopbackHub:
    """Repositories by name, each with its files. `faults` are answered once, by path, before anything is looked at."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.authorized: set[str] = set()
        self.faults: dict[str, int] = {}
        self.spoil: set[str] = set()
        """Paths that the hub keeps with another last byte."""
        self.url = ""

    def commit(self, name: str) -> str:
        """The id of what a repository holds now."""
        files = {path: hashlib.sha256(data).hexdigest() for path, data in self.repositories[name].items()}
        return hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        parts = urlsplit(path).path.strip("/").split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[0] == "objects" and method == "PUT":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return 400, {"error": "another digest"}
            self.objects[parts[1]] = body
            return 200, {}
        if parts[0] == "api" and parts[1] == "datasets":
            return self._of_repository("/".join(parts[2:4]), parts[4:], body)
        if parts[0] == "datasets" and parts[-2:] == ["objects", "batch"]:
            return 200, self._batch(json.loads(body))
        if parts[0] == "datasets" and parts[3] == "resolve":
            data = self.repositories.get("/".join(parts[1:3]), {}).get("/".join(parts[5:]))
            return (404, {"error": "no such file"}) if data is None else (200, data)
        return 404, {"error": f"{method} {path}"}

    def _create(self, asked: dict) -> tuple[int, object]:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = f"{self.url}/datasets/{name}"
        if name in self.repositories:
            return 409, {"error": "You already created this dataset repo", "url": url}
        self.repositories[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return 200, {"url": url, "id": name, "name": name}

    def _of_repository(self, name: str, rest: list[str], body: bytes) -> tuple[int, object]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[name]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name, "sha": self.commit(name), "private": name in self.private, "siblings": siblings}
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["size"] > 10_000], "shouldIgnore": False} for f in asked
                ]
            }
        if rest[0] == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
                if value.get("path") in self.spoil:
                    files[value["path"]] = files[value["path"]][:-1] + b"?"
            commit = self.commit(name)
            return 200, {"commitUrl": f"{self.url}/datasets/{name}/commit/{commit}", "commitOid": commit}
        if rest[0] == "tree":
            return 200, [self._entry(path, data) for path, data in files.items()]
        return 404, {"error": rest}

    def _entry(self, path: str, data: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()
        entry: dict = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if len(data) > 10_000:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _batch(self, asked: dict) -> dict:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Serve a hub until the block ends."""
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
            hub.authorized.add(self.headers.get("Authorization", ""))
            fault = next((key for key in hub.faults if key in self.path), None)
            status, answer = (
                (hub.faults.pop(fault), {"error": "x"}) if fault else hub.answer(self.command, self.path, body)
            )
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""A tokenizer by hub name: the real client library against a server on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from conftest import command
from support.runs import every_digest
from support.servers import listening
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {name: (TOKENIZER / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as downloading a file takes; `gated/model` refuses."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        owner, _, _, revision, name = self.path.strip("/").split("/")
        if owner == "gated":
            self._answer(401, {"X-Error-Code": "GatedRepo"}, b"")
        elif name not in FILES or revision not in ("main", "v1", COMMIT):
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        else:
            etag = hashlib.sha1(FILES[name]).hexdigest()
            self._answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, FILES[name])

    do_GET = do_HEAD  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that sends the client library to the server."""
    Hub.asked = []
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with listening(Hub) as url:
        yield keep | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


def pretokenize(root: Path, corpus: Path, tokenizer: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = command("pretokenize", root, "--dataset", corpus, "--tokenizer", tokenizer, "--shard-size", 2000, "--quiet")
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=env, check=False)


@pytest.mark.parametrize("name", ["owner/model", "owner/model@v1"])
def test_tokenizer_by_hub_name(tmp_path: Path, corpus: Path, hub: dict[str, str], name: str) -> None:
    result = pretokenize(tmp_path / "out", corpus, name, hub)
    assert result.returncode == 0, result.stderr
    assert pretokenize(tmp_path / "local", corpus, TOKENIZER, hub).returncode == 0
    assert every_digest(tmp_path / "out") == every_digest(tmp_path / "local")
    state = manifest.load(tmp_path / "out")
    assert (state.tokenizer.name, state.tokenizer.revision) == (name, COMMIT)

    Hub.asked.clear()
    assert pretokenize(tmp_path / "out", corpus, name, hub).returncode == 0
    assert all(f"/resolve/{COMMIT}/" in path for path in Hub.asked)  # a resume stays with the pinned commit
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    assert pretokenize(tmp_path / "out", corpus, name, offline).returncode == 0


def test_gated_and_unknown_tokenizers_stop_the_run(tmp_path: Path, corpus: Path, hub: dict[str, str]) -> None:
    for name, message in (("gated/model", "HF_TOKEN"), ("owner/model@nonesuch", "no tokenizer.json")):
        result = pretokenize(tmp_path / "out", corpus, name, hub)
        assert result.returncode == 4
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_token_never_shows(tmp_path: Path, corpus: Path, hub: dict[str, str]) -> None:
    secret = "hf" + "_" + "s" * 34
    for name in ("gated/model", "owner/model"):
        result = pretokenize(tmp_path / "out", corpus, name, hub | {"HF_TOKEN": secret})
        assert secret not in result.stdout + result.stderr
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert secret.encode() not in written

"""What servers say, however they say it: waits, pages, ETags, certificates, logins, refusals."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import os
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from conftest import IMPATIENT, command, run_cli
from support.buckets import LINE, Bucket, bucket
from support.servers import AWS, Site, listening, serving
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import find_corpus
from tokenmill.errors import SourceError, StorageError
from tokenmill.options import StoreOptions
from tokenmill.remote import certificates, hub, retry
from tokenmill.remote import etag as etags
from tokenmill.remote.http import HttpClient
from tokenmill.remote.retry import AnswerError, Retrier, TransientError, stated_wait
from tokenmill.transfer.download import download
from tokenmill.transfer.stores import open_store
from tokenmill.transfer.upload import upload

TEXT = st.text()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait, but for what servers ask; credentials are there."""
    monkeypatch.setattr(retry, "backoff", tenacity.wait_none())
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", *certificates.VARIABLES):
        monkeypatch.delenv(name, raising=False)


# Waits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"Retry-After": lambda: email.utils.formatdate(time.time() + 100, usegmt=True)}, 100),
        ({"Retry-After": lambda: email.utils.formatdate(time.time() - 100, usegmt=True)}, 0),
        ({"RateLimit": '"api";r=0;t=100'}, 100),
        ({"RateLimit": '"api";r=3;t=100'}, 0),
        ({"RateLimit": '"api";r=0;t=5, "pages";r=0;t=9'}, 9),
        ({"X-RateLimit-Reset": "30"}, 30),
        ({"X-RateLimit-Reset": lambda: str(round(time.time()) + 60)}, 60),
        ({"X-RateLimit-Remaining": "5", "X-RateLimit-Reset": "30"}, 0),
        ({"x-ms-retry-after-ms": "2500"}, 2.5),
        ({"Retry-After": "soon", "RateLimit": "nonsense", "X-RateLimit-Reset": "-1"}, 0),
        ({"Retry-After": "3", "RateLimit": '"api";r=0;t=4'}, 4),
        # Of the server's clock, whatever ours says.
        ({"Retry-After": "Fri, 01 Jan 1999 00:01:40 GMT", "Date": "Fri, 01 Jan 1999 00:00:00 GMT"}, 100),
        ({"Retry-After": "Tue, 01 Jan 2999 00:01:40 GMT", "Date": "Tue, 01 Jan 2999 00:00:00 GMT"}, 100),
        ({"X-RateLimit-Reset": "1800000060", "Date": "Fri, 15 Jan 2027 08:00:00 GMT"}, 60),
    ],
)
def test_every_way_to_ask_for_a_wait(headers: dict, seconds: float) -> None:
    found = stated_wait({name: value() if callable(value) else value for name, value in headers.items()})
    assert abs(found - seconds) < 5 if seconds >= 60 else found == seconds


@given(
    st.dictionaries(
        st.sampled_from(["Retry-After", "RateLimit", "X-RateLimit-Reset", "x-ms-retry-after-ms", "Date"]), st.text()
    )
)
def test_no_header_is_a_traceback(headers: dict[str, str]) -> None:
    assert stated_wait(headers) >= 0


def test_a_limit_is_waited_for_and_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "SAID_WAIT_SECONDS", 0.2)
    answers = iter([TransientError("HTTP 429", stated_wait({"x-ms-retry-after-ms": "300"}), limited=True), None])

    def task() -> str:
        error = next(answers)
        if error is not None:
            raise error
        return "done"

    began = time.monotonic()
    assert Retrier()(task) == "done"
    assert time.monotonic() - began >= 0.3
    assert [record.name for record in caplog.records if "waiting 0 s, as the server asks" in record.message] == [
        "tokenmill.say"
    ]


def test_a_limit_that_stays_says_what_lifts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Limited(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(429)
            self.send_header("RateLimit", '"api";r=0;t=0')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with listening(Limited) as url:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        line = command("pretokenize", tmp_path / "o", "--dataset", "hf://datasets/owner/data", "--tokenizer", TOKENIZER)
        line[1:3] = ["-c", IMPATIENT]
        result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert result.returncode == 3
    assert "the hub limits requests" in result.stderr
    assert "HF_TOKEN" in result.stderr


# ETags


@given(digest=st.binary(min_size=16, max_size=16), parts=st.none() | st.integers(1, 99))
def test_etags_are_compared_however_written(digest: bytes, parts: int | None) -> None:
    bare = digest.hex() + (f"-{parts}" if parts else "")
    ways = [bare, bare.upper(), f'"{bare}"', f'W/"{bare}"', f' "{bare.upper()}" ']
    assert len({etags.canonical(way) for way in ways}) == 1
    assert all(etags.same(way, bare) for way in ways)
    assert not etags.same(bare, bare.replace(bare[0], "f" if bare[0] != "f" else "0", 1))
    assert not etags.same("", "")


@given(data=st.binary(max_size=200), size=st.integers(1, 40))
def test_etags_of_parts_whose_size_is_guessed(data: bytes, size: int) -> None:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    etag = etags.parts_etag([etags.md5_etag(piece) for piece in pieces])
    hasher = etags.ETagHasher(etag, [size + 1, size])
    for piece in (data[:7], data[7:]):
        hasher.update(piece)
    assert hasher.found == etag
    assert etags.ETagHasher(etag).found == ""


WAYS = {
    "quoted": lambda etag: f'"{etag}"',
    "bare": lambda etag: etag,
    "upper": lambda etag: f'"{etag.upper()}"',
    "bare upper": lambda etag: etag.upper(),
    "weak": lambda etag: f'W/"{etag}"',
}


@pytest.mark.parametrize("way", WAYS)
def test_stores_that_write_etags_their_own_way(way: str, tmp_path: Path) -> None:
    store = bucket(written=staticmethod(WAYS[way]))
    (tmp_path / "data").mkdir()
    for n in range(12):
        (tmp_path / "data" / f"f{n}.bin").write_bytes(os.urandom(3_000))
    with listening(store) as url:
        options = StoreOptions(url)
        sent = upload(tmp_path / "data", "s3://bucket/a", store=options)
        assert len(sent.moved) == 12
        again = upload(tmp_path / "data", "s3://bucket/a", store=options)
        assert not again.moved
        brought = download("s3://bucket/a", tmp_path / "back", store=options)
        assert {file.checked for file in brought.files} == {"etag"}
        for path in (tmp_path / "data").glob("*.bin"):
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
        assert not download("s3://bucket/a", tmp_path / "back", store=options).moved
        store.objects["c/x.jsonl"] = LINE
        corpus = find_corpus("s3://bucket/c", options=options)
        reader = corpus.open(0)
        assert reader.read(next(iter(reader.spans()))).array.to_pylist() == ["some text"]


# Listings


def test_a_listing_goes_on_from_the_page_that_failed() -> None:
    """Of 30 pages every third request fails: from the start each time, it would never end."""
    count = iter(range(1, 10_000))
    store = bucket(
        objects={f"c/{n:04}.jsonl": LINE for n in range(300)},
        fault=staticmethod(lambda method, path: (503, "SlowDown", {}) if next(count) % 3 == 0 else None),
    )
    with listening(store) as url:
        assert len(find_corpus("s3://bucket/c", options=StoreOptions(url)).files) == 300
        assert len(open_store("s3://bucket/c", StoreOptions(url)).files()) == 300
    assert len(store.asked) < 110


def test_the_hubs_listing_goes_on_from_the_page_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1, 10_000))

    class Hub(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            type(self).asked += 1
            parts = urllib.parse.urlsplit(self.path)
            at = int(dict(urllib.parse.parse_qsl(parts.query)).get("cursor", "0"))
            body, headers, status = b'{"id": "owner/data", "sha": "c0ffee", "siblings": []}', {}, 200
            if next(count) % 3 == 0:
                body, status = b"", 500
            elif "/tree/" in parts.path:
                one = '{"type": "file", "path": "%03d.jsonl", "size": 22, "oid": "0"}'
                body = f"[{one % at}]".encode()
                if at < 39:
                    headers = {"Link": f'<http://{self.headers["Host"]}{parts.path}?cursor={at + 1}>; rel="next"'}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with listening(Hub) as url:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        found = hub.open_dataset("owner/data", None, Retrier())
    assert [file.path for file in found.files] == [f"{n:03}.jsonl" for n in range(40)]
    assert Hub.asked < 80


# Exact names


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.jsonl", "what?.jsonl", "[x].jsonl"])
def test_the_exact_name_goes_before_the_glob(name: str, tmp_path: Path) -> None:
    store = bucket(
        objects={f"c/{name}": LINE, "c/a1.jsonl": LINE, "c/bcd.jsonl": LINE, "c/x.jsonl": LINE, "c/whatx.jsonl": LINE}
    )
    (tmp_path / name).write_bytes(LINE)
    (tmp_path / "a1.jsonl").write_bytes(LINE)
    with listening(store) as url:
        remote = find_corpus(f"s3://bucket/c/{name}", options=StoreOptions(url))
    local = find_corpus(str(tmp_path / name))
    assert [file.path for file in remote.files] == [file.path for file in local.files] == [name]


def test_keys_with_dots_are_refused(tmp_path: Path) -> None:
    for key in ("c/./a.jsonl", "c/x/../a.jsonl"):
        store = bucket(objects={key: LINE, "c/b.jsonl": LINE})
        with listening(store) as url, pytest.raises(SourceError, match="cannot be asked for over HTTP"):
            find_corpus("s3://bucket/c", options=StoreOptions(url))


# Refusals


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (400, "ExpiredToken", "a session may have expired"),
        (400, "InvalidToken", "AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", "set this machine's clock"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
        (301, "PermanentRedirect", "AWS_REGION"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (404, "NoSuchBucket", "check the bucket's name"),
    ],
)
def test_refusals_by_what_the_store_calls_them(status: int, code: str, says: str) -> None:
    for faulty in ("list-type", "x.jsonl"):
        store = bucket(
            objects={"c/x.jsonl": LINE},
            fault=staticmethod(lambda method, path, faulty=faulty: (status, code, {}) if faulty in path else None),
        )
        with listening(store) as url, pytest.raises(SourceError, match=says):
            list(find_corpus("s3://bucket/c", options=StoreOptions(url)).open(0).spans())
        assert len(store.asked) <= 4  # it is not tried again


def test_slow_down_is_tried_again_whatever_its_status() -> None:
    count = iter(range(100))
    store = bucket(
        objects={"c/x.jsonl": LINE},
        fault=staticmethod(lambda method, path: (400, "SlowDown", {}) if next(count) < 3 else None),
    )
    with listening(store) as url:
        assert len(find_corpus("s3://bucket/c", options=StoreOptions(url)).files) == 1


def test_a_content_network_that_refuses_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site, network = Site(), Site()
    files = {"x.jsonl": LINE}
    site.add("owner/data", files)
    network.commits = site.commits
    refusals = iter(["403"])
    network.fault = lambda number, path: next(refusals, None)
    with serving(network) as there, serving(site) as url:
        site.cdn = there
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        corpus = find_corpus("hf://datasets/owner/data")
        monkeypatch.setattr(
            type(corpus.location.repository),
            "url",
            lambda self, path: f"{url}/datasets/{self.name}/resolve/{self.commit}/{path}",
        )
        reader = corpus.open(0)
        assert reader.read(next(iter(reader.spans()))).array.to_pylist() == ["some text"]


def test_terms_that_were_not_accepted(tmp_path: Path) -> None:
    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with listening(Gated) as url:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        line = command("pretokenize", tmp_path / "o", "--dataset", "owner/data", "--tokenizer", TOKENIZER)
        result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert result.returncode == 3
    assert f"accept its terms at {url}/datasets/owner/data" in result.stderr


# Certificates and logins


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate of 127.0.0.1 that signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    line += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    try:
        subprocess.run(line, cwd=folder, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not at hand")
    return {"key": folder / "key.pem", "cert": folder / "cert.pem"}


@contextlib.contextmanager
def secure(handler: type[BaseHTTPRequestHandler], authority: dict[str, Path]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority["cert"], authority["key"])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients that do not trust it hang up
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("variable", [None, *certificates.VARIABLES, "ca_bundle"])
def test_all_trust_the_same(
    variable: str | None, authority: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control calls and bytes of a bucket, and a web server; told at once where none is set."""
    if variable == "ca_bundle":
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {authority['cert']}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    elif variable:
        monkeypatch.setenv(variable, str(authority["cert"]))
    store = bucket(objects={"c/x.jsonl": LINE})
    with secure(store, authority) as url:
        trusted = variable is not None
        expectation = contextlib.nullcontext() if trusted else pytest.raises(SourceError, match="SSL_CERT_FILE")
        with expectation:
            corpus = find_corpus("s3://bucket/c", options=StoreOptions(url))
            assert next(iter(corpus.open(0).spans())).rows == 1
        if variable != "ca_bundle":
            expectation = contextlib.nullcontext() if trusted else pytest.raises(SourceError, match="SSL_CERT_FILE")
            with expectation:
                assert next(iter(find_corpus(f"{url}/bucket/c/x.jsonl").open(0).spans())).rows == 1
    assert trusted or not store.asked


def test_the_hub_trusts_the_same(authority: dict[str, Path], tmp_path: Path) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with secure(Hub, authority) as url:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        line = command("pretokenize", tmp_path / "o", "--dataset", "hf://datasets/a/b", "--tokenizer", TOKENIZER)
        for more, says in (
            ({}, "no trusted connection to the hub"),
            ({"REQUESTS_CA_BUNDLE": str(authority["cert"])}, "RepositoryNotFound"),
        ):
            result = subprocess.run(line, capture_output=True, text=True, env=env | more, timeout=60, check=False)
            assert (result.returncode, says in result.stderr) == (3, True), result.stderr


def test_a_bundle_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/certificates.pem")
    with pytest.raises(StorageError, match="REQUESTS_CA_BUNDLE: /nowhere"):
        HttpClient()


class Door(BaseHTTPRequestHandler):
    """Says who came; /away leads to another host."""

    came: list[str | None]
    away = ""

    def do_GET(self) -> None:
        self.came.append(self.headers.get("Authorization"))
        wanted = "Basic " + base64.b64encode(b"user:p@ss/word").decode()
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", self.away)
        elif self.path == "/closed" and self.headers.get("Authorization") != wanted:
            self.send_response(401)
        else:
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-0/1")
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")
            return
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_logins_in_urls_and_none_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text(
        "machine 127.0.0.1 login thief password stolen\nmachine localhost login thief password stolen\n"
    )
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    doors = [type("Door", (Door,), {"came": []}) for _ in range(2)]
    with listening(doors[0]) as first, listening(doors[1]) as second:
        client = HttpClient()
        doors[0].away = second.replace("127.0.0.1", "localhost") + "/open"
        host = first.removeprefix("http://")
        assert client.head(f"http://user:p%40ss%2Fword@{host}/closed").nbytes == 1
        with pytest.raises(AnswerError, match="401"):
            client.head(f"{first}/closed")
        client.head(f"{first}/open")
        client.head(f"{first}/away")
        client.head(f"http://user:p%40ss%2Fword@{host}/away")
    sent = [who for who in doors[0].came if who is not None]
    assert all("thief" not in base64.b64decode(who.removeprefix("Basic ")).decode() for who in sent)
    assert doors[1].came == [None, None]


# Proof


def test_a_proof_is_told_as_it_was_made(tmp_path: Path) -> None:
    """Parts whose size the store does not tell are proven by likely sizes, or by reading twice; it is kept which."""
    data = os.urandom(11 << 20)
    store = bucket(
        objects={"d/likely.bin": data, "d/odd.bin": data}, sizes={"d/likely.bin": 5 << 20, "d/odd.bin": 4_000_001}
    )
    store.fault = staticmethod(lambda method, path: (403, "", {}) if "partNumber" in path else None)
    with listening(store) as url:
        for _ in range(2):
            result = download("s3://bucket/d", tmp_path / "d", store=StoreOptions(url))
            assert {file.path: file.checked for file in result.files} == {"likely.bin": "etag", "odd.bin": "twice"}
        said = run_cli("download", "s3://bucket/d", tmp_path / "d", "--endpoint-url", url)
    assert "1 file compared with the store's ETag" in said.stdout
    assert "1 file compared with a second reading" in said.stdout


def test_a_refused_question_does_not_switch_proof_off(tmp_path: Path) -> None:
    """One bit is flipped on the way, and what would tell the parts' size is refused: found all the same."""
    data = os.urandom(3 << 20)
    flips = iter([True])

    class Flipping(Bucket):
        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            if status == 206 and len(body) > 1 << 20 and next(flips, False):
                body = bytes([body[0] ^ 1]) + body[1:]
            super()._answer(status, body, headers)

    fields = {"objects": {"d/x.bin": data}, "sizes": {"d/x.bin": 1_234_567}, "asked": []}
    store = type("Store", (Flipping,), fields)
    store.fault = staticmethod(lambda method, path: (403, "", {}) if "partNumber" in path else None)
    with listening(store) as url:
        result = download("s3://bucket/d", tmp_path / "d", store=StoreOptions(url))
    assert (tmp_path / "d" / "x.bin").read_bytes() == data
    assert [file.checked for file in result.files] == ["twice"]

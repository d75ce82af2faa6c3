"""Servers that never come to an end, and names and sizes that nothing can hold: told in bounded time, by what it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests

from support.buckets import LINE, bucket
from support.servers import listening
from tokenmill.corpus.corpus import find_corpus
from tokenmill.errors import DataRootError, RecipeError, SourceError, StorageError
from tokenmill.options import StoreOptions
from tokenmill.recipe import load_recipe
from tokenmill.remote import http, hub, retry, s3
from tokenmill.remote.http import HttpClient
from tokenmill.remote.retry import AnswerError, Retrier, TransientError
from tokenmill.transfer.download import download
from tokenmill.transfer.stores import checked_path, open_store
from tokenmill.transfer.upload import upload


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of about a second, so that the tests need not wait."""
    monkeypatch.setattr(http, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(retry, "CALL_SECONDS", 1.5)
    monkeypatch.setattr(Retrier.__init__, "__defaults__", (2,))


class Dripping(BaseHTTPRequestHandler):
    """Sends `first`, and then `drip` for ever."""

    protocol_version = "HTTP/1.1"
    first = b""
    drip = b"x"

    def do_GET(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(self.first)
            while True:
                self.wfile.write(self.drip)
                time.sleep(0.1)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


DRIPS = {
    "nothing but a status line": (b"HTTP/1.1 200 OK\r\n", b""),
    "a header a byte at a time": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "100 Continue for ever": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the body of a 503": (b"HTTP/1.1 503 Slow Down\r\nContent-Length: 100000\r\n\r\n", b" "),
    "the body of a 403": (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100000\r\n\r\n", b" "),
    "a body": (b"HTTP/1.1 206 P\r\nContent-Length: 9999\r\nContent-Range: bytes 0-9998/9999\r\n\r\n", b"x"),
}


@contextlib.contextmanager
def dripping(kind: str) -> Iterator[str]:
    first, drip = DRIPS[kind]
    with listening(type("Server", (Dripping,), {"first": first, "drip": drip})) as url:
        yield url


@pytest.mark.parametrize("kind", DRIPS)
@pytest.mark.parametrize("method", ["head", "read", "put"])
@pytest.mark.usefixtures("brief")
def test_no_answer_takes_for_ever(kind: str, method: str) -> None:
    began = time.monotonic()
    with dripping(kind) as url:
        client = HttpClient()
        ask = {
            "head": lambda: client.head(url),
            "read": lambda: client.read(url, 0, 9999, total=9999),
            "put": lambda: client.put(url, b"x" * 1000),
        }[method]
        if kind == "a body" and method != "read":
            ask()  # the body is not needed
        else:
            with pytest.raises((TransientError, AnswerError)):
                ask()
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("kind", DRIPS)
@pytest.mark.usefixtures("brief")
def test_no_question_to_a_store_takes_for_ever(kind: str) -> None:
    began = time.monotonic()
    with dripping(kind) as url, pytest.raises(StorageError, match="s3://bucket/a"):
        open_store("s3://bucket/a", StoreOptions(url, anonymous=True)).files()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", ["a header a byte at a time", "100 Continue for ever", "the body of a 503"])
@pytest.mark.usefixtures("brief")
def test_no_question_to_the_hub_takes_for_ever(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    began = time.monotonic()
    with dripping(kind) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(SourceError, match="the hub"):
            hub.open_dataset("owner/data", None, Retrier(tries=2))
    assert time.monotonic() - began < 20


def test_what_fails_within_the_time_is_what_it_was() -> None:
    with pytest.raises(KeyError, match="no such"):
        retry.run_within(5, lambda: {}["no such"], "host")
    with pytest.raises(TransientError, match="host: no whole answer within 0 s"):
        retry.run_within(0.05, threading.Event().wait, "host")
    with pytest.raises(requests.ConnectionError):
        retry.run_within(5, lambda: (_ for _ in ()).throw(requests.ConnectionError()), "host")


def listing(page: str, token: str) -> bytes:
    return (
        f"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
        f"{page}</ListBucketResult>"
    ).encode()


def entry(key: str, nbytes: int = 5) -> str:
    return f'<Contents><Key>{key}</Key><Size>{nbytes}</Size><ETag>"{"0" * 32}"</ETag></Contents>'


LISTINGS = {
    "the same page again": lambda n: listing(entry("a/x.jsonl"), "again"),
    "empty pages": lambda n: listing("", str(n)),
    "new keys for ever": lambda n: listing("".join(entry(f"a/{n}-{i}.jsonl") for i in range(50)), str(n)),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_listing_that_never_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "MOST_ENTRIES", 2_000)
    monkeypatch.setattr(retry, "FEW_PAGES", 30)
    count = iter(range(1_000_000))

    class Endless(bucket()):
        def _list(self, query: dict[str, str]) -> None:
            self._answer(200, LISTINGS[kind](next(count)))

    with listening(Endless) as url:
        options = StoreOptions(url, anonymous=True)
        for ask in (
            lambda: open_store("s3://bucket/a", options).files(),
            lambda: find_corpus("s3://bucket/a", options=options),
        ):
            with pytest.raises((StorageError, SourceError), match="the listing does not end"):
                ask()


@pytest.mark.parametrize("nbytes", [-1, 1 << 63, 10**30])
def test_sizes_that_nothing_has(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retrier.__init__, "__defaults__", (2,))

    class Strange(bucket()):
        def _list(self, query: dict[str, str]) -> None:
            body = listing(entry("a/x.jsonl", nbytes), "1").replace(b"true", b"false")
            self._answer(200, body)

    with listening(Strange) as url, pytest.raises(StorageError, match="an answer that makes no sense"):
        open_store("s3://bucket/a", StoreOptions(url, anonymous=True)).files()


@pytest.mark.parametrize("when", ["2026-01-01T00:00:00R", "2026-01-01T00:00:00.000ZZ", "never", ""])
def test_a_date_that_is_damaged_is_an_answer_to_ask_again_for(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library only warns, and the user made warnings errors, as these tests do."""
    monkeypatch.setattr(Retrier.__init__, "__defaults__", (2,))
    asked = iter([when])

    class Damaged(bucket()):
        def _list(self, query: dict[str, str]) -> None:
            dated = entry("a/x.jsonl", 5).replace("</Key>", f"</Key><LastModified>{next(asked, '')}</LastModified>")
            body = listing(dated, "1").replace(b"true", b"false").replace(b"<LastModified></LastModified>", b"")
            self._answer(200, body)

    with listening(Damaged) as url:
        assert list(open_store("s3://bucket/a", StoreOptions(url, anonymous=True)).files()) == ["x.jsonl"]


def test_a_manifest_that_memory_cannot_hold(tmp_path: Path) -> None:
    class Large(bucket()):
        def _list(self, query: dict[str, str]) -> None:
            self._answer(200, listing(entry("a/manifest.json", 10**11), "1").replace(b"true", b"false"))

    with listening(Large) as url, pytest.raises(StorageError, match="a record of at most 2147483648 bytes") as caught:
        download("s3://bucket/a", tmp_path / "out", store=StoreOptions(url, anonymous=True))
    assert "manifest.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


# Names


@pytest.mark.parametrize("name", ["a\\b.bin", "tab\there.bin", "C:x.bin", "line\nbreak.bin"])
def test_names_that_could_not_be_downloaded_are_not_uploaded(name: str, tmp_path: Path) -> None:
    store = bucket()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.bin").write_bytes(b"x")
    (tmp_path / "data" / name).write_bytes(b"x")
    with listening(store) as url, pytest.raises(StorageError, match="refused the name"):
        upload(tmp_path / "data", "s3://bucket/a", store=StoreOptions(url, anonymous=True))
    assert not store.objects


def test_names_that_no_folder_takes(tmp_path: Path) -> None:
    assert checked_path("é" * 127, "s3://bucket") == "é" * 127
    for path in ("x" * 256, "é" * 128, f"a/{'x' * 300}/b"):
        store = bucket(objects={f"a/{path}": b"x"})
        with pytest.raises(StorageError, match="names of at most 255 bytes, found"):
            checked_path(path, "s3://bucket")
        with listening(store) as url, pytest.raises(StorageError, match="at most 255 bytes"):
            download("s3://bucket/a", tmp_path / "out", store=StoreOptions(url, anonymous=True))
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match="not UTF-8"):
        checked_path("caf\udce9.bin", "/data")


# Redirects


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("says", [{}, {"x-amz-bucket-region": "eu-west-1"}], ids=["no region", "a region"])
def test_a_store_that_redirects_every_question(status: int, says: dict[str, str], tmp_path: Path) -> None:
    """Botocore asks a redirecting server where the bucket is, and is redirected, until Python's stack ends."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_bytes(LINE)
    store = bucket(fault=staticmethod(lambda method, path: (status, "TemporaryRedirect", {"Location": "/", **says})))
    with listening(store) as url:
        options = StoreOptions(url, anonymous=True)
        for call in (
            lambda: find_corpus("s3://bucket/c", options=options),
            lambda: upload(tmp_path / "data", "s3://bucket/a", store=options),
            lambda: download("s3://bucket/a", tmp_path / "out", store=options),
        ):
            with pytest.raises((SourceError, StorageError), match="TemporaryRedirect") as caught:
                call()
            assert "AWS_REGION" in str(caught.value)
    assert not store.objects
    assert not (tmp_path / "out").exists()


def test_bytes_behind_redirects(tmp_path: Path) -> None:
    """Objects that lie elsewhere are read and written there, and held to their ETags as ever."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_bytes(LINE)
    there = bucket()
    with listening(there) as elsewhere:

        def fault(method: str, path: str) -> tuple[int, str, dict[str, str]] | None:
            is_object = method in ("GET", "PUT") and "list-type" not in path
            return (307, "TemporaryRedirect", {"Location": elsewhere + path}) if is_object else None

        here = bucket(objects=there.objects, fault=staticmethod(fault))
        with listening(here) as url:
            options = StoreOptions(url, anonymous=True)
            assert upload(tmp_path / "data", "s3://bucket/a", store=options).moved
            assert there.objects
            download("s3://bucket/a", tmp_path / "out", store=options)
    assert (tmp_path / "out" / "x.jsonl").read_bytes() == (tmp_path / "data" / "x.jsonl").read_bytes()


# Recipes


@pytest.mark.timeout(60)  # some took minutes
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed = " + "[" * 100_000, "not TOML"),
        ("a" + ".a" * 100_000 + " = 1", "no dotted name of many parts"),
        ("a" + " . a" * 40 + " = 1", "no dotted name of many parts"),
        ("# " + "x" * (1 << 20), "at most 1048576 characters"),
        ("# " + "x" * 1_000_000, "tokenizer"),
        ("# " + " " * 1_000_000 + ".", "tokenizer"),
        ("# " + "x." * 31 + " some words", "tokenizer"),
    ],
    ids=["arrays within arrays", "a dotted name", "with blanks", "long", "a long word", "blanks", "dots of a sentence"],
)
def test_recipes_that_take_time_or_stack(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(str(tmp_path / "recipe.toml"), {"tokenizer": 5})


def test_a_file_that_changes_while_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record says what its bytes must be: parts of two versions are neither."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.bin").write_bytes(b"first")
    put = s3.Bucket.put

    def slow(self: s3.Bucket, key: str, data: bytes, md5: str) -> str:
        (tmp_path / "data" / "x.bin").write_bytes(b"other")
        return put(self, key, data, md5)

    monkeypatch.setattr(s3.Bucket, "put", slow)
    with listening(bucket()) as url:
        options = StoreOptions(url, anonymous=True)
        with pytest.raises(DataRootError, match=r"x\.bin: changed while it was sent"):
            upload(tmp_path / "data", "s3://bucket/a", store=options)
        monkeypatch.undo()
        assert upload(tmp_path / "data", "s3://bucket/a", store=options).moved
        download("s3://bucket/a", tmp_path / "out", store=options)
    assert (tmp_path / "out" / "x.bin").read_bytes() == b"other"

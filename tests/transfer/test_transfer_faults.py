"""Transfers through a wire that resets, truncates, flips bits, stalls, answers 503: right, or an error that names it.

A file of its own, which takes minutes of waiting: the test run begins with it.
"""

from __future__ import annotations

import random
import re
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tenacity

from support.servers import Proxy
from support.transfers import bucket, contents, make_root, root, server, small, store  # noqa: F401  # fixtures, too
from tokenmill import errors
from tokenmill.remote import http, retry, s3
from tokenmill.transfer import download as downloads
from tokenmill.transfer import upload as uploads
from tokenmill.transfer.download import bring as download
from tokenmill.transfer.upload import send as upload

SCHEDULES = 100
RATES = (0.005, 0.02, 0.05, 0.15)
PART_NBYTES = 5_000
AT_ONCE = 4
"""Most of a schedule is waiting."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, as it travels four hundred times."""
    return make_root(tmp_path_factory.mktemp("made"), documents=40, shard_size=3_000)


@pytest.fixture(autouse=True)
def hasty(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait, what stands still is given up soon, and files have two to six parts."""
    monkeypatch.setattr(retry, "backoff", tenacity.wait_none())
    for module in (http, s3):
        monkeypatch.setattr(module, "STALL_SECONDS", 0.25)
    monkeypatch.setattr(downloads, "PART_NBYTES", PART_NBYTES)
    monkeypatch.setattr(uploads, "PART_NBYTES", PART_NBYTES)
    monkeypatch.setattr(uploads, "WHOLE_NBYTES", PART_NBYTES)


def each_schedule(server: str, attempt: Callable[[int, str], bool]) -> None:
    """Call `attempt` with the number of each schedule and the URL of its faulty wire; several wait at once.

    Some attempts fail, and some do not; every kind of fault occurs.
    """

    def one(seed: int) -> tuple[bool, list[str]]:
        proxy = Proxy(server)
        proxy.rng, proxy.rate = random.Random(seed), RATES[seed % len(RATES)]
        try:
            return attempt(seed, proxy.url), proxy.faults
        finally:
            proxy.close()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(one, range(SCHEDULES)))
    assert {kind for _, faults in done for kind in faults} == set(Proxy.KINDS)
    assert 0 < sum(failed for failed, _ in done) < SCHEDULES


def test_uploads_through_random_faults_are_right_or_fail(server: str, root: Path, tmp_path: Path) -> None:
    """100 schedules of resets, truncations, flipped bytes, stalls and 503s, both ways.

    What is reported done is right; what fails names what, leaves no manifest over files that are not there,
    and the next run without faults makes it whole.
    """
    expected = contents(root)

    def attempt(seed: int, faulty: str) -> bool:
        prefix = f"faults-{seed}"
        here = Path(shutil.copytree(root, tmp_path / prefix))
        try:
            upload(here, store(faulty, prefix))
        except errors.TokenmillError as error:
            assert f"bucket/{prefix}" in str(error)  # noqa: PT017  # some pass
            there = bucket(server, prefix)
            assert "manifest.json" not in there or expected.items() <= there.items()
            upload(here, store(server, prefix))
            failed = True
        else:
            failed = False
        assert expected.items() <= bucket(server, prefix).items()  # a flipped bit in a name makes one more
        shutil.rmtree(here)
        return failed

    each_schedule(server, attempt)


class LateWire(Proxy):
    """The first request to store a manifest arrives damaged, and only once it is told to; all others arrive at once."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.release = threading.Event()
        self.arrived = threading.Event()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        while is_request and (data := source.recv(16_384)):
            if b"manifest.json" in data and data.startswith(b"PUT ") and not self.faults:
                self.faults.append("late")
                head, _, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length
                while len(body) < int(length[1]):
                    body += source.recv(16_384)
                self.release.wait(30)
                with socket.create_connection(self._target) as late:  # the other one ended when the client gave up
                    late.sendall(head + b"\r\n\r\n" + body[:-1] + b"x")
                    assert late.recv(100).startswith(b"HTTP/1.1 ")
                self.arrived.set()
                return
            sink.sendall(data)
        super()._pump(source, sink, is_request)


def test_a_damaged_request_that_arrives_late_changes_nothing(server: str, root: Path) -> None:
    """The client gave it up, tried again, and found all in order; then it came through."""
    wire = LateWire(server)
    try:
        upload(root, store(wire.url, "late"))
        assert bucket(server, "late") == contents(root)
        wire.release.set()
        assert wire.arrived.wait(30)
        assert wire.faults == ["late"]
        assert bucket(server, "late") == contents(root)
    finally:
        wire.close()


def test_downloads_through_random_faults_are_right_or_fail(server: str, root: Path, tmp_path: Path) -> None:
    """Likewise; nothing wrong ever has its name here, failed or not."""
    expected = contents(root)
    upload(root, store(server, "source"))

    def attempt(seed: int, faulty: str) -> bool:
        new = tmp_path / f"new-{seed}"
        try:
            download(store(faulty, "source"), new)
        except errors.TokenmillError as error:
            assert "bucket/source" in str(error)  # noqa: PT017  # some pass
            here = {path: sha256 for path, sha256 in contents(new).items() if not path.endswith(".partial")}
            assert here.items() <= expected.items()
            download(store(server, "source"), new)
            failed = True
        else:
            failed = False
        assert contents(new) == expected
        shutil.rmtree(new)
        return failed

    each_schedule(server, attempt)

"""Transfers through a wire that resets, truncates, flips bits, stalls, answers 503: right, or an error that names it.

A file of its own, which takes minutes of waiting: the test run begins with it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tenacity

from servers import Proxy
from test_transfer import bucket, contents, made, root, server, small, store  # noqa: F401  # fixtures, too
from tokenmill import errors, http, retry, s3
from tokenmill.downloads import bring as download
from tokenmill.uploads import send as upload

SCHEDULES = 100
RATES = (0.005, 0.02, 0.05, 0.15)


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(retry, "_backoff", tenacity.wait_none())
    for module in (http, s3):
        monkeypatch.setattr(module, "STALL_SECONDS", 0.25)
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def test_uploads_through_random_faults_are_right_or_fail(server: str, proxy: Proxy, root: Path) -> None:
    """100 schedules of resets, truncations, flipped bytes, stalls and 503s, both ways.

    What is reported done is right; what fails names what, leaves no manifest over files that are not there,
    and the next run without faults makes it whole.
    """
    expected = contents(root)
    failed = 0
    for seed in range(SCHEDULES):
        prefix = f"faults-{seed}"
        proxy.rng, proxy.rate = random.Random(seed), RATES[seed % len(RATES)]
        try:
            upload(root, store(proxy.url, prefix))
        except errors.TokenmillError as error:
            failed += 1
            assert f"bucket/{prefix}" in str(error)  # noqa: PT017  # some pass
            there = bucket(server, prefix)
            assert "manifest.json" not in there or expected.items() <= there.items()
            upload(root, store(server, prefix))
        assert expected.items() <= bucket(server, prefix).items()  # a flipped bit in a name makes one more
    assert set(proxy.faults) == set(Proxy.KINDS)
    assert 0 < failed < SCHEDULES


def test_downloads_through_random_faults_are_right_or_fail(
    server: str, proxy: Proxy, root: Path, tmp_path: Path
) -> None:
    """Likewise; nothing wrong ever has its name here, failed or not."""
    expected = contents(root)
    upload(root, store(server, "source"))
    failed = 0
    for seed in range(SCHEDULES):
        new = tmp_path / f"new-{seed}"
        proxy.rng, proxy.rate = random.Random(seed), RATES[seed % len(RATES)]
        try:
            download(store(proxy.url, "source"), new)
        except errors.TokenmillError as error:
            failed += 1
            assert "bucket/source" in str(error)  # noqa: PT017  # some pass
            here = {path: sha256 for path, sha256 in contents(new).items() if not path.endswith(".partial")}
            assert here.items() <= expected.items()
            download(store(server, "source"), new)
        assert contents(new) == expected
        shutil.rmtree(new)
    assert set(proxy.faults) == set(Proxy.KINDS)
    assert 0 < failed < SCHEDULES

"""A share of the campaign (see campaign.py) that every run of the tests makes, always of the same seeds."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import campaign

SHARE = {
    "kills": 4,
    "power": 30,
    "corruptions": 60,
    "network": 2,
    "fuzz": 4,
    "disk": 6,
    "sending": 6,
    "races": 4,
    "hostile": 8,
}
"""Cases of each kind."""


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[campaign.Field]:
    yield campaign.Field(tmp_path_factory.mktemp("field"))
    campaign.close_servers()


@pytest.mark.parametrize("kind", campaign.KINDS)
def test_a_share_of_the_campaign(kind: str, field: campaign.Field, tmp_path: Path) -> None:
    if kind == "power" and (sys.platform != "linux" or shutil.which("cc") is None):
        pytest.skip("recording what a run writes needs Linux and a C compiler (cc)")
    for seed in range(SHARE[kind]):
        campaign.one(kind, seed, field, tmp_path)


def test_power_that_is_lost_is_noticed(field: campaign.Field, tmp_path: Path) -> None:
    """The simulation itself: what was not synced can be gone, what was cannot."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "old").write_bytes(b"old")
    events = [
        campaign.Event("c", "a.partial", "", 0, b""),
        campaign.Event("w", "a.partial", "", 0, b"first"),
        campaign.Event("s", "a.partial", "", 0, b""),
        campaign.Event("w", "a.partial", "", 5, b" second"),
        campaign.Event("r", "a.partial", "a", 0, b""),
        campaign.Event("u", "old", "", 0, b""),
        campaign.Event("s", "", "", 0, b""),
    ]

    def states(count: int) -> set[tuple[tuple[str, bytes], ...]]:
        found = set()
        for seed in range(60):
            disk = campaign.Disk(tmp_path / "before")
            for event in events[:count]:
                disk.do(event)
            root = tmp_path / f"{count}-{seed}"
            disk.lose_power(campaign.Random(seed), root)
            found.add(tuple((path.name, path.read_bytes()) for path in sorted(root.iterdir())))
        return found

    old, whole, part = ("old", b"old"), b"first second", b"first"
    assert states(0) == {(old,)}
    assert states(2) == {(old,), (("a.partial", b""), old), (("a.partial", part), old)}
    assert states(3) == {(old,), (("a.partial", part), old)}
    assert states(7) == {(("a", part),), (("a", whole),)}
    assert {(("a", part), old), (("a.partial", part), old)} <= states(5)

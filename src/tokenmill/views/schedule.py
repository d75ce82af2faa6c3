"""Schedule: weights → which source each sample of a mixture comes from. Pure.

Every source with a share of `w` in `PERIOD` samples has a window for each of them: the `j`-th may come from place
`floor(j * PERIOD / w)` on, and must have come at place `ceil((j + 1) * PERIOD / w) - 1`. Whichever must come first,
comes first. That no window is missed, and so every prefix is within one sample of each source's share, is R. Tijdeman's
result ("The Chairman Assignment Problem", 1980). `docs/format.md` states the rule.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot.layout import SCHEDULE_PERIOD as PERIOD


def integer_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the share of each source in `PERIOD` samples, by largest remainders, ties by name.

    Raises:
        ValueError: a weight above 0 would come to nothing; it says which.
    """
    total = sum(map(Fraction, weights.values()))
    exact = {name: Fraction(weight) * PERIOD / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: PERIOD - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if weights[name] and not share:
            raise ValueError(
                f"the weight of {name!r}, {weights[name]}, is {float(exact[name] / PERIOD):.2g} of all: expected 0, or "
                f"at least 1/{PERIOD} of all, {float(total / PERIOD):.3g} here"
            )
    return shares


def make_period(shares: Mapping[str, int]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return the source of each place of a period, and how many of the same source come before it in the period.

    Args:
        shares: of the sources, in the order in which they are numbered; they sum to `PERIOD`.

    Both arrays have shape `(PERIOD,)`, and are not to be written to.
    """
    return _period_of(tuple(shares.items()))


@functools.lru_cache(maxsize=16)
def _period_of(shares: tuple[tuple[str, int], ...]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    by_name = sorted(range(len(shares)), key=lambda number: shares[number][0])
    released, windows = [], []
    for place_of_name, number in enumerate(by_name):
        share = shares[number][1]
        rank = np.arange(share)
        released.append(rank * PERIOD // share)
        due = -(-(rank + 1) * PERIOD // share) - 1
        windows.append(due * len(shares) + place_of_name)  # in the order in which they must come, ties by name
    release, window = np.concatenate(released), np.concatenate(windows)
    in_order = np.argsort(release, kind="stable")
    coming = window[in_order].tolist()
    waiting: list[int] = []
    found: list[int] = []
    begin = 0
    for end in np.searchsorted(release[in_order], np.arange(PERIOD), side="right").tolist():
        for each in coming[begin:end]:
            heapq.heappush(waiting, each)
        begin = end
        found.append(heapq.heappop(waiting))
    sources = np.array(by_name, np.uint16)[np.array(found) % len(shares)]
    ranks = np.empty(PERIOD, np.uint16)
    for number, (_, share) in enumerate(shares):
        ranks[sources == number] = np.arange(share)
    for array in (sources, ranks):
        array.flags.writeable = False
    return sources, ranks

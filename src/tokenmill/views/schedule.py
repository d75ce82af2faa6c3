"""Schedule: weights → which source each sample of a mixture comes from. Pure.

Every source with a share of `w` in `PERIOD` samples has a window for each of them: the `j`-th may come from place
`floor(j * PERIOD / w)` on, and must have come at place `ceil((j + 1) * PERIOD / w) - 1`. Whichever must come first,
comes first. That no window is missed, and so every prefix is within one sample of each source's share, is R. Tijdeman's
result ("The Chairman Assignment Problem", 1980). `docs/format.md` states the rule.
"""

from __future__ import annotations

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

    Both arrays have shape `(PERIOD,)`.
    """
    released: list[list[tuple[int, str, int, int]]] = [[] for _ in range(PERIOD)]
    for number, (name, share) in enumerate(shares.items()):
        for rank in range(share):
            due = -(-(rank + 1) * PERIOD // share) - 1
            released[rank * PERIOD // share].append((due, name, number, rank))
    sources, ranks = np.empty(PERIOD, np.uint16), np.empty(PERIOD, np.uint16)
    waiting: list[tuple[int, str, int, int]] = []
    for place in range(PERIOD):
        for window in released[place]:
            heapq.heappush(waiting, window)
        _, _, sources[place], ranks[place] = heapq.heappop(waiting)
    return sources, ranks

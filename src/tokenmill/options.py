"""Options: what a run does that changes no byte, where several commands share it. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

OnBadRows = Literal["error", "skip"]
"""What to do about a row that is not what its format says."""

OnBytes = Callable[[int, int], None]
"""A callback that gets the number of bytes that are done, and of all bytes."""


class StoreOptions(NamedTuple):
    """How to reach stores that are not local, and how much to take from a corpus at a time."""

    endpoint_url: str | None = None
    """Address of an S3 store that is not AWS."""
    anonymous: bool = False
    """Send no credentials to it."""
    revision: str | None = None
    """The commit an earlier run resolved a hub data set to."""
    max_document_nbytes: int = 1 << 30
    """A document of a corpus that is larger is an error: of the text, or of the line that holds it."""


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_COUNT = re.compile(r"([+-]?)(\d[\d_]*(?:\.\d+)?)(?:e(\d{1,2}))?\s*([kmgbt]?|[kmgt]i)", re.IGNORECASE)
MAX_VALUES = 10_000
"""Different values of a metadata column that statistics count tokens by."""
MOST_GROUPS = 20
"""Source files, and values of a column, that a comparison gives figures for: those with the most text."""
LARGEST_COUNT = (1 << 63) - 1
"""Counts and sizes are stored as signed 64-bit integers."""


def parse_count(text: str) -> int:
    """Parse a count: `1_000_000`, `1M`, `1.5e9`, `150Gi` (k, M, G or B, T are powers of 1,000; Ki to Ti of 1,024).

    Raises:
        ValueError: not a whole number, or more than 64 bits hold.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r}: expected a whole number, such as 1000000, 1_000_000, 1M, 1e6 or 150Gi")
    sign, digits, exponent, unit = match.groups()
    value = Fraction(digits.replace("_", "")) * 10 ** int(exponent or 0) * _UNITS[unit.lower()]
    if value.denominator != 1:
        raise ValueError(f"{text!r}: expected a whole number, found {float(value)}")
    if value > LARGEST_COUNT:
        raise ValueError(f"{text!r}: expected at most {LARGEST_COUNT}")
    return -int(value) if sign == "-" else int(value)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

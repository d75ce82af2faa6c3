"""SplitMix64: numbers that are as good as random, from numbers that are not. Pure NumPy.

G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators" (2014), with D. Stafford's variant 13 of
MurmurHash3's finalizer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""What the generator's state grows by with every number."""


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the number that each state gives."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)

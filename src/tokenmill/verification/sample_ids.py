"""Verify ids: a process that makes the sample ids of a range again and prints the first that differs.

    python verify_ids.py tokens.bin sample_ids.bin WINDOW_NBYTES FIRST END

Imports the standard library only, and nothing of what wrote the ids.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def first_difference(tokens: Path, sample_ids: Path, window_nbytes: int, first: int, end: int) -> str:
    """`sample expected found` of the first id that differs; empty if none does."""
    with tokens.open("rb") as data, sample_ids.open("rb") as stored:
        data.seek(first * window_nbytes)
        stored.seek(first * 8)
        for sample in range(first, end):
            expected = hashlib.blake2b(data.read(window_nbytes), digest_size=8).hexdigest()
            found = stored.read(8).hex()
            if expected != found:
                return f"{sample} {expected} {found or '-'}"
    return ""


if __name__ == "__main__":
    window, begin, stop = map(int, sys.argv[3:6])
    try:
        sys.stdout.write(first_difference(Path(sys.argv[1]), Path(sys.argv[2]), window, begin, stop))
        sys.stdout.flush()
    except BrokenPipeError:  # the process that asked is gone
        os._exit(141)

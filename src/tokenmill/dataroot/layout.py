"""Layout: the one home of file names, names of dtypes, and id schemes. Pure; loads no library (`npy.py` has the bytes).

`docs/format.md` specifies what is defined here.
"""

from __future__ import annotations

import re
from typing import Literal

DTypeName = Literal["uint8", "uint16", "uint32"]
"""What a stored token may be; tokenmill writes the latter two."""

TOKENS = "tokens.bin"
SAMPLE_IDS = "sample_ids.bin"
MANIFEST = "manifest.json"
CONSOLIDATED = "consolidated.json"
SKIPPED = "skipped.jsonl"
LOCK = ".tokenmill.lock"
RUN = ".tokenmill.run"
LOG = "tokenmill.log"
TRANSFERS = "transfers.json"
VIEW = "view.json"
VIEW_BEGINS = "view_begins.bin"
VIEW_PLACES = "view_places.bin"
VIEW_SCHEDULE = "view_schedule.bin"
SCHEDULE_PERIOD = 65_536
"""Places of a period of a mixture's schedule."""
PARTIAL_SUFFIX = ".partial"
SHARD_GLOB = "train_*.npy"
DOCUMENTS_GLOB = "documents_*.parquet"

DOCUMENTS_VERSION = 2
"""Version of a new data root's sidecars; version 1 has no `text_xxh3`. A data root keeps the version it began with."""

NPY_HEADER_NBYTES = 128
"""Size of the header of any 1-D array (NumPy pads to multiples of 64; a 1-D header takes 2)."""


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"train_{index:06d}.npy"


def documents_name(index: int) -> str:
    """File name of a shard's documents sidecar."""
    return f"documents_{index:06d}.parquet"


def smallest_dtype(vocab_size: int) -> str:
    """`uint16` or `uint32`, the smaller that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_index(name: str) -> int | None:
    """Return the number in a shard's file name; None if it is not named as a shard is."""
    match = re.fullmatch(r"train_(\d{6,})\.npy", name)
    return int(match[1]) if match else None


IdScheme = Literal["blake2b-64", "templar-v1"]
ID_SCHEMES: tuple[IdScheme, ...] = ("blake2b-64", "templar-v1")
ID_NBYTES = 8
"""Size of a sample id: a BLAKE2b digest (RFC 7693) of that length, read as a little-endian integer."""


def id_window_nbytes(scheme: IdScheme, *, seq_len: int, itemsize: int) -> int:
    """Return bytes of `tokens.bin` that id `i` covers, from `i` times as many on.

    `templar-v1` is what the script that made the Templar data set did: it looked at the tokens as
    32-bit integers, whatever their size, so that ids of 16-bit tokens cover two samples each and run
    out half-way: an id after the end of the file covers no bytes.
    """
    return seq_len * (itemsize if scheme == "blake2b-64" else 4)

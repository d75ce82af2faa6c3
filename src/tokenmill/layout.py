"""Layout: the one home of file names, dtypes, headers and id schemes. Pure: bytes in, values out.

`docs/format.md` specifies what is defined here.
"""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.uint16] | NDArray[np.uint32]
TokenDType = np.dtype[np.uint16] | np.dtype[np.uint32]

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
PARTIAL_SUFFIX = ".partial"
SHARD_GLOB = "train_*.npy"
DOCUMENTS_GLOB = "documents_*.parquet"

NPY_HEADER_NBYTES = 128
"""Of the header of any 1-D array (NumPy pads to multiples of 64; a 1-D header takes 2)."""


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"train_{index:06d}.npy"


def documents_name(index: int) -> str:
    """File name of a shard's documents sidecar."""
    return f"documents_{index:06d}.parquet"


def token_dtype(name: str) -> TokenDType:
    """The little-endian dtype called `uint16` or `uint32`."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def smallest_dtype(vocab_size: int) -> str:
    """`uint16` or `uint32`, the smaller that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def npy_header(dtype: np.dtype[Any], tokens: int) -> bytes:
    """The header `np.save` writes before a 1-D array (NumPy's NPY format, version 1.0)."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    header = buffer.getvalue()
    assert len(header) == NPY_HEADER_NBYTES
    return header


def shard_nbytes(dtype: TokenDType, tokens: int) -> int:
    """Size of a shard file."""
    return NPY_HEADER_NBYTES + tokens * dtype.itemsize


class NpyHeader(NamedTuple):
    """What the header of a stored 1-D array says."""

    dtype: DTypeName
    tokens: int
    nbytes: int
    """Of the header itself."""


def parse_npy_header(data: bytes) -> NpyHeader:
    """The header at the start of an `.npy` file of tokens; nothing is unpickled.

    Raises:
        ValueError: not an NPY file, or not a 1-D array of little-endian unsigned 8, 16 or 32-bit integers.
    """
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected NPY version 1.0 or 2.0, found {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(buffer)
    except (SyntaxError, tokenize.TokenError) as error:  # NumPy lets some of the parser's errors through
        raise ValueError(f"the header cannot be parsed: {error}") from None
    if len(shape) != 1:
        raise ValueError(f"expected a 1-D array, found shape {shape}")
    if dtype.hasobject:
        raise ValueError("expected an array of integers, found pickled Python objects")
    names: dict[str, DTypeName] = {"|u1": "uint8", "<u2": "uint16", "<u4": "uint32"}
    if dtype.str not in names:
        raise ValueError(f"expected little-endian uint8, uint16 or uint32, found {dtype.str}")
    return NpyHeader(names[dtype.str], int(shape[0]), buffer.tell())


def shard_index(name: str) -> int | None:
    """The number in a shard's file name; None if it is not named as a shard is."""
    match = re.fullmatch(r"train_(\d{6,})\.npy", name)
    return int(match[1]) if match else None


IdScheme = Literal["blake2b-64", "templar-v1"]
ID_SCHEMES: tuple[IdScheme, ...] = ("blake2b-64", "templar-v1")
ID_NBYTES = 8
"""Of a sample id: a BLAKE2b digest (RFC 7693) of that length, read as a little-endian integer."""


def id_window_nbytes(scheme: IdScheme, *, seq_len: int, itemsize: int) -> int:
    """Bytes of `tokens.bin` that id `i` covers, from `i` times as many on.

    `templar-v1` is what the script that made the Templar data set did: it looked at the tokens as
    32-bit integers, whatever their size, so that ids of 16-bit tokens cover two samples each and run
    out half-way: an id behind the end of the file covers no bytes.
    """
    return seq_len * (itemsize if scheme == "blake2b-64" else 4)

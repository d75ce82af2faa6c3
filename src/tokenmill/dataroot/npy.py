"""NPY: dtypes of stored tokens, and the headers of shard files. Pure: bytes in, values out.

`docs/format.md` specifies what is defined here.
"""

from __future__ import annotations

import io
import tokenize
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot.layout import NPY_HEADER_NBYTES, DTypeName

TokenArray = NDArray[np.uint16] | NDArray[np.uint32]
TokenDType = np.dtype[np.uint16] | np.dtype[np.uint32]


def token_dtype(name: str) -> TokenDType:
    """Return the little-endian dtype called `uint16` or `uint32`."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def npy_header(dtype: np.dtype[Any], tokens: int) -> bytes:
    """Return the header `np.save` writes before a 1-D array (NumPy's NPY format, version 1.0)."""
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
    """Size of the header itself."""


def parse_npy_header(data: bytes) -> NpyHeader:
    """Return the header at the start of an `.npy` file of tokens; nothing is unpickled.

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

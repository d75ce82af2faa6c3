"""Layout: the one home of file names, dtypes and headers. Pure: bytes in, values out.

`docs/format.md` specifies what is defined here.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.uint16] | NDArray[np.uint32]
TokenDType = np.dtype[np.uint16] | np.dtype[np.uint32]

MANIFEST = "manifest.json"
LOCK = ".tokenmill.lock"
LOG = "tokenmill.log"
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


def npy_header(dtype: TokenDType, tokens: int) -> bytes:
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

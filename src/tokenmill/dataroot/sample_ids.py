"""Ids: bytes of tokens → sample ids; and, run as a program, a worker process that does so.

BLAKE2b of a few kilobytes holds the interpreter lock too often for threads to help (two threads
made fewer ids than one), so `tokens_file.py` runs this file in processes. It therefore imports the
standard library only.
"""

from __future__ import annotations

import os
import struct
import sys
from hashlib import blake2b
from pathlib import Path

REQUEST = struct.Struct("<QQ")
"""A request to a worker, on its standard input: first byte of the range, number of bytes. The answer is the ids."""


def sample_ids(data: bytes | memoryview, window_nbytes: int) -> bytes:
    """Return the ids, 8 bytes each, of consecutive windows of `data`; the last window may be short."""
    windows = range(0, len(data), window_nbytes)
    return b"".join([blake2b(data[at : at + window_nbytes], digest_size=8).digest() for at in windows])


EMPTY_ID = blake2b(b"", digest_size=8).digest()
"""The id of a window without bytes."""


def serve(path: str, window_nbytes: int) -> None:
    """Answer requests until standard input ends."""
    buffer = memoryview(bytearray())
    with Path(path).open("rb", buffering=0) as file:
        while request := sys.stdin.buffer.read(REQUEST.size):
            offset, nbytes = REQUEST.unpack(request)
            if nbytes > len(buffer):
                buffer = memoryview(bytearray(nbytes))
            file.seek(offset)
            filled = 0
            while filled < nbytes and (count := file.readinto(buffer[filled:nbytes])):
                filled += count
            sys.stdout.buffer.write(sample_ids(buffer[:filled], window_nbytes))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        serve(sys.argv[1], int(sys.argv[2]))
    except BrokenPipeError:  # the process that asked is gone
        os._exit(141)

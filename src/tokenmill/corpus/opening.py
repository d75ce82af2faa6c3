"""Opening: files that are read front to back, decompressed, their errors told as ours."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenmill.corpus.location import MEND, file_gone_error
from tokenmill.corpus.reader import first_line, native
from tokenmill.errors import SourceError
from tokenmill.remote.remote_file import RemoteFile

READ_NBYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}


def compression_of(name: str) -> str | None:
    """Return how a file is compressed, by its name."""
    return _COMPRESSIONS.get(name.rpartition(".")[2].lower())


@contextlib.contextmanager
def open_content(opened: Path | RemoteFile, name: str, nbytes: int) -> Iterator[tuple[Any, Any]]:
    """Open a file of that name and size: the file itself, whose `tell` says what was read, and its content.

    Raises:
        pa.ArrowInvalid: it has no bytes and should be compressed; see `translate_source_errors`.
    """
    compression = compression_of(name)
    if compression and not nbytes:
        raise pa.ArrowInvalid(f"the file has no bytes: expected the header of {compression}")
    with _open_raw(opened, compression) as raw:
        yield raw, _decompressed(raw, compression)


def _open_raw(opened: Path | RemoteFile, compression: str | None) -> Any:
    """Open a file; where nothing is compressed Python's own are opened faster than Arrow's."""
    if isinstance(opened, Path) and compression is None:
        return opened.open("rb", buffering=0)
    return pa.input_stream(native(opened), compression=None)


def _decompressed(raw: Any, compression: str | None) -> Any:
    """Return something whose `read` gives the content of a file that `_open_raw` opened."""
    if compression == "gzip":
        # Python's reader knows that tapes and tools pad with zeros, and takes an end that is missing for an error.
        return gzip.GzipFile(fileobj=io.BufferedReader(_PythonFile(raw), READ_NBYTES))
    return pa.CompressedInputStream(raw, compression) if compression else raw


@contextlib.contextmanager
def translate_source_errors(name: str, where: Callable[[], str]) -> Iterator[None]:
    """Raise what Arrow, zlib and the operating system raise for a file as a SourceError that says `where`."""
    try:
        yield
    except FileNotFoundError:
        raise file_gone_error(name) from None
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        reason, step = first_line(error), MEND
        if "too much memory" in reason or "indow" in reason:
            step = "compress it again with a smaller window: zstd -d --long=31 FILE, then zstd without --long"
        raise SourceError(f"{name}: cannot be read {where()}: {reason}", next_step=step) from None


class _PythonFile(io.RawIOBase):
    """An Arrow file as Python's own modules read one."""

    def __init__(self, raw: pa.NativeFile) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return int(self._raw.readinto(buffer))

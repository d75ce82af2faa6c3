"""The fast engine: the one module that imports `gigatoken` (and `awkward`, its array type).

About twelve times HF `tokenizers` a core on Llama-2, with the GIL released, so threads scale. It
trusts its input to be UTF-8, and always parses added-token strings: callers see to both.
"""

from __future__ import annotations

import threading
from importlib.metadata import version

import awkward as ak
import gigatoken
import numpy as np
import pyarrow as pa
from gigatoken.gigatoken_rs import BPETokenizer, SentencePieceTokenizer
from numpy.typing import NDArray

from tokenmill.errors import TokenizerError
from tokenmill.tokenizer import TokenizerFile

_CACHE_TEXT_NBYTES = 1 << 30
"""Text after which a byte-level tokenizer is loaded anew: gigatoken 0.10 keeps every distinct word
it met, for ever. (SentencePiece-style caches live for one call and need no bound.)"""


class GigatokenEngine:
    """gigatoken over a `tokenizer.json`. Threads may share it."""

    name = "gigatoken"
    version = f"gigatoken {version('gigatoken')}"

    def __init__(self, tokenizer: TokenizerFile) -> None:
        self._json = tokenizer.json
        try:
            self._backend = gigatoken.Tokenizer.from_json(self._json).backend
        except (ValueError, TypeError, RuntimeError) as error:
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: gigatoken cannot take it: {error}",
                next_step="use --engine-tokenizer hf (slower, same bytes), or auto to choose by itself",
            ) from None
        self._cache_grows = isinstance(self._backend, BPETokenizer)
        self._cached_nbytes = 0
        self._lock = threading.Lock()

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts one after the other, and where each begins: shapes `(tokens,)`, `(rows + 1,)`.

        `texts` has no nulls and is valid UTF-8; its buffers are read in place.
        """
        backend = self._bounded_backend(texts.nbytes) if self._cache_grows else self._backend
        layout = backend.encode_batch(_as_awkward(texts), parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data)

    def _bounded_backend(self, nbytes: int) -> BPETokenizer | SentencePieceTokenizer:
        with self._lock:
            self._cached_nbytes += nbytes
            if self._cached_nbytes > _CACHE_TEXT_NBYTES:
                self._backend = gigatoken.Tokenizer.from_json(self._json).backend
                self._cached_nbytes = 0
            return self._backend


def _as_awkward(texts: pa.LargeStringArray) -> ak.Array:
    """The same buffers seen as an awkward array of strings."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    characters = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    content = ak.contents.NumpyArray(characters, parameters={"__array__": "char"})
    strings = ak.contents.ListOffsetArray(ak.index.Index64(bounds), content, parameters={"__array__": "string"})
    return ak.Array(strings)

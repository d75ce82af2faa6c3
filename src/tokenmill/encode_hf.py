"""The reference engine: the one module that imports HF `tokenizers`.

Slow and exact by definition: what it returns is what a document's tokens are.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from tokenmill.errors import TokenizerError
from tokenmill.tokenizer import TokenizerFile


class HFEngine:
    """HF `tokenizers` over a `tokenizer.json`. Threads may share it; it releases the GIL.

    Args:
        special_in_text: `parse` turns control-token strings into control tokens, `text` does not.
    """

    name = "hf"
    version = f"tokenizers {tokenizers.__version__}"

    def __init__(self, tokenizer: TokenizerFile, *, special_in_text: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json.decode())
        except Exception as error:  # noqa: BLE001  # the library raises bare Exception for every malformed file
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: HF tokenizers {tokenizers.__version__} cannot load it: {error}",
                next_step="fetch tokenizer.json again, or upgrade tokenizers if the file is newer than the library",
            ) from None
        self._tokenizer.encode_special_tokens = special_in_text == "text"

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts one after the other, and where each begins: shapes `(tokens,)`, `(rows + 1,)`."""
        encodings = self._tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        offsets = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum([len(e) for e in encodings], out=offsets[1:])
        ids = np.empty(offsets[-1], np.uint32)
        for i, encoding in enumerate(encodings):
            ids[offsets[i] : offsets[i + 1]] = encoding.ids
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, control tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds; a token that only begins a character adds none yet."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in ids]

    def name_of(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token) or ""

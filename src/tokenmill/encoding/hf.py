"""The reference backend: the one module that imports HF `tokenizers`.

Slow and exact by definition: what it returns is what a document's tokens are.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from tokenmill.encoding.framing import join_ids
from tokenmill.encoding.long_documents import Cut
from tokenmill.encoding.tokenizer import AddedToken, TokenizerFile
from tokenmill.errors import TokenizerError

_TRIAL_SECONDS = 120
_TRIAL_NBYTES = 8 << 30
"""Memory limit for loading a file that might make the library allocate without bound."""

_TRIAL = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, ({_TRIAL_NBYTES}, {_TRIAL_NBYTES}))
except (ImportError, ValueError, OSError):
    pass
import tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
for text in sys.argv[1:]:
    try:
        tokenizer.encode(text, add_special_tokens=False)
    except BaseException:
        pass
"""
"""Program text: loads a tokenizer and encodes some texts. A text it cannot encode is no fault of the file."""


_REPLACEMENT, _REPLACEMENT_IN_BYTES = "\ufffd", "\u00ef\u00bf\u00bd"
"""What stands for bytes that are no character, and how a byte-level vocabulary writes that character itself."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class CannotEncodeError(Exception):
    """The library cannot encode a text.

    Args:
        row: of the texts given.
        reason: what it said.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


class HFBackend:
    """HF `tokenizers` over a `tokenizer.json`. Threads may share it; it releases the GIL.

    Args:
        special_in_text: `parse` turns control-token strings into control tokens, `text` does not.
    """

    name = "hf"
    version = f"tokenizers {tokenizers.__version__}"
    doubtful: str | None = None
    cut: Cut | None = None

    def __init__(self, tokenizer: TokenizerFile, *, special_in_text: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json.decode())
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            raise _cannot_load(tokenizer, _first_line(error)) from None
        self._tokenizer.encode_special_tokens = special_in_text == "text"

    def resolved(self, tokenizer: TokenizerFile) -> TokenizerFile:
        """Return the same file with the ids that the library gives: it renumbers some added tokens as it loads them."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = [
            AddedToken(
                id, token.content, token.special, token.normalized, token.single_word, token.lstrip, token.rstrip
            )
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
        ]
        eos_id = self._tokenizer.token_to_id(tokenizer.eos_token)
        if eos_id is None:
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: {self.version} lacks {tokenizer.eos_token!r}, which the file has",
                next_step="name another end-of-sequence token with --eos-token",
            )
        named = [token for token in (tokenizer.bos_token, *(tokenizer.fim.tokens if tokenizer.fim else ())) if token]
        if lacking := [token for token in named if token not in ids]:
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: {self.version} lacks {lacking[0]!r}, which the file has",
                next_step="name another token",
            )
        if tokenizer.bos_token is not None:
            tokenizer = tokenizer._replace(bos_id=ids[tokenizer.bos_token])
        if tokenizer.fim is not None:
            prefix, middle, suffix = (ids[token] for token in tokenizer.fim.tokens)
            tokenizer = tokenizer._replace(fim=tokenizer.fim._replace(ids=(prefix, middle, suffix)))
        return tokenizer._replace(
            eos_id=eos_id, vocab_size=max(ids.values()) + 1, added_tokens=tuple(sorted(added, key=lambda t: t.id))
        )

    def encode(self, texts: pa.LargeStringArray) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return ids of all texts one after the other, and where each begins: shapes `(tokens,)`, `(rows + 1,)`.

        Raises:
            CannotEncodeError: a text that the tokenizer has no ids for.
        """
        values = texts.to_pylist()
        try:
            encodings = self._tokenizer.encode_batch_fast(values, add_special_tokens=False)
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            raise self._first_failing(values, error) from None
        return join_ids(encoding.ids for encoding in encodings)

    def _first_failing(self, values: list[str], error: BaseException) -> CannotEncodeError:
        for row, value in enumerate(values):
            try:
                self._tokenizer.encode_batch_fast([value], add_special_tokens=False)
            except BaseException as own:
                if not _is_of_the_library(own):
                    raise
                return CannotEncodeError(row, _first_line(own))
        return CannotEncodeError(0, f"{_first_line(error)} (in one of {len(values)} rows, each of which alone passes)")

    def decode(self, ids: list[int]) -> str:
        """Return the text of some tokens, control tokens shown; their names where the library cannot decode them."""
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=False))
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            return "".join(map(self.name_of, ids))

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """Return the text of each list of tokens, as `decode`."""
        try:
            return list(self._tokenizer.decode_batch(ids, skip_special_tokens=False))
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            return [self.decode(each) for each in ids]

    def unknown_id(self) -> int | None:
        """Return the id of text that the vocabulary has no token for; None if there is none such."""
        model = msgspec.json.decode(self._tokenizer.to_str())["model"]
        name, found = model.get("unk_token"), model.get("unk_id")  # the latter of Unigram
        return found if name is None else self._tokenizer.token_to_id(name)

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the text that each token adds; a token that only begins a character adds none yet."""
        found = []
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        for token in ids:
            try:
                found.append(stream.step(self._tokenizer, token) or "")
            except BaseException as error:
                if not _is_of_the_library(error):
                    raise
                # A character that was cut off before this token can change how the text before it reads.
                stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
                found.append(self.decode([token]))
        return found

    def texts_of(self, ids: list[int]) -> list[str | None]:
        """Return the text that each token adds after another; None for one that is only a part of a character."""
        try:
            anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            anchor = []  # the vocabulary cannot write it
        before = self.decode(anchor)
        after = self.decode_batch([[*anchor, token] for token in ids])
        added = (text[len(before) :] if text.startswith(before) else text for text in after)
        return [None if self._is_part(token, text) else text for token, text in zip(ids, added, strict=True)]

    def _is_part(self, token: int, text: str) -> bool:
        """Return whether a token is a part of a character; U+FFFD may also be what the text itself has."""
        if _REPLACEMENT not in text:
            return False
        name = self.name_of(token)
        return max(name.count(_REPLACEMENT), name.count(_REPLACEMENT_IN_BYTES)) != text.count(_REPLACEMENT)

    def nbytes_of(self, ids: list[int], texts: list[str | None]) -> NDArray[np.int64]:
        """Return the bytes that each token stands for, in UTF-8, shape `(len(ids),)`; `texts` is of `texts_of`."""
        nbytes = np.empty(len(ids), np.int64)
        for at, (token, text) in enumerate(zip(ids, texts, strict=True)):
            if text is None:  # one byte as `<0x0A>`, or, where all tokens are of bytes, a character for each of them
                name = self.name_of(token)
                nbytes[at] = 1 if _BYTE.fullmatch(name) else len(name)
            else:
                nbytes[at] = len(text.encode())
        return nbytes

    def control_ids(self) -> list[int]:
        """Return the ids of the control tokens, as the library has them."""
        return [id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    def name_of(self, token: int) -> str:
        """Return a token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token) or ""


def refuse_fatal(tokenizer: TokenizerFile, texts: Sequence[str]) -> None:
    """Load a tokenizer, and encode some texts, in a process that may die of it, before this one does.

    Raises:
        TokenizerError: that process died, took too long, or the library refused the file.
    """
    line = [sys.executable, "-P", "-c", _TRIAL, *(text.replace("\x00", " ") for text in texts)]
    try:
        done = subprocess.run(line, input=tokenizer.json, capture_output=True, timeout=_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _cannot_load(tokenizer, f"it takes more than {_TRIAL_SECONDS} s") from None
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        raise _cannot_load(tokenizer, f"the library ends the process with {name}")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise _cannot_load(tokenizer, last[0] if last else f"exit code {done.returncode}")


def _cannot_load(tokenizer: TokenizerFile, reason: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer {tokenizer.name}: HF tokenizers {tokenizers.__version__} cannot load it: {reason}",
        next_step="fetch tokenizer.json again, or upgrade tokenizers if the file is newer than the library",
    )


def _is_of_the_library(error: BaseException) -> bool:
    """Return whether it is not ours: the library raises bare Exception, and panics pass by that class altogether."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

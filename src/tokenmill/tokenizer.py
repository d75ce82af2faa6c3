"""Tokenizer: a name → the bytes of its `tokenizer.json` and its end-of-sequence token.

A tokenizer is that file as it is. Nothing here encodes; the engines do (`encode_gigatoken.py`,
`encode_hf.py`), and both are built from the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenmill.errors import TokenizerError

_GIVE_EOS = "name the end-of-sequence token with --eos-token (or eos_token in the recipe)"


class AddedToken(NamedTuple):
    """A string the tokenizer recognises in text before its model runs."""

    id: int
    content: str
    special: bool
    normalized: bool


class TokenizerFile(NamedTuple):
    """A `tokenizer.json`, and what a run needs to know of it."""

    name: str
    """As the recipe gave it."""
    revision: str | None
    """The hub commit it was resolved to; None for a local file."""
    json: bytes
    """The file's contents, truncation and padding switched off: they would lose text."""
    sha256: str
    """Of the file as it was found."""
    eos_token: str
    eos_id: int
    vocab_size: int
    """One more than the largest id, added tokens included."""
    added_tokens: tuple[AddedToken, ...]


def load_tokenizer(name: str, *, eos_token: str | None = None, revision: str | None = None) -> TokenizerFile:
    """Find and read a tokenizer: a directory, a `tokenizer.json`, or a hub name (`owner/name[@revision]`).

    Raises:
        TokenizerError: not found, not a tokenizer, or no end-of-sequence token.
    """
    path = Path(name)
    if path.is_dir():
        return _read(name, path / "tokenizer.json", eos_token, None)
    if path.is_file():
        return _read(name, path, eos_token, None)
    hub_name, _, given_revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", hub_name) or path.suffix in (".json", ".model"):
        raise TokenizerError(
            f"tokenizer {name}: no such file or directory",
            next_step="give a directory with tokenizer.json, such a file, or a hub name as owner/name",
        )
    from tokenmill.hub import fetch_tokenizer

    fetched = fetch_tokenizer(hub_name, revision or given_revision or None)
    return _read(name, fetched.path, eos_token, fetched.revision)


def _read(name: str, path: Path, eos_token: str | None, revision: str | None) -> TokenizerFile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"tokenizer {name}: cannot read {path}: {error.strerror}",
            next_step="give a directory that holds tokenizer.json (a SentencePiece .model must be converted first)",
        ) from None
    fields = _parse(name, path, data)
    ids = _ids(name, path, fields)
    eos = eos_token or _configured_eos(path.parent)
    if eos is None:
        raise TokenizerError(
            f"tokenizer {name}: no end-of-sequence token: expected eos_token in tokenizer_config.json "
            f"or special_tokens_map.json beside {path}, found none",
            next_step=_GIVE_EOS,
        )
    if eos not in ids:
        raise TokenizerError(
            f"tokenizer {name}: end-of-sequence token {eos!r} is not in its vocabulary of {len(ids)}",
            next_step=_GIVE_EOS,
        )
    return TokenizerFile(
        name=name,
        revision=revision,
        json=_without_truncation(fields, data),
        sha256=hashlib.sha256(data).hexdigest(),
        eos_token=eos,
        eos_id=ids[eos],
        vocab_size=max(ids.values()) + 1,
        added_tokens=tuple(
            AddedToken(token["id"], token["content"], bool(token.get("special")), bool(token.get("normalized")))
            for token in fields.get("added_tokens") or []
        ),
    )


def _parse(name: str, path: Path, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise TokenizerError(
            f"tokenizer {name}: {path} is not JSON: {error}",
            next_step="fetch tokenizer.json again; a Git LFS pointer or a half-written file reads like this",
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise TokenizerError(
            f"tokenizer {name}: {path} has no model", next_step="give the tokenizer.json that HF tokenizers writes"
        )
    return fields


def _ids(name: str, path: Path, fields: dict[str, Any]) -> dict[str, int]:
    vocab = fields["model"].get("vocab")
    if isinstance(vocab, dict):
        ids = dict(vocab)
    elif isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    else:
        raise TokenizerError(
            f"tokenizer {name}: {path} has no vocabulary", next_step="give the tokenizer.json that HF tokenizers writes"
        )
    ids.update((token["content"], token["id"]) for token in fields.get("added_tokens") or [])
    return ids


def _configured_eos(folder: Path) -> str | None:
    """`eos_token` as HF `transformers` stores it: a string or an object with `content`."""
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / file_name
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_bytes()).get("eos_token")
        except ValueError as error:
            raise TokenizerError(f"{file} is not JSON: {error}", next_step=f"mend it, or {_GIVE_EOS}") from None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _without_truncation(fields: dict[str, Any], data: bytes) -> bytes:
    if fields.get("truncation") is None and fields.get("padding") is None:
        return data
    return json.dumps(fields | {"truncation": None, "padding": None}, ensure_ascii=False).encode()

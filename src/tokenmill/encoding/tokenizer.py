"""Tokenizer: a name → the bytes of its `tokenizer.json` and its end-of-sequence token.

A tokenizer is that file as it is. Nothing here encodes; the backends do (`gigatoken.py`, `hf.py`), and both are built
from the same bytes. What the file says is checked here before any of it
reaches native code, which may abort the process over it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from tokenmill.encoding.framing import Fim
from tokenmill.errors import TokenizerError
from tokenmill.recipe import Recipe

_KEPT = 2
"""Tokenizers that stay read: of a run there is one."""

MAX_IDS = 1 << 24
"""Ids must be below this: libraries allocate a table up to the largest one."""

_GIVE_EOS = "name the end-of-sequence token with --eos-token (or eos_token in the recipe)"
_GIVE = {
    "eos_token": _GIVE_EOS,
    "bos_token": "name the beginning-of-sequence token with --bos-token (or bos_token in the recipe)",
}
_GIVE_HF = "give the tokenizer.json that HF tokenizers writes"

Id = Annotated[int, msgspec.Meta(ge=0, lt=MAX_IDS)]


class AddedToken(msgspec.Struct, frozen=True):
    """A string the tokenizer recognises in text before its model runs."""

    id: Id
    content: str
    special: bool = False
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class TokenizerFile(NamedTuple):
    """A `tokenizer.json`, and what a run needs to know of it."""

    name: str
    """As the recipe gave it."""
    revision: str | None
    """The hub commit it was resolved to; None for a local file."""
    json: bytes
    """The file's contents, truncation and padding switched off: they would lose text."""
    sha256: str
    """SHA-256 of the file as it was found."""
    eos_token: str
    eos_id: int
    """As the file has it, until `hf.HFBackend.resolved` says what the library makes of it; likewise below."""
    vocab_size: int
    """One more than the largest id, added tokens included."""
    added_tokens: tuple[AddedToken, ...]
    folder: Path | None = None
    """Where it was found, and what is configured beside it."""
    bos_token: str | None = None
    """What begins documents, once `with_special_tokens` says that something does."""
    bos_id: int | None = None
    fim: Fim | None = None
    """How documents are taken apart, likewise."""


KNOWN_FIM_TOKENS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
)
"""Sentinels of StarCoder, of Qwen Coder and others, of SantaCoder, and of Code Llama."""


def with_special_tokens(tokenizer: TokenizerFile, recipe: Recipe) -> TokenizerFile:
    """Return a tokenizer with what begins documents and takes them apart, as a recipe says.

    Raises:
        TokenizerError: it has no such token.
    """
    if recipe.bos == "none" and not recipe.fim_rate:
        return tokenizer
    fields = msgspec.json.decode(tokenizer.json)
    ids = _vocabulary(tokenizer.name, Path("tokenizer.json"), fields)
    ids |= {token.content: token.id for token in tokenizer.added_tokens}
    if recipe.bos == "prepend":
        bos = recipe.bos_token
        if bos is None and tokenizer.folder is not None:
            bos = _configured(tokenizer.name, tokenizer.folder, "bos_token")
        if bos is None or bos not in ids:
            found = "none" if bos is None else f"{bos!r}, which is not in its vocabulary of {len(ids)}"
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: expected a beginning-of-sequence token, found {found}",
                next_step=_GIVE["bos_token"],
            )
        tokenizer = tokenizer._replace(bos_token=bos, bos_id=ids[bos])
    if recipe.fim_rate:
        known = (each for each in KNOWN_FIM_TOKENS if all(token in ids for token in each))
        tokens = recipe.fim_tokens or next(known, None)
        if tokens is None or not all(token in ids for token in tokens):
            every = "; ".join(" ".join(each) for each in KNOWN_FIM_TOKENS)
            lacking = (
                f"none that is known ({every})" if tokens is None else repr(next(t for t in tokens if t not in ids))
            )
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: expected sentinels for fill in the middle, each one token of its "
                f"vocabulary, found {lacking}{'' if tokens is None else ', which is not'}",
                next_step="name the three with --fim-tokens PREFIX MIDDLE SUFFIX (or fim_tokens in the recipe), or add "
                "them to the tokenizer",
            )
        if len(set(tokens)) < 3:
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: expected three different sentinels, found {', '.join(tokens)}",
                next_step="name three with --fim-tokens PREFIX MIDDLE SUFFIX",
            )
        prefix, middle, suffix = tokens
        if "suf" in middle.lower() or "mid" in suffix.lower():
            raise TokenizerError(
                f"tokenizer {tokenizer.name}: expected sentinels in the order prefix, middle, suffix, found "
                f"{', '.join(tokens)}",
                next_step=f"give {prefix} {suffix} {middle}",
            )
        named = ids[prefix], ids[middle], ids[suffix]
        fim = Fim(recipe.fim_rate, recipe.fim_spm_rate, recipe.seed, (prefix, middle, suffix), named)
        tokenizer = tokenizer._replace(fim=fim)
    return tokenizer


def load_tokenizer(
    name: str, *, eos_token: str | None = None, revision: str | None = None, needs_eos: bool = True
) -> TokenizerFile:
    """Find and read a tokenizer: a directory, a `tokenizer.json`, or a hub name (`owner/name[@revision]`).

    Where no end-of-sequence token is needed and none is configured, any token of the vocabulary stands in for it.

    Raises:
        TokenizerError: not found, not a tokenizer, or no end-of-sequence token.
    """
    path = Path(name)
    if path.is_dir():
        return _read(name, path / "tokenizer.json", eos_token, None, needs_eos=needs_eos)
    if path.is_file():
        return _read(name, path, eos_token, None, needs_eos=needs_eos)
    hub_name, _, given_revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", hub_name) or path.suffix in (".json", ".model"):
        raise TokenizerError(
            f"tokenizer {name}: no such file or directory",
            next_step="give a directory with tokenizer.json, such a file, or a hub name as owner/name",
        )
    from tokenmill.remote.hub import fetch_tokenizer

    fetched = fetch_tokenizer(hub_name, revision or given_revision or None)
    return _read(name, fetched.path, eos_token, fetched.revision, needs_eos=needs_eos)


def _read(name: str, path: Path, eos_token: str | None, revision: str | None, *, needs_eos: bool) -> TokenizerFile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"tokenizer {name}: cannot read {path}: {error.strerror}",
            next_step="give a directory that holds tokenizer.json (a SentencePiece .model must be converted first)",
        ) from None
    eos = eos_token or _configured(name, path.parent, "eos_token")
    return _tokenizer_of(data, name, path, eos, revision, needs_eos=needs_eos)


@functools.lru_cache(maxsize=_KEPT)
def _tokenizer_of(
    data: bytes, name: str, path: Path, eos: str | None, revision: str | None, *, needs_eos: bool
) -> TokenizerFile:
    """Return what the content of a `tokenizer.json` says."""
    fields = _parse(name, path, data)
    added = _added_tokens(name, path, fields)
    ids = _vocabulary(name, path, fields) | {token.content: token.id for token in added}
    if not ids:
        raise TokenizerError(f"tokenizer {name}: {path} has an empty vocabulary", next_step=_GIVE_HF)
    if eos is None and not needs_eos:
        eos = next(iter(ids))
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
        added_tokens=added,
        folder=path.parent,
    )


def _parse(name: str, path: Path, data: bytes) -> dict[str, Any]:
    try:
        fields: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerError(
            f"tokenizer {name}: {path} is not JSON: {error}",
            next_step="fetch tokenizer.json again; a Git LFS pointer or a half-written file reads like this",
        ) from None
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError(f"tokenizer {name}: {path} has no model", next_step=_GIVE_HF)
    if model.get("dropout"):
        raise TokenizerError(
            f"tokenizer {name}: model.dropout is {model['dropout']!r} in {path}: the same text would give other ids "
            "each time",
            next_step='set "dropout": null in tokenizer.json: training data must be the same every time',
        )
    return dict(fields)


def _added_tokens(name: str, path: Path, fields: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    return tuple(_converted(name, path, fields.get("added_tokens") or [], list[AddedToken], "added_tokens"))


def _vocabulary(name: str, path: Path, fields: Mapping[str, Any]) -> dict[str, int]:
    vocab = fields["model"].get("vocab")
    if isinstance(vocab, dict):
        ids: dict[str, int] = _converted(name, path, vocab, dict[str, Id], "model.vocab")
        return ids
    if isinstance(vocab, list):  # Unigram
        pieces = _converted(name, path, vocab, list[tuple[str, float]], "model.vocab")
        return {piece: i for i, (piece, _) in enumerate(pieces)}
    raise TokenizerError(f"tokenizer {name}: {path} has no vocabulary", next_step=_GIVE_HF)


def _converted(name: str, path: Path, value: object, kind: Any, field: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise TokenizerError(
            f"tokenizer {name}: {path}: {field} is not what a tokenizer has there: {error}", next_step=_GIVE_HF
        ) from None


def _configured(name: str, folder: Path, field: str) -> str | None:
    """`eos_token` or `bos_token` as HF `transformers` stores it: a string or an object with `content`."""
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / file_name
        if not file.is_file():
            continue
        mend = f"mend or remove it, or {_GIVE[field]}"
        try:
            config = msgspec.json.decode(file.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TokenizerError(f"tokenizer {name}: {file} is not JSON: {error}", next_step=mend) from None
        except OSError as error:
            raise TokenizerError(f"tokenizer {name}: cannot read {file}: {error.strerror}", next_step=mend) from None
        if not isinstance(config, dict):
            raise TokenizerError(
                f"tokenizer {name}: {file}: expected a JSON object, found {type(config).__name__}", next_step=mend
            )
        token = config.get(field)
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and not isinstance(token, str):
            raise TokenizerError(
                f"tokenizer {name}: {file}: {field}: expected a string, found {token!r:.60}", next_step=mend
            )
        if token:
            return token
    return None


def _without_truncation(fields: dict[str, Any], data: bytes) -> bytes:
    if fields.get("truncation") is None and fields.get("padding") is None:
        return data
    return msgspec.json.encode(fields | {"truncation": None, "padding": None})

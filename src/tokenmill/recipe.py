"""Recipe: everything that can change an output byte, and nothing else. Pure but for reading TOML.

In: a built-in name or a TOML file, and overrides. Out: a frozen `Recipe`. What only changes speed
(workers, span sizes, engines) is an argument of `pipeline.pretokenize` instead.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from tokenmill.errors import RecipeError
from tokenmill.options import LARGEST_COUNT, parse_count
from tokenmill.redact import escape_surrogates

Positive = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_COUNT)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

DEFAULT_SHARD_SIZE = 256 * 1024 * 1024

_TOML_CHARACTERS = 1 << 20
"""Longest recipe. Parsing TOML takes time and memory that grow with the square of the parts of a dotted name."""

_COUNTS = {"buffer_size", "shard_size", "total_tokens", "seq_len"}
"""Fields that may be written as `"150Gi"` or `"1e9"`."""


SIDECAR_COLUMNS = ("start", "tokens", "source", "row", "text_xxh3")
"""Columns of the documents sidecar that are not metadata."""

_FIRST_SETTINGS = frozenset(
    {
        "text_column",
        "text_separator",
        "order",
        "seed",
        "buffer_size",
        "shard_size",
        "total_tokens",
        "dtype",
        "special_in_text",
        "eos_token",
        "seq_len",
    }
)
"""What the fingerprint always has. No field is ever added here."""

_KINDS = ("string", "int64", "float64", "bool")


class MetadataColumn(NamedTuple):
    """A value that the documents sidecar keeps of each row, beside its text."""

    name: str
    """Name of the sidecar's column."""
    path: str
    """Path in the source: a column or JSON field of that name; else, after dots, one inside another."""
    kind: str
    """`string`, `int64`, `float64` or `bool`."""

    @classmethod
    def parse(cls, text: str) -> MetadataColumn:
        """Return what `[NAME=]PATH[:TYPE]` means.

        Raises:
            ValueError: it means nothing.
        """
        rest, colon, kind = text.rpartition(":")
        if not colon:
            rest, kind = text, "string"
        name, equals, path = rest.partition("=")
        if not equals:
            path = name
        if kind not in _KINDS or not name or not path:
            raise ValueError(
                f"metadata column {text!r}: expected [NAME=]PATH[:TYPE] with TYPE one of {', '.join(_KINDS)}, which a "
                "name with a colon needs"
            )
        return cls(name, path, kind)

    def __str__(self) -> str:
        return f"{self.name}={self.path}:{self.kind}"

    @property
    def arrow_type(self) -> str:
        """Arrow's name of the type it is stored in; the offsets of strings have 64 bits, as many may be together."""
        return "large_string" if self.kind == "string" else self.kind

    @property
    def parts(self) -> list[str]:
        """The names that its path goes through."""
        return self.path.split(".")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What defines the bytes of a data set.

    `dataset` and `tokenizer` say where to find them and are identified by content: the manifest
    holds the files' sizes and the SHA-256 of `tokenizer.json`. All other fields are compared as
    they are when a data root is resumed.
    """

    dataset: str | tuple[str, ...]
    """Local: a directory (searched recursively), a glob, a file, or a list of files. Else
    `hf://datasets/OWNER/NAME[@REVISION][/PATH]` or just `OWNER/NAME`, `s3://BUCKET/PREFIX`, or URLs."""
    tokenizer: str
    """A directory with `tokenizer.json`, such a file, or a hub name (`owner/name[@revision]`)."""
    text_column: str = "text"
    """Column of parquet and Arrow files, or field of JSON Lines, that holds the documents."""
    metadata_columns: tuple[str, ...] = ()
    """Other columns or fields that the documents sidecar keeps, each as `[NAME=]PATH[:TYPE]` with TYPE `string` (if
    left out), `int64`, `float64` or `bool`. A value that is missing is null."""
    text_separator: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Ends each document of a plain text file; null makes every file one document."""
    order: Literal["buffer", "sequential"] = "buffer"
    """`buffer` is the pinned shuffle (see `order.py`); `sequential` keeps path and row order."""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 42
    buffer_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 10_000
    """Slots of the shuffle's reservoir, in rows."""
    shard_size: Positive = DEFAULT_SHARD_SIZE
    """Tokens per shard."""
    total_tokens: Positive | None = None
    """Stop after this many tokens, mid-document if need be; null takes the whole corpus."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Data type of a stored token; `auto` is the smallest that holds the vocabulary."""
    special_in_text: Literal["parse", "text"] = "parse"
    """What a control-token string such as `</s>` inside a document becomes: the control token, as
    HF `tokenizers` does by default, or ordinary text."""
    eos_token: str | None = None
    """Appended, as an id, to every document; null takes the tokenizer's own."""
    seq_len: Positive = 2048
    """Tokens per training sample."""
    bos: Literal["none", "prepend"] = "none"
    """`prepend` begins every document with the beginning-of-sequence token, as an id."""
    bos_token: str | None = None
    """That token; null takes the tokenizer's own."""
    fim_rate: Share = 0.0
    """Share of the documents that are taken apart for fill in the middle (`encoding/framing.py`), by their text."""
    fim_spm_rate: Share = 0.5
    """Share of those that are put in the order suffix, prefix, middle; the others are prefix, suffix, middle."""
    fim_tokens: tuple[str, str, str] | None = None
    """Sentinels before prefix, middle and suffix, each one token; null takes the tokenizer's, if it has known ones."""

    def __post_init__(self) -> None:
        """Require that the metadata columns can be told apart, and that what is named is used."""
        if self.bos_token is not None and self.bos == "none":
            raise ValueError(f'bos_token {self.bos_token!r} is named, but bos is "none": expected "prepend"')
        if self.fim_tokens is not None and not self.fim_rate:
            raise ValueError("fim_tokens are named, but fim_rate is 0: expected a share of the documents")
        taken: set[str] = set()
        for column in self.metadata:
            if column.name.lower() in SIDECAR_COLUMNS:
                raise ValueError(
                    f"metadata column {column.path!r}: the sidecar has a column {column.name!r} of its own: give it "
                    f"another name, such as doc_{column.name}={column.path}:{column.kind}"
                )
            if column.name.lower() in taken:
                raise ValueError(f"metadata column {column.name!r} is named twice (case is ignored): rename one")
            taken.add(column.name.lower())

    @property
    def metadata(self) -> tuple[MetadataColumn, ...]:
        """The metadata columns."""
        return tuple(map(MetadataColumn.parse, self.metadata_columns))

    def shard_tokens(self, index: int) -> int:
        """Number of tokens of shard `index` if the corpus does not end before it does."""
        if self.total_tokens is None:
            return self.shard_size
        return min(self.shard_size, self.total_tokens - index * self.shard_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the fields as sorted JSON, but `dataset` and `tokenizer`, and later ones that say nothing.

        A field that the first recipes did not have is left out where it has its default: so recipes that do not use it
        keep their fingerprint, and data roots that were made before there was such a field are of the same recipe.
        """
        return hashlib.sha256(msgspec.json.encode(self._settings(), order="sorted")).hexdigest()

    def difference(self, other: Recipe) -> str | None:
        """Return the first setting in which `other` would make other bytes, as `field: mine, theirs`."""
        mine, theirs = (msgspec.to_builtins(recipe) for recipe in (self, other))
        for field in {**self._settings(), **other._settings()}:
            if mine.get(field) != theirs.get(field):
                return f"{field} = {mine.get(field)!r} there, {theirs.get(field)!r} here"
        return None

    def _settings(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        defaults = _defaults(type(self))
        return {
            name: value
            for name, value in fields.items()
            if name in _FIRST_SETTINGS
            or (name not in ("dataset", "tokenizer") and getattr(self, name) != defaults[name])
        }


@functools.cache
def _defaults(kind: type[Recipe]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def builtin_recipes() -> list[str]:
    """Return the names `load_recipe` knows, sorted."""
    folder = resources.files("tokenmill") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str | None = None, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Load the recipe named or stored at `source` (None: the defaults), with `overrides` applied to it.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown field, a wrong type, or a value missing.
    """
    fields = {} if source is None else _read_toml(source)
    fields.update(overrides or {})
    for name in _COUNTS & fields.keys():
        if isinstance(text := fields[name], str):
            try:
                fields[name] = parse_count(text)
            except ValueError as error:
                raise RecipeError(f"recipe {source or '(defaults)'}: {name}: {error}", next_step="correct it") from None
    _require_utf8(fields)
    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        missing = re.fullmatch(r"Object missing required field `(\w+)`", str(error))
        if missing is not None:
            raise RecipeError(
                f"{'no recipe is given' if source is None else f'recipe {source}'}: {missing[1]} is missing",
                next_step=f"give --{missing[1].replace('_', '-')}, or {missing[1]} = ... in a recipe",
            ) from None
        fields_known = ", ".join(Recipe.__struct_fields__)
        raise RecipeError(
            f"recipe {source or '(defaults)'}: {error}",
            next_step=f"the fields are {fields_known}; for their values see: tokenmill pretokenize --help",
        ) from None


def _require_utf8(fields: Mapping[str, object]) -> None:
    """Require that records can hold every text of a recipe: a path of this machine may be no UTF-8."""
    for name, value in fields.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and not text.isascii() and text != text.encode("utf-8", "replace").decode():
                raise RecipeError(
                    f"{name}: {escape_surrogates(text)} is not UTF-8, which records must be",
                    next_step="rename it, or give a link to it whose name is UTF-8",
                )


def validate_recipe(recipe: Recipe) -> Recipe:
    """Validate the fields of a recipe, which its constructor does not.

    Raises:
        RecipeError: a wrong type or value.
    """
    return load_recipe(None, msgspec.to_builtins(recipe))


def _read_toml(source: str) -> dict[str, object]:
    if source in builtin_recipes():
        text = (resources.files("tokenmill") / "recipes" / f"{source}.toml").read_text("utf-8")
    elif Path(source).is_file():
        try:
            with Path(source).open(encoding="utf-8") as file:
                text = file.read(_TOML_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {source}: cannot be read: {error}", next_step="correct the file") from None
    else:
        raise RecipeError(
            f"recipe {source}: neither a built-in recipe nor a file",
            next_step=f"use one of {', '.join(builtin_recipes())}, or the path of a TOML file",
        )
    if len(text) > _TOML_CHARACTERS or re.search(r"\.(?:[ \t]*[\w\"'-]+[ \t]*\.){31}", text):
        raise RecipeError(
            f"recipe {source}: expected at most {_TOML_CHARACTERS} characters, and no dotted name of many parts",
            next_step="correct the file: a recipe has no tables within tables",
        )
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {source}: not TOML: {error}", next_step="correct the file") from None

"""Spec: what a user asks of a view, from a TOML file or from Python, and whether it can be meant."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tokenmill.dataroot.manifest import Natural
from tokenmill.dataroot.view_record import Shuffle, Split
from tokenmill.errors import RecipeError
from tokenmill.options import parse_count
from tokenmill.recipe import Positive

_MOST_CHARACTERS = 1 << 20
_NAME = re.compile(r"[\w.+-]+")


class ViewSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A data root of a view."""

    name: str
    """Which sources are told apart by, and which order and provenance of documents depend on."""
    root: str
    """The data root; in a file, relative to the file's directory."""
    where: str | None = None
    """SQL over the columns of the documents sidecar: documents for which it is true are taken."""
    remove: str | None = None
    """A text file that names documents to leave out, one a line: `FILE ROW`, or the 16 digits of `text_xxh3`."""


class ViewSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What defines a view, given its data roots."""

    sources: Annotated[list[ViewSource], msgspec.Meta(min_length=1)]
    seq_len: Positive | None = None
    """Tokens per sample; None takes that of the data roots."""
    seed: Natural = 0
    shuffle: Shuffle = "documents"
    """What is put in a random order: `documents`, `samples`, or `none`: source after source, as they lie."""
    holdout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Share of the documents that are for validation, chosen by the hash of their text."""
    split: Split = "train"
    """Which of both sides the view takes."""
    duplicates: Literal["keep", "first"] = "keep"
    """`first` takes one of all documents with the same text: the first by source name, file and row."""


def load_spec(path: Path) -> ViewSpec:
    """Load the spec that a TOML file holds; its data roots and lists are relative to the file.

    Raises:
        RecipeError: it cannot be read, is not TOML, or says what cannot be meant; the line is named.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"view {path}: cannot be read: {error}", next_step="give a TOML file") from None
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(f"view {path}: expected at most {_MOST_CHARACTERS} characters", next_step="correct the file")
    try:
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"view {path}: not TOML: {error}", next_step="correct the file") from None
    if isinstance(length := fields.get("seq_len"), str):
        try:
            fields["seq_len"] = parse_count(length)
        except ValueError as error:
            where = f"{path}, line {_line_of(text, 'seq_len', None)}"
            raise RecipeError(f"view {where}: seq_len: {error}", next_step="correct it") from None
    try:
        spec = msgspec.convert(fields, ViewSpec)
        validate_spec(spec)
    except msgspec.ValidationError as error:
        raise _explained(path, text, str(error)) from None
    beside = path.parent
    sources = [
        msgspec.structs.replace(
            source,
            root=str(beside / source.root),
            remove=None if source.remove is None else str(beside / source.remove),
        )
        for source in spec.sources
    ]
    return msgspec.structs.replace(spec, sources=sources)


def validate_spec(spec: ViewSpec) -> None:
    """Require what the types of the fields do not say.

    Raises:
        ValidationError: it says what cannot be meant; as msgspec words it.
    """
    msgspec.convert(msgspec.to_builtins(spec), ViewSpec)  # the constructor validates nothing
    names = [source.name for source in spec.sources]
    for at, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise msgspec.ValidationError(
                f"Expected a name of letters, digits and `.+-_`, found {name!r} - at `$.sources[{at}].name`"
            )
        if name in names[:at]:
            raise msgspec.ValidationError(f"Two sources are called {name!r} - at `$.sources[{at}].name`")
    if spec.split == "validation" and not spec.holdout:
        raise msgspec.ValidationError("Expected a holdout above 0, as nothing is held out without - at `$.split`")


def _explained(path: Path, text: str, error: str) -> RecipeError:
    """Return an error of msgspec with the line of the file, and the nearest word that was meant."""
    source = re.search(r"`\$\.sources\[(\d+)\]", error)
    number = int(source[1]) if source else None
    unknown = re.search(r"unknown field `(.+?)`", error)
    named = re.search(r"`\$(?:\.sources\[\d+\])?\.?(\w*)`", error)
    key = unknown[1] if unknown else named[1] if named else ""
    known = (ViewSource if number is not None else ViewSpec).__struct_fields__
    step = "the fields are " + ", ".join(known)
    if unknown and (near := difflib.get_close_matches(key, known, 1)):
        step = f"did you mean {near[0]}? " + step
    value = re.search(r"Invalid enum value '(.+?)'", error)
    if value:
        choices = {"shuffle": Shuffle, "split": Split, "duplicates": Literal["keep", "first"]}[key]
        words = [str(word) for word in choices.__args__]  # type: ignore[attr-defined]
        near = difflib.get_close_matches(value[1], words, 1)
        step = (f"did you mean {near[0]!r}? " if near else "") + "it is one of " + ", ".join(words)
    reason = error.split(" - at ", maxsplit=1)[0]
    line = _line_of(text, key, number)
    return RecipeError(f"view {path}, line {line}: {key + ': ' if key and not unknown else ''}{reason}", next_step=step)


def _line_of(text: str, key: str, source: int | None) -> int:
    """Return the line of a field, of the file or of the source with that number; where it is missing, of its table."""
    table, found = -1, 1
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*\[\[\s*sources\s*\]\]", line):
            table += 1
            if table == source:
                found = number
        elif re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) and table == (-1 if source is None else source):
            return number
    return found

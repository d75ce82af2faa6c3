"""Spec: what a user asks of a view, from a TOML file or from Python, and whether it can be meant."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from tokenmill.dataroot.manifest import Natural
from tokenmill.dataroot.view_record import Packing, Shuffle, Split
from tokenmill.errors import RecipeError
from tokenmill.options import parse_count
from tokenmill.recipe import Positive

_MOST_CHARACTERS = 1 << 20
_NAME = re.compile(r"[\w.+-]+")

Weight = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
MOST_EPOCHS = 1e6
Duplicates = Literal["keep", "first"]
SameData = Literal["refuse", "merge"]


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
    weight: Weight | None = None
    """Share of the samples that come from it, beside the weights of the others, in stages that name none."""
    max_epochs: Annotated[float, msgspec.Meta(gt=0, le=MOST_EPOCHS)] = 1.0
    """How often each of its samples may come in a mixture; a mixture that would need more is refused."""


class ViewStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a mixture with weights of its own."""

    tokens: Positive | None = None
    """How long it is; whole samples are counted. The last one may leave out both: it ends where a source would begin
    more epochs than it may."""
    samples: Positive | None = None
    weights: dict[str, Weight] | None = None
    """Weights of sources by name, 0 for those that are not named; None takes the sources' own weights."""


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
    duplicates: Duplicates = "keep"
    """`first` takes one of all documents with the same text: the first by source name, file and row."""
    packing: Packing = "concat"
    """How samples are made: `concat` cuts the row of documents every `seq_len` tokens; `best-fit` cuts only documents
    that are longer than that, and pads what stays free."""
    stages: list[ViewStage] = []
    """Stretches of a mixture; none: one, as long as its sources last."""
    same_data: SameData = "refuse"
    """What becomes of sources that are the same documents of the same data: they are refused, or `merge` makes them
    one, by the first name and with the sum of their weights."""

    @property
    def is_mixture(self) -> bool:
        """Whether samples come from sources by weight."""
        return bool(self.stages) or any(source.weight is not None for source in self.sources)

    @property
    def mixed_stages(self) -> list[ViewStage]:
        """The stages of a mixture, one at least, each with its weights."""
        own = {source.name: source.weight or 0.0 for source in self.sources}
        stages = self.stages or [ViewStage()]
        return [msgspec.structs.replace(stage, weights=stage.weights or own) for stage in stages]


def load_spec(path: Path) -> ViewSpec:
    """Load the spec that a TOML file holds; its data roots and lists are relative to the file.

    Raises:
        RecipeError: it cannot be read, is not TOML, or says what cannot be meant; the line is named.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"view {path}: cannot be read: {error}", next_step="give a TOML file") from None
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(f"view {path}: expected at most {_MOST_CHARACTERS} characters", next_step="correct the file")
    try:
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"view {path}: not TOML: {error}", next_step="correct the file") from None
    counts: list[tuple[Any, str, tuple[str, int] | None]] = [(fields, "seq_len", None)]
    if isinstance(stages := fields.get("stages"), list):
        counts += [(stage, name, ("stages", at)) for at, stage in enumerate(stages) for name in ("tokens", "samples")]
    for table, name, where in counts:
        if isinstance(table, dict) and isinstance(count := table.get(name), str):
            try:
                table[name] = parse_count(count)
            except ValueError as error:
                place = name if where is None else f"{where[0]}[{where[1]}].{name}"
                message = _explained(path, text, f"{error} - at `$.{place}`").message
                raise RecipeError(message, next_step="correct it") from None
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
    if spec.is_mixture:
        _validate_weights(spec, names)
    elif spec.same_data == "merge":
        raise msgspec.ValidationError("Expected weights, as only sources of a mixture are merged - at `$.same_data`")


def _validate_weights(spec: ViewSpec, names: list[str]) -> None:
    needs_weights = not spec.stages or any(stage.weights is None for stage in spec.stages)
    for at, source in enumerate(spec.sources):
        if needs_weights and source.weight is None:
            raise msgspec.ValidationError(
                "Expected a weight for each source of a mixture; 0 takes it only in stages that name it - at "
                f"`$.sources[{at}].weight`"
            )
    if needs_weights and not any(source.weight for source in spec.sources):
        raise msgspec.ValidationError("Expected a weight above 0 for some source - at `$.sources[0].weight`")
    for at, stage in enumerate(spec.stages):
        is_last = at == len(spec.stages) - 1
        if (stage.tokens is None) == (stage.samples is None) and (stage.tokens is not None or not is_last):
            both = "not both" if stage.tokens is not None else "which only the last stage may leave out"
            raise msgspec.ValidationError(f"Expected tokens or samples, {both} - at `$.stages[{at}].tokens`")
        if stage.weights is None:
            continue
        for name in stage.weights:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                meant = f", did you mean {near[0]!r}?" if near else ""
                raise msgspec.ValidationError(
                    f"Expected the name of a source, found {name!r}{meant} - at `$.stages[{at}].weights`"
                )
        if not any(stage.weights.values()):
            raise msgspec.ValidationError(f"Expected a weight above 0 - at `$.stages[{at}].weights`")


def _explained(path: Path, text: str, error: str) -> RecipeError:
    """Return an error of msgspec with the line of the file, and the nearest word that was meant."""
    table = re.search(r"`\$\.(sources|stages)\[(\d+)\]", error)
    where = (table[1], int(table[2])) if table else None
    unknown = re.search(r"unknown field `(.+?)`", error)
    named = re.search(r"`\$(?:\.(?:sources|stages)\[\d+\])?\.?(\w*)", error)
    key = unknown[1] if unknown else named[1] if named else ""
    known = {None: ViewSpec, "sources": ViewSource, "stages": ViewStage}[where and where[0]].__struct_fields__
    step = "the fields are " + ", ".join(known)
    if unknown and (near := difflib.get_close_matches(key, known, 1)):
        step = f"did you mean {near[0]}? " + step
    if unknown and where is not None and key in ViewSpec.__struct_fields__:
        step = f"{key} belongs before the first [[sources]]; " + step
    value = re.search(r"Invalid enum value '(.*)'", error)
    if value:
        kinds = {
            "shuffle": Shuffle,
            "split": Split,
            "duplicates": Duplicates,
            "packing": Packing,
            "same_data": SameData,
        }
        words = [str(word) for word in get_args(kinds[key])]
        near = difflib.get_close_matches(value[1], words, 1)
        step = (f"did you mean {near[0]!r}? " if near else "") + "it is one of " + ", ".join(words)
    reason = error.split(" - at ", maxsplit=1)[0].replace("Object contains unknown field", "There is no field")
    reason = reason.replace(" | null", "").replace("`float`", "a number").replace("`int`", "a whole number")
    reason = reason.replace("`str`", "a text").replace("`object`", "a table").replace("`array`", "a list")
    found = _line_of(text, key, where)
    line = "" if found is None else f", line {found}"
    return RecipeError(f"view {path}{line}: {key + ': ' if key and not unknown else ''}{reason}", next_step=step)


def _line_of(text: str, key: str, table: tuple[str, int] | None) -> int | None:
    """Return the line of a field, of the file or of one of its tables; where it is missing, of its table.

    None where neither is found, as in a table inside a line.
    """
    seen: dict[str, int] = {}
    here: tuple[str, int] | None = None
    found = 1 if table is None else None
    text = re.sub(r"\"{3}.*?\"{3}|\'{3}.*?\'{3}", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    for number, line in enumerate(text.splitlines(), start=1):
        if opened := re.match(r"\s*\[\[\s*[\"']?(sources|stages)[\"']?\s*\]\]", line):
            here = opened[1], seen.get(opened[1], 0)
            seen[opened[1]] = here[1] + 1
            if here == table:
                found = number
        elif re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line) and here == table:
            return number
    return found

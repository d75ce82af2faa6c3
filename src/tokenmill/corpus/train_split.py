"""Train split: which files of a hub repository are its split `train`. Pure: card and paths in, paths out.

The rule is that of `datasets` 4 for `load_dataset(name, split="train")`
(https://huggingface.co/docs/datasets/repository_structure): the default configuration in the card's
YAML, else `data/train-NNNNN-of-NNNNN*`, else a folder named for a split, else a file named so, else
every file. Hidden files, folders that begin with `__`, and the repository's own metadata never count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from tokenmill.errors import SourceError

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "-._ 0-9"
_IN_FOLDER = ("**/{word}/**", "**/{word}[{sep}]*/**", "**/*[{sep}]{word}/**", "**/*[{sep}]{word}[{sep}]*/**")
_IN_NAME = ("**/{word}[{sep}]*", "**/*[{sep}]{word}[{sep}]*")
_SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_METADATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_METADATA |= {"dummy_data.zip"}


def train_files(name: str, card: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Return the files of the split `train`, sorted.

    Args:
        name: of the repository, for messages.
        card: the YAML of its `README.md`.
        paths: of all its files.

    Raises:
        SourceError: several configurations and no default, or no such split.
    """
    every = sorted(paths)
    config = _default_config(name, card)
    folder = str(config.get("data_dir") or "").strip("/")
    if folder:
        every = [path for path in every if path.startswith(folder + "/")]
    patterns = _by_split(config["data_files"]) if config.get("data_files") else None
    below = [path.removeprefix(folder + "/") if folder else path for path in every]
    splits = patterns if patterns is not None else default_patterns(below)
    if "train" not in splits:
        raise SourceError(
            f"{name}: no split train: its files give {', '.join(splits) or 'no split at all'}",
            next_step=f"name the files, for example hf://datasets/{name}/**/*.parquet",
        )
    found = {path for pattern in splits["train"] for path in matching(pattern, below)}
    return sorted(f"{folder}/{path}" if folder else path for path in found)


def _default_config(name: str, card: Mapping[str, Any]) -> Mapping[str, Any]:
    configs = [config for config in card.get("configs") or [] if isinstance(config, dict)]
    if not configs:
        return {}
    default = [
        config
        for config in configs
        if len(configs) == 1 or config.get("config_name") == "default" or config.get("default")
    ]
    if len(default) != 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise SourceError(
            f"{name}: its card has the configurations {names} and {'several defaults' if default else 'no default'}",
            next_step=f"name the files of one, for example hf://datasets/{name}/FOLDER/*.parquet",
        )
    return default[0]


def _by_split(data_files: Any) -> dict[str, list[str]]:
    """`data_files` of a card: a pattern, a list of them, or a list of splits with theirs."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if any(isinstance(entry, dict) for entry in data_files):
        return {str(entry["split"]): _listed(entry["path"]) for entry in data_files if isinstance(entry, dict)}
    return {"train": list(data_files)}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def default_patterns(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return patterns by split for a repository whose card names none."""
    sharded = {match[1] for path in paths if (match := _SHARDED.fullmatch(path))}
    if sharded:
        digits = "[0-9]" * 5
        return {split: [f"data/{split}-{digits}-of-{digits}*.*"] for split in sorted(sharded)}
    for templates in (_IN_FOLDER, _IN_NAME):
        patterns = {
            split: [template.format(word=word, sep=_SEPARATORS) for word in words for template in templates]
            for split, words in _KEYWORDS.items()
            if any(word in path for word in words for path in paths)  # else no pattern can match
        }
        found = {split: each for split, each in patterns.items() if any(matching(pattern, paths) for pattern in each)}
        if found:
            return found
    return {"train": ["**"]}


def _glob(pattern: str) -> Callable[[str], object]:
    """Return whether a path matches, as a function."""
    if pattern == "**":  # of most corpora the only one, and the library takes a while to load
        return lambda path: True
    from fsspec.utils import glob_translate  # the globs of `datasets`

    return re.compile(glob_translate(pattern)).match


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that a glob means: `**` crosses folders; hidden parts only where the pattern has them too."""
    matches = _glob(pattern)
    without = _METADATA - {pattern.rpartition("/")[2]}
    special = _special(pattern)
    return [
        path for path in paths if matches(path) and path.rpartition("/")[2] not in without and _special(path) == special
    ]


def is_hidden(path: str) -> bool:
    """Return whether a part of the path begins with a dot, or a folder with `__`."""
    return _special(path) != (0, 0)


def _special(path: str) -> tuple[int, int]:
    """Return how many parts are hidden, and how many folders are set apart by `__`."""
    if "/." not in path and "__" not in path and not path.startswith("."):
        return 0, 0
    parts = PurePosixPath(path).parts
    return sum(part.startswith(".") for part in parts), sum(part.startswith("__") for part in parts[:-1])

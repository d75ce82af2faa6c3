"""Fixtures of finished data roots, as shards and consolidated."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from conftest import text, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate

SEQ_LEN = 96


RECORDS = ("manifest.json", "consolidated.json")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of shards whose size is no multiple of the sample's."""
    folder = tmp_path_factory.mktemp("made")
    write_parquet(folder / "corpus" / "a.parquet", [text(i, 3 + i % 60) for i in range(200)])
    corpus = str(folder / "corpus")
    recipe = Recipe(dataset=corpus, tokenizer=str(TOKENIZER), buffer_size=40, seq_len=SEQ_LEN)
    pretokenize(msgspec.structs.replace(recipe, shard_size=5_001, total_tokens=14_002), folder / "root")
    return folder / "root"


@pytest.fixture(scope="module")
def consolidated(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("consolidated") / "root"
    shutil.copytree(shards, root)
    consolidate(root, consume=True)
    return root


def without_records(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*RECORDS, "documents*")))

"""Demo: the main job on text that every machine has, the standard library of the running Python."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.dataroot import layout
from tokenmill.dataroot.atomic import translate_write_errors
from tokenmill.encoding.hf import HFBackend
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.loading.view import open_root
from tokenmill.recipe import Recipe, load_recipe

TOKENIZER = Path(__file__).parent.parent / "demo_tokenizer"
"""Llama-style BPE with byte fallback, 4,096 ids; made by `scripts/train_demo_tokenizer.py`."""

_FILES = 4
_ROW_GROUP_ROWS = 200


def library_texts() -> Iterator[tuple[str, str]]:
    """Name and text of every module of the standard library that is UTF-8, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few test modules exist to be in another encoding
            continue
        if text:
            yield name, text


def write_corpus(folder: Path) -> None:
    """The standard library as parquet files with the columns `text` and `path`; all of them or none."""
    partial = folder.with_name(folder.name + layout.PARTIAL_SUFFIX)
    documents = list(library_texts())
    with translate_write_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for index in range(_FILES):
            part = documents[index::_FILES]
            table = pa.table({"text": [text for _, text in part], "path": [name for name, _ in part]})
            file = partial / f"part-{index:05d}.parquet"
            pq.write_table(table, file, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        partial.replace(folder)


def demo_recipe(corpus: Path) -> Recipe:
    """Return the built-in recipe `demo` over that corpus."""
    return load_recipe("demo", {"dataset": str(corpus), "tokenizer": str(TOKENIZER)})


def excerpt(root: Path, tokens: int = 160) -> str:
    """Return the text of the first tokens."""
    stream = open_root(root).tokens()
    ids = stream.read(0, min(tokens, stream.tokens)).tolist()
    return HFBackend(load_tokenizer(str(TOKENIZER)), special_in_text="parse").decode(ids)

"""Exports are read by the readers of the projects that they are for: every token, and every bound where there is one.

The readers are packages of other projects, in an environment of their own (`make interop`).
"""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import REPOSITORY, text, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.interchange import huggingface, litdata, mds
from tokenmill.interchange.export import export
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

INTEROP = REPOSITORY / ".venv" / "interop" / "bin" / "python"
SEQ_LEN = 16
SMALL = {(mds, "SHARD_NBYTES"): 8192 + 500, (litdata, "CHUNK_NBYTES"): 400, (huggingface, "FILE_NBYTES"): 4_000}
SMALL |= {(huggingface, "GROUP_NBYTES"): 1_000}

pytestmark = pytest.mark.skipif(not INTEROP.exists(), reason="the readers of other projects are not here: make interop")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """16 and 32 bits, as shards, as one file, and as a view. Texts hold no control tokens, which are other documents to
    readers that look for EOS."""
    folder = tmp_path_factory.mktemp("roots")
    texts = [text(i, 1 + i % 30).replace("</s>", "") for i in range(80)]
    write_parquet(folder / "corpus" / "a, b.parquet", texts[:50], lang=["de", None] * 25)
    write_parquet(folder / "corpus" / "c.parquet", texts[50:], lang=["en"] * 30)
    recipe = Recipe(
        dataset=str(folder / "corpus"),
        tokenizer=str(TOKENIZER),
        shard_size=700,
        seq_len=SEQ_LEN,
        metadata_columns=("lang",),
    )
    for name, dtype in (("uint16", "uint16"), ("uint32", "uint32")):
        pretokenize(msgspec.structs.replace(recipe, dtype=dtype), folder / name)
        source = ViewSource(name="s", root=str(folder / name))
        build_view(ViewSpec(sources=[source], seed=3, seq_len=SEQ_LEN), folder / f"{name} view")
    pretokenize(recipe, folder / "joined")
    consolidate(folder / "joined")
    return {path.name: path for path in folder.iterdir() if path.name != "corpus"}


def read(to: str, roots: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Export every data set, and return what the reader of the format prints of each."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, constant), value in SMALL.items():
            patch.setattr(module, constant, value)
        for name, root in roots.items():
            export(root, folder / name, to)
    script = REPOSITORY / "tests" / "interchange" / "readers" / f"read_{to}.py"
    line = [str(INTEROP), "-W", "ignore", str(script), *(str(folder / name) for name in roots)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(roots, json.loads(done.stdout.splitlines()[-1]), strict=True))


def tokens_of(root: Path) -> list[int]:
    return [token for chunk in open_root(root).tokens().chunks(1 << 20) for token in chunk.tolist()]


def documents_of(root: Path) -> list[Any]:
    found = open_root(root)
    return [part.document for part in found.documents().parts_between(0, found.tokens().tokens)]


def lengths_of(root: Path) -> list[int]:
    return [document.tokens for document in documents_of(root)]


def blocks_of(root: Path) -> list[list[int]]:
    tokens = tokens_of(root)
    return np.array(tokens[: len(tokens) // SEQ_LEN * SEQ_LEN]).reshape(-1, SEQ_LEN).tolist()


def test_megatron(roots: dict[str, Path], tmp_path: Path) -> None:
    """Its own builder makes the same two files, byte for byte; its GPT data set gives samples of 16 tokens."""
    for name, found in read("megatron", roots, tmp_path).items():
        assert found["tokens"] == tokens_of(roots[name]), name
        assert found["lengths"] == lengths_of(roots[name]), name
        assert found["same bytes"], name
        assert all(len(sample) == SEQ_LEN for sample in found["samples"])
        assert {token for sample in found["samples"] for token in sample} <= {*tokens_of(roots[name]), 0}


def test_datatrove(roots: dict[str, Path], tmp_path: Path) -> None:
    for name, found in read("datatrove", roots, tmp_path).items():
        tokens = tokens_of(roots[name])
        assert found["tokens"] == tokens, name
        assert found["lengths"] == lengths_of(roots[name]), name
        windows = [tokens[at : at + SEQ_LEN + 1] for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN + 1)]
        assert found["windows"] == windows, name


def test_litdata(roots: dict[str, Path], tmp_path: Path) -> None:
    for name, found in read("litdata", roots, tmp_path).items():
        assert found["blocks"] == blocks_of(roots[name]), name


def test_mosaicml_streaming(roots: dict[str, Path], tmp_path: Path) -> None:
    for name, found in read("mds", roots, tmp_path).items():
        assert found["blocks"] == blocks_of(roots[name]), name
        assert found["dtype"] == ("int32" if "uint32" in name else "uint16")


def test_hugging_face_datasets(roots: dict[str, Path], tmp_path: Path) -> None:
    for name, found in read("parquet", roots, tmp_path).items():
        assert list(itertools.chain(*(row["input_ids"] for row in found["train"]))) == tokens_of(roots[name]), name
        wanted = [(d.tokens, d.source, d.row, d.metadata["lang"]) for d in documents_of(roots[name])]
        rows = [(len(row["input_ids"]), row["source"], row["row"], row["lang"]) for row in found["train"]]
        assert rows == wanted, name
        assert ("int32" if "uint32" in name else "uint16") in found["type"]


def test_olmo_core(roots: dict[str, Path], tmp_path: Path) -> None:
    """Documents by the csv are those by their EOS."""
    for name, found in read("olmo", roots, tmp_path).items():
        assert found["tokens"] == tokens_of(roots[name]), name
        ends = np.cumsum(lengths_of(roots[name])).tolist()
        assert found["listed"] == [list(pair) for pair in zip([0, *ends[:-1]], ends, strict=True)], name
        assert found["scanned"] == found["listed"], name
        assert found["blocks"] == blocks_of(roots[name]), name

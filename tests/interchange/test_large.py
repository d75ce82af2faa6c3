"""Data sets beyond 2^31 tokens or bytes, as sparse files: refused where there is no room, right everywhere else."""

from __future__ import annotations

import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import layout, manifest
from tokenmill.dataroot.manifest import Consolidated, Count, Cursor, FileRecord, Manifest, ShardRecord, TokenizerRecord
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.interchange.dataset import ExportedDataset
from tokenmill.interchange.export import FORMATS, export, plan_export
from tokenmill.interchange.position import where_trainer
from tokenmill.recipe import Recipe
from tokenmill.shards.ledger import balance
from tokenmill.shards.shard import Documents

LIMIT = 1 << 31
EOS = 2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files with holes take no room on Linux")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk: in memory, holes that are mapped would take room."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def sparse_root(root: Path, lengths: list[int]) -> Path:
    """A finished data root of documents that are zeros and EOS."""
    root.mkdir()
    tokens = sum(lengths)
    recipe = Recipe(
        dataset="made up", tokenizer=str(TOKENIZER), dtype="uint16", eos_token="</s>", shard_size=1 << 40, seq_len=2_048
    )
    record = Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=TokenizerRecord(str(TOKENIZER), None, "0" * 64, 4_096, EOS, {}),
        software={},
        files=[FileRecord("a.txt", 1, len(lengths))],
        documents_version=layout.DOCUMENTS_VERSION,
        documents=len(lengths),
        tokens=tokens,
        complete=True,
    )
    ends = np.cumsum(lengths)
    writer = Documents(root / layout.documents_name(0), pa.array(["a.txt"]), documents_schema(record))
    numbers = np.arange(len(lengths))
    writer.append(np.stack([ends - lengths, np.array(lengths), numbers, numbers, np.zeros_like(numbers)]), None)
    counted = [Count(0, len(lengths))]
    cursor = Cursor(len(lengths))
    record.shards = [ShardRecord(0, tokens, "0" * 64, len(lengths), writer.publish(), cursor, 0, counted)]
    balance(root, record)
    with (root / layout.TOKENS).open("wb") as file:
        for end in ends.tolist():
            file.seek(2 * (end - 1))
            file.write(struct.pack("<H", EOS))
    (root / layout.SAMPLE_IDS).write_bytes(b"")
    manifest.save(root, record)
    joined = Consolidated(dtype="uint16", seq_len=2_048, id_scheme="blake2b-64", tokens=tokens, complete=True)
    manifest.save_consolidated(root, joined)
    return root


def test_a_document_of_2_31_tokens(disk: Path) -> None:
    for length, fits in ((LIMIT - 1, True), (LIMIT, False)):
        root = sparse_root(disk / str(length), [3, length, 3])
        dataset = ExportedDataset(root)
        for name, kind in FORMATS.items():
            if fits or name not in ("megatron", "parquet"):
                kind.refuse(dataset)
                stored = sum(kind.files(dataset, "train").values())
                assert stored >= 2 * (dataset.tokens - dataset.tokens % 2_048), name
                continue
            with pytest.raises(errors.ExportError, match=f"documents of at most {LIMIT - 1} tokens, found {LIMIT}"):
                plan_export(root, disk / "none", name)


def test_an_index_beyond_2_31_bytes(disk: Path) -> None:
    """Megatron's counts bytes in 64 bits, and documents in 32."""
    lengths = [5, LIMIT // 2 - 100, 200, 7]
    root = sparse_root(disk / "root", lengths)
    assert export(root, disk / "out", "megatron").linked == 1
    index = (disk / "out" / "train.idx").read_bytes()
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 4, 5)
    assert np.frombuffer(index, "<i4", 4, 34).tolist() == lengths
    begins = [0, 5, LIMIT // 2 - 95, LIMIT // 2 + 105]
    assert np.frombuffer(index, "<i8", 4, 50).tolist() == [2 * begin for begin in begins]
    found = where_trainer(root, "megatron", "3:6")
    assert (found.documents[0].source, found.documents[0].row) == ("a.txt", 3)

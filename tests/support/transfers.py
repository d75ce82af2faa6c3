"""Fixtures of transfers: an S3 server, a data root to send, small parts."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import text, write_parquet
from support.servers import AWS, moto, s3_client
from tokenmill.cli.demo import TOKENIZER
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.transfer import download as downloads
from tokenmill.transfer import upload as uploads
from tokenmill.transfer.stores import open_store

HERE_ONLY = {".tokenmill.lock", "tokenmill.log", "transfers.json"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for loopback, and parts so small that small files have several."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads, "PART_NBYTES", 2_048)
    monkeypatch.setattr(uploads, "PART_NBYTES", 2_048)
    monkeypatch.setattr(uploads, "WHOLE_NBYTES", 2_048)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("made"), documents=200, shard_size=5_000)


def make_root(folder: Path, *, documents: int, shard_size: int) -> Path:
    """A consolidated data root, with a file in it of which nothing is recorded."""
    write_parquet(folder / "c" / "a.parquet", [text(i, 5 + i % 60) for i in range(documents)])
    recipe = Recipe(dataset=str(folder / "c"), tokenizer=str(TOKENIZER), shard_size=shard_size, buffer_size=40)
    pretokenize(recipe, folder / "root")
    consolidate(folder / "root", seq_len=64)
    (folder / "root" / "notes").mkdir()
    (folder / "root" / "notes" / "extra.bin").write_bytes(random.Random(1).randbytes(9_000))
    (folder / "root" / "empty.txt").write_bytes(b"")
    return folder / "root"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root", ignore=lambda *_: HERE_ONLY))


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in HERE_ONLY
    }


def bucket(endpoint: str, prefix: str) -> dict[str, str]:
    client = s3_client(endpoint)
    listed = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    return {
        each["Key"].removeprefix(f"{prefix}/"): hashlib.sha256(
            client.get_object(Bucket="bucket", Key=each["Key"])["Body"].read()
        ).hexdigest()
        for each in listed
    }


def store(endpoint: str, prefix: str):
    return open_store(f"s3://bucket/{prefix}", StoreOptions(endpoint))

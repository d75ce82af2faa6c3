"""The quick start, both options, end to end against loopback servers: our commands, and the original scripts'."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY, command, golden, shared
from support.servers import AWS, Site, moto, serving
from tokenmill.cli.demo import TOKENIZER, write_corpus

SCRIPTS = REPOSITORY / "scripts"
DATASET, MODEL = "mlfoundations/dclm-baseline-1.0-parquet", "togethercomputer/LLaMA-2-7B-32K"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    hub = {"HF_HOME": str(tmp_path / "hub-cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return keep | AWS | hub | {"NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


def publish(site: Site, corpus: Path, tokenizer: Path) -> None:
    """What the recipe names, as the hub has it."""
    folder = "filtered/OH_eli5_200k_train/processed_data"
    site.add(DATASET, {f"{folder}/{path.name}": path.read_bytes() for path in sorted(corpus.iterdir())})
    site.add(f"models/{MODEL}", {path.name: path.read_bytes() for path in tokenizer.iterdir() if path.is_file()})


def run(env: dict[str, str], *arguments: object, script: str | None = None) -> subprocess.CompletedProcess[str]:
    line = command(*arguments, script=SCRIPTS / script if script else None)
    result = subprocess.run(line, capture_output=True, text=True, timeout=200, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result


def both_options(env: dict[str, str], s3: str, folder: Path, sizes: list[object], seq_len: int) -> Path:
    """From scratch with the original's command line; to a bucket; from there, and joined again."""
    root, other, place = folder / "data", folder / "downloaded", f"s3://bucket/{folder.name}"
    run(env, "--output_dir", root, "--num_proc", -1, *sizes, script="01_pretokenize_data.py")
    run(env, "upload", root, place, "--endpoint-url", s3)
    last = run(env, "--data_root", root, "--seq_len", seq_len, script="02_consolidate_shards.py")
    assert last.stdout.splitlines()[-1] == "✅ Preprocessing complete!"
    run(env, "download", place, other, "--endpoint-url", s3)
    last = run(env, "--data_root", other, "--seq_len", seq_len, script="02_consolidate_shards.py")
    assert last.stdout.splitlines()[-1] == "✅ Preprocessing complete!"
    for name in ("tokens.bin", "sample_ids.bin"):
        assert digest(root / name) == digest(other / name)
    ours = folder / "ours"
    run(env, "pretokenize", ours, "--recipe", "templar-150b", *sizes)
    run(env, "consolidate", ours, "--seq-len", seq_len)
    assert digest(ours / "tokens.bin") == digest(root / "tokens.bin")
    return root


def test_quick_start_on_the_demo_corpus(tmp_path: Path, environment: dict[str, str], s3: str) -> None:
    write_corpus(tmp_path / "corpus")
    site = Site()
    publish(site, tmp_path / "corpus", TOKENIZER)
    sizes = ["--shard_size", 300_000, "--total_tokens", 1_000_000, "--buffer_size", 100]
    with serving(site) as hub:
        root = both_options(environment | {"HF_ENDPOINT": hub}, s3, tmp_path, sizes, 2048)
    local = tmp_path / "local"
    run(
        environment,
        "pretokenize",
        local,
        "--recipe",
        "templar-150b",
        "--dataset",
        tmp_path / "corpus",
        *sizes,
        "--tokenizer",
        TOKENIZER,
    )
    for index in range(4):
        assert digest(local / f"train_{index:06d}.npy") == digest(root / f"train_{index:06d}.npy")


@pytest.mark.parametrize("case", golden("shards.json")[:1], ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
def test_quick_start_makes_the_golden_bytes(tmp_path: Path, environment: dict[str, str], s3: str, case: dict) -> None:
    site = Site()
    publish(site, shared(case["corpus"]), shared("data/llama2-tokenizer"))
    sizes = [
        argument
        for name in ("shard_size", "total_tokens", "seed", "buffer_size")
        for argument in (f"--{name}", case[name])
    ]
    with serving(site) as hub:
        root = both_options(environment | {"HF_ENDPOINT": hub}, s3, tmp_path, sizes, case["seq_len"])
    assert digest(root / "tokens.bin") == case["tokens_bin_sha256"]
    assert {name: digest(root / name) for name in case["shards"]} == case["shards"]

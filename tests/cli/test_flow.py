"""The README's local flows, as a user types them: test shard, two steps, one step."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, golden, run_cli, shared
from tokenmill.cli.demo import TOKENIZER, write_corpus

SCRIPTS = REPOSITORY / "scripts"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(folder)
    return folder


def test_the_local_flow_on_the_demo_corpus(tmp_path: Path, demo_corpus: Path) -> None:
    """single_testing_shard.py, then 02_consolidate_shards.py --seq_len 2048 --skip-validation, then a look."""
    root = tmp_path / "test_shard"
    shard = ["--dataset", demo_corpus, "--tokenizer", TOKENIZER, "--shard_size", 300_000, "--buffer_size", 100]
    made = run_cli("--output_dir", root, *shard, script=SCRIPTS / "single_testing_shard.py", from_scratch=True)
    assert made.returncode == 0, made.stderr
    tokens = np.load(root / "train_000000.npy")
    assert (tokens.dtype, len(tokens)) == (np.uint16, 300_000)
    for line in (
        "Tokens: 300,000",
        f"Size: {(600_128) / 1024**2:.1f} MB",
        "Dtype: uint16",
        f"Vocab range: {tokens.min()} - {tokens.max()}",
        f"Unique tokens: {len(np.unique(tokens)):,}",
        f"Mean token ID: {tokens.mean():.1f}",
    ):
        assert line in made.stdout
    length = ["--seq_len", 2048, "--skip-validation"]
    joined = run_cli("--data_root", root, *length, script=SCRIPTS / "02_consolidate_shards.py", from_scratch=True)
    assert joined.returncode == 0, joined.stderr
    assert (root / "tokens.bin").read_bytes() == tokens.tobytes()
    assert (root / "sample_ids.bin").stat().st_size == 300_000 // 2048 * 8
    assert run_cli("verify", root, "--deep", 20).returncode == 0
    assert "row" in run_cli("show", root, "--sample", 0).stdout


def test_the_test_shard_is_the_first_shard_of_the_full_run(tmp_path: Path, demo_corpus: Path) -> None:
    flags = ["--dataset", demo_corpus, "--tokenizer", TOKENIZER, "--shard-size", 200_000, "--seed", 9]
    assert run_cli("test-shard", tmp_path / "one", *flags).returncode == 0
    assert run_cli("pretokenize", tmp_path / "all", *flags).returncode == 0
    assert digest(tmp_path / "one" / "train_000000.npy") == digest(tmp_path / "all" / "train_000000.npy")
    assert len(list((tmp_path / "one").glob("train_*"))) == 1
    assert len(list((tmp_path / "all").glob("train_*"))) > 1


def test_a_sufficient_shard_is_kept_and_a_smaller_one_made_again(tmp_path: Path, demo_corpus: Path) -> None:
    root, script = tmp_path / "shard", SCRIPTS / "single_testing_shard.py"
    flags = ["--output_dir", root, "--dataset", demo_corpus, "--tokenizer", TOKENIZER, "--shard_size"]
    assert run_cli(*flags, 90_000, script=script).returncode == 0
    before = (root / "train_000000.npy").stat().st_mtime_ns
    kept = run_cli(*flags, 100_000, script=script)
    assert (kept.returncode, "it is kept" in kept.stdout) == (0, True)
    assert (root / "train_000000.npy").stat().st_mtime_ns == before
    larger = run_cli(*flags, 150_000, script=script)
    assert (larger.returncode, "made again" in larger.stdout) == (0, True), larger.stderr
    assert len(np.load(root / "train_000000.npy")) == 150_000


def test_a_foreign_smaller_shard_is_left_alone(tmp_path: Path, demo_corpus: Path) -> None:
    (tmp_path / "shard").mkdir()
    np.save(tmp_path / "shard" / "train_000000.npy", np.zeros(10, np.uint16))
    flags = ["--dataset", demo_corpus, "--tokenizer", TOKENIZER, "--shard-size", 1_000]
    result = run_cli("test-shard", tmp_path / "shard", *flags)
    assert (result.returncode, "holds another data set" in result.stderr) == (5, True)
    (tmp_path / "shard" / "train_000000.npy").write_bytes(b"not a shard")
    assert run_cli("test-shard", tmp_path / "shard", *flags).returncode == 5


@pytest.mark.parametrize("case", golden("shards.json"), ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
def test_two_steps_and_one_on_the_golden_corpus(tmp_path: Path, case: dict) -> None:
    corpus = ["--dataset", shared(case["corpus"]), "--tokenizer", shared("data/llama2-tokenizer")]
    sizes = [
        argument
        for name in ("shard_size", "total_tokens", "seed", "buffer_size")
        for argument in (f"--{name}", case[name])
    ]
    length = ["--seq_len", case["seq_len"]]
    two, one = tmp_path / "two", tmp_path / "one"
    assert run_cli("--output_dir", two, *corpus, *sizes, script=SCRIPTS / "01_pretokenize_data.py").returncode == 0
    second = run_cli("--data_root", two, *length, script=SCRIPTS / "02_consolidate_shards.py")
    straight = run_cli("pretokenize", one, *corpus, *sizes, *length, "--consolidated")
    for result, root in ((second, two), (straight, one)):
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "✅ Preprocessing complete!"
        assert digest(root / "tokens.bin") == case["tokens_bin_sha256"]
        assert digest(root / "sample_ids.bin") == case["sample_ids_sha256"]["blake2b-64"]
        assert re.search(f"sha256 {case['tokens_bin_sha256']}", result.stdout)

"""Consolidation: exact bytes, refusals before anything is written, resume, consume, validation."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DIE_AT, PRINT_PEAK, REPOSITORY, command, golden, run_cli, shared, write_parquet, write_record
from support import reference
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import inventory, layout, manifest, proof, sample_ids, tokens_file
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.progress import Progress
from tokenmill.recipe import Recipe, load_recipe
from tokenmill.shards import consolidate as consolidation
from tokenmill.shards.consolidate import consolidate

SCRIPT = REPOSITORY / "scripts" / "02_consolidate_shards.py"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_shards(root: Path, tokens: np.ndarray, shard_size: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for index, at in enumerate(range(0, len(tokens), shard_size)):
        np.save(root / f"train_{index:06d}.npy", tokens[at : at + shard_size])


def some_tokens(count: int, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(count).integers(0, 250, count).astype(dtype)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four shards without a manifest, as downloaded."""
    write_shards(tmp_path / "root", some_tokens(3_500), 1_000)
    return tmp_path / "root"


def expected_files(root: Path, seq_len: int, scheme: str) -> tuple[bytes, bytes]:
    tokens = np.concatenate([np.load(path) for path in sorted(root.glob("train_*.npy"))])
    return tokens.tobytes(), reference.sample_ids(tokens, seq_len, scheme)


def stored_files(root: Path) -> tuple[bytes, bytes]:
    return (root / "tokens.bin").read_bytes(), (root / "sample_ids.bin").read_bytes()


# Bytes


@pytest.mark.parametrize("case", golden("shards.json"), ids=lambda case: f"seed{case['seed']}-{case['tokens']}")
@pytest.mark.parametrize("straight", [False, True])
def test_golden_digests(tmp_path: Path, case: dict, straight: bool) -> None:
    """Two steps and one, both id schemes; where a scheme is undefined, a clear error."""
    fields = {name: case[name] for name in ("shard_size", "total_tokens", "seed", "buffer_size", "seq_len")}
    corpus, tokenizer = str(shared(case["corpus"])), str(shared("data/llama2-tokenizer"))
    recipe = Recipe(dataset=corpus, tokenizer=tokenizer, dtype="uint16", **fields)
    root = tmp_path / "out"
    pretokenize(recipe, root, consolidated=straight)
    for scheme, expected in case["sample_ids_sha256"].items():
        if expected is None:
            with pytest.raises(errors.RecipeError, match="templar-v1 is undefined for 7995074 bytes"):
                consolidate(root, id_scheme=scheme)
            continue
        report = consolidate(root, id_scheme=scheme)
        assert report.proof.passed
        assert (digest(root / "tokens.bin"), digest(root / "sample_ids.bin")) == (case["tokens_bin_sha256"], expected)
        record = manifest.load_consolidated(root)
        assert (record.tokens, record.samples, record.id_scheme) == (case["tokens"], case["samples"], scheme)
        assert (record.tokens_sha256, record.sample_ids_sha256) == (case["tokens_bin_sha256"], expected)
    assert bool(list(root.glob("train_*.npy"))) is not straight


@settings(max_examples=50)
@given(
    count=st.integers(1, 3_000),
    shards=st.integers(1, 12),
    seq_len=st.integers(1, 400),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    scheme=st.sampled_from(["blake2b-64", "templar-v1"]),
    chunk=st.sampled_from([64, 100, 1_000, 8 << 20]),
    consume=st.booleans(),
)
def test_any_shards_equal_the_slow_way(
    count: int, shards: int, seq_len: int, dtype: str, scheme: str, chunk: int, consume: bool
) -> None:
    shard_size = -(-count // shards)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_file, "CHUNK_NBYTES", chunk)
        patch.setattr(tokens_file, "IDS_NBYTES", chunk)
        patch.setattr(consolidation, "CHUNK_NBYTES", chunk)
        root = Path(folder) / "root"
        tokens = some_tokens(count, dtype)
        write_shards(root, tokens, shard_size)
        if scheme == "templar-v1" and tokens.nbytes % 4:
            with pytest.raises(errors.RecipeError, match="undefined"):
                consolidate(root, seq_len=seq_len, id_scheme=scheme)
            return
        report = consolidate(root, seq_len=seq_len, id_scheme=scheme, consume=consume, workers=2)
        assert stored_files(root) == (tokens.tobytes(), reference.sample_ids(tokens, seq_len, scheme))
        assert report.proof.passed
        assert bool(list(root.glob("train_*.npy"))) is not consume
        record = report.proof.record
        assert record.tokens_sha256 == digest(root / "tokens.bin")
        assert record.sample_ids_sha256 == digest(root / "sample_ids.bin")


def test_straight_is_the_same_as_two_steps(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "two")
    consolidate(tmp_path / "two")
    summary = pretokenize(recipe, tmp_path / "one", consolidated=True, workers=3)
    assert stored_files(tmp_path / "one") == stored_files(tmp_path / "two")
    assert summary.proof.passed
    one, two = (manifest.load(tmp_path / name) for name in ("one", "two"))
    assert [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
    assert one.ledger == two.ledger
    for path in (tmp_path / "two").glob("documents_*.parquet"):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert not list((tmp_path / "one").glob("train_*"))


# Refusals: before anything is written


def _big_endian(root: Path) -> None:
    np.save(root / "train_000001.npy", np.load(root / "train_000001.npy").astype(">u2"))


def _pickled(root: Path) -> None:
    np.save(root / "train_000002.npy", np.array([{"a": 1}], object), allow_pickle=True)


def _version_2(root: Path) -> None:
    with (root / "train_000001.npy").open("wb") as file:
        np.lib.format.write_array(file, some_tokens(1_000), version=(2, 0))


def _append(root: Path) -> None:
    with (root / "train_000003.npy").open("ab") as file:
        file.write(b"x")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gap": (lambda r: (r / "train_000001.npy").unlink(), r"expected train_000001\.npy, found train_000002\.npy"),
    "late start": (lambda r: (r / "train_000000.npy").unlink(), r"expected train_000000\.npy, found train_000001"),
    "no shards": (lambda r: [p.unlink() for p in r.glob("*.npy")], "no shards"),
    "other dtype": (
        lambda r: np.save(r / "train_000002.npy", some_tokens(1_000, "uint32")),
        r"train_000002\.npy: expected tokens of uint16 .*, found uint32",
    ),
    "signed": (lambda r: np.save(r / "train_000002.npy", some_tokens(1_000, "int16")), "found <i2"),
    "big-endian": (_big_endian, "found >u2"),
    "floats": (lambda r: np.save(r / "train_000002.npy", np.zeros(1_000)), "found <f8"),
    "2-D": (lambda r: np.save(r / "train_000001.npy", some_tokens(1_000).reshape(10, 100)), r"shape \(10, 100\)"),
    "0-D": (lambda r: np.save(r / "train_000001.npy", np.uint16(3)), r"shape \(\)"),
    "pickled": (_pickled, "pickled"),
    "not npy": (lambda r: (r / "train_000001.npy").write_bytes(b"x" * 5_000), "not a shard"),
    "empty file": (lambda r: (r / "train_000001.npy").write_bytes(b""), "not a shard"),
    "foreign header": (_version_2, "header that numpy.save writes"),
    "truncated": (
        lambda r: os.truncate(r / "train_000001.npy", 1_000),
        r"expected 2128 bytes for 1000 tokens of uint16, found 1000",
    ),
    "an extra byte": (_append, "expected 1128 bytes .* found 1129"),
    "small in the middle": (
        lambda r: np.save(r / "train_000001.npy", some_tokens(999)),
        "expected 1000 tokens .* found 999",
    ),
    "large at the end": (
        lambda r: np.save(r / "train_000003.npy", some_tokens(1_001)),
        "expected at most 1000 tokens .* found 1001",
    ),
    "no tokens": (lambda r: np.save(r / "train_000003.npy", some_tokens(0)), "found 0"),
    "a copy": (lambda r: shutil.copy(r / "train_000001.npy", r / "train_000001 (copy).npy"), "its place"),
    "foreign tokens.bin": (lambda r: (r / "tokens.bin").write_bytes(b"precious"), "is not overwritten"),
    "foreign ids": (lambda r: (r / "sample_ids.bin").write_bytes(b"precious"), "is not overwritten"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(root: Path, name: str) -> None:
    mistake, message = REFUSED[name]
    mistake(root)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(errors.DataRootError) as caught:
        consolidate(root)
    assert re.search(message, str(caught.value)), caught.value
    assert {p.name: p.read_bytes() for p in root.iterdir() if p.name != layout.LOCK} == before


def test_wrong_arguments_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.DataRootError, match="expected tokens of uint8, found uint16"):
        consolidate(root, dtype="uint8")
    with pytest.raises(errors.DataRootError, match="no such directory"):
        consolidate(tmp_path / "nowhere")
    assert run_cli("consolidate", root, "--seq-len", "0").returncode == 2


def test_unfinished_roots_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    recipe = msgspec.structs.replace(recipe, shard_size=500)

    def stop(progress: Progress) -> None:
        if progress.tokens > 4_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretokenize(recipe, tmp_path / "out", on_progress=stop)
    with pytest.raises(errors.DataRootError, match="not all made yet"):
        consolidate(tmp_path / "out")


def test_a_surplus_shard_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    shards = len(manifest.load(tmp_path / "out").shards)
    np.save(tmp_path / "out" / layout.shard_name(shards), some_tokens(3))
    with pytest.raises(errors.DataRootError, match=rf"train_{shards:06d}\.npy is not in manifest\.json"):
        consolidate(tmp_path / "out")


# Again, otherwise, and consuming later


def test_done_is_done(root: Path) -> None:
    consolidate(root)
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert consolidate(root).status == "already complete"
    assert before == {path: path.stat().st_mtime_ns for path in root.iterdir()}


def test_other_settings_make_other_ids_of_the_same_tokens(root: Path) -> None:
    consolidate(root, seq_len=100, consume=True)
    tokens = np.frombuffer((root / "tokens.bin").read_bytes(), np.uint16)
    for seq_len, scheme in ((33, "blake2b-64"), (50, "templar-v1"), (50, "blake2b-64")):
        report = consolidate(root, seq_len=seq_len, id_scheme=scheme)
        assert report.adopted_nbytes == tokens.nbytes
        assert stored_files(root) == (tokens.tobytes(), reference.sample_ids(tokens, seq_len, scheme))


def test_shards_are_consumed_later_too(root: Path) -> None:
    consolidate(root)
    made = stored_files(root)
    report = consolidate(root, consume=True)
    assert (report.consumed, list(root.glob("train_*"))) == (4, [])
    assert stored_files(root) == made


def test_a_lost_shard_that_was_consumed_is_named(root: Path) -> None:
    consolidate(root, consume=True)
    os.truncate(root / "tokens.bin", 3_000)
    with pytest.raises(
        errors.DataRootError, match=r"train_000001\.npy was consumed, but .* does not hold it at byte 2000"
    ):
        consolidate(root)
    assert (root / "tokens.bin.partial").stat().st_size == 3_000


def test_consuming_takes_the_data_and_one_shard(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    original = consolidation.Consolidation.retire

    def measured(job: consolidation.Consolidation, shards: list) -> None:
        peaks.append(sum(path.stat().st_blocks * 512 for path in root.iterdir() if path.suffix != ".log"))
        original(job, shards)

    monkeypatch.setattr(consolidation.Consolidation, "retire", measured)
    write_shards(root, some_tokens(3_500_000), 1_000_000)
    consolidate(root, consume=True)
    data, shard = 7_000_000, 2_000_000
    assert len(peaks) == 5
    assert max(peaks) < data + shard + 100_000


def test_pretokenize_leaves_a_consolidated_root_alone(tmp_path: Path, recipe: Recipe) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root)
    consolidate(root, consume=True)
    before = {path: path.read_bytes() for path in root.iterdir()}
    for straight in (False, True):
        summary = pretokenize(recipe, root, consolidated=straight)
        assert (summary.status, summary.new_tokens) == ("already complete", 0)
    assert before == {path: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("lost", ["tokens.bin", "sample_ids.bin"])
def test_a_lost_file_of_a_consumed_root_is_told_and_made_again(tmp_path: Path, recipe: Recipe, lost: str) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root, consolidated=True)
    made = stored_files(root)
    (root / lost).unlink()
    with pytest.raises(errors.DataRootError, match=r"is missing, or not of the size consolidated\.json says"):
        pretokenize(recipe, root)
    pretokenize(recipe, root, consolidated=True)
    assert stored_files(root) == made


# Validation


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_wrong_shard_fails_and_publishes_nothing(tmp_path: Path, recipe: Recipe) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root)
    flip(root / "train_000001.npy")
    result = run_cli("consolidate", root)
    assert result.returncode == 1
    recorded = manifest.load(root).shards[1].sha256
    for line in (r"train_000001\.npy sha256 +FAIL", f"expected  {recorded}", r"actual    \w{64}", "failed validation"):
        assert re.search(line, result.stdout), result.stdout
    assert not [path.name for path in root.iterdir() if "bin" in path.name or path.name == layout.CONSOLIDATED]


def test_consume_keeps_what_is_wrong_and_what_follows(tmp_path: Path, recipe: Recipe) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root)
    good = (root / "train_000002.npy").read_bytes()
    flip(root / "train_000002.npy")
    report = consolidate(root, consume=True)
    assert (report.status, report.consumed) == ("failed", 2)
    assert not (root / "tokens.bin").exists()
    assert sorted(path.name for path in root.glob("train_*"))[0] == "train_000002.npy"
    (root / "train_000002.npy").write_bytes(good)
    report = consolidate(root, consume=True)
    assert report.proof.passed
    assert report.adopted_nbytes == 2 * 2 * recipe.shard_size
    pretokenize(recipe, tmp_path / "whole", consolidated=True)
    assert stored_files(root) == stored_files(tmp_path / "whole")


@pytest.mark.parametrize("same_time", [False, True])
def test_a_repaired_shard_is_copied_again_before_it_is_consumed(
    tmp_path: Path, recipe: Recipe, same_time: bool
) -> None:
    """What was consolidated unchecked must not outlive the good shard."""
    root = tmp_path / "out"
    pretokenize(recipe, root)
    path = root / "train_000001.npy"
    good, times = path.read_bytes(), path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    consolidate(root, validate=False)
    path.write_bytes(good)
    if same_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = consolidate(root, consume=True)
    assert report.proof.passed
    pretokenize(recipe, tmp_path / "whole", consolidated=True)
    assert stored_files(root) == stored_files(tmp_path / "whole")


def test_a_wrong_copy_is_not_a_reason_to_delete(tmp_path: Path, recipe: Recipe) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root)
    flip(root / "train_000001.npy")
    consolidate(root, validate=False)
    report = consolidate(root, consume=True)
    assert (report.status, report.consumed) == ("failed", 1)
    assert (root / "train_000001.npy").exists()


def test_a_bare_shard_that_changed_is_copied_again(root: Path) -> None:
    consolidate(root, seq_len=100)
    np.save(root / "train_000002.npy", np.zeros(1_000, np.uint16))
    report = consolidate(root, seq_len=100, consume=True)
    assert report.adopted_nbytes == 4_000
    assert (root / "tokens.bin").read_bytes()[4_000:6_000] == bytes(2_000)


def test_every_bit_of_a_header(root: Path) -> None:
    """Refused or, where it is of no meaning to NumPy either, never a crash."""
    path = root / "train_000001.npy"
    whole = path.read_bytes()
    for at in range(8 * layout.NPY_HEADER_NBYTES):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(errors.DataRootError):
            inventory.read_header(path)


def test_skipping_validation_says_that_nothing_was_proven(tmp_path: Path, recipe: Recipe) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root)
    flip(root / "train_000001.npy")
    for spelling in ("--skip-validation", "--skip_validation"):
        result = run_cli("--data_root", root, spelling, "--seq_len", 64, "--token_dtype", "uint16", script=SCRIPT)
        assert result.returncode == 0, result.stderr
        assert "nothing was proven" in result.stdout.splitlines()[-1]
    assert stored_files(root) == expected_files(root, 64, "blake2b-64")


def test_without_anything_to_compare_with_it_says_so(root: Path) -> None:
    result = run_cli("consolidate", root)
    assert (result.returncode, "recorded, not proven" in result.stdout.splitlines()[-1]) == (0, True)


def test_the_script_expects_the_published_data_set(root: Path) -> None:
    """As the original does; nothing is left then, and skipping validation works."""
    result = run_cli("--data_root", root, script=SCRIPT)
    assert result.returncode == 1
    assert re.search(r"tokens\.bin tokens +FAIL\n +expected  161061273600\n +actual    3500\n", result.stdout)
    assert not (root / "tokens.bin").exists()
    assert run_cli("--data_root", root, "--skip-validation", script=SCRIPT).returncode == 0
    assert run_cli(script=SCRIPT).returncode == 2
    assert "--data_root <DATA_ROOT>" in run_cli("--help", script=SCRIPT).stdout


def published(tokens: np.ndarray) -> proof.Published:
    ids = reference.sample_ids(tokens, 2048, "templar-v1")
    sha256 = [hashlib.sha256(data).hexdigest() for data in (tokens.tobytes(), ids)]
    return proof.Published(len(tokens), sha256[0], len(ids) // 8, sha256[1])


def test_shards_of_the_published_size_are_held_to_its_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the 300 GB: the scheme is templar-v1, and every digest must be met."""
    tokens = some_tokens(10_240)
    monkeypatch.setitem(proof.PUBLISHED, "templar-150b", published(tokens))
    write_shards(tmp_path / "right", tokens, 4_096)
    report = consolidate(tmp_path / "right")
    assert report.proof.record.id_scheme == "templar-v1"
    assert report.proof.passed
    assert {check.name for check in report.proof.checks} >= {"tokens.bin sha256", "sample_ids.bin sha256"}
    assert "published digests of templar-150b" in report.proof.against
    write_shards(tmp_path / "wrong", tokens[::-1].copy(), 4_096)
    report = consolidate(tmp_path / "wrong")
    failed = [check.name for check in report.proof.checks if not check.passed]
    assert failed == ["tokens.bin sha256", "sample_ids.bin sha256"]
    assert not (tmp_path / "wrong" / "tokens.bin").exists()


def test_scheme_of_the_unmodified_recipe_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real recipe, its names standing for directories here; the corpus is too small, and that is told."""
    corpus = tmp_path / "corpus"
    write_parquet(corpus / "a.parquet", ["the same text, so that the tokens divide by four"] * 4_000)
    for name, source in (
        ("mlfoundations/dclm-baseline-1.0-parquet", corpus),
        ("togethercomputer/LLaMA-2-7B-32K", TOKENIZER),
    ):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("templar-150b")
    summary = pretokenize(recipe, tmp_path / "straight", consolidated=True)
    assert summary.proof.record.id_scheme == "templar-v1"
    assert not summary.proof.passed
    assert not (tmp_path / "straight" / "tokens.bin").exists()
    pretokenize(recipe, tmp_path / "shards")
    report = consolidate(tmp_path / "shards")
    assert report.proof.record.id_scheme == "templar-v1"
    assert {c.name for c in report.proof.checks if not c.passed} == {
        *("tokens.bin tokens", "tokens.bin sha256", "sample_ids.bin ids", "sample_ids.bin sha256"),
    }
    for field, value in (("seed", 7), ("dataset", str(corpus)), ("seq_len", 64), ("buffer_size", 5)):
        changed = msgspec.structs.replace(recipe, **{field: value})
        root = tmp_path / f"by-{field}"
        pretokenize(changed, root)
        report = consolidate(root)
        assert (report.proof.record.id_scheme, report.proof.passed) == ("blake2b-64", True)


def test_output_for_a_person_and_for_a_program(tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    result = run_cli("consolidate", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "✅ Preprocessing complete!"
    record = manifest.load_consolidated(tmp_path / "out")
    for word in (record.tokens_sha256, record.sample_ids_sha256, "blake2b-64", "shards sha256 ", "PASS"):
        assert word in result.stdout
    again = json.loads(run_cli("consolidate", tmp_path / "out", "--json").stdout)
    assert (again["status"], again["proof"]["record"]["tokens"]) == ("already complete", record.tokens)
    assert run_cli("consolidate", tmp_path / "out", "--quiet").stdout == ""
    assert "consolidated: " in (tmp_path / "out" / "tokenmill.log").read_text()


# Straight


def test_forms_are_not_mixed(tmp_path: Path, recipe: Recipe) -> None:
    recipe = msgspec.structs.replace(recipe, shard_size=500)

    def stop(progress: Progress) -> None:
        if progress.tokens > 4_000:
            raise KeyboardInterrupt

    for straight, message in ((False, "was begun as shards"), (True, "was begun as tokens.bin")):
        root = tmp_path / str(straight)
        with pytest.raises(KeyboardInterrupt):
            pretokenize(recipe, root, consolidated=straight, on_progress=stop)
        with pytest.raises(errors.DataRootError, match=message):
            pretokenize(recipe, root, consolidated=not straight)
        pretokenize(recipe, root, consolidated=straight)
    with pytest.raises(errors.DataRootError, match="was begun as shards"):
        pretokenize(recipe, tmp_path / "False", consolidated=True)
    consolidate(tmp_path / "False")
    assert stored_files(tmp_path / "False") == stored_files(tmp_path / "True")


def test_a_refused_straight_run_claims_nothing(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(errors.TokenmillError):
        pretokenize(msgspec.structs.replace(recipe, text_column="body"), tmp_path / "out", consolidated=True)

    def full(plan: object) -> None:
        raise errors.StorageError("the disk is full", next_step="make room")

    with pytest.raises(errors.StorageError):
        pretokenize(recipe, tmp_path / "out", consolidated=True, on_plan=full)
    assert pretokenize(recipe, tmp_path / "out").status == "complete"
    assert consolidate(tmp_path / "out").proof.passed


@pytest.mark.parametrize("damage", ["flip", "truncate", "sidecar"])
def test_damaged_stretches_are_made_again(tmp_path: Path, recipe: Recipe, damage: str) -> None:
    root = tmp_path / "out"
    pretokenize(recipe, root, consolidated=True)
    made, before = stored_files(root), manifest.load(root)
    write_record(root / layout.CONSOLIDATED, json.loads((root / layout.CONSOLIDATED).read_text()) | {"complete": False})
    (root / "tokens.bin").rename(root / "tokens.bin.partial")
    if damage == "flip":
        flip(root / "tokens.bin.partial", 2 * 2 * recipe.shard_size + 11)
    elif damage == "truncate":
        os.truncate(root / "tokens.bin.partial", 3 * 2 * recipe.shard_size - 1)
    else:
        (root / "documents_000002.parquet").unlink()
    summary = pretokenize(recipe, root, consolidated=True)
    assert summary.remade[0] == "train_000002.npy"
    assert stored_files(root) == made
    assert manifest.load(root).ledger == before.ledger


# Kills


def dies(call: int, line: list[str]) -> bool:
    run = subprocess.run([sys.executable, "-c", DIE_AT, str(call), *line[3:]], timeout=120, check=False)
    assert run.returncode in (-9, 0)
    return run.returncode == -9


def nothing_is_lost(root: Path, tokens: np.ndarray, shard_size: int) -> None:
    """Every shard is there, or its bytes are durable in what `tokens.bin` is to become."""
    for index, at in enumerate(range(0, len(tokens), shard_size)):
        wanted = tokens[at : at + shard_size]
        shard = root / f"train_{index:06d}.npy"
        if shard.exists():
            assert np.array_equal(np.load(shard), wanted)
            continue
        path = root / "tokens.bin" if (root / "tokens.bin").exists() else root / "tokens.bin.partial"
        assert path.read_bytes()[at * 2 : (at + shard_size) * 2] == wanted.tobytes()
        assert len(manifest.load_consolidated(root).shards) > index


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("with_manifest", [False, True])
def test_kill_before_every_step(tmp_path: Path, recipe: Recipe, consume: bool, with_manifest: bool) -> None:
    source = tmp_path / "source"
    if with_manifest:
        shard_size = 9_000
        pretokenize(msgspec.structs.replace(recipe, shard_size=shard_size), source)
    else:
        shard_size = 4_000
        write_shards(source, some_tokens(9_001), shard_size)
    tokens = np.concatenate([np.load(path) for path in sorted(source.glob("train_*.npy"))])
    ids = reference.sample_ids(tokens, 2048, "blake2b-64")
    call = died = 0
    while True:
        call += 1
        root = tmp_path / "root"
        shutil.copytree(source, root)
        line = command("consolidate", root, *(["--consume"] if consume else []), "--quiet")
        if not dies(call, line):
            break
        died += 1
        nothing_is_lost(root, tokens, shard_size)
        subprocess.run(line, check=True, timeout=120)
        assert stored_files(root) == (tokens.tobytes(), ids)
        assert bool(list(root.glob("train_*.npy"))) is not consume
        assert not list(root.glob("*.partial"))
        shutil.rmtree(root)
    assert died >= (18 if consume else 8)


def test_kill_straight_before_every_fifth_step(tmp_path: Path, corpus: Path) -> None:
    options = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 8_000, "--consolidated", "--quiet"]
    subprocess.run(command("pretokenize", tmp_path / "whole", *options), check=True, timeout=120)
    whole = stored_files(tmp_path / "whole")
    died = 0
    for call in range(1, 200, 5):
        root = tmp_path / f"root-{call}"
        line = command("pretokenize", root, *options)
        if not dies(call, line):
            break
        died += 1
        subprocess.run(line, check=True, timeout=120)
        assert stored_files(root) == whole
        assert not list(root.glob("*.partial"))
        assert manifest.load(root).ledger == manifest.load(tmp_path / "whole").ledger
    assert died >= 5


def test_a_kill_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    write_shards(root, some_tokens(100_000), 10_000)
    monkeypatch.setattr(consolidation, "JOURNAL_NBYTES", 1)

    def stop(done: int, total: int) -> None:
        if done == 150_000 // 20_000 * 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(root, on_progress=stop)
    report = consolidate(root)
    assert report.adopted_nbytes == 120_000
    assert stored_files(root) == expected_files(root, 2048, "blake2b-64")


def test_a_lost_id_process_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_ids, "__file__", str(root / "no-such-program.py"))
    with pytest.raises(errors.StorageError, match="a process that makes sample ids was lost"):
        consolidate(root, seq_len=10)
    monkeypatch.undo()
    assert consolidate(root, seq_len=10).status == "complete"


PEAK = (
    """
import sys
from tokenmill.shards.consolidate import consolidate
consolidate(sys.argv[1])
"""
    + PRINT_PEAK
)


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    peaks = []
    for megatokens in (16, 128):
        root = tmp_path / str(megatokens)
        root.mkdir()
        np.save(root / "train_000000.npy", np.zeros(megatokens << 20, np.uint16))
        result = subprocess.run([sys.executable, "-c", PEAK, str(root)], capture_output=True, check=True, timeout=120)
        peaks.append(int(result.stdout))
        shutil.rmtree(root)
    assert peaks[1] - peaks[0] < 20_000, peaks
    assert peaks[1] < 300_000


def test_a_full_disk_is_told_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000))
    with pytest.raises(errors.StorageError, match=r"cannot hold tokens\.bin: .* needed, [^-]*--consume"):
        consolidate(root)
    assert consolidate(root, consume=True).status == "complete"


def test_the_limit_of_file_sizes_is_told_and_nothing_is_lost(root: Path) -> None:
    """A real write error, in the middle of tokens.bin."""
    write_shards(root, some_tokens(3_500_000), 1_000_000)
    limit = (5_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    program = (
        "import resource, signal; from tokenmill.cli import main;"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, {limit}); main()"
    )
    line = [sys.executable, "-c", program, "consolidate", str(root), "--consume"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 6, result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    nothing_is_lost(root, some_tokens(3_500_000), 1_000_000)
    assert consolidate(root, consume=True).adopted_nbytes == 4_000_000


def test_straight_from_a_larger_corpus_through_small_memory(tmp_path: Path) -> None:
    """Parts, shards and chunks all of different sizes, several id processes."""
    write_parquet(tmp_path / "corpus" / "a.parquet", [f"row {i} " * (i % 97) for i in range(3_000)])
    recipe = Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER), shard_size=77_777, seq_len=128)
    pretokenize(recipe, tmp_path / "two")
    consolidate(tmp_path / "two")
    pretokenize(recipe, tmp_path / "one", consolidated=True)
    assert stored_files(tmp_path / "one") == stored_files(tmp_path / "two")


def test_the_disk_takes_tokens_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_file, "SYNC_NBYTES", 1_000)
    monkeypatch.setattr(consolidation, "CHUNK_NBYTES", 1_000)
    write_shards(tmp_path / "root", some_tokens(20_000), 10_000)
    original, sizes = os.fsync, []
    syncs = "fdatasync" if hasattr(os, "fdatasync") else "fsync"

    def noted(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        original(descriptor)

    monkeypatch.setattr(os, syncs, noted)
    assert consolidate(tmp_path / "root").proof.passed
    assert sizes  # the last bytes of each file are made durable by os.fsync

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, syncs, broken)
    write_shards(tmp_path / "other", some_tokens(20_000), 10_000)
    with pytest.raises(errors.StorageError, match=r"tokens\.bin: cannot be written: Input/output error"):
        consolidate(tmp_path / "other")
    assert not (tmp_path / "other" / "tokens.bin").exists()
    monkeypatch.undo()
    assert consolidate(tmp_path / "other").proof.passed

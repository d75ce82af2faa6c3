"""Receipts: what a rank consumed can be checked by anyone with the data, and only what is true passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_cli
from support.data_roots import SEQ_LEN, consolidated, shards, without_records  # noqa: F401  # fixtures
from tokenmill import EpochSampler, ReceiptWriter, TokenDataset, ValidatorSampler, WindowSampler, errors
from tokenmill.loading.receipts import Receipt, check_receipt, load_receipt


def of(dataset: TokenDataset, kind: str) -> EpochSampler | WindowSampler | ValidatorSampler:
    size = len(dataset)
    if kind == "epoch":
        return EpochSampler(size, 5, epoch=2, rank=1, world_size=3, start=4)
    if kind == "window":
        return WindowSampler(size, 7, 9, size // 2, 1, 2)
    return ValidatorSampler(size, 7, 9, size // 2, size // 4, seed=3)


def consume(dataset: TokenDataset, sampler, samples: int) -> Receipt:
    """As a trainer does, batch by batch."""
    writer = ReceiptWriter(dataset, sampler)
    taken = [index for index, _ in zip(sampler, range(samples), strict=False)]
    for at in range(0, samples, 5):
        writer.add(taken[at : at + 5])
    return writer.receipt()


@pytest.mark.parametrize("kind", ["epoch", "window", "validator"])
def test_a_true_receipt_passes(consolidated: Path, tmp_path: Path, kind: str) -> None:
    dataset = TokenDataset(consolidated)
    sampler = of(dataset, kind)
    for samples in (0, 1, len(sampler)):
        receipt = consume(dataset, sampler, samples)
        receipt.save(tmp_path / "receipt.json")
        assert load_receipt(tmp_path / "receipt.json") == receipt
        assert all(check.passed for check in check_receipt(consolidated, receipt))


@given(data=st.data())
def test_whatever_was_consumed_otherwise_does_not_pass(consolidated: Path, data: st.DataObject) -> None:
    dataset = TokenDataset(consolidated)
    sampler = of(dataset, data.draw(st.sampled_from(["epoch", "window", "validator"])))
    taken = sampler.indices()
    at, other = (data.draw(st.integers(0, len(taken) - 1)) for _ in range(2))
    what = data.draw(st.sampled_from(["swapped", "left out", "twice", "another"]))
    wrong = taken.copy()
    if what == "swapped":
        wrong[[at, other]] = wrong[[other, at]]
    elif what == "left out":
        wrong = np.delete(wrong, at)
    elif what == "twice":
        wrong = np.insert(wrong, at, wrong[at])
    else:
        wrong[at] = other
    writer = ReceiptWriter(dataset, sampler)
    writer.add(wrong)
    true = dataset.sample_ids[wrong].tolist() == dataset.sample_ids[taken[: len(wrong)]].tolist()
    assert all(check.passed for check in check_receipt(consolidated, writer.receipt())) == true


def test_every_field_counts(consolidated: Path) -> None:
    dataset = TokenDataset(consolidated)
    receipt = consume(dataset, of(dataset, "epoch"), 20)
    fields = msgspec.to_builtins(receipt)
    for name, value in (("sample_ids_sha256", "0" * 64), ("samples", 19), ("ids_sha256", "0" * 64)):
        forged = msgspec.convert(fields | {name: value}, Receipt)
        assert not all(check.passed for check in check_receipt(consolidated, forged))
    for name in ("seed", "epoch", "start"):
        sampler = fields["sampler"] | {name: fields["sampler"][name] + 1}
        forged = msgspec.convert(fields | {"sampler": sampler}, Receipt)
        assert not all(check.passed for check in check_receipt(consolidated, forged))


def test_receipts_at_the_command_line(consolidated: Path, shards: Path, tmp_path: Path) -> None:
    dataset = TokenDataset(consolidated)
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    receipt = consume(dataset, of(dataset, "window"), 20)
    receipt.save(good)
    msgspec.structs.replace(receipt, samples=21).save(bad)
    result = run_cli("receipts", consolidated, good)
    assert (result.returncode, f"{good}: true" in result.stdout) == (0, True)
    result = run_cli("receipts", consolidated, good, bad)
    assert (result.returncode, f"{bad}: NOT TRUE" in result.stdout) == (1, True)
    found = json.loads(run_cli("receipts", consolidated, good, "--json").stdout)
    assert found[str(good)][0]["name"] == "sample_ids.bin sha256"
    bad.write_text(good.read_text().replace('"rank": 1', '"rank": 5'))
    for path in (bad, tmp_path / "none.json"):
        result = run_cli("receipts", consolidated, path)
        assert (result.returncode, "not a receipt" in result.stderr) == (2, True), result.stderr
    result = run_cli("receipts", shards, good)
    assert (result.returncode, "has no sample ids" in result.stderr) == (5, True)


def test_ids_that_were_changed_since_are_found(consolidated: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(consolidated, tmp_path / "root"))
    dataset = TokenDataset(root)
    receipt = consume(dataset, of(dataset, "epoch"), 5)
    data = bytearray((root / "sample_ids.bin").read_bytes())
    data[0] ^= 1
    (root / "sample_ids.bin").write_bytes(data)
    first, *_ = check_receipt(root, receipt)
    assert (first.name, first.passed) == ("sample_ids.bin sha256", False)


def test_only_of_consolidated_data(shards: Path, consolidated: Path, tmp_path: Path) -> None:
    bare = without_records(consolidated, tmp_path / "bare")
    for dataset in (TokenDataset(shards), TokenDataset(bare, seq_len=SEQ_LEN, dtype="uint16")):
        with pytest.raises(errors.DataRootError, match="has no sample ids"):
            ReceiptWriter(dataset, EpochSampler(5, 1))

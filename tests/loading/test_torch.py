"""PyTorch: batches from a DataLoader, in this process and in workers, and Templar's own class."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, run_cli, text
from support.data_roots import SEQ_LEN, consolidated, shards, without_records  # noqa: F401  # fixtures
from support.training import EXAMPLE, run_ranks
from support.views import make

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tokenmill[torch]'")

from torch.utils.data import BatchSampler, DataLoader, default_collate  # noqa: E402

from tokenmill import EpochSampler, errors  # noqa: E402
from tokenmill import TokenDataset as NumPyDataset  # noqa: E402
from tokenmill.torch import SharedShardedDataset, TokenDataset, loader  # noqa: E402
from tokenmill.views.build import build_view  # noqa: E402
from tokenmill.views.spec import ViewSource, ViewSpec, ViewStage  # noqa: E402

TRAINERS = (REPOSITORY / "docs" / "trainers.md").read_text()


@pytest.fixture(params=["shards", "consolidated"])
def root(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, None])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["loader", "DataLoader", "own collate function", "batch sampler"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_batches(root: Path, dtype: torch.dtype | None, workers: int, how: str) -> None:
    dataset, plain = TokenDataset(root, dtype=dtype), NumPyDataset(root)
    sampler = EpochSampler(len(dataset), seed=1)
    if how == "loader":
        batches = loader(dataset, sampler, batch_size=16, num_workers=workers, drop_last=False)
    elif how == "DataLoader":
        batches = DataLoader(dataset, 16, sampler=sampler, num_workers=workers)
    elif how == "own collate function":
        batches = DataLoader(dataset, 16, sampler=sampler, num_workers=workers, collate_fn=torch.stack)
    else:
        chosen = BatchSampler(sampler, 16, drop_last=False)
        batches = DataLoader(dataset, batch_size=None, sampler=chosen, num_workers=workers)
    found = list(batches)
    assert all(type(batch) is torch.Tensor and batch.dtype == (dtype or torch.uint16) for batch in found)
    assert [len(batch) for batch in found] == [16] * (len(dataset) // 16) + [len(dataset) % 16]
    assert np.array_equal(torch.cat(found).numpy(), plain[list(sampler)])
    assert len(loader(dataset, sampler, batch_size=16)) == len(dataset) // 16


def test_samples_have_memory_of_their_own(root: Path) -> None:
    dataset, plain = TokenDataset(root), NumPyDataset(root)
    batch = dataset[[3, 1, 2]]
    assert np.array_equal(batch.numpy(), plain[[3, 1, 2]])
    rows = dataset.__getitems__([3, 1, 2])
    assert torch.equal(torch.stack(rows), batch)
    assert rows[1].data_ptr() == rows[0].data_ptr() + rows[0].nbytes  # gathered once
    assert default_collate(rows).data_ptr() == rows[0].data_ptr()  # and not copied again
    assert type(torch.stack(rows)) is type(rows[0] + 1) is torch.Tensor
    assert torch.equal(default_collate(rows[:2]), batch[:2])
    rows[1] = rows.pop()
    assert torch.equal(default_collate(rows), batch[[0, 2]])
    assert torch.equal(dataset[3], batch[0])
    assert dataset[-1].tolist() == plain[-1].tolist()
    assert dataset.sample_id(3) == plain.sample_id(3)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    for found in (batch, rows[0], dataset[3]):
        found.zero_()
    assert np.array_equal(dataset[3].numpy(), plain[3])


def test_a_dtype_that_does_not_hold_the_tokens_is_refused(root: Path, consolidated: Path, tmp_path: Path) -> None:
    assert TokenDataset(root, dtype=torch.int16)[3].tolist() == NumPyDataset(root)[3].tolist()  # 4,096 ids
    bare = without_records(consolidated, tmp_path / "bare")
    for where, told, dtype in (
        (root, {}, torch.uint8),
        (root, {}, torch.float32),
        (bare, {"seq_len": SEQ_LEN, "stored_dtype": "uint16"}, torch.int16),
    ):
        with pytest.raises(ValueError, match="does not hold token ids"):
            TokenDataset(where, dtype=dtype, **told)


def test_pickles(root: Path) -> None:
    dataset = TokenDataset(root, dtype=None)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[5], dataset[5])


def test_templars_own_class(
    consolidated: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its trainer uses it: on data with records and without, with PyTorch's own collation."""
    plain = NumPyDataset(consolidated)
    for path in (consolidated, without_records(consolidated, tmp_path / "bare")):
        monkeypatch.setenv("DATASET_BINS_PATH", str(path))
        dataset = SharedShardedDataset(sequence_length=SEQ_LEN, rank=0, world_size=1, token_dtype=np.uint16)
        assert (dataset.tokens_file, dataset.ids_file) == (path / "tokens.bin", path / "sample_ids.bin")
        assert len(dataset) == dataset.total_samples == len(dataset.sample_ids) == len(plain)
        assert dataset[7].dtype == torch.uint16
        assert dataset[7].tolist() == plain[7].tolist()
        assert dataset.sample_id(7) == int(dataset.sample_ids[7].item()) == plain.sample_id(7)
        loader = DataLoader(dataset, batch_size=4, sampler=EpochSampler(len(dataset), 3))
        assert np.array_equal(torch.cat(list(loader)).numpy(), plain[list(EpochSampler(len(dataset), 3))])
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[7], dataset[7])
    monkeypatch.setenv("DATASET_BINS_PATH", str(consolidated))
    with pytest.raises(errors.DataRootError, match="expected tokens of uint32, found uint16"):
        SharedShardedDataset(SEQ_LEN, 0, 1, token_dtype=np.uint32)
    monkeypatch.setenv("DATASET_BINS_PATH", str(shards))
    with pytest.raises(errors.DataRootError, match="has no sample ids"):
        SharedShardedDataset(SEQ_LEN, 0, 1)


def test_templars_class_of_today(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard at a time, with the ids beside it, or with those made of its tokens."""
    monkeypatch.setenv("DATASET_BINS_PATH", str(tmp_path))
    with pytest.raises(errors.DataRootError, match=r"train_000003\.npy: cannot be read"):
        SharedShardedDataset(3, SEQ_LEN, 0, 1)
    tokens = np.load(shards / "train_000000.npy")
    tokens = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN]
    np.save(tmp_path / "train_000003.npy", tokens)
    expected = SharedShardedDataset.locate_shards(3)
    assert expected == (str(tmp_path / "train_000003.npy"), str(tmp_path / "sample_ids_000003.npy"))
    assert SharedShardedDataset.locate_shards(3, "/x", "anneal")[1] == "/x/sample_ids_anneal_000003.npy"
    made = SharedShardedDataset(3, SEQ_LEN, 0, 1)
    assert made[1].dtype == torch.uint32
    assert made[1].tolist() == tokens[SEQ_LEN : 2 * SEQ_LEN].tolist()
    assert made.sample_id(0) == NumPyDataset(shards).sample_id(0)
    np.save(tmp_path / "sample_ids_000003.npy", np.arange(len(made), dtype=np.uint64))
    for dataset in (
        SharedShardedDataset(3, SEQ_LEN, 0, 1),
        SharedShardedDataset(shard_index=3, sequence_length=SEQ_LEN, rank=0, world_size=1, token_dtype=np.uint16),
    ):
        assert len(dataset) == len(tokens) // SEQ_LEN
        assert [dataset.sample_id(i) for i in (0, 5)] == [0, 5]
        assert int(dataset.sample_ids[5].item()) == 5
        batches = list(DataLoader(dataset, batch_size=4))
        assert torch.equal(torch.cat(batches).to(torch.int64).flatten(), torch.from_numpy(tokens.astype(np.int64)))
        assert torch.equal(torch.cat(list(loader(dataset, range(8), batch_size=4))), torch.cat(batches)[:8])
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[2], dataset[2])
    np.save(tmp_path / "val_000003.npy", tokens[:-1])
    with pytest.raises(ValueError, match="do not divide by"):
        SharedShardedDataset(3, SEQ_LEN, 0, 1, file_prefix="val")
    np.save(tmp_path / "train_000003.npy", tokens.astype(np.uint32))
    with pytest.raises(errors.DataRootError, match="expected tokens of uint16, found uint32"):
        SharedShardedDataset(3, SEQ_LEN, 0, 1, token_dtype=np.uint16)


def test_an_index_of_any_kind(shards: Path) -> None:
    dataset, plain = TokenDataset(shards), NumPyDataset(shards)
    for index in (torch.tensor(3), np.array(3), np.int64(3), 3):
        assert plain[index].tolist() == plain[3].tolist()
        assert dataset[index].tolist() == plain[3].tolist()
    for wrong in (torch.tensor(3.0), 3.5, "3", None, True):
        with pytest.raises(TypeError):
            plain[wrong]


def train(root: Path, checkpoint: Path, *arguments: object, ranks: int = 2, by_torchrun: bool = False) -> list[str]:
    """Lines of the example's log."""
    small = ["--context", SEQ_LEN, "--width", 32, "--layers", 1, "--heads", 2, "--log-every", 1, "--lr", 0.01]
    given = [str(each) for each in (root, "--checkpoint", checkpoint, *small, *arguments)]
    if not by_torchrun:
        return run_ranks(given, ranks, checkpoint.with_suffix(".log"))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*line, EXAMPLE, *given], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def losses(lines: list[str]) -> dict[int, float]:
    found = [line.split() for line in lines if line.startswith("step")]
    return {int(words[1]): float(words[3]) for words in found}


@pytest.fixture(scope="module")
def mixture(consolidated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of packed samples: of both sources, then of the other one alone."""
    folder = tmp_path_factory.mktemp("mixture")
    other = make(folder, "other", {"a.parquet": [text(i, 30) for i in range(900, 1_100)]}, seq_len=SEQ_LEN)
    sources = [
        ViewSource(name="first", root=str(consolidated), weight=2, max_epochs=2),
        ViewSource(name="other", root=str(other), weight=1, max_epochs=2),
    ]
    stages = [ViewStage(samples=70), ViewStage(samples=60, weights={"other": 1})]
    build_view(ViewSpec(sources=sources, seq_len=SEQ_LEN, packing="best-fit", stages=stages), folder / "view")
    return folder / "view"


def test_the_example_learns_a_mixture_and_goes_on_in_the_middle_of_a_stage(mixture: Path, tmp_path: Path) -> None:
    """Stopped and resumed with fewer ranks, it takes the samples and has the losses of one long run, by source."""
    steps, batch = 30, 4
    whole = train(mixture, tmp_path / "whole", "--steps", steps, "--batch", batch)
    unigram = float(whole[1].split()[-1])
    assert losses(whole)[steps] < losses(whole)[1] - 1
    assert losses(whole)[steps] < unigram + 0.5
    first = train(mixture, tmp_path / "parts", "--steps", 12, "--batch", batch, by_torchrun=True)
    rest = train(mixture, tmp_path / "parts", "--steps", steps, "--batch", batch, ranks=1)
    assert list(losses(first)) == list(range(1, 13))
    for step, loss in (losses(first) | losses(rest)).items():
        assert loss == pytest.approx(losses(whole)[step], abs=2e-3)
    by_source = {int(line.split()[1]): line.split("k tokens/s")[1].split()[::2] for line in whole if line[:4] == "step"}
    assert by_source[5] == ["first", "other"]
    assert all(by_source[step] == ["other"] for step in range(19, steps + 1))
    receipts = sorted(tmp_path.glob("*/receipt-*.json"))
    assert [path.parent.name + path.stem for path in receipts] == [
        "partsreceipt-epoch0-from0-rank0",
        "partsreceipt-epoch0-from0-rank1",
        f"partsreceipt-epoch0-from{12 * batch}-rank0",
        "wholereceipt-epoch0-from0-rank0",
        "wholereceipt-epoch0-from0-rank1",
    ]
    checked = run_cli("receipts", mixture, *receipts)
    assert (checked.returncode, checked.stdout.count(": true")) == (0, 5), checked.stdout


def test_the_example_with_templars_class(consolidated: Path, tmp_path: Path) -> None:
    found = losses(train(consolidated, tmp_path, "--steps", 12, "--batch", 4, "--drop-in", SEQ_LEN, ranks=1))
    assert found[12] < found[1] - 0.3


def test_the_example_goes_on_into_the_next_epoch(consolidated: Path, tmp_path: Path) -> None:
    """With a batch that does not divide the data set: the rest of the epoch is left out."""
    samples = len(NumPyDataset(consolidated))
    batch = samples // 2 - 3
    train(consolidated, tmp_path / "ck", "--steps", 3, "--batch", batch, ranks=1)
    names = sorted(path.name for path in (tmp_path / "ck").glob("receipt-*"))
    assert names == ["receipt-epoch0-from0-rank0.json", "receipt-epoch1-from0-rank0.json"]
    state = torch.load(tmp_path / "ck" / "model.pt", weights_only=True)
    assert (state["step"], state["samples"]) == (3, samples + batch)
    assert run_cli("receipts", consolidated, *(tmp_path / "ck").glob("receipt-*")).returncode == 0


@pytest.mark.parametrize("number", range(len(re.findall(r"```python", TRAINERS))))
def test_the_page_on_trainers_is_true(
    consolidated: Path,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = re.findall(r"```python\n(.*?)```", TRAINERS, re.DOTALL)[number]
    monkeypatch.setenv("DATASET_BINS_PATH", str(consolidated))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"docs/trainers.md, block {number}", "exec"), {})

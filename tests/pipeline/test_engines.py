"""The contract of engines: threads, a cluster in this process, and Ray make the same bytes and fail alike."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from conftest import golden, run_cli, text, write_parquet
from support.engines import PicklingEngine
from support.runs import StopError, every_digest, golden_recipe, shard_digests, stop_after
from support.servers import AWS, Site, moto, s3_client, serving
from support.transfers import bucket
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import find_corpus
from tokenmill.dataroot import layout, manifest
from tokenmill.options import StoreOptions
from tokenmill.pipeline import driver, leftovers, tasks
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.progress import Progress
from tokenmill.recipe import Recipe
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.write import write_view

Run = Callable[..., Any]
"""`pretokenize` on one engine."""


@pytest.fixture(scope="module")  # its idle processes take a tenth of a processor
def ray_cluster() -> Iterator[Any]:
    """Ray on this machine, its own, with a head that does no work."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenmill[ray]'")
    from ray.cluster_utils import Cluster

    settings = {"object_store_memory": 150 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AWS.items():  # machines get their credentials from their own environment
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **settings})
        cluster.add_node(num_cpus=5, object_store_memory=150 << 20)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def ray_engine(ray_cluster: Any) -> Iterator[Any]:
    from tokenmill.ray import RayEngine

    with RayEngine(ray_cluster.address) as engine:
        yield engine


@pytest.fixture(params=["threads 1", "threads 5", "cluster 1", "cluster 5", "ray"])
def run(request: pytest.FixtureRequest) -> Run:
    kind, _, workers = request.param.partition(" ")
    if kind == "ray":
        engine = request.getfixturevalue("ray_engine")
        return lambda *args, **options: pretokenize(*args, engine=engine, **options)
    if kind == "cluster":
        return lambda *args, **options: pretokenize(*args, engine=PicklingEngine(int(workers)), **options)
    return lambda *args, **options: pretokenize(*args, workers=int(workers), **options)


@pytest.mark.parametrize("changes", [{}, {"order": "sequential", "total_tokens": 9_001}, {"special_in_text": "text"}])
def test_same_bytes(run: Run, recipe: Recipe, tmp_path: Path, changes: dict) -> None:
    recipe = msgspec.structs.replace(recipe, **changes)
    pretokenize(recipe, tmp_path / "reference", workers=1, span_rows=11)
    summary = run(recipe, tmp_path / "root", span_rows=7)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")
    assert manifest.load(tmp_path / "root").ledger == manifest.load(tmp_path / "reference").ledger
    assert summary.audited_documents > 0
    assert verify(tmp_path / "root", deep=20).passed
    assert run(recipe, tmp_path / "root").status == "already complete"


@pytest.mark.parametrize("case", golden("shards.json")[:1], ids=lambda case: f"seed{case['seed']}")
def test_golden_bytes(run: Run, case: dict, tmp_path: Path) -> None:
    """Those of the original scripts on the real corpus."""
    run(golden_recipe(case), tmp_path / "root", span_rows=137)
    assert shard_digests(tmp_path / "root") == case["shards"]


def test_same_bytes_in_one_file(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    pretokenize(recipe, tmp_path / "reference", workers=1, consolidated=True)
    summary = run(recipe, tmp_path / "root", span_rows=9, consolidated=True)
    assert summary.proof.passed
    for name in (layout.TOKENS, layout.SAMPLE_IDS):
        assert (tmp_path / "root" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert verify(tmp_path / "root").passed
    assert not list((tmp_path / "root").glob("*.partial"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "arrow"])
def test_same_bytes_from_formats_that_are_read_front_to_back(
    run: Run, recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    corpus = tmp_path / "other"
    corpus.mkdir()
    for number in range(3):
        texts = [text(100 * number + i, i % 30) for i in range(40)]
        path = corpus / f"{number}.{kind}"
        lines = b"".join(msgspec.json.encode({"text": each}) + b"\n" for each in texts)
        if kind == "arrow":
            with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as writer:
                for at in range(0, 40, 9):
                    writer.write(pa.record_batch({"text": texts[at : at + 9]}))
        elif kind == "txt":
            path.write_text("\x1e".join(texts))
        else:
            path.write_bytes(lines if kind == "jsonl" else gzip.compress(lines))
    separator = "\x1e" if kind == "txt" else None
    recipe = msgspec.structs.replace(recipe, dataset=str(corpus), text_separator=separator)
    pretokenize(recipe, tmp_path / "reference", workers=1, span_rows=11)
    run(recipe, tmp_path / "root", span_rows=7)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


def test_bad_rows(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    """Told alike, and left out alike."""
    corpus = tmp_path / "other"
    corpus.mkdir()
    lines = [msgspec.json.encode({"text": text(i, 9)}) for i in range(60)]
    lines[41] = b'{"text": 5}'
    (corpus / "a.jsonl").write_bytes(b"\n".join(lines))
    recipe = msgspec.structs.replace(recipe, dataset=str(corpus), shard_size=300)
    with pytest.raises(errors.SourceError) as told:
        pretokenize(recipe, tmp_path / "reference")
    with pytest.raises(errors.SourceError) as found:
        run(recipe, tmp_path / "root")
    assert str(found.value) == str(told.value)
    pretokenize(recipe, tmp_path / "reference", on_bad_rows="skip")
    assert run(recipe, tmp_path / "root", on_bad_rows="skip").skipped_bad == 1
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")
    skipped = [(tmp_path / name / layout.SKIPPED).read_bytes() for name in ("root", "reference")]
    assert skipped[0] == skipped[1]


def test_a_damaged_file_is_told_as_on_one_machine(run: Run, recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    """The same message, and what was finished stays."""
    data = bytearray((corpus / "sub" / "c.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    (corpus / "sub" / "c.parquet").write_bytes(data)
    recipe = msgspec.structs.replace(recipe, order="sequential", shard_size=500)
    with pytest.raises(errors.SourceError) as told:
        pretokenize(recipe, tmp_path / "reference", workers=1, span_rows=7)
    began = time.monotonic()
    with pytest.raises(errors.SourceError) as found:
        run(recipe, tmp_path / "root", span_rows=7)
    assert type(found.value) is type(told.value)
    assert str(found.value) == str(told.value)
    assert time.monotonic() - began < 60


def test_stopped_and_resumed(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(recipe, shard_size=700)
    pretokenize(recipe, tmp_path / "reference", workers=1)
    for tokens in (3_000, 9_000):
        with pytest.raises(StopError):
            run(recipe, tmp_path / "root", on_progress=stop_after(tokens), span_rows=5)
    run(recipe, tmp_path / "root", span_rows=11)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")
    assert manifest.load(tmp_path / "root").ledger == manifest.load(tmp_path / "reference").ledger
    assert not list((tmp_path / "root").glob("*.partial"))


@pytest.mark.parametrize("first", ["threads", "cluster"])
@pytest.mark.parametrize("consolidated", [False, True])
def test_another_engine_goes_on(recipe: Recipe, tmp_path: Path, first: str, consolidated: bool) -> None:
    """Also in the middle of a file whose rows were not all counted."""
    corpus = tmp_path / "other"
    corpus.mkdir()
    for number in range(3):
        lines = [msgspec.json.encode({"text": text(100 * number + i, i % 30)}) for i in range(90)]
        (corpus / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    recipe = msgspec.structs.replace(recipe, dataset=str(corpus), shard_size=400, buffer_size=20)
    options: dict[str, Any] = {"consolidated": consolidated}
    pretokenize(recipe, tmp_path / "reference", workers=1, **options)
    engines = {"threads": None, "cluster": PicklingEngine(2)}
    with pytest.raises(StopError):
        pretokenize(
            recipe, tmp_path / "root", on_progress=stop_after(2_500), span_rows=5, engine=engines.pop(first), **options
        )
    pretokenize(recipe, tmp_path / "root", engine=engines.popitem()[1], span_rows=5, **options)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


def test_shards_that_are_lost_are_made_again(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "root", span_rows=7)
    whole = every_digest(tmp_path / "root")
    for index in (1, 4):
        (tmp_path / "root" / layout.shard_name(index)).unlink()
    assert run(recipe, tmp_path / "root", span_rows=7).remade == [layout.shard_name(1), layout.shard_name(4)]
    assert every_digest(tmp_path / "root") == whole


def test_a_resume_encodes_only_what_missing_shards_need(recipe: Recipe, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(recipe, buffer_size=10, shard_size=500)
    whole, stopped, resumed = (PicklingEngine(2) for _ in range(3))
    tokens = pretokenize(recipe, tmp_path / "reference", engine=whole, span_rows=5).tokens
    with pytest.raises(StopError):
        pretokenize(recipe, tmp_path / "root", engine=stopped, span_rows=5, on_progress=stop_after(tokens * 9 // 10))
    pretokenize(recipe, tmp_path / "root", engine=resumed, span_rows=5)
    encoded = [sum(name == "encode_spans" for name, _ in engine.done) for engine in (whole, resumed)]
    assert 0 < encoded[1] < encoded[0] / 2
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


def test_tasks_get_what_they_need_and_no_more(recipe: Recipe, tmp_path: Path) -> None:
    """No text and no tokens pass through the driver; a shard's task gets the spans it points into."""
    engine = PicklingEngine(2)
    pretokenize(recipe, tmp_path / "root", engine=engine, span_rows=20)
    shards = [args for name, args in engine.done if name == "write_shard"]
    assert len(shards) == len(manifest.load(tmp_path / "root").shards)
    for _, plan, *spans in shards:
        used = set(np.concatenate([block.batch for block, _, _ in plan.parts]).tolist())
        assert used == set(range(len(spans)))
        assert all(block.batches == [] for block, _, _ in plan.parts)


def test_what_waits_is_bounded(recipe: Recipe, tmp_path: Path) -> None:
    """Slow shards hold back the encoders; less room than the shuffle needs stops nobody."""
    texts = [random.Random(i).randbytes(400).hex() for i in range(1_500)]
    write_parquet(tmp_path / "big" / "a.parquet", texts, row_group_size=20)
    recipe = Recipe(dataset=str(tmp_path / "big"), tokenizer=str(TOKENIZER), buffer_size=30, shard_size=40_000)
    peaks = {}
    for room in (1 << 40, 400_000, 1):
        engine = PicklingEngine(3)
        engine.memory_nbytes = room
        pretokenize(recipe, tmp_path / str(room), engine=engine, span_rows=20)
        peaks[room] = engine.peak_nbytes
        assert engine.live_nbytes == 0
    assert peaks[400_000] < 700_000
    assert peaks[1] <= peaks[400_000] < peaks[1 << 40] or peaks[1 << 40] < 700_000
    assert every_digest(tmp_path / "1") == every_digest(tmp_path / str(1 << 40))


def test_one_run_per_target(recipe: Recipe, tmp_path: Path) -> None:
    engine = PicklingEngine(1)
    with engine.hold(str(tmp_path / "root")), pytest.raises(errors.DataRootError, match="held"):
        pretokenize(recipe, tmp_path / "root", engine=engine)


def test_storage_that_is_not_shared_is_told(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is not there, that is another, and one whose files nobody else sees."""

    def hide(task: str, done: bool) -> None:
        if task == "write_shard" and not done:
            (tmp_path / "root" / layout.RUN).write_text("another run's")

    with pytest.raises(errors.DataRootError, match=r"every machine must see it[\s\S]*--keep-local no"):
        pretokenize(recipe, tmp_path / "root", engine=Meddled(hide))

    def lose(task: str, done: bool) -> None:
        if task == "write_shard" and done:
            (tmp_path / "other" / layout.shard_name(1)).unlink(missing_ok=True)

    monkeypatch.setattr("tokenmill.pipeline.cluster.VISIBLE_SECONDS", 0.1)
    with pytest.raises(errors.DataRootError, match=r"train_000001.npy: expected \d+ bytes.*found no such file"):
        pretokenize(recipe, tmp_path / "other", engine=Meddled(lose))
    pretokenize(recipe, tmp_path / "other", engine=PicklingEngine(2))
    pretokenize(recipe, tmp_path / "reference", workers=1)
    assert every_digest(tmp_path / "other") == every_digest(tmp_path / "reference")


class Meddled(PicklingEngine):
    """Something happens before and after every task: `meddle(name, done)`."""

    def __init__(self, meddle: Callable[[str, bool], None]) -> None:
        super().__init__(1)
        self._meddle = meddle

    def _run(self, task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._meddle(task.__name__, False)
        found = super()._run(task, args)
        self._meddle(task.__name__, True)
        return found


def test_a_range_of_the_one_file_that_is_another_is_found(recipe: Recipe, tmp_path: Path) -> None:
    """A machine wrote somewhere else, or over its neighbour: nothing is published, and the next run mends it."""
    partial = tmp_path / "root" / (layout.TOKENS + layout.PARTIAL_SUFFIX)
    written: list[str] = []

    def meddle(task: str, done: bool) -> None:
        if task == "write_shard" and done:
            written.append(task)
            if len(written) == 4:
                with partial.open("r+b") as file:
                    file.seek(2 * recipe.shard_size + 100)
                    file.write(bytes(500))

    with pytest.raises(errors.DataRootError, match="shard 1 is not what was written there"):
        pretokenize(recipe, tmp_path / "root", engine=Meddled(meddle), consolidated=True)
    assert not (tmp_path / "root" / layout.TOKENS).exists()
    again = PicklingEngine(2)
    summary = pretokenize(recipe, tmp_path / "root", engine=again, consolidated=True)
    assert summary.remade == [layout.shard_name(1)]
    assert sum(name == "write_shard" for name, _ in again.done) == 1  # those behind it stayed
    pretokenize(recipe, tmp_path / "reference", workers=1, consolidated=True)
    for name in (layout.TOKENS, layout.SAMPLE_IDS):
        assert (tmp_path / "root" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


@pytest.mark.parametrize("how", ["replaced", "grown", "other time"])
def test_a_file_that_changes_under_the_tasks_is_told(recipe: Recipe, tmp_path: Path, how: str) -> None:
    corpus = tmp_path / "other"
    corpus.mkdir()
    path = corpus / "a.jsonl"
    lines = [msgspec.json.encode({"text": text(i, 20)}) for i in range(200)]
    path.write_bytes(b"\n".join(lines))

    def meddle(task: str, done: bool) -> None:
        if task == "plan_files" and done:
            if how == "replaced":
                path.write_bytes(b"\n".join(reversed(lines)))
            elif how == "grown":
                path.write_bytes(b"\n".join(lines * 2))
            else:
                os.utime(path, ns=(0, 0))

    recipe = msgspec.structs.replace(recipe, dataset=str(corpus))
    with pytest.raises(errors.SourceChangedError, match=r"a\.jsonl: on .* it is not the file that was listed"):
        pretokenize(recipe, tmp_path / "root", engine=Meddled(meddle))


def test_a_shard_that_fails_takes_none_with_it(recipe: Recipe, tmp_path: Path) -> None:
    """What is finished beside it is recorded, and not made again."""
    recipe = msgspec.structs.replace(recipe, shard_size=500)

    class Failing(PicklingEngine):
        def _run(self, task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if task is tasks.write_shard and args[1].shard == 2:
                time.sleep(1)
                raise errors.StorageError("a disk is full", next_step="make room")
            return super()._run(task, args)

    with pytest.raises(errors.StorageError, match="a disk is full"):
        pretokenize(recipe, tmp_path / "root", engine=Failing(4), span_rows=20)
    there = {path.name for path in (tmp_path / "root").glob("train_*.npy")}
    recorded = {layout.shard_name(shard.index) for shard in manifest.load(tmp_path / "root").shards}
    assert recorded == there
    assert len(recorded) > 4


def test_other_software_on_a_machine_of_ray_is_told(
    ray_engine: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tasks.installed_software()
    monkeypatch.setattr(tasks, "installed_software", lambda: ours | {"gigatoken": "0.0.1"})
    with pytest.raises(errors.EngineError, match=r"expected gigatoken 0\.0\.1 .* found 0\.10"):
        pretokenize(recipe, tmp_path / "root", engine=ray_engine)


def test_what_killed_tasks_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ours = leftovers.process_space()
    for name in (
        f"{ours}-{process.pid}-x",
        f"{ours}-{os.getpid()}-x",
        f"another.1-{process.pid}-x",
        f"{process.pid}-x",
    ):
        (tmp_path / f"tokenmill-task-{name}").mkdir()
    leftovers.remove_leftovers()
    left = {path.name.removeprefix("tokenmill-task-") for path in tmp_path.iterdir()}
    # Of another container that shares the folder, and of older versions, nothing is known.
    assert left == {f"{ours}-{os.getpid()}-x", f"another.1-{process.pid}-x", f"{process.pid}-x"}


def test_containers_tell_their_processes_apart(tmp_path: Path) -> None:
    program = "from tokenmill.pipeline import leftovers; print(leftovers.process_space())"
    line = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program]
    inside = subprocess.run(line, capture_output=True, text=True, check=False)
    if inside.returncode:
        pytest.skip(f"no namespaces here: {inside.stderr.strip()}")
    assert inside.stdout.strip() != leftovers.process_space()


def test_tasks_of_long_documents_have_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SPAN_TEXT_NBYTES", 10_000)
    write_parquet(tmp_path / "c" / "a.parquet", [random.Random(i).randbytes(500).hex() for i in range(300)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), buffer_size=20, shard_size=10_000)
    engine = PicklingEngine(1)
    pretokenize(recipe, tmp_path / "root", engine=engine)
    spans = [span.rows for name, args in engine.done if name == "encode_spans" for _, span in args[1]]
    assert sum(spans) == 300
    assert max(spans) <= 10
    pretokenize(recipe, tmp_path / "reference")
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


def test_other_software_on_a_machine_is_told(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tasks.installed_software()
    tasks.unpacked.clear()
    answers = iter([ours, *[ours | {"gigatoken": "0.0.1"}] * 1_000])
    monkeypatch.setattr(tasks, "installed_software", lambda: next(answers))
    with pytest.raises(errors.EngineError, match=r"expected gigatoken 0\.10.*found 0\.0\.1"):
        pretokenize(recipe, tmp_path / "root", engine=PicklingEngine(1))


def test_no_credential_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tasks need of a remote corpus is pickled without keys, tokens and connections, and reads the same."""
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    site = Site()
    write_parquet(tmp_path / "a.parquet", ["one", "two"])
    site.add("owner/data", {"data/train-0.parquet": (tmp_path / "a.parquet").read_bytes()})
    with serving(site) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        corpus = find_corpus("hf://datasets/owner/data")
        data = pickle.dumps(corpus)
        assert b"secret" not in data
        source = pickle.loads(data).open(0)
        assert source.read(next(iter(source.spans()))).array.to_pylist() == ["one", "two"]
        corpus.location.close()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["cluster", "ray"])
def test_from_a_bucket_to_a_bucket(
    request: pytest.FixtureRequest,
    recipe: Recipe,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
    kind: str,
) -> None:
    """Read and sent by the tasks; resumed in the middle."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    on_ray = request.getfixturevalue("ray_engine") if kind == "ray" else None
    pretokenize(recipe, tmp_path / "reference", workers=1)
    with moto() as endpoint:
        client = s3_client(endpoint)
        for path in corpus.rglob("*.parquet"):
            client.put_object(
                Bucket="bucket", Key=f"corpus/{path.relative_to(corpus).as_posix()}", Body=path.read_bytes()
            )
        recipe = msgspec.structs.replace(recipe, dataset="s3://bucket/corpus")
        options: dict[str, Any] = {"store": StoreOptions(endpoint), "upload_to": "s3://bucket/out", "span_rows": 20}
        options["keep_local"] = keep
        first, second = on_ray or PicklingEngine(2), on_ray or PicklingEngine(2)
        with pytest.raises(StopError):
            pretokenize(recipe, tmp_path / "root", engine=first, on_progress=stop_after(8_000), **options)
        pretokenize(recipe, tmp_path / "root", engine=second, **options)
        found = bucket(endpoint, "out")
        expected = every_digest(tmp_path / "reference")
        assert {name: found.get(name) for name in expected} == expected
        assert layout.MANIFEST in found
        stays = {path.name for path in (tmp_path / "root").glob("train_*")}
        assert bool(stays) == keep


def test_machines_come_and_go(ray_cluster: Any, ray_engine: Any, recipe: Recipe, tmp_path: Path) -> None:
    """One joins, then both it and the first are lost in turn, with what they held; another had joined meanwhile."""
    recipe = msgspec.structs.replace(recipe, shard_size=500)
    pretokenize(recipe, tmp_path / "reference", workers=1)
    joined = [ray_cluster.add_node(num_cpus=2, object_store_memory=100 << 20)]
    lost: list[int] = []

    def show(progress: Progress) -> None:
        if len(lost) < 2 and progress.tokens > (2_000, 6_000)[len(lost)]:
            lost.append(progress.tokens)
            if len(lost) == 1:
                joined.append(ray_cluster.add_node(num_cpus=2, object_store_memory=100 << 20))
            ray_cluster.remove_node(joined[len(lost) - 1], allow_graceful=False)

    pretokenize(recipe, tmp_path / "root", engine=ray_engine, span_rows=5, on_progress=show)
    assert len(lost) == 2
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


def test_a_view_is_written_on_ray(ray_engine: Any, tmp_path: Path) -> None:
    """With metadata, through the disk and not: what threads write."""
    columns: dict[str, list[Any]] = {"lang": ["de" if i % 3 else None for i in range(200)], "n": list(range(200))}
    write_parquet(tmp_path / "corpus" / "a.parquet", [text(i, 2 + i % 50) for i in range(200)], **columns)
    recipe = Recipe(
        dataset=str(tmp_path / "corpus"),
        tokenizer=str(TOKENIZER),
        shard_size=900,
        metadata_columns=("lang", "number=n:int64"),
    )
    pretokenize(recipe, tmp_path / "threads")
    pretokenize(recipe, tmp_path / "root", engine=ray_engine)
    files = {path.name: path.read_bytes() for path in (tmp_path / "root").glob("*.*") if path.suffix != ".json"}
    assert files == {name: (tmp_path / "threads" / name).read_bytes() for name in files}
    build_view(ViewSpec(sources=[ViewSource(name="a", root=str(tmp_path / "root"))], seed=5), tmp_path / "view")
    write_view(tmp_path / "view", tmp_path / "out", shard_size=700)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*") if path.suffix != ".json"}
    assert len(expected) > 10
    for through_disk in (False, True):
        out = tmp_path / f"ray-{through_disk}"
        write_view(tmp_path / "view", out, shard_size=700, engine=ray_engine, through_disk=through_disk)
        assert {path.name: path.read_bytes() for path in out.glob("*.*") if path.suffix != ".json"} == expected
        assert verify(out).passed
    with ray_engine.hold(str(tmp_path / "held")), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenmill.ray.LEASE_SECONDS", 0.5)
        with pytest.raises(errors.DataRootError, match="another tokenmill run of this Ray"):
            write_view(tmp_path / "view", tmp_path / "held", engine=ray_engine)


def test_a_second_run_on_ray_is_refused(
    ray_engine: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.ray.LEASE_SECONDS", 0.5)
    target = str((tmp_path / "root").resolve())
    with ray_engine.hold(target), pytest.raises(errors.DataRootError, match="another tokenmill run of this Ray"):
        pretokenize(recipe, tmp_path / "root", engine=ray_engine)
    pretokenize(recipe, tmp_path / "root", engine=ray_engine)


def test_ray_at_the_command_line(recipe: Recipe, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenmill[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flags = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--buffer-size", 40, "--shard-size", 2_000, "--seed", 3]
    result = run_cli("pretokenize", tmp_path / "none", *flags, "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert result.returncode == 8
    assert "no Ray cluster at 127.0.0.1:1" in result.stderr
    assert "ray start --head" in result.stderr
    assert "Traceback" not in result.stderr
    with monkeypatch.context() as patch:  # the cluster this machine was in last is gone
        patch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        result = run_cli("pretokenize", tmp_path / "none", *flags, "--engine", "ray")
        assert (result.returncode, "no Ray cluster at auto" in result.stderr) == (8, True), result.stderr
    result = run_cli("pretokenize", tmp_path / "none", *flags, "--engine", "ray", "--ray-address", "ray://h:10001")
    assert (result.returncode, "expected HOST:PORT" in result.stderr) == (8, True)
    assert run_cli("pretokenize", tmp_path / "none", *flags, "--ray-address", "local").returncode == 2
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = run_cli("pretokenize", tmp_path / "root", *flags, "--engine", "ray", "--ray-address", "local")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "home" / ".ray" / "auth_token").exists()  # it would turn on the user's authentication
    pretokenize(recipe, tmp_path / "reference", workers=1)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")


class Counting(PicklingEngine):
    """Counts the spans that are encoded at the same time; for a while none of its workers is there."""

    active = most = 0

    def _run(self, task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        is_span = task.__name__ == "encode_spans"
        self.active += is_span
        self.most = max(self.most, self.active)
        self.workers = 0 if 20 < len(self.done) < 25 else 4
        try:
            return super()._run(task, args)
        finally:
            self.active -= is_span


def test_large_spans_keep_every_worker_busy(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their text is not in this process, so its size bounds nothing; and workers may come and go."""
    monkeypatch.setattr(driver, "BATCH_NBYTES", 1)
    engine = Counting(4)
    engine.delay = 0.02
    pretokenize(recipe, tmp_path / "root", engine=engine, span_rows=10)
    assert engine.most == 4
    pretokenize(recipe, tmp_path / "reference", workers=1)
    assert every_digest(tmp_path / "root") == every_digest(tmp_path / "reference")

"""Exports: the files hold what the data set has, by plain readers of each format; guards, kills, and resuming."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import DIE_AT, command, run_cli, text, write_parquet
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.cli.interchange import FORMATS as FORMAT_NAMES
from tokenmill.dataroot import atomic, layout
from tokenmill.interchange import huggingface, litdata, llmc, mds, position
from tokenmill.interchange.export import FORMATS, export, plan_export
from tokenmill.interchange.output import EXPORT
from tokenmill.interchange.position import POSITIONS
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

SEQ_LEN = 16
EOS = 2


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As shards, as one file, of 32 bits, cut off inside a document, and views of these."""
    folder = tmp_path_factory.mktemp("roots")
    texts: list[str | None] = [text(i, 2 + i % 40) for i in range(120)]
    texts[7:9] = [None, "with </s> inside"]
    write_parquet(folder / "corpus" / "a.parquet", texts[:50], lang=["de", None] * 25)
    write_parquet(folder / "corpus" / "b" / "c, d.parquet", texts[50:], lang=["en"] * 70)
    recipe = Recipe(
        dataset=str(folder / "corpus"),
        tokenizer=str(TOKENIZER),
        shard_size=700,
        seq_len=SEQ_LEN,
        metadata_columns=("lang",),
    )
    made = {}
    for name, changes in (
        ("shards", {}),
        ("joined", {}),
        ("wide", {"dtype": "uint32"}),
        ("wide joined", {"dtype": "uint32"}),
        ("cut", {"total_tokens": 1_001, "seed": 1}),
    ):
        made[name] = folder / name
        pretokenize(msgspec.structs.replace(recipe, **changes), made[name])
        if "joined" in name:
            consolidate(made[name])
    for name, shuffle, names, split in (
        ("view", "documents", ["shards", "joined"], "train"),
        ("validation", "documents", ["shards", "joined"], "validation"),
        ("samples", "samples", ["joined"], "train"),
    ):
        sources = [ViewSource(name=each, root=str(made[each])) for each in names]
        spec = ViewSpec(sources=sources, shuffle=shuffle, seed=3, seq_len=8, split=split)
        build_view(msgspec.structs.replace(spec, holdout=0.2 * (len(names) > 1)), folder / name)
        made[name] = folder / name
    return made


class Read:
    """What a plain reader found: tokens, and lengths of documents where the format has them."""

    def __init__(self, tokens: Any, lengths: Any = None, more: Any = None) -> None:
        self.tokens = np.asarray(tokens).astype(np.int64)
        self.lengths = None if lengths is None else np.asarray(lengths).astype(np.int64)
        self.more = more


def read_megatron(out: Path, split: str) -> Read:
    data = (out / f"{split}.idx").read_bytes()
    assert data[:9] == b"MMIDIDX\0\0"
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", data, 9)
    assert (version, bounds) == (1, sequences + 1)
    lengths = np.frombuffer(data, "<i4", sequences, 34)
    begins = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(data, "<i8", bounds, 34 + 12 * sequences)
    assert len(data) == 42 + 20 * sequences
    dtype = np.dtype({8: "<u2", 4: "<i4"}[code])
    assert documents.tolist() == list(range(bounds))
    assert begins.tolist() == [0, *(np.cumsum(lengths.astype(np.int64)) * dtype.itemsize).tolist()][:-1]
    return Read(np.fromfile(out / f"{split}.bin", dtype), lengths)


def read_nanogpt(out: Path, split: str) -> Read:
    assert pickle.loads((out / "meta.pkl").read_bytes()) == {"vocab_size": 4096}
    return Read(np.memmap(out / f"{split}.bin", np.uint16, "r"))


def read_llmc(out: Path, split: str) -> Read:
    pieces = []
    for path in sorted(out.glob(f"{split}_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}[int(header[0]), int(header[1])]
        pieces.append(np.fromfile(path, dtype, offset=1024))
        assert len(pieces[-1]) == header[2]
        assert not header[3:].any()
    return Read(np.concatenate(pieces))


def read_olmo(out: Path, split: str) -> Read:
    with gzip.open(out / split / "part-00000.csv.gz", "rt", newline="") as file:
        rows = list(csv.reader(file))
    starts, ends = ([int(row[n]) for row in rows] for n in (0, 1))
    assert starts == [0, *ends[:-1]]
    origins = [(row[3], int(row[4]) - 1) for row in rows]
    assert [row[2] for row in rows] == [f"{source}:{number}" for source, number in origins]
    return Read(np.fromfile(out / split / "part-00000.npy", "<u2"), np.subtract(ends, starts), origins)


def read_datatrove(out: Path, split: str) -> Read:
    stem = out / split / f"00000_{split}.ds"
    ends = np.fromfile(f"{stem}.index", "<u8").astype(np.int64)
    name, count, _ = Path(f"{stem}.metadata").read_text().split("\n")
    tokens = np.fromfile(stem, "<u2")
    assert (name, int(count)) == (f"{TOKENIZER}|2", len(tokens))
    return Read(tokens, np.diff(ends, prepend=0))


def read_mds(out: Path, split: str) -> Read:
    index = json.loads((out / split / "index.json").read_text())
    pieces = []
    for shard in index["shards"]:
        data = (out / split / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"] < 1 << 32
        assert hashlib.sha256(data).hexdigest() == shard["raw_data"]["hashes"]["sha256"]
        (samples,) = struct.unpack_from("<I", data)
        offsets = np.frombuffer(data, "<u4", samples + 1, 4)
        config = json.loads(data[8 + 4 * samples : offsets[0]])
        assert config == {key: value for key, value in shard.items() if key not in ("samples", "raw_data", "zip_data")}
        (encoding,) = config["column_encodings"]
        _, kind, length = encoding.split(":")
        assert (samples, offsets[-1]) == (shard["samples"], len(data))
        for begin, end in itertools.pairwise(offsets):
            pieces.append(np.frombuffer(data[begin:end], kind))
            assert len(pieces[-1]) == int(length)
    return Read(np.concatenate(pieces))


def read_litdata(out: Path, split: str) -> Read:
    index = json.loads((out / split / "index.json").read_text())
    kind = {"no_header_numpy:5": "<u2", "no_header_numpy:6": "<u4"}[index["config"]["data_format"][0]]
    pieces = []
    for chunk in index["chunks"]:
        data = (out / split / chunk["filename"]).read_bytes()
        assert struct.unpack_from("<III", data) == (1, 12, len(data))
        assert (chunk["chunk_bytes"], chunk["chunk_size"]) == (len(data), 1)
        pieces.append(np.frombuffer(data, kind, offset=12))
        assert len(pieces[-1]) == chunk["dim"]
    assert all(len(piece) % 8 == 0 for piece in pieces[:-1])
    return Read(np.concatenate(pieces))


def read_parquet(out: Path, split: str) -> Read:
    name = {"train": "train", "val": "validation"}[split]
    tables = [pq.read_table(path) for path in sorted((out / "data").glob(f"{name}-*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    documents = [row["input_ids"] for row in rows]
    assert f"  - split: {name}\n" in (out / "README.md").read_text()
    origins = [(row["source"], row["row"], row["lang"]) for row in rows]
    return Read(list(itertools.chain(*documents)), list(map(len, documents)), origins)


def read_torchtitan(out: Path, split: str) -> Read:
    itemsize = json.loads((out / EXPORT).read_text())["splits"][split]["dtype"] == "uint32"
    bounds = np.load(out / split / "document_offsets.npy")
    return Read(np.fromfile(out / split / "tokens.bin", "<u4" if itemsize else "<u2"), np.diff(bounds))


READERS: dict[str, Callable[[Path, str], Read]] = {
    name: globals()[f"read_{name}"] for name in FORMAT_NAMES if f"read_{name}" in globals()
}


def expected(root: Path) -> Read:
    found = open_root(root)
    tokens = np.concatenate([*found.tokens().chunks(1 << 20)])
    parts = found.documents().parts_between(0, len(tokens)) if "samples" not in root.name else []
    bounds = [part.document.start for part in parts] + [len(tokens)]
    origins = [(d.source, d.row, d.metadata.get("lang")) for d, _, _ in parts]
    return Read(tokens, np.diff(bounds), origins)


def test_every_format_has_a_name_and_a_reader() -> None:
    assert list(FORMATS) == list(FORMAT_NAMES) == list(READERS)


SMALL = {
    (llmc, "FILE_TOKENS"): 300,
    (mds, "SHARD_NBYTES"): 8192 + 500,
    (litdata, "CHUNK_NBYTES"): 400,
    (huggingface, "FILE_NBYTES"): 1_600,
    (huggingface, "GROUP_NBYTES"): 400,
}


@pytest.mark.parametrize("name", ["shards", "joined", "wide", "wide joined", "cut", "view", "samples"])
@pytest.mark.parametrize("to", FORMAT_NAMES)
def test_files_hold_what_the_data_set_has(
    roots: dict[str, Path], tmp_path: Path, name: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as large as they are for users, and small ones, so that there are several."""
    if name not in ("wide joined", "samples"):
        for (module, constant), value in SMALL.items():
            monkeypatch.setattr(module, constant, value)
    about_documents = to in ("megatron", "olmo", "datatrove", "parquet", "torchtitan")
    if name == "samples" and about_documents:
        with pytest.raises(errors.ExportError, match="its samples are shuffled, which cuts documents"):
            export(roots[name], tmp_path / "out", to)
        return
    planned = plan_export(roots[name], tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    report = export(roots[name], tmp_path / "out", to)
    assert (report.status, planned.status, report.notes) == ("complete", "planned", planned.notes)
    assert report.files.keys() == planned.files.keys()
    wanted, found = expected(roots[name]), READERS[to](tmp_path / "out", "train")
    tokens = wanted.tokens
    if to in ("mds",):
        length = open_root(roots[name]).seq_len
        tokens = tokens[: len(tokens) // length * length]
    if to == "llmc":
        assert found.tokens[0] == EOS
        tokens = np.concatenate([[EOS], tokens if tokens[-1] != EOS else tokens[:-1]])
    assert np.array_equal(found.tokens, tokens)
    if about_documents:
        assert found.lengths.tolist() == wanted.lengths.tolist()
    if to == "olmo":
        assert found.more == [origin[:2] for origin in wanted.more]
    if to == "parquet":
        assert found.more == wanted.more
    links = to in ("megatron", "nanogpt", "datatrove", "olmo", "torchtitan") and "joined" in name
    links = links and not (to in ("nanogpt", "datatrove", "olmo") and "wide" in name)
    assert report.linked == links
    if name == "cut":
        assert any("the last document is cut off" in note for note in report.notes)
    if name == "shards":
        inner = np.count_nonzero(wanted.tokens == EOS) - len(wanted.lengths)
        assert inner > 100
        assert any(f"train: {inner} end tokens (id 2) lie inside documents" in note for note in report.notes)
    record = json.loads((tmp_path / "out" / EXPORT).read_text())
    stored = np.concatenate([*open_root(roots[name]).tokens().chunks(1 << 20)])
    assert record["splits"]["train"]["tokens_sha256"] == hashlib.sha256(stored.tobytes()).hexdigest()
    assert set(record["files"]) == {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    } - {EXPORT, layout.LOCK}
    before = (tmp_path / "out" / EXPORT).stat().st_mtime_ns
    assert export(roots[name], tmp_path / "out", to).status == "already complete"
    assert (tmp_path / "out" / EXPORT).stat().st_mtime_ns == before


@pytest.mark.parametrize("to", FORMAT_NAMES)
def test_train_and_validation(roots: dict[str, Path], tmp_path: Path, to: str) -> None:
    result = run_cli("export", roots["view"], tmp_path / "out", "--to", to, "--split", roots["validation"])
    assert result.returncode == 0, result.stderr
    for split, name in (("train", "view"), ("val", "validation")):
        tokens = READERS[to](tmp_path / "out", split).tokens
        wanted = expected(roots[name]).tokens
        shift = to == "llmc"
        assert np.array_equal(tokens[shift:], wanted[: len(tokens) - shift])
    assert str(tmp_path / "out") in result.stdout.splitlines()[-1]


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in (EXPORT, layout.LOCK)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("to", ["megatron", "mds"])
def test_killed_at_any_step_it_goes_on(roots: dict[str, Path], tmp_path: Path, to: str) -> None:
    export(roots["shards"], tmp_path / "whole", to)
    wanted = contents(tmp_path / "whole")
    for step in (1, 2, 4, 5, 7, 12, 20):
        out = tmp_path / f"out-{step}"
        line = command("export", roots["shards"], out, "--to", to, "--quiet")
        died = subprocess.run([sys.executable, "-c", DIE_AT, str(step), *line[3:]], timeout=60, check=False)
        assert died.returncode in (-signal.SIGKILL, 0)
        assert export(roots["shards"], out, to).status == ("complete" if died.returncode else "already complete")
        assert contents(out) == wanted
        if died.returncode == 0:
            return


@pytest.mark.usefixtures("opened_once")
@pytest.mark.parametrize("name", ["joined", "cut", "view"])
@pytest.mark.parametrize("to", FORMAT_NAMES)
def test_a_position_of_a_trainer_leads_back_to_file_and_row(
    roots: dict[str, Path], tmp_path: Path, name: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every document, and many samples, windows and tokens: what the trainer has there is of the documents named."""
    for module in (llmc, position):
        monkeypatch.setattr(module, "FILE_TOKENS", 300)
    export(roots[name], tmp_path / "out", to)
    found, length = READERS[to](tmp_path / "out", "train"), open_root(roots[name]).seq_len
    whole = expected(roots[name])
    ends = np.cumsum(whole.lengths)

    def check(at: str, tokens: list[int]) -> None:
        place = position.where_trainer(roots[name], to, at)
        parts = []
        for part in place.documents:
            number = int(np.searchsorted(ends, part.begin, side="right"))
            assert whole.more[number][:2] == (part.source, part.row)
            begin = int(ends[number] - whole.lengths[number])
            assert (part.document_begin, part.document_end) == (part.begin - begin, part.end - begin)
            parts += whole.tokens[part.begin : part.end].tolist()
        assert parts == tokens

    tokens = found.tokens.tolist()
    if to in ("megatron", "parquet"):
        bounds = np.cumsum([0, *found.lengths]).tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            check(str(number), tokens[begin:end])
            if number % 9 == 0:
                check(f"{number}:{end - begin - 1}", tokens[end - 1 : end])
    elif to in ("mds", "litdata", "datatrove"):
        length += to == "datatrove"
        for number in range(0, len(tokens) // length, 31 if name == "view" else 3):
            check(str(number), tokens[number * length : (number + 1) * length])
            if number % 9 == 0:
                check(f"{number}:3", tokens[number * length + 3 : number * length + 4])
    elif to == "llmc":
        for at in range(1, len(tokens), 61):
            check(f"{at // 300}:{at % 300}", tokens[at : at + 1])
    else:
        for at in range(0, len(tokens), 61):
            check(str(at), tokens[at : at + 1])
    for wrong in ("", "x", "1:x", "-1", "1:2:3", str(1 << 40)):
        with pytest.raises(errors.QueryError, match="position"):
            position.where_trainer(roots[name], to, wrong if to != "llmc" or wrong else "7")
    if name == "joined":
        result = run_cli("where", roots[name], "--trainer", to, "--position", "0:1" if ":" in POSITIONS[to] else "1")
        assert (result.returncode, "row" in result.stdout) == (0, True), result.stderr


def test_refusals(roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(roots["shards"], tmp_path / "out", "nanogpt")
    with pytest.raises(errors.ExportError, match=r"holds another export: nanogpt of"):
        export(roots["shards"], tmp_path / "out", "megatron")
    with pytest.raises(errors.ExportError, match=r"holds another export"):
        export(roots["cut"], tmp_path / "out", "nanogpt")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").touch()
    with pytest.raises(errors.ExportError, match="holds something that is no export"):
        export(roots["shards"], tmp_path / "foreign", "nanogpt")
    with pytest.raises(errors.ExportError, match="format 'gguf': not known"):
        export(roots["shards"], tmp_path / "new", "gguf")
    with pytest.raises(errors.ExportError, match="another tokenizer or dtype"):
        export(roots["shards"], tmp_path / "new", "llmc", validation=roots["wide"])
    with pytest.raises(errors.ExportError, match="is the same data as"):
        export(roots["shards"], tmp_path / "new", "llmc", validation=roots["shards"])
    with pytest.raises(errors.DataRootError, match="expected"):
        export(tmp_path / "nothing", tmp_path / "new", "llmc")
    joined = tmp_path / "joined"
    joined.mkdir()
    for name in (layout.TOKENS, layout.SAMPLE_IDS, layout.CONSOLIDATED):
        os.link(roots["joined"] / name, joined / name)
    with pytest.raises(errors.ExportError, match=r"expected a manifest\.json"):
        export(joined, tmp_path / "new", "megatron")
    build_view(
        ViewSpec(sources=[ViewSource(name="s", root=str(roots["shards"]))], seq_len=1 << 20), tmp_path / "no-sample"
    )
    for to in ("mds", "litdata"):
        with pytest.raises(errors.ExportError, match="tokens make none of 1,048,576"):
            export(tmp_path / "no-sample", tmp_path / "new", to)
    monkeypatch.setattr("tokenmill.interchange.format.LONGEST_INT32", 30)
    for to in ("megatron", "parquet"):
        with pytest.raises(errors.ExportError, match="lengths of 32 bits: expected documents of at most 30 tokens"):
            export(roots["shards"], tmp_path / "new", to)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("vocab_size", "fits"), [(65_535, True), (65_536, True), (65_537, False)])
def test_ids_of_sixteen_bits(
    roots: dict[str, Path], tmp_path: Path, vocab_size: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the number of ids, added tokens included, whatever the data set stores."""
    for kind in FORMATS.values():
        from tokenmill.interchange.dataset import ExportedDataset

        dataset = ExportedDataset(roots["wide"])
        dataset.tokenizer = msgspec.structs.replace(dataset.tokenizer, vocab_size=vocab_size)
        if kind.name == "nanogpt" and not fits:
            with pytest.raises(errors.ExportError, match="at most 65536, added tokens included, found 65537"):
                kind.refuse(dataset)
            continue
        kind.refuse(dataset)
        sizes = kind.files(dataset, "train")
        largest = max(sizes.values())
        if kind.name in ("datatrove", "olmo"):
            assert largest == dataset.tokens * (2 if fits else 4)


def test_what_was_written_is_read_again(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a disk that keeps another last byte."""
    publish = atomic.AtomicFile.publish

    def damaging(file: atomic.AtomicFile) -> None:
        publish(file)
        if file.path.suffix == ".bin":
            file.path.write_bytes(file.path.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(atomic.AtomicFile, "publish", damaging)
    with pytest.raises(errors.StorageError, match=r"train\.bin: expected what was written, xxh3-128"):
        export(roots["shards"], tmp_path / "out", "megatron")


@pytest.mark.parametrize("copy", [False, True])
def test_a_damaged_tokens_bin_is_not_exported(roots: dict[str, Path], tmp_path: Path, *, copy: bool) -> None:
    root = Path(shutil.copytree(roots["joined"], tmp_path / "root"))
    data = bytearray((root / layout.TOKENS).read_bytes())
    data[100] ^= 1
    (root / layout.TOKENS).write_bytes(data)
    for to in ("megatron", "mds"):
        with pytest.raises(errors.DataRootError, match=r"tokens\.bin: expected sha256 .* by consolidated\.json, found"):
            export(root, tmp_path / f"out-{to}", to, copy=copy)
        assert not json.loads((tmp_path / f"out-{to}" / "export.json").read_text())["complete"]


def test_a_copy_shares_nothing_with_the_data_set(roots: dict[str, Path], tmp_path: Path) -> None:
    report = export(roots["joined"], tmp_path / "out", "megatron", copy=True)
    assert report.linked == 0
    assert (tmp_path / "out" / "train.bin").stat().st_ino != (roots["joined"] / layout.TOKENS).stat().st_ino
    assert TokenDataset(roots["joined"]).tokens * 2 == (tmp_path / "out" / "train.bin").stat().st_size


def test_at_the_command_line(roots: dict[str, Path], tmp_path: Path) -> None:
    line = ["export", roots["joined"], tmp_path / "out", "--to", "megatron"]
    planned = run_cli(*line, "--dry-run")
    assert (planned.returncode, "nothing was written" in planned.stdout) == (0, True), planned.stderr
    assert not (tmp_path / "out").exists()
    found = json.loads(run_cli(*line, "--json").stdout)
    assert (found["status"], found["linked"], sorted(found["files"])) == ("complete", 1, ["train.bin", "train.idx"])
    again = run_cli(*line)
    assert "already complete" in again.stdout
    refused = run_cli("export", roots["samples"], tmp_path / "x", "--to", "olmo")
    assert (refused.returncode, "build a view with shuffle" in refused.stderr) == (2, True)

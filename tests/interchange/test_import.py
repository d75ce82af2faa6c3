"""Imports: an export that is imported is the data set again, and what others wrote is taken or refused by name."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DIE_AT, command, run_cli, text, write_parquet
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest as manifests
from tokenmill.interchange import huggingface, incoming, litdata, llmc, mds
from tokenmill.interchange.export import FORMATS, export
from tokenmill.interchange.importing import import_data
from tokenmill.loading.dataset import TokenDataset
from tokenmill.loading.provenance import show, where_token
from tokenmill.loading.view import open_root
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

EOS = 2
SAY_BOUNDS = ("megatron", "olmo", "datatrove", "parquet", "torchtitan")


def content(root: Path) -> tuple[list[int], list[int]]:
    """All tokens, and where documents begin."""
    found = open_root(root)
    tokens = np.concatenate([*found.tokens().chunks(1 << 20)]).tolist()
    return tokens, found.documents().starts_between(0, len(tokens)).tolist()


@settings(max_examples=20)
@given(
    rows=st.lists(st.text(max_size=30) | st.sampled_from(["a </s> b", "</s>"]), min_size=1, max_size=30),
    to=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(["uint16", "uint32"]),
    is_view=st.booleans(),
    is_cut=st.booleans(),
    shard_size=st.sampled_from([5, 40, 10_000]),
    block=st.sampled_from([1, 7, 1 << 20]),
)
def test_an_export_that_is_imported_is_the_data_set_again(
    rows: list[str],
    to: str,
    dtype: str,
    is_view: bool,
    is_cut: bool,
    shard_size: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Tokens and bounds; where the format has no bounds, EOS in a text is one more, and MDS has whole samples only."""
    folder = tmp_path_factory.mktemp("import")
    write_parquet(folder / "corpus" / "a.parquet", [*rows, "so that there is one"])
    total = 7 if is_cut else None
    recipe = Recipe(
        dataset=str(folder / "corpus"), tokenizer=str(TOKENIZER), dtype=dtype, seq_len=4, total_tokens=total
    )
    pretokenize(recipe, folder / "root")
    root = folder / "root"
    if is_view and not is_cut:
        build_view(ViewSpec(sources=[ViewSource(name="s", root=str(root))], seed=1), folder / "view")
        root = folder / "view"
    tokens, starts = content(root)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (llmc, "FILE_TOKENS", 6),
            (mds, "SHARD_NBYTES", 8192 + 50),
            (litdata, "CHUNK_NBYTES", 30),
            (huggingface, "FILE_NBYTES", 40),
            (huggingface, "GROUP_NBYTES", 20),
            (incoming, "BLOCK_TOKENS", block),
        ):
            patch.setattr(module, name, value)
        if to in ("mds", "litdata") and len(tokens) < 4:
            return
        export(root, folder / "out", to)
        report = import_data(folder / "out", folder / "again", to, shard_size=shard_size, seq_len=4)
    if to == "mds":
        tokens = tokens[: len(tokens) // 4 * 4]
    if to not in SAY_BOUNDS:
        starts = [0, *(i + 1 for i, token in enumerate(tokens[:-1]) if token == EOS)]
    assert content(folder / "again") == (tokens, starts)
    assert (report.documents, report.is_guess) == (len(starts), to not in SAY_BOUNDS)
    result = verify(folder / "again")
    assert result.passed, result.findings
    assert (
        import_data(folder / "out", folder / "again", to, shard_size=shard_size, seq_len=4).status == "already complete"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    texts = [text(i, 2 + i % 30) for i in range(100)]
    write_parquet(tmp_path / "corpus" / "a.parquet", texts)
    pretokenize(Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER), seq_len=16), tmp_path / "root")
    return tmp_path / "root"


def test_all_of_tokenmill_works_on_it(root: Path, tmp_path: Path) -> None:
    export(root, tmp_path / "out", "megatron")
    import_data(tmp_path / "out", tmp_path / "in", "megatron", seq_len=16, shard_size=300, tokenizer=str(TOKENIZER))
    consolidate(tmp_path / "in")
    assert verify(tmp_path / "in").passed
    assert np.array_equal(TokenDataset(tmp_path / "in")[:], TokenDataset(root)[:])
    assert [token.id for token in show(tmp_path / "in", 3).tokens] == TokenDataset(root)[3].tolist()
    (part,) = where_token(tmp_path / "in", 0).documents
    assert (part.source, part.row, part.text_xxh3) == ("train.bin", 0, None)
    build_view(ViewSpec(sources=[ViewSource(name="s", root=str(tmp_path / "in"))], holdout=0.3), tmp_path / "view")
    assert verify(tmp_path / "view").passed
    export(tmp_path / "view", tmp_path / "second", "parquet")
    for line in (["info"], ["stats"], ["where", "--sample", 2]):
        result = run_cli(line[0], tmp_path / "in", *line[1:])
        assert result.returncode == 0, result.stderr
    with pytest.raises(errors.DataRootError, match="has no corpus to compare with"):
        verify(tmp_path / "in", deep=3)
    with pytest.raises(errors.DataRootError, match="was imported from"):
        pretokenize(Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER)), tmp_path / "in")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        import_data(tmp_path / "out", tmp_path / "in", "megatron", seq_len=32, shard_size=300, tokenizer=str(TOKENIZER))


@pytest.mark.parametrize("copy", [True, False])
def test_killed_at_any_step_it_goes_on(root: Path, tmp_path: Path, *, copy: bool) -> None:
    def made(folder: Path) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".parquet", ".bin")
        }

    export(root, tmp_path / "out", "datatrove")
    source = (tmp_path / "out" / "train" / "00000_train.ds").read_bytes()
    import_data(tmp_path / "out", tmp_path / "whole", "datatrove", shard_size=1_000, copy=copy)
    wanted = made(tmp_path / "whole")
    assert len(wanted) > 4
    for step in (1, 2, 4, 6, 7, 8, 10, 12, 14):
        again = tmp_path / f"in-{step}"
        line = command("import", tmp_path / "out", again, "--from", "datatrove", "--shard-size", 1_000, "--quiet")
        line += ["--copy"] * copy
        died = subprocess.run([sys.executable, "-c", DIE_AT, str(step), *line[3:]], timeout=60, check=False)
        assert died.returncode in (-signal.SIGKILL, 0)
        import_data(tmp_path / "out", again, "datatrove", shard_size=1_000, copy=copy)
        assert made(again) == wanted
        assert verify(again).passed
        assert (tmp_path / "out" / "train" / "00000_train.ds").read_bytes() == source
    for lost in ("train_000001.npy" if copy else "tokens.bin", "documents_000001.parquet"):
        (tmp_path / "whole" / lost).unlink()
        report = import_data(tmp_path / "out", tmp_path / "whole", "datatrove", shard_size=1_000, copy=copy)
        assert (report.status, made(tmp_path / "whole")) == ("complete", wanted)


def test_a_file_that_is_all_tokens_is_linked(root: Path, tmp_path: Path) -> None:
    """On the same file system, where nothing is to be added; else, and if asked for, its tokens are copied."""
    export(root, tmp_path / "out", "megatron")
    source = tmp_path / "out" / "train.bin"
    data = source.read_bytes()
    for shard_size in (300, 10**6):
        linked = tmp_path / f"linked-{shard_size}"
        report = import_data(tmp_path / "out", linked, "megatron", seq_len=16, shard_size=shard_size)
        assert (report.linked, report.status) == (True, "complete")
        assert (linked / "tokens.bin").samefile(source)
        assert not list(linked.glob("*.npy"))
        assert content(linked) == content(root)
        assert verify(linked).passed
        assert np.array_equal(TokenDataset(linked)[:], TokenDataset(root)[:])
        report = import_data(tmp_path / "out", linked, "megatron", seq_len=16, shard_size=shard_size)
        assert (report.linked, report.status) == (True, "already complete")
    consolidate(linked, seq_len=32)
    assert (TokenDataset(linked).seq_len, source.read_bytes()) == (32, data)
    copied = import_data(tmp_path / "out", tmp_path / "copied", "megatron", seq_len=16, shard_size=300, copy=True)
    assert (copied.linked, copied.shards) == (False, len(list((tmp_path / "copied").glob("*.npy"))))
    result = run_cli("import", tmp_path / "out", tmp_path / "told", "--from", "megatron")
    assert "tokens.bin is a link to the file that was imported" in result.stdout
    consolidate(tmp_path / "copied", consume=True)
    report = import_data(tmp_path / "out", tmp_path / "copied", "megatron", seq_len=16, shard_size=300)
    assert (report.linked, report.status) == (False, "already complete")
    # Of a file that changed since, the data set is wrong, and says so.
    source.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert not verify(linked).passed


def test_a_link_that_a_killed_run_left_is_not_there_twice(root: Path, tmp_path: Path) -> None:
    """The system renames nothing where both names are those of one file."""
    export(root, tmp_path / "out", "megatron")
    linked = tmp_path / "in"
    import_data(tmp_path / "out", linked, "megatron", seq_len=16)
    whole = manifests.load_consolidated(linked)
    (linked / "tokens.bin").rename(linked / "tokens.bin.partial")
    manifests.save_consolidated(linked, msgspec.structs.replace(whole, complete=False))
    assert import_data(tmp_path / "out", linked, "megatron", seq_len=16).status == "complete"
    assert not (linked / "tokens.bin.partial").exists()
    assert (linked / "tokens.bin").samefile(tmp_path / "out" / "train.bin")
    assert verify(linked).passed


def test_documents_without_an_end_are_given_one(tmp_path: Path) -> None:
    documents = [[[5, 6], [7, EOS]], [], [[9]], [[8, 8]], [[EOS]]]
    megatron(tmp_path / "text_document", documents, "<u2", 8)
    with pytest.raises(errors.ImportDataError, match=r"document 2: expected id 2 at its end.*") as refused:
        import_data(tmp_path / "text_document", tmp_path / "in", "megatron", eos_id=EOS, seq_len=2)
    assert "--append-eos" in (refused.value.next_step or "")
    options: dict[str, Any] = {"eos_id": EOS, "seq_len": 2, "append_eos": True}
    for shard_size in (3, 1 << 20):
        report = import_data(
            tmp_path / "text_document", tmp_path / f"{shard_size}", "megatron", shard_size=shard_size, **options
        )
        assert content(tmp_path / f"{shard_size}") == ([5, 6, 7, EOS, 9, EOS, 8, 8, EOS, EOS], [0, 4, 6, 9])
        assert (report.linked, report.documents) == (False, 4)
        assert "were given one" in report.notes[-1]
        assert verify(tmp_path / f"{shard_size}").passed
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        import_data(tmp_path / "text_document", tmp_path / "3", "megatron", shard_size=3, eos_id=EOS, seq_len=2)


def megatron(prefix: Path, documents: list[list[list[int]]], dtype: str, code: int) -> None:
    """A prefix with documents of several sequences, as preprocess_data.py writes them for text split into sentences."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = [np.array(sequence, dtype) for sequence in sequences]
    prefix.with_suffix(".bin").write_bytes(b"".join(each.tobytes() for each in tokens))
    lengths = np.array([len(each) for each in tokens], "<i4")
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * np.dtype(dtype).itemsize
    bounds = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(tokens), len(bounds))
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + begins.tobytes() + bounds.tobytes())


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5), ("u1", 1)])
def test_megatron_of_others(tmp_path: Path, dtype: str, code: int) -> None:
    """Documents of several sequences, one without any, types that are wider than the ids; by its prefix."""
    documents = [[[5, 6], [7, EOS]], [], [[EOS]], [[8, EOS]]]
    megatron(tmp_path / "my_text_document", documents, dtype, code)
    import_data(tmp_path / "my_text_document", tmp_path / "in", "megatron", eos_id=EOS, seq_len=2)
    assert content(tmp_path / "in") == ([5, 6, 7, EOS, EOS, 8, EOS], [0, 4, 5])
    manifest = manifests.load(tmp_path / "in")
    assert manifest is not None
    assert (manifest.ledger[0].rows, manifest.ledger[0].empty) == (4, 1)
    assert verify(tmp_path / "in").passed


def test_csvs_of_dolma(tmp_path: Path) -> None:
    """CRLF, names in quotes, files after each other."""
    for number, ends in enumerate(([3, 4], [2])):
        np.arange(3, 3 + ends[-1], dtype="<u2").tofile(tmp_path / f"part-{number}.npy")
        with gzip.open(tmp_path / f"part-{number}.csv.gz", "wt", newline="") as file:
            for begin, end in zip([0, *ends], ends, strict=False):
                csv.writer(file).writerow([begin, end, "a, b", "/x/y.gz", 1])
        tokens = np.fromfile(tmp_path / f"part-{number}.npy", "<u2")
        tokens[np.array(ends) - 1] = EOS
        tokens.tofile(tmp_path / f"part-{number}.npy")
    import_data(tmp_path, tmp_path / "in", "olmo", eos_id=EOS, dtype="uint16", seq_len=2)
    assert content(tmp_path / "in") == ([3, 4, EOS, EOS, 3, EOS], [0, 3, 4])
    assert where_token(tmp_path / "in", 5).documents[0].source == "part-1.npy"


def test_bare_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([5, EOS, 6], "<u2"))
    np.save(tmp_path / "b.npy", np.array([7, EOS, 8], "<u2"))
    report = import_data(tmp_path, tmp_path / "in", "raw", eos_id=EOS, seq_len=2)
    assert content(tmp_path / "in") == ([5, EOS, 6, 7, EOS, 8], [0, 2, 5])
    assert report.is_guess
    assert "do not say" in report.notes[0] or "does not say where documents end" in report.notes[0]
    np.array([5, EOS], "<u4").tofile(tmp_path / "c.bin")
    with pytest.raises(errors.ImportDataError, match="nothing says how large a token is"):
        import_data(tmp_path / "c.bin", tmp_path / "x", "raw", eos_id=EOS)
    import_data(tmp_path / "c.bin", tmp_path / "wide", "raw", eos_id=EOS, dtype="uint32", seq_len=2)
    assert content(tmp_path / "wide") == ([5, EOS], [0])


def spoil(path: Path, change: Any) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("to", "name", "change", "message"),
    [
        ("megatron", "train.bin", lambda data: data[:-2], "holds .* tokens, and its documents"),
        ("megatron", "train.idx", lambda data: b"x" + data, "not a Megatron index"),
        ("megatron", "train.idx", lambda data: data[:100], "found version 1"),
        ("datatrove", "train/00000_train.ds", lambda data: data[:-1], "expected tokens of 2 bytes"),
        ("llmc", "train_000000.bin", lambda data: data[:-2], "expected the header of llm.c"),
        ("mds", "train/shard.00000.mds", lambda data: data[:-2], r"expected \d+ bytes, found"),
        ("mds", "train/index.json", lambda data: b"{}", "expected a list of shards"),
        ("litdata", "train/chunk-0-0.bin", lambda data: data + b"xx", r"expected \d+ bytes, found"),
        ("olmo", "train/part-00000.npy", lambda data: data + b"xx", "holds .* tokens, and its documents"),
        ("nanogpt", "train.bin", lambda data: b"\xff\xff" + data, "document 0: expected ids below 4096, found 65535"),
        ("torchtitan", "train/tokens.bin", lambda data: data[2:], "holds .* tokens, and its documents"),
        ("datatrove", "train/00000_train.ds", lambda data: data[2:] + data[:2], "document 0: expected id 2 at its end"),
    ],
)
def test_files_that_are_not_what_they_say(
    root: Path, tmp_path: Path, to: str, name: str, change: Any, message: str
) -> None:
    export(root, tmp_path / "out", to)
    spoil(tmp_path / "out" / name, change)
    with pytest.raises(errors.ImportDataError, match=message):
        import_data(tmp_path / "out", tmp_path / "in", to)
    assert not list((tmp_path / "in").glob("*.npy"))


@pytest.mark.parametrize(
    ("to", "name", "content"),
    [
        ("datatrove", "train/00000_train.ds.index", None),
        ("torchtitan", "train/document_offsets.npy", None),
        ("torchtitan", "train/document_offsets.npy", b"x"),
        ("olmo", "train/part-00000.csv.gz", b"x"),
        ("litdata", "train/index.json", b"x"),
        ("litdata", "train/index.json", b"[]"),
        ("mds", "train/index.json", b'{"shards": [{"format": "mds", "column_names": ["tokens"]}]}'),
        ("parquet", "data/train-00000-of-00001.parquet", b"x"),
        ("llmc", "train_000000.bin", b"x"),
    ],
)
def test_damage_of_any_kind_is_no_traceback(
    root: Path, tmp_path: Path, to: str, name: str, content: bytes | None
) -> None:
    export(root, tmp_path / "out", to)
    if content is None:
        (tmp_path / "out" / name).unlink()
    else:
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(errors.ImportDataError):
        import_data(tmp_path / "out", tmp_path / "in", to)


def test_refusals(root: Path, tmp_path: Path) -> None:
    export(root, tmp_path / "out", "mds")
    for wrong, message in (
        (lambda: import_data(tmp_path / "out", tmp_path / "in", "gguf"), "format 'gguf': not known"),
        (lambda: import_data(tmp_path / "out", tmp_path / "in", "litdata"), "expected uncompressed tokens"),
        (lambda: import_data(tmp_path / "corpus", tmp_path / "in", "mds", eos_id=2), "no such files in it"),
        (lambda: import_data(tmp_path / "corpus", tmp_path / "in", "mds"), "nothing says which token ends a document"),
        (lambda: import_data(tmp_path / "corpus", tmp_path / "in", "parquet", eos_id=2), "expected a column input_ids"),
    ):
        with pytest.raises(errors.ImportDataError, match=message):
            wrong()
    lists = pa.table({"input_ids": [[1, -1, 2]]})
    pq.write_table(lists, tmp_path / "negative.parquet")
    with pytest.raises(errors.ImportDataError, match="expected ids from 0"):
        import_data(tmp_path / "negative.parquet", tmp_path / "in", "parquet", eos_id=2)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["complete"]
    result = run_cli("import", tmp_path / "out", tmp_path / "in", "--from", "mds", "--seq-len", 16)
    assert (result.returncode, "taken to end with id 2" in result.stdout) == (0, True), result.stderr
    result = run_cli("import", tmp_path / "none", tmp_path / "x", "--from", "mds", "--eos-id", 2)
    assert (result.returncode, "no such files" in result.stderr) == (3, True)
    again = run_cli("import", tmp_path / "out", tmp_path / "in", "--from", "mds", "--seq-len", 16, "--json")
    assert json.loads(again.stdout)["status"] == "already complete"


def test_parquet_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    """Its footer is whole, so that it opens; what lies before it is not."""
    rows = [[int(i) % 900 + 3 for i in range(at, at + 200)] + [2] for at in range(300)]
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.uint16()))})
    pq.write_table(table, tmp_path / "train-0.parquet", compression="zstd")
    data = bytearray((tmp_path / "train-0.parquet").read_bytes())
    data[200:600] = bytes(400)
    (tmp_path / "train-0.parquet").write_bytes(data)
    with pytest.raises(errors.ImportDataError, match=r"train-0\.parquet: cannot be read"):
        import_data(tmp_path, tmp_path / "root", "parquet", tokenizer=str(TOKENIZER))

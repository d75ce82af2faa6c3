"""Which files are a corpus: each once, whatever leads to it; never silently fewer than there are."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli, write_parquet
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus import local_listing
from tokenmill.corpus.choice import choose
from tokenmill.corpus.corpus import find_corpus
from tokenmill.dataroot.manifest import load
from tokenmill.errors import DataRootError, SourceError, StorageError
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.transfer.upload import upload
from tokenmill.verification.verify import verify


def put(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or ("some text",)))
    return path


def names(*dataset: object) -> list[str]:
    return [file.path for file in find_corpus([str(entry) for entry in dataset]).files]


def notes(*dataset: object) -> str:
    return "\n".join(find_corpus([str(entry) for entry in dataset]).notes)


def test_links_lead_to_each_file_once(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    put(corpus / "a.jsonl")
    put(corpus / "sub" / "b.jsonl")
    put(other / "deep" / "c.jsonl")
    (corpus / "latest").symlink_to(".")
    (corpus / "sub" / "up").symlink_to("..")
    (corpus / "y").symlink_to(other)
    (corpus / "x").symlink_to(other)
    (corpus / "z").symlink_to(other / "deep")
    (corpus / "0.jsonl").symlink_to("a.jsonl")
    (corpus / "far.jsonl").symlink_to(other / "deep" / "c.jsonl")
    assert names(corpus) == ["a.jsonl", "far.jsonl", "sub/b.jsonl"]
    assert "0.jsonl" in notes(corpus)
    assert names(corpus, corpus / "sub") == ["a.jsonl", "far.jsonl", "sub/b.jsonl"]
    assert names(corpus / "**" / "*.jsonl") == ["a.jsonl", "far.jsonl", "sub/b.jsonl"]
    (corpus / "far.jsonl").unlink()
    assert names(corpus) == ["a.jsonl", "sub/b.jsonl", "x/deep/c.jsonl"]
    (corpus / "far.jsonl").symlink_to(other / "deep" / "c.jsonl")
    assert names(corpus / "*.jsonl", corpus / "sub/up/a.jsonl") == ["a.jsonl", "far.jsonl"]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_paths_do_not_depend_on_the_order_of_a_folder(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same tree, its entries made in another order, gives the same files."""
    rng = random.Random(seed)
    folders = [
        "",
        *{f"d{rng.randrange(4)}" for _ in range(3)},
        *{f"d{rng.randrange(4)}/e{rng.randrange(3)}" for _ in range(3)},
    ]
    made = [("file", f"{folder}/f{n}.jsonl".lstrip("/")) for folder in folders for n in range(rng.randrange(3))]
    made += [("link", f"{rng.choice(folders)}/l{n}".lstrip("/"), rng.choice(folders)) for n in range(rng.randrange(6))]
    made.append(("file", "always.jsonl"))
    found = []
    for _ in range(2):
        root = tmp_path_factory.mktemp("tree")
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        rng.shuffle(made)
        for kind, path, *target in made:
            if kind == "file":
                put(root / path, path)
            elif not os.path.lexists(root / path):
                (root / path).symlink_to(root / target[0])
        listing = local_listing.walk(root)
        found.append(listing)
        real = [os.path.realpath(root / path) for path in listing.files]
        assert len(set(real)) == len(real)
        every = {str(path) for path in root.rglob("*.jsonl") if not path.is_symlink()}
        assert set(real) == {os.path.realpath(path) for path in every}
    assert found[0] == found[1]


def test_hidden_files_never_count(tmp_path: Path) -> None:
    put(tmp_path / "part-0.jsonl")
    for name in (
        ".ipynb_checkpoints/part-0.jsonl",
        ".cache/x.jsonl",
        "._part-0.jsonl",
        ".a.jsonl.swp.jsonl",
        "__pycache__/x.jsonl",
    ):
        put(tmp_path / name)
    assert names(tmp_path) == names(tmp_path / "*.jsonl") == names(tmp_path / "**/*.jsonl") == ["part-0.jsonl"]
    assert "left out are hidden files and folders, 5: ._part-0.jsonl" in notes(tmp_path)
    assert names(tmp_path / ".cache" / "*.jsonl") == ["x.jsonl"]
    assert names(tmp_path / ".*.jsonl") == ["._part-0.jsonl", ".a.jsonl.swp.jsonl"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="as root a folder is unreadable only by fault")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "corpus" / "a.jsonl")
    put(tmp_path / "corpus" / "closed" / "b.jsonl")
    scandir = os.scandir

    def refusing(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for dataset in ("corpus", "corpus/**/*.jsonl", "corpus/*/*.jsonl"):
        with pytest.raises(SourceError, match=r"closed: cannot be listed: Permission denied"):
            find_corpus(str(tmp_path / dataset))
    with pytest.raises((StorageError, DataRootError), match=r"closed: cannot be listed"):
        upload(tmp_path / "corpus", str(tmp_path / "there"))


def test_all_formats_of_a_data_set_are_read(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"part-{number}.jsonl", f"document {number}")
    write_parquet(tmp_path / "index.parquet", ["of files"])
    (tmp_path / "b.arrow").write_bytes(b"")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "README.txt").write_text("x")
    assert names(tmp_path) == ["b.arrow", "index.parquet", "part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert "2 files of no known format: README.txt, notes.md" in notes(tmp_path)


def test_text_beside_other_formats_is_asked_about(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(SourceError, match=r"b\.txt.*lie beside files of other formats.*a\.jsonl"):
        find_corpus(str(tmp_path))
    assert names(tmp_path / "*.jsonl", tmp_path / "*.txt") == ["a.jsonl", "b.txt"]


def test_plain_text_alone_is_all_read(tmp_path: Path) -> None:
    for name in ("README.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["README.txt", "a.txt"]


@pytest.mark.parametrize(
    "paths",
    [
        ["data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
        ["train-a.jsonl", "validation-a.jsonl", "test-a.jsonl"],
        ["train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow"],
        ["my_train_set/a.parquet", "my_dev_set/a.parquet"],
    ],
)
def test_a_directory_is_read_as_the_hub_reads_it(paths: list[str], tmp_path: Path) -> None:
    for path in paths:
        put(tmp_path / path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    found = find_corpus(str(tmp_path))
    assert [file.path for file in found.files] == paths[:1]
    note = "\n".join(found.notes)
    assert "the split train is read, 1 file" in note
    assert all(path in note for path in paths[1:])


def test_a_card_holds_for_a_copy_too(tmp_path: Path) -> None:
    for path in ("en/a.jsonl", "de/a.jsonl"):
        put(tmp_path / path)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: de/*.jsonl\n---\n# Data\n"
    (tmp_path / "README.md").write_text(card)
    assert names(tmp_path) == ["de/a.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs: [}\n---\n")
    assert names(tmp_path) == ["de/a.jsonl", "en/a.jsonl"]


def test_no_train_split_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "test-a.jsonl")
    with pytest.raises(SourceError, match="no split train"):
        find_corpus(str(tmp_path))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    try:
        put(path)
    except OSError:
        pytest.skip("this file system has no such names")
    result = run_cli("pretokenize", tmp_path / "out", "--dataset", tmp_path, "--tokenizer", TOKENIZER)
    assert result.returncode == 3
    assert "caf\\xe9.jsonl: the name is not UTF-8" in result.stderr


def test_a_fifo_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match=r"a\.jsonl: expected a file"):
        find_corpus(str(tmp_path))
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SourceError, match=r"b\.jsonl: No such file"):
        find_corpus(str(tmp_path))


def test_data_roots_of_older_rules_go_on(tmp_path: Path) -> None:
    """Begun when hidden files, links, and all splits were read: what the manifest names is the corpus."""
    corpus = tmp_path / "corpus"
    files = [
        put(corpus / name, *(f"{name} {i}" for i in range(9)))
        for name in ("train-0.jsonl", "test-0.jsonl", ".hidden.jsonl")
    ]
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), order="sequential", shard_size=50)
    explicit = Recipe(dataset=tuple(map(str, files)), tokenizer=str(TOKENIZER), order="sequential", shard_size=50)
    pretokenize(explicit, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["dataset"] = str(corpus)
    del manifest["source_rules"], manifest["notes"], manifest["digests"]
    path.write_text(json.dumps(manifest | {"version": 1}))
    assert verify(tmp_path / "out", deep=20).passed
    shard = tmp_path / "out" / "train_000001.npy"
    before = shard.read_bytes()
    shard.unlink()
    assert pretokenize(recipe, tmp_path / "out").remade == ["train_000001.npy"]
    assert shard.read_bytes() == before
    assert load(tmp_path / "out").source_rules == 1


def test_a_mistyped_path_is_told_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    environment.pop("HF_HUB_OFFLINE", None)
    (tmp_path / "corpus").mkdir()
    import subprocess
    import sys
    import time

    def run(dataset: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable,
            "-m",
            "tokenmill",
            "pretokenize",
            "out",
            "--dataset",
            dataset,
            "--tokenizer",
            str(TOKENIZER),
        ]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
        )

    began = time.monotonic()
    result = run("corps/train")
    assert time.monotonic() - began < 30  # it was 42 s of trying again; the point is that it does not try again
    assert result.returncode == 3
    assert "corps/train: no such file or directory" in result.stderr
    assert "hf://datasets/corps/train" in result.stderr
    for dataset in ("corpus/trian", "./corps/train", "a/b/c", "corps--x/train"):
        result = run(dataset)
        assert result.returncode == 3
        assert f"{dataset}: no such file or directory" in result.stderr
        assert "asking the hub" not in result.stderr


def test_choices_travel_to_other_machines(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    corpus = find_corpus(str(tmp_path), options=StoreOptions())
    assert pickle.loads(pickle.dumps(corpus)).files == corpus.files


@given(st.lists(st.text(min_size=1, max_size=12).filter(lambda name: "/" not in name and "\0" not in name), max_size=6))
def test_nothing_is_left_out_in_silence(stems: list[str]) -> None:
    paths = sorted({f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".parquet", ".csv")})
    try:
        found = choose("there", paths)
    except SourceError:
        return
    left = [path for path in paths if path not in found.paths]
    assert not left or found.notes


def test_a_file_without_the_field_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "c" / "a.jsonl", "kept")
    (tmp_path / "c" / "b.jsonl").write_text('{"content": "lost"}\n\n{"content": "too", "id": 1}\n')
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), order="sequential")
    with pytest.raises(SourceError, match=r"b\.jsonl: no line has the field 'text': found the fields 'content'"):
        pretokenize(recipe, tmp_path / "out")
    (tmp_path / "c" / "b.jsonl").write_text('{"content": "lost"}\n' * 9_000 + '{"text": null}\n')
    assert pretokenize(recipe, tmp_path / "out").skipped_null == 9_001


def test_a_column_without_values_is_null(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", pa.array([None, None], pa.null()))
    write_parquet(tmp_path / "c" / "b.parquet", ["fine"])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), order="sequential")
    summary = pretokenize(recipe, tmp_path / "o")
    assert (summary.documents, summary.skipped_null) == (1, 2)


def test_settings_that_came_to_nothing_are_told(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "c" / name).write_text("one text\n")
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), text_separator="\n\n", total_tokens=1_000)
    said = "\n".join(pretokenize(recipe, tmp_path / "out").notes)
    assert "--text-separator '\\n\\n' divides none of 2 text files" in said
    assert "--total-tokens 1,000: the corpus ended after" in said

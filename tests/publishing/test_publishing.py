"""Publishing: the card says what the records say, Croissant's own validator accepts it, and the hub gets every byte."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from conftest import REPOSITORY, command, run_cli, text, write_parquet
from support.hub_writes import LoopbackHub, loopback_hub
from tokenmill import TokenDataset, build_view, consolidate, errors, pretokenize, write_card
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest as manifests
from tokenmill.loading.data_root import DataRoot
from tokenmill.publishing.domains import count_domains
from tokenmill.recipe import Recipe
from tokenmill.views.spec import ViewSource, ViewSpec

INTEROP = REPOSITORY / ".venv" / "interop" / "bin" / "python"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publishing")
    for number in range(2):
        rows = range(number * 300, number * 300 + 300)
        urls: list[str | None] = [f"https://user@WWW.host-{row * row % 37}.example:80/a?b#c{row}" for row in rows]
        urls[3:6] = [None, "not a url", ""]
        texts: list[str | None] = [text(row, 5 + row % 60) for row in rows]
        texts[9] = None
        write_parquet(folder / "a corpus" / f"|`<b>{number}.parquet", texts, url=urls)
    recipe = Recipe(
        dataset=str(folder / "a corpus"),
        tokenizer=str(TOKENIZER),
        shard_size=10_000,
        seq_len=64,
        buffer_size=50,
        metadata_columns=("url",),
    )
    pretokenize(recipe, folder / "data")
    consolidate(folder / "data")
    return folder / "data"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def test_the_card_says_what_the_records_say(root: Path) -> None:
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    result = run_cli("card", root, "--license", "cc-by-4.0", "--name", 'A "name": <b> | x')
    assert result.returncode == 0, result.stderr
    assert {path.name for path in root.iterdir()} == {*before, "README.md", "croissant.json", "preview"}
    readme = (root / "README.md").read_text()
    card = DatasetCard(readme)
    assert (card.data.pretty_name, card.data.license) == ('A "name": <b> | x', "cc-by-4.0")
    assert card.data.configs == [
        {"config_name": "preview", "data_files": [{"split": "train", "path": "preview/samples.parquet"}]}
    ]
    state = manifests.load(root)
    for word in (f"{state.tokens:,}", f"{state.documents:,}", state.fingerprint, state.tokenizer.sha256):
        assert word in readme
    assert str(root.parent) not in readme  # where it lies here is nobody's business
    assert "- a corpus" in readme
    assert '# A "name": &lt;b&gt; \\| x' in readme
    assert "compli" not in readme
    for shard in state.shards:
        assert shard.sha256 in readme
    assert run_cli("verify", root).returncode == 0  # with the card beside it
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.name in before} == before


def test_hosts_are_those_of_the_slow_way(root: Path) -> None:
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    without = 0
    for path in sorted(root.glob("documents_*.parquet")):
        for row in pq.read_table(path).to_pylist():
            match = re.match(r"https://user@(WWW\.host-\d+\.example):80/", row["url"] or "")
            if match is None:
                without += 1
                continue
            documents[match[1].lower().removeprefix("www.")] += 1
            tokens[match[1].lower().removeprefix("www.")] += row["tokens"]
    found = count_domains(DataRoot(root, *manifests.load_records(root)), most=1000)
    assert (found.hosts, found.documents, found.tokens) == (len(documents), documents.total(), tokens.total())
    assert found.without == without
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert [(each.host, each.tokens) for each in found.top] == ranked
    assert [each.documents for each in found.top] == [documents[host] for host, _ in ranked]
    assert len(count_domains(DataRoot(root, *manifests.load_records(root)), most=2).top) == 2


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:p@ss@Host.EXAMPLE/", "host.example"),
        ("http://[2001:db8::1]:8080/x", "[2001:db8::1]"),
        ("ftp://a.example", "a.example"),
        ("//no.scheme/", None),
        ("https://", None),
        ("https://user@/x", None),
        ("mailto:a@b.example", None),
    ],
)
def test_a_host_is_what_a_browser_would_ask(tmp_path: Path, url: str, host: str | None) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["one text"], url=[url])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), metadata_columns=("url",))
    pretokenize(recipe, tmp_path / "out")
    found = count_domains(DataRoot(tmp_path / "out", *manifests.load_records(tmp_path / "out")), most=9)
    assert [each.host for each in found.top] == ([] if host is None else [host])


def test_the_preview_is_samples_as_they_are(root: Path) -> None:
    write_card(root)
    table = pq.read_table(root / "preview" / "samples.parquet")
    samples = TokenDataset(root)
    assert len(table) == min(100, len(samples))
    for row in table.to_pylist()[::9]:
        assert row["input_ids"] == samples[row["sample"]].tolist()
        assert len(row["text"]) > 10
        assert all(each["source"].endswith(".parquet") for each in row["sources"])


def test_croissant_names_every_file_with_its_digest_and_the_lineage(root: Path) -> None:
    write_card(root, license="cc-by-4.0", url="https://host.example/data")
    found = json.loads((root / "croissant.json").read_text())
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    files = {each["@id"]: each for each in found["distribution"] if each["@type"] == "cr:FileObject"}
    ours = {".tokenmill.lock", "tokenmill.log", "README.md", "croissant.json", "preview"}
    here = {path.name for path in root.iterdir()} - ours | {"preview/samples.parquet"}
    assert set(files) == here
    for name, each in files.items():
        data = (root / name).read_bytes()
        assert (each["sha256"], each["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")
    assert [each["prov:label"] for each in found["prov:wasDerivedFrom"]] == ["a corpus"]
    agents = found["prov:wasGeneratedBy"]["prov:wasAssociatedWith"]
    assert any(each["prov:label"].startswith("tokenmill ") for each in agents)


@pytest.mark.skipif(not INTEROP.exists(), reason="the readers of other projects are not here: make interop")
def test_croissants_own_reader_accepts_it_and_reads_records(root: Path) -> None:
    write_card(root, license="cc-by-4.0", url="https://host.example/data")
    program = """
import itertools, json, sys
import mlcroissant
found = mlcroissant.Dataset(sys.argv[1])
records = list(itertools.islice(found.records("document"), 600))
preview = next(iter(found.records("preview")))
print(json.dumps({
    "errors": list(found.metadata.ctx.issues.errors),
    "starts": [int(each["document/start"]) for each in records],
    "ids": [int(each) for each in preview["preview/input_ids"]],
}))
"""
    line = [str(INTEROP), "-c", program, str(root / "croissant.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == []
    starts = [
        row["start"] for path in sorted(root.glob("documents_*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(found["starts"]) == starts
    assert found["ids"] == TokenDataset(root)[0].tolist()


def test_a_readme_of_the_users_own_stays(root: Path) -> None:
    (root / "README.md").write_text("mine")
    refused = run_cli("card", root)
    assert (refused.returncode, (root / "README.md").read_text()) == (5, "mine")
    assert "was not made by tokenmill card" in refused.stderr
    assert run_cli("card", root, "--overwrite").returncode == 0
    assert run_cli("card", root, "--name", "again").returncode == 0  # its own is replaced
    assert "# again" in (root / "README.md").read_text()


def test_words_that_the_user_added_to_the_card_stay(root: Path) -> None:
    assert run_cli("card", root, "--license", "mit").returncode == 0
    readme = (root / "README.md").read_text()
    (root / "README.md").write_text(readme + "\n## Intended use\n\nNone.\n")
    again = run_cli("card", root, "--license", "mit")
    assert (again.returncode, "was changed since" in again.stderr) == (5, True)
    assert "## Intended use" in (root / "README.md").read_text()
    (root / "README.md").unlink()
    assert run_cli("card", root).returncode == 5  # a croissant.json alone may be the user's own
    assert run_cli("card", root, "--overwrite").returncode == 0


def test_files_that_the_records_name_must_be_there(root: Path) -> None:
    (root / "train_000001.npy").unlink()
    with pytest.raises(errors.DataRootError, match=r"train_000001\.npy is missing"):
        write_card(root)
    for path in root.glob("train_*.npy"):  # all of them are in tokens.bin
        path.unlink()
    assert "train_000000.npy" not in json.loads(json.dumps(sorted(write_card(root).files)))
    next(iter(root.glob("documents_*.parquet"))).unlink()
    with pytest.raises(errors.DataRootError, match=r"documents_\d+\.parquet is missing"):
        write_card(root)


def test_odd_names_and_columns(tmp_path: Path) -> None:
    """A name outside of the first plane, a column that only looks like URLs, one with a blank, a corpus by file://."""
    write_parquet(tmp_path / "private" / "c" / "a.parquet", ["one text", "two"], url=[1, 2], **{"a b": ["x", "y"]})
    recipe = Recipe(
        dataset=f"file://{tmp_path / 'private' / 'c'}",
        tokenizer=str(TOKENIZER),
        metadata_columns=("url:int64", "a b"),
        seq_len=2,
    )
    root = tmp_path / "data \U0001f680"
    pretokenize(recipe, root)
    write_card(root)
    readme = (root / "README.md").read_text()
    assert DatasetCard(readme).data.pretty_name == root.name
    assert "## Domains" not in readme
    assert "private" not in readme + (root / "croissant.json").read_text()
    fields = json.loads((root / "croissant.json").read_text())["recordSet"][0]["field"]
    assert "document/a_b" in [each["@id"] for each in fields]


def test_what_has_no_card(root: Path, tmp_path: Path) -> None:
    build_view(ViewSpec(seq_len=64, sources=[ViewSource(name="a", root=str(root))]), tmp_path / "view")
    with pytest.raises(errors.DataRootError, match="is a view"):
        write_card(tmp_path / "view")
    with pytest.raises(errors.DataRootError):
        write_card(tmp_path)
    (root / "manifest.json").unlink()
    with pytest.raises(errors.DataRootError, match="found none"):
        write_card(root)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub() as found:
        yield found


def publish(hub: LoopbackHub, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Upload as a user does; without Xet storage, whose protocol is not the hub's alone."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "a-token", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
    environment.pop("HF_HUB_OFFLINE", None)
    line = command("upload", *arguments)
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_data_set_goes_to_the_hub_and_comes_back(hub: LoopbackHub, root: Path, tmp_path: Path) -> None:
    planned = publish(hub, root, "hf://datasets/owner/name", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert hub.requests == []
    sent = publish(hub, root, "hf://datasets/owner/name", "--private", "--license", "cc-by-4.0", "--json")
    assert sent.returncode == 0, sent.stderr
    files = hub.repositories["owner/name"]
    assert json.loads(sent.stdout)["commit"] == hub.commit("owner/name")
    assert set(json.loads(sent.stdout)["files"]) == set(files)
    assert {"manifest.json", "tokens.bin", "README.md", "croissant.json", "preview/samples.parquet"} <= set(files)
    assert not {"tokenmill.log", ".tokenmill.lock"} & set(files)
    assert all((root / path).read_bytes() == data for path, data in files.items())
    assert hub.private == {"owner/name"}
    assert hub.authorized >= {"Bearer a-token"}
    assert "a-token" not in sent.stdout + sent.stderr
    assert "# name" in files["README.md"].decode()
    for path, data in files.items():
        (tmp_path / "back" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / path).write_bytes(data)
    assert run_cli("verify", tmp_path / "back").returncode == 0
    preview = pq.read_table(io.BytesIO(files["preview/samples.parquet"]))
    assert np.array_equal(preview["input_ids"][0].as_py(), TokenDataset(tmp_path / "back")[0])
    hub.requests.clear()
    again = publish(hub, root, "hf://datasets/owner/name", "--license", "cc-by-4.0")
    assert again.returncode == 0, again.stderr
    assert not [request for request in hub.requests if request.startswith("PUT")]  # what arrived is not sent again


def test_a_card_of_the_users_own_goes_along_and_old_shards_do_not_stay(hub: LoopbackHub, root: Path) -> None:
    run_cli("card", root, "--name", "My set", "--license", "mit")
    (root / "README.md").write_text((root / "README.md").read_text() + "\nMine.\n")
    first = publish(hub, root, "hf://datasets/owner/name")
    assert first.returncode == 0, first.stderr
    assert hub.repositories["owner/name"]["README.md"].decode().endswith("Mine.\n")
    hub.repositories["owner/name"] |= {"train_000099.npy": b"of an earlier one", "other.txt": b"of the user"}
    again = publish(hub, root, "hf://datasets/owner/name", "--license", "cc0-1.0")
    assert again.returncode == 0, again.stderr
    assert "--license is not used" in again.stdout
    assert "train_000099.npy" not in hub.repositories["owner/name"]
    assert "other.txt" in hub.repositories["owner/name"]


def test_what_the_hub_refuses_or_damages_is_told(hub: LoopbackHub, root: Path) -> None:
    hub.spoil = {"tokens.bin"}
    damaged = publish(hub, root, "hf://datasets/owner/name")
    assert damaged.returncode == 6
    assert "tokens.bin: expected" in damaged.stderr
    hub.faults = {"repos/create": 403}
    refused = publish(hub, root, "hf://datasets/owner/other")
    assert refused.returncode == 6
    assert "HF_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr
    for target in ("hf://owner/name", "hf://datasets/owner", "hf://datasets/owner/name@main"):
        assert publish(hub, root, target).returncode == 6
    assert publish(hub, root, "hf://datasets/owner/name", "--shards", "0").returncode == 2
    assert run_cli("upload", root, root.parent / "copy", "--private").returncode == 2

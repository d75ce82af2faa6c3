"""Remote corpora: the real client libraries against servers on loopback, and every fault on the way."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from conftest import command, text, write_parquet
from support.runs import every_digest, jsonl, shard_digests
from support.servers import AWS, Site, listening, moto, s3_client, serving
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.corpus.corpus import find_corpus
from tokenmill.corpus.train_split import train_files
from tokenmill.dataroot.manifest import load
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.remote import http, retry, s3
from tokenmill.verification.verify import verify

NAME = "owner/data"
RECIPE = ["--tokenizer", TOKENIZER, "--shard-size", 2_000, "--buffer-size", 40, "--seed", 3]


@functools.cache
def files() -> dict[str, bytes]:
    """A repository: three files of its split train, others around them, a wide column nobody needs."""
    made: dict[str, bytes] = {"README.md": b"---\nlicense: mit\n---\n# Data\n", ".gitattributes": b"x"}
    rng = random.Random(5)
    for number in range(4):
        rows = [text(number * 100 + i, 5 + i % 70) for i in range(100)]
        table = pa.table({"id": range(100), "wide": [rng.randbytes(3_000) for _ in rows], "text": rows})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=30)
        split = "train" if number < 3 else "test"
        made[f"data/{split}-{number % 3:05d}-of-00003.parquet"] = sink.getvalue().to_pybytes()
    return made


def train() -> dict[str, bytes]:
    return {path: data for path, data in files().items() if "/train-" in path}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The same files in a directory, and a data root made of them."""
    for path, data in train().items():
        (tmp_path / "local" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / path).write_bytes(data)
    assert run(tmp_path / "expected", "--dataset", tmp_path / "local").returncode == 0
    return tmp_path / "expected"


@pytest.fixture
def site() -> Site:
    site = Site()
    site.add(NAME, files())
    return site


@pytest.fixture
def hub(site: Site, tmp_path: Path) -> Iterator[dict[str, str]]:
    with serving(site) as url:
        yield environment(url, tmp_path)


def environment(url: str, tmp_path: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub-cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return keep | AWS | hub | {"NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


def run(
    root: Path, *arguments: object, env: dict[str, str] | None = None, name: str = "pretokenize"
) -> subprocess.CompletedProcess[str]:
    line = command(name, root, *arguments, *(RECIPE if name == "pretokenize" else []))
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=env, check=False)


def same(root: Path, expected: Path) -> bool:
    return every_digest(root) == every_digest(expected)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the waiting; a stalled connection is given up after half a second."""
    monkeypatch.setattr(retry, "backoff", tenacity.wait_none())
    monkeypatch.setattr(http, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(http, "SLOWEST_NBYTES_PER_SECOND", 1 << 30)


@pytest.mark.parametrize(
    "dataset",
    [NAME, f"hf://datasets/{NAME}", f"{NAME}@main", f"hf://datasets/{NAME}@main/data/train-*.parquet"],
)
@pytest.mark.parametrize("cdn", [False, True])
def test_the_hub_gives_the_bytes_of_a_directory(
    tmp_path: Path, local: Path, site: Site, hub: dict[str, str], dataset: str, cdn: bool
) -> None:
    with serving(site) as elsewhere:
        site.cdn = elsewhere if cdn else ""
        result = run(tmp_path / "out", "--dataset", dataset, env=hub)
        assert result.returncode == 0, result.stderr
        assert same(tmp_path / "out", local)
        state = load(tmp_path / "out")
        assert state.source_revision == site.branches[NAME, "main"]
        assert all(file.etag for file in state.files)
        assert not list((tmp_path / "hub-cache").rglob("*.parquet")) if (tmp_path / "hub-cache").exists() else True
        if cdn:
            assert [path for _, path, _ in site.log if "/cdn/" not in path and "README" not in path] == []
        assert run(tmp_path / "out", "--deep", 20, env=hub, name="verify").returncode == 0


def test_only_the_text_column_is_read(tmp_path: Path, site: Site, hub: dict[str, str]) -> None:
    assert run(tmp_path / "out", "--dataset", NAME, env=hub).returncode == 0
    read = sum(nbytes for _, path, nbytes in site.log if path.endswith(".parquet"))
    whole = sum(map(len, train().values()))
    text_nbytes = sum(
        pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(group).column(2).total_compressed_size
        for data in train().values()
        for group in range(4)
    )
    assert text_nbytes < read < whole / 2
    assert read < 2 * text_nbytes + 5 * 65_536 * 3  # footers, twice, and a sample for the estimate


def test_a_resume_stays_with_the_commit(tmp_path: Path, local: Path, site: Site, hub: dict[str, str]) -> None:
    assert run(tmp_path / "out", "--dataset", NAME, env=hub).returncode == 0
    changed = {path: data for path, data in files().items() if "00001" not in path}
    site.add(NAME, changed)  # the branch moves on
    (tmp_path / "out" / "train_000001.npy").unlink()
    site.log.clear()
    result = run(tmp_path / "out", "--dataset", NAME, env=hub)
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "out", local)
    other = run(tmp_path / "new", "--dataset", NAME, env=hub)
    assert (other.returncode, same(tmp_path / "new", local)) == (0, False)


def test_private_unknown_and_offline(tmp_path: Path, site: Site, hub: dict[str, str]) -> None:
    site.add("private/data", files())
    site.token = secret = "hf" + "_" + "s" * 34
    cases = [
        ("private/data", {}, "HF_TOKEN"),
        ("owner/nonesuch", {}, "check the name"),
        (f"{NAME}@nonesuch", {}, "check the name and the revision"),
        (NAME, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (f"hf://datasets/{NAME}/nowhere", {}, "no file there"),
        (f"hf://datasets/{NAME}/*.csv", {}, "no file there"),
        (f"hf://{NAME}", {}, "expected hf://datasets/OWNER/NAME"),
    ]
    for dataset, extra, message in cases:
        result = run(tmp_path / "out", "--dataset", dataset, env=hub | extra)
        assert (result.returncode, message in result.stderr) == (3, True), (dataset, result.stderr)
        assert "Traceback" not in result.stderr
    result = run(tmp_path / "out", "--dataset", "private/data", env=hub | {"HF_TOKEN": secret})
    assert result.returncode == 0, result.stderr
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert secret.encode() not in written
    assert secret not in result.stdout + result.stderr


TRANSIENT = ["429", "500", "503", "reset", "truncate", "wrong_length", "drip"]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_change_no_byte(
    tmp_path: Path, local: Path, site: Site, hub: dict[str, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request fails; the run shows it."""
    use(monkeypatch, hub)
    site.fault = lambda number, path: fault if number % 3 == 0 and path.endswith(".parquet") else None
    if fault == "429":  # its Retry-After is a second, so not too often
        site.fault = lambda number, path: fault if number in (5, 9) else None
    shown: list[int] = []
    recipe = Recipe(dataset=NAME, tokenizer=str(TOKENIZER), shard_size=2_000, buffer_size=40, seed=3)
    summary = pretokenize(recipe, tmp_path / "out", on_progress=lambda progress: shown.append(progress.retries))
    assert same(tmp_path / "out", local)
    assert summary.retries > 0
    assert max(shown) > 0


def use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    """Point the client libraries of this process at the servers."""
    import huggingface_hub.constants as hub

    for name in ("NO_PROXY", *AWS):
        monkeypatch.setenv(name, env[name])
    monkeypatch.setattr(hub, "ENDPOINT", env["HF_ENDPOINT"])
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("401", errors.SourceError, "HF_TOKEN"),
        ("403", errors.SourceError, "access denied"),
        ("404", errors.SourceError, "not there"),
        ("grown", errors.SourceChangedError, "changed while it was read"),
        ("503", errors.SourceError, "8 times in a row"),
        ("truncate", errors.SourceError, "8 times in a row"),
    ],
)
def test_permanent_faults_stop_the_run_which_resumes_later(
    tmp_path: Path,
    local: Path,
    site: Site,
    hub: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    kind: type[errors.TokenmillError],
    message: str,
) -> None:
    use(monkeypatch, hub)
    recipe = Recipe(dataset=NAME, tokenizer=str(TOKENIZER), shard_size=2_000, buffer_size=40, seed=3)
    site.fault = lambda number, path: fault if number > 14 else None
    with pytest.raises(kind, match=re.escape(message)) as caught:
        pretokenize(recipe, tmp_path / "out", span_rows=10)
    assert "data/train-0000" in str(caught.value)
    site.fault = lambda number, path: None
    pretokenize(recipe, tmp_path / "out", span_rows=10)
    assert same(tmp_path / "out", local)


@pytest.mark.usefixtures("patient")
def test_random_faults_never_change_a_byte(
    tmp_path: Path, local: Path, site: Site, hub: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of all kinds at random: the bytes are right, or the run stops and a later one makes them right."""
    use(monkeypatch, hub)
    recipe = Recipe(dataset=NAME, tokenizer=str(TOKENIZER), shard_size=2_000, buffer_size=40, seed=3)
    rng = random.Random(11)
    kinds = ["500", "reset", "truncate", "wrong_length", "404", "401"]
    for round_ in range(12):
        root = tmp_path / f"out-{round_}"
        share = rng.choice([0.1, 0.3, 0.6])
        weights = [4, 4, 4, 4, 0.1, 0.1]
        site.fault = lambda number, path: rng.choices(kinds, weights)[0] if rng.random() < share else None  # noqa: B023
        for _ in range(4):
            try:
                pretokenize(recipe, root, span_rows=rng.choice([7, 30, None]))
                break
            except errors.SourceError:
                continue
        site.fault = lambda number, path: None
        pretokenize(recipe, root)
        assert same(root, local)


CARD = {
    "one": ({"configs": [{"config_name": "a", "data_files": "b/*.parquet"}]}, ["b/x.parquet"]),
    "default": (
        {
            "configs": [
                {"config_name": "a", "data_files": "b/*.parquet"},
                {"config_name": "default", "data_files": [{"split": "train", "path": ["c/*.parquet", "b/x.parquet"]}]},
            ]
        },
        ["b/x.parquet", "c/y.parquet"],
    ),
    "marked": (
        {"configs": [{"config_name": "a"}, {"config_name": "z", "default": True, "data_dir": "c"}]},
        ["c/y.parquet"],
    ),
}


@pytest.mark.parametrize("case", CARD)
def test_the_card_says_what_train_is(case: str) -> None:
    card, expected = CARD[case]
    assert train_files("o/n", card, ["README.md", "b/x.parquet", "c/y.parquet", "d/train/z.parquet"]) == expected


LAYOUTS = [  # what datasets 4.8.4 takes for split="train", by get_data_patterns and DataFilesList
    (["a.parquet", "README.md", ".hidden/x.parquet", "__x__/b.parquet"], ["a.parquet"]),
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "other.parquet"], [0]),
    (["data/train-00000-of-00001-0123abc.parquet", "train.parquet"], [0]),
    (["train/a.parquet", "test/a.parquet", "b.parquet"], [0]),
    (["x/200k_train/y/a.parquet", "x/eval/b.parquet", "c.parquet"], [0]),
    (["my-train-1.parquet", "training.parquet", "val.parquet", "mytrain.parquet"], [0, 1]),
    (["deep/er/a.parquet", "b.parquet", "dataset_info.json"], ["b.parquet", "deep/er/a.parquet"]),
    (["test/a.parquet"], None),
]


@pytest.mark.parametrize(("paths", "expected"), LAYOUTS)
def test_layouts_without_a_card(paths: list[str], expected: list | None) -> None:
    if expected is None:
        with pytest.raises(errors.SourceError, match="no split train"):
            train_files("o/n", {}, paths)
        return
    wanted = [paths[each] if isinstance(each, int) else each for each in expected]
    assert train_files("o/n", {}, paths) == sorted(wanted)


def test_a_card_without_a_default_asks(site: Site, hub: dict[str, str], tmp_path: Path) -> None:
    configs = "configs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n"
    site.add("owner/two", files() | {"README.md": f"---\n{configs}---\n".encode()})
    result = run(tmp_path / "out", "--dataset", "owner/two", env=hub)
    assert (result.returncode, "configurations en, de and no default" in result.stderr) == (3, True), result.stderr


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.mark.parametrize("dataset", ["s3://bucket/c", "s3://bucket/c/data/*.parquet", "s3://bucket/c/data/"])
def test_a_bucket_gives_the_bytes_of_a_directory(tmp_path: Path, local: Path, bucket: str, dataset: str) -> None:
    for path, data in (train() | {"notes.md": b"no", "data/": b""}).items():
        s3_client(bucket).put_object(Bucket="bucket", Key=f"c/{path}", Body=data)
    s3_client(bucket).put_object(Bucket="bucket", Key="corpus-of-another/x.parquet", Body=b"no")
    env = environment("http://127.0.0.1:9", tmp_path)
    result = run(tmp_path / "out", "--dataset", dataset, "--endpoint-url", bucket, env=env)
    assert result.returncode == 0, result.stderr
    names = [Path(file.path).name for file in load(tmp_path / "out").files]
    assert names == [Path(path).name for path in train()]
    assert shards(tmp_path / "out") == shards(local)
    assert run(tmp_path / "out", "--deep", 9, "--endpoint-url", bucket, env=env, name="verify").returncode == 0
    by_variable = run(tmp_path / "out", "--dataset", dataset, env=env | {"AWS_ENDPOINT_URL": bucket})
    assert "already complete" in by_variable.stdout, by_variable.stderr


def shards(root: Path) -> list[str]:
    return [shard.sha256 for shard in load(root).shards]


def test_bucket_refusals(tmp_path: Path, bucket: str) -> None:
    env = environment("http://127.0.0.1:9", tmp_path)
    nobody = {name: value for name, value in env.items() if not name.startswith("AWS_ACCESS")}
    cases = [
        ("s3://bucket/nowhere", env, "no object there"),
        ("s3://nonesuch/x", env, "NoSuchBucket"),
        ("s3:///x", env, "expected s3://BUCKET/PREFIX"),
        ("s3://bucket/x", nobody | {"AWS_PROFILE": "nonesuch"}, "AWS_PROFILE"),
        ("s3://bucket/x", nobody, "AWS_ACCESS_KEY_ID"),
    ]
    for dataset, variables, message in cases:
        result = run(tmp_path / "out", "--dataset", dataset, "--endpoint-url", bucket, env=variables)
        assert (result.returncode, message in result.stderr) == (3, True), (dataset, result.stderr)
        assert "Traceback" not in result.stderr
        assert "testing" not in result.stderr


def test_profiles_and_anonymous(tmp_path: Path, local: Path, bucket: str) -> None:
    for path, data in train().items():
        s3_client(bucket).put_object(Bucket="bucket", Key=f"p/{path}", Body=data, ACL="public-read")
    env = environment("http://127.0.0.1:9", tmp_path)
    nobody = {name: value for name, value in env.items() if not name.startswith("AWS_")}
    nobody |= {"AWS_EC2_METADATA_DISABLED": "true"}
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = k\naws_secret_access_key = s\n")
    (tmp_path / "config").write_text(f"[profile mine]\nregion = eu-west-1\nendpoint_url = {bucket}\n")
    profile = {"AWS_PROFILE": "mine", "AWS_CONFIG_FILE": str(tmp_path / "config")}
    profile |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    result = run(tmp_path / "a", "--dataset", "s3://bucket/p", env=nobody | profile)
    assert (result.returncode, same(tmp_path / "a", local)) == (0, True), result.stderr
    result = run(tmp_path / "b", "--dataset", "s3://bucket/p", "--endpoint-url", bucket, "--anonymous", env=nobody)
    assert (result.returncode, same(tmp_path / "b", local)) == (0, True), result.stderr


def test_an_object_that_changes_is_found(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    s3_client(bucket).put_object(Bucket="bucket", Key="v/a.jsonl", Body=jsonl([text(i, 9) for i in range(50)]))
    corpus = find_corpus("s3://bucket/v/a.jsonl", options=StoreOptions(bucket))
    s3_client(bucket).put_object(Bucket="bucket", Key="v/a.jsonl", Body=jsonl([text(i, 9) for i in range(1, 51)]))
    with pytest.raises(errors.SourceChangedError, match=r"a\.jsonl: changed while it was read"):
        list(corpus.open(0).spans())


def test_urls_and_what_they_must_not_leak(tmp_path: Path, site: Site) -> None:
    site.add("web/x", {"a.jsonl": jsonl([text(i, 30) for i in range(40)]), "b.jsonl": jsonl([text(7, 50)])})
    with serving(site) as url:
        base = f"{url}/datasets/web/x/resolve/main"
        env = environment("http://127.0.0.1:9", tmp_path)
        two = ["--dataset", f"{base}/a.jsonl?X-Signature=secret1", "--dataset", f"{base}/b.jsonl"]
        result = run(tmp_path / "out", *two, env=env)
        assert result.returncode == 0, result.stderr
        assert "already complete" in run(tmp_path / "out", *two, env=env).stdout
        written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
        assert b"secret1" not in written
        assert verify(tmp_path / "out").passed
        missing = run(tmp_path / "no", "--dataset", f"{base}/none.jsonl?X-Signature=secret1", env=env)
        assert (missing.returncode, "not there: HTTP 404" in missing.stderr) == (3, True), missing.stderr
        assert "secret1" not in missing.stderr
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert recipe["dataset"] == [f"{base}/a.jsonl", f"{base}/b.jsonl"]


def test_urls_that_share_a_path_are_refused() -> None:
    """What tells them apart is not recorded, and the last one would stand for both."""
    query = ["https://h/get.jsonl?part=0", "https://h/get.jsonl?part=1"]
    for two in (query, ["https://h/a%2Fb.jsonl", "https://h/a/b.jsonl"]):
        with pytest.raises(errors.SourceError, match="differ only in what is not recorded"):
            find_corpus(two)
    with pytest.raises(errors.SourceError, match="not a URL"):
        find_corpus("https://[bad/x.parquet")


def test_branches_of_the_hub_with_slashes(site: Site, hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, hub)
    site.add("owner/converted", {"default/train/0000.parquet": train()["data/train-00000-of-00003.parquet"]})
    site.branches["owner/converted", "refs/convert/parquet"] = site.branches["owner/converted", "main"]
    for path in ("", "/default/train"):
        corpus = find_corpus(f"hf://datasets/owner/converted@refs/convert/parquet{path}")
        assert [file.path for file in corpus.files] == ["default/train/0000.parquet"]


def test_arrow_files_are_fetched_once(site: Site, tmp_path: Path) -> None:
    """Their reader looks at the end first."""
    rows = [random.Random(i).randbytes(4_000).hex() for i in range(2_500)]
    table = pa.table({"text": rows})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    data = (tmp_path / "a.arrow").read_bytes()
    site.add("web/y", {"a.arrow": data})
    with serving(site) as url:
        file = find_corpus(f"{url}/datasets/web/y/resolve/main/a.arrow").open(0)
        assert [text for span in file.spans() for text in file.read(span).array.to_pylist()] == rows
    assert sum(nbytes for _, _, nbytes in site.log) < 1.1 * len(data)


class Odd(BaseHTTPRequestHandler):
    """Answers that no one should choke on; the path says which."""

    def do_GET(self) -> None:
        status, headers, body = {
            "/redirect": (302, {"Location": "http://[bad/x"}, b""),
            "/dots": (302, {"Location": "http://a..b/x"}, b""),
            "/late": (503, {"Retry-After": "Sun, 06 Nov 999999 08:49:37 GMT"}, b""),
            "/timeout": (400, {}, b"<Error><Code>RequestTimeout</Code></Error>"),
            "/cloud": (522, {}, b""),
            "/never": (501, {}, b"<Error><Code>NotImplemented</Code><Message>secret</Message></Error>"),
        }[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
            time.sleep(0.1)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    with listening(Odd) as url:
        yield url


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("/redirect", retry.AnswerError, "ValueError"),
        ("/dots", retry.AnswerError, "LocationParseError"),
        ("/late", retry.TransientError, "503"),
        ("/timeout", retry.TransientError, "RequestTimeout"),
        ("/cloud", retry.TransientError, "522"),
        ("/never", retry.AnswerError, "NotImplemented"),
    ],
)
def test_odd_answers_are_faults_and_no_tracebacks(odd: str, path: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        http.HttpClient().read(odd + path, 0, 10, total=10)
    assert "secret" not in str(caught.value)


def test_a_slow_receiver_is_waited_for(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is for a block, not for all of a large body."""
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.8)
    monkeypatch.setattr(http, "STALL_SECONDS", 10.0)
    begun = time.monotonic()
    http.HttpClient().put(odd + "/slow", bytes(20 << 20))
    assert time.monotonic() - begun > 1


def test_signed_urls_are_of_the_buckets_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS redirects calls to where a bucket is, but not signed URLs."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    found = s3.Bucket("b", http.HttpClient())
    headers = {"ResponseMetadata": {"HTTPHeaders": {"x-amz-bucket-region": "eu-west-1"}}}
    monkeypatch.setattr(found.client, "head_bucket", lambda **_: headers)
    assert "%2Feu-west-1%2Fs3%2F" in found.sign("get_object", Key="k")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    other = s3.Bucket("b", http.HttpClient(), endpoint_url="http://127.0.0.1:9")
    assert "%2Feu-central-1%2F" in other.sign("get_object", Key="k")


def test_one_corpus_is_in_one_kind_of_place(tmp_path: Path) -> None:
    for dataset, message in (
        ([str(tmp_path), "s3://b/x"], "several kinds of place"),
        (["s3://b/x", "s3://b/y"], "takes one --dataset"),
        (["ftp://host/x"], "no corpus is read from ftp://"),
    ):
        with pytest.raises(errors.SourceError, match=message):
            find_corpus(dataset)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_many_small_files_are_opened_at_the_same_time(
    kind: str, site: Site, hub: dict[str, str], tmp_path: Path
) -> None:
    """Each costs the time of a request or two, however small it is."""
    folder = tmp_path / "small"
    for number in range(40):
        rows = [text(number, 9), text(number + 1, 30)]
        if kind == "parquet":
            write_parquet(folder / f"{number:03d}.parquet", rows)
        else:
            folder.mkdir(exist_ok=True)
            (folder / f"{number:03d}.jsonl").write_bytes(jsonl(rows))
    site.add("some/small", {f"data/{path.name}": path.read_bytes() for path in folder.iterdir()})
    waiting: list[int] = []
    together: list[int] = []

    def wait(number: int, path: str) -> None:
        waiting.append(number)
        together.append(len(waiting))
        time.sleep(0.02)
        waiting.remove(number)

    site.fault = wait
    assert run(tmp_path / "out", "--dataset", "hf://datasets/some/small", env=hub).returncode == 0
    (tmp_path / "copy").mkdir()
    folder.rename(tmp_path / "copy" / "data")
    assert run(tmp_path / "expected", "--dataset", tmp_path / "copy").returncode == 0
    assert shard_digests(tmp_path / "out") == shard_digests(tmp_path / "expected")
    assert max(together) > 4

"""Transfer: download and upload against a real S3 implementation on loopback, whole and through faults."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenacity

from conftest import command, text, write_parquet
from support.servers import listening, s3_client, s3rver
from support.transfers import HERE_ONLY, bucket, contents, made, root, server, small, store  # noqa: F401  # fixtures
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.loading.dataset import TokenDataset
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.remote import http, retry, s3
from tokenmill.remote.etag import ETagHasher, md5_etag
from tokenmill.transfer import download as downloads
from tokenmill.transfer import upload as uploads
from tokenmill.transfer.download import bring as download
from tokenmill.transfer.selection import Selection, TransferredFile, shard_range
from tokenmill.transfer.stores import FolderStore, StoredFile, checked_path
from tokenmill.transfer.upload import part_nbytes
from tokenmill.transfer.upload import send as upload
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec, load_spec


def pending(endpoint: str, prefix: str) -> list[str]:
    found = s3_client(endpoint).list_multipart_uploads(Bucket="bucket", Prefix=f"{prefix}/")
    return [entry["Key"] for entry in found.get("Uploads", [])]


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def test_there_and_back(server: str, root: Path, tmp_path: Path) -> None:
    sent = cli("upload", root, "s3://bucket/back", "--endpoint-url", server)
    assert sent.returncode == 0, sent.stderr
    assert bucket(server, "back") == contents(root)
    again = cli("upload", root, "s3://bucket/back/", "--endpoint-url", server)
    assert "0 files, 0.000 GB; " in again.stdout, again.stdout
    brought = cli("download", "s3://bucket/back", tmp_path / "new", "--endpoint-url", server)
    assert brought.returncode == 0, brought.stderr
    assert contents(tmp_path / "new") == contents(root)
    assert "files compared with SHA-256 of the manifest" in brought.stdout
    again = cli("download", "s3://bucket/back", tmp_path / "new", "--endpoint-url", server, "--json")
    assert sum(file["moved_nbytes"] for file in json.loads(again.stdout)["files"]) == 0
    assert cli("verify", tmp_path / "new").returncode == 0
    assert not list((tmp_path / "new").rglob("*.partial"))


def test_another_implementation_of_s3(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps objects on disk, and cannot list uploads that were begun."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
    (tmp_path / "server").mkdir()
    with s3rver(tmp_path / "server") as endpoint:
        (root / "notes" / "a b+c&d=ä%.bin").write_bytes(bytes(7_000))
        upload(root, store(endpoint, "data"))
        assert upload(root, store(endpoint, "data")).moved == []
        download(store(endpoint, "data"), tmp_path / "new")
        assert contents(tmp_path / "new") == contents(root)


def test_directories_are_stores_too(root: Path, tmp_path: Path) -> None:
    assert cli("upload", root, f"file://{tmp_path}/a").returncode == 0
    assert cli("download", tmp_path / "a", tmp_path / "b").returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(root)


def test_only_what_is_missing_or_different_travels(server: str, root: Path, tmp_path: Path) -> None:
    there = store(server, "diff")
    upload(root, there)
    new = tmp_path / "new"
    download(there, new)
    (new / "train_000001.npy").unlink()
    torn = bytearray((new / "train_000000.npy").read_bytes())
    torn[500] ^= 1
    (new / "train_000000.npy").write_bytes(torn)
    os.utime(new / "documents_000000.parquet")  # touched, not changed: hashed, and kept
    (new / "transfers.json").write_text("no journal")
    moved = [file.path for file in download(store(server, "diff"), new).moved if file.nbytes]
    assert moved == ["train_000000.npy", "train_000001.npy"]
    assert contents(new) == contents(root)

    (root / "notes" / "extra.bin").write_bytes(b"another")
    (root / "transfers.json").unlink()
    moved = [file.path for file in upload(root, store(server, "diff")).moved if file.nbytes]
    assert moved == ["manifest.json", "notes/extra.bin"]  # withdrawn while a file under it changed
    assert bucket(server, "diff") == contents(root)


def test_selections_and_dry_run(server: str, root: Path, tmp_path: Path) -> None:
    upload(root, store(server, "some"))
    plan = cli("download", "s3://bucket/some", tmp_path / "no", "--endpoint-url", server, "--dry-run")
    assert f"{len(contents(root))} files" in plan.stdout
    assert not (tmp_path / "no").exists()
    two = cli("download", "s3://bucket/some", tmp_path / "two", "--endpoint-url", server, "--shards", "1-2")
    names = {f"{kind}_00000{n}.{end}" for n in (1, 2) for kind, end in (("train", "npy"), ("documents", "parquet"))}
    records = {"manifest.json", "consolidated.json"} & set(contents(root))
    assert (two.returncode, set(contents(tmp_path / "two"))) == (0, names | records)
    assert "4 files compared with SHA-256 of the manifest" in two.stdout
    patterns = Selection(include=("*.npy", "*.bin"), exclude=("tokens.*", "train_*1.npy"))
    download(store(server, "some"), tmp_path / "p", patterns)
    expected = {path for path in contents(root) if path.endswith((".npy", ".bin"))}
    assert set(contents(tmp_path / "p")) == expected - {"tokens.bin", "train_000001.npy"}
    with pytest.raises(errors.StorageError, match=r"none of the \d+ files there is meant"):
        download(store(server, "some"), tmp_path / "q", Selection(include=("*.nope",)))
    for wrong in ("3-1", "x", "-1"):
        with pytest.raises(errors.StorageError, match="--shards"):
            shard_range(wrong)


def test_a_wrong_file_in_the_store_is_refused(server: str, root: Path, tmp_path: Path) -> None:
    """Damaged there: same size, another byte. Nothing of it gets its name here."""
    upload(root, store(server, "damaged"))
    wrong = bytearray((root / "train_000001.npy").read_bytes())
    wrong[1_000] ^= 4
    s3_client(server).put_object(Bucket="bucket", Key="damaged/train_000001.npy", Body=bytes(wrong))
    result = cli("download", "s3://bucket/damaged", tmp_path / "new", "--endpoint-url", server)
    assert result.returncode == 6
    assert "damaged/train_000001.npy: arrived wrong 3 times" in result.stderr
    assert not (tmp_path / "new" / "train_000001.npy").exists()
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_wrong_file_here_is_not_sent(server: str, root: Path) -> None:
    for name in ("train_000001.npy", "documents_000000.parquet"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(errors.DataRootError, match=f"{name}: expected sha256"):
            upload(root, store(server, f"bad-{name}"))
        assert "manifest.json" not in bucket(server, f"bad-{name}")
        assert name not in bucket(server, f"bad-{name}")
        (root / name).write_bytes(whole)
    (root / "documents_000001.parquet").unlink()
    with pytest.raises(errors.DataRootError, match=r"documents_000001\.parquet is missing"):
        upload(root, store(server, "bad-none"))


def test_a_half_data_set_in_the_store_is_told(server: str, root: Path, tmp_path: Path) -> None:
    upload(root, store(server, "half"))
    s3_client(server).delete_object(Bucket="bucket", Key="half/sample_ids.bin")
    with pytest.raises(errors.StorageError, match=r"sample_ids\.bin is not there, but its records speak of it"):
        download(store(server, "half"), tmp_path / "new")
    download(store(server, "half"), tmp_path / "new", Selection(include=("train_*",)))


def test_another_data_set_is_not_mixed_in(server: str, root: Path, tmp_path: Path) -> None:
    upload(root, store(server, "one"))
    write_parquet(tmp_path / "c" / "a.parquet", [text(i, 9) for i in range(90)])
    pretokenize(Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=700), tmp_path / "other")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        download(store(server, "one"), tmp_path / "other")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        upload(tmp_path / "other", store(server, "one"))
    # The same settings over another corpus are another data set, and one shard of it as well.
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=5_000, buffer_size=40)
    pretokenize(recipe, tmp_path / "alike")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        download(store(server, "one"), tmp_path / "alike", Selection(shards=range(1)))
    before = bucket(server, "one")
    with pytest.raises(errors.DataRootError, match="holds another data set"):
        pretokenize(recipe, tmp_path / "straight", store=StoreOptions(server), upload_to="s3://bucket/one")
    assert bucket(server, "one") == before == contents(root)
    with lock_data_root(root), pytest.raises(errors.DataRootError, match="another tokenmill process"):
        upload(root, store(server, "two"))


ESCAPES = ["../up", "a/../../b", "/abs", "a//b", "C:/x", "c:x", "a\\b", "..", "a/./b", "x\n", "a/\x00"]


@pytest.mark.parametrize("path", ESCAPES)
def test_keys_that_leave_the_data_root_are_refused(path: str) -> None:
    with pytest.raises(errors.StorageError, match="it would leave the data root"):
        checked_path(path, "s3://b")


def test_keys_of_a_bucket_are_checked(server: str, tmp_path: Path) -> None:
    s3_client(server).put_object(Bucket="bucket", Key="evil/..\\..\\up.npy", Body=b"x")
    with pytest.raises(errors.StorageError, match="it would leave the data root"):
        download(store(server, "evil"), tmp_path / "deep" / "er")
    assert not list(tmp_path.rglob("up*"))
    for good in ("a", "train_000000.npy", "a/b.c", "...", "ä ö"):
        assert checked_path(good, "") == good


def test_files_without_a_manifest_are_held_to_etags(server: str, tmp_path: Path) -> None:
    """What the original's users have: shards in a bucket, uploaded by another tool in its own parts."""
    client, data = s3_client(server), random.Random(2).randbytes(20_000)
    client.put_object(Bucket="bucket", Key="bare/small.npy", Body=data[:900])
    key = {"Bucket": "bucket", "Key": "bare/large.npy"}
    begun = client.create_multipart_upload(**key)["UploadId"]
    parts = [
        {
            "PartNumber": n + 1,
            "ETag": client.upload_part(**key, UploadId=begun, PartNumber=n + 1, Body=data[at : at + 7_000])["ETag"],
        }
        for n, at in enumerate(range(0, len(data), 7_000))
    ]
    client.complete_multipart_upload(**key, UploadId=begun, MultipartUpload={"Parts": parts})
    there = store(server, "bare")
    result = download(there, tmp_path / "new")
    assert (tmp_path / "new" / "large.npy").read_bytes() == data
    assert {file.path: file.checked for file in result.files} == {"large.npy": "etag", "small.npy": "etag"}
    tag = ETagHasher(there.files()["large.npy"].etag, [7_000])
    for at in range(0, len(data), 333):
        tag.update(data[at : at + 333])
    assert tag.found == there.files()["large.npy"].etag


def test_part_sizes_are_equal_few_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PART_NBYTES", 32 << 20)
    for nbytes in (1, 16 << 20, 160 << 30, (160_000 << 20) + 1, 322_122_547_200, 5 << 40):
        size = part_nbytes(nbytes)
        assert 5 << 20 <= size <= 5 << 30
        assert -(-nbytes // size) <= 10_000
        assert size % (1 << 20) == 0


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_killed_transfers_go_on_in_the_middle_of_a_file(
    server: str, root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at random moments; at the end all is right, and no part travels that had arrived."""
    (root / "notes" / "extra.bin").write_bytes(random.Random(3).randbytes(20_000_000))
    expected = {path: sha256 for path, sha256 in contents(root).items() if not path.endswith(".npy")}
    prefix = f"killed-{kind}"
    if kind == "download":
        monkeypatch.setattr(uploads, "PART_NBYTES", 1 << 20)
        upload(root, store(server, prefix))
    program = (
        "from tokenmill.transfer import download, upload;"
        "download.PART_NBYTES = upload.PART_NBYTES = upload.WHOLE_NBYTES = 65_536;"
        "from tokenmill.cli import main; main()"
    )
    new = tmp_path / "new"
    ends = ["upload", root, f"s3://bucket/{prefix}"] if kind == "upload" else ["download", f"s3://bucket/{prefix}", new]
    line = command(*ends, "--endpoint-url", server, "--json", "--exclude", "*.npy")
    line[1:3] = ["-c", program]
    rng = random.Random(4)
    moved = 0
    for _ in range(8):
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0.4, 1.2))
            process.kill()
            moved += process.wait() == -signal.SIGKILL
        if kind == "upload":
            there = bucket(server, prefix)
            assert ("manifest.json" in there) <= (there == expected)
    assert moved
    last = subprocess.run(line, capture_output=True, check=True, timeout=100)
    assert json.loads(last.stdout)["files"]
    assert (bucket(server, prefix) if kind == "upload" else contents(new)) == expected
    assert pending(server, prefix) == []


def test_a_begun_download_is_gone_on_with(server: str, root: Path, tmp_path: Path) -> None:
    upload(root, store(server, "begun"))
    there, new = store(server, "begun"), tmp_path / "new"
    file = there.files()["tokens.bin"]
    new.mkdir()
    run = downloads.Download(there, new, {}, {}, lambda done, total: None)
    whole = (root / "tokens.bin").read_bytes()
    run.partial_path(file).write_bytes(whole[:5_000])
    (new / "tokens.bin.0123456789ab.partial").write_bytes(b"of another version")
    moved = {each.path: each.moved_nbytes for each in download(there, new).files}
    assert moved["tokens.bin"] == len(whole) - 5_000
    assert contents(new) == contents(root)
    # A torn beginning is found by the digest, and the file is fetched anew.
    (new / "tokens.bin").unlink()
    run.partial_path(file).write_bytes(bytes(5_000))
    download(there, new)
    assert contents(new) == contents(root)


def test_a_begun_upload_is_gone_on_with_and_others_are_aborted(server: str, root: Path) -> None:
    there = store(server, "begun-up")
    key = "begun-up/tokens.bin"
    whole = (root / "tokens.bin").read_bytes()
    foreign = there.bucket.begin_upload(key)
    there.bucket.put_part(key, foreign, 1, bytes(3_000), md5_etag(bytes(3_000)))
    begun = there.bucket.begin_upload(key)
    there.bucket.put_part(key, begun, 2, whole[2_048:4_096], md5_etag(whole[2_048:4_096]))
    there.bucket.put_part(key, begun, 3, bytes(2_048), md5_etag(bytes(2_048)))  # not what the file has there
    moved = {each.path: each.moved_nbytes for each in upload(root, there).files}
    assert moved["tokens.bin"] == len(whole) - 2_048
    assert bucket(server, "begun-up") == contents(root)
    assert pending(server, "begun-up") == []


def test_partials_of_other_files_are_left_alone(server: str, tmp_path: Path) -> None:
    for name in ("x.npy", "x.npy.sha256"):
        s3_client(server).put_object(Bucket="bucket", Key=f"alike/{name}", Body=bytes(5_000))
    there, new = store(server, "alike"), tmp_path / "new"
    new.mkdir()
    run = downloads.Download(there, new, {}, {}, lambda done, total: None)
    other = run.partial_path(there.files()["x.npy.sha256"])
    other.write_bytes(bytes(4_000))
    download(there, new, Selection(include=("x.npy",)))
    assert other.exists()


def test_a_store_whose_etags_are_new_each_time(server: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with keys of the customer's own: what arrived is read back instead, and found if it is wrong."""
    monkeypatch.setattr(retry, "backoff", tenacity.wait_none())
    there = store(server, "keyed")
    real = there.bucket.put_part
    number = itertools.count()

    def put_part(*arguments: Any) -> str:
        real(*arguments)
        return f'"{next(number):032x}"'

    def complete(key: str, upload: str, parts: list[s3.UploadedPart]) -> str:
        return s3.Bucket.complete_upload(there.bucket, key, upload, there.bucket.parts(key, upload))

    monkeypatch.setattr(there.bucket, "put_part", put_part)
    monkeypatch.setattr(there.bucket, "complete_upload", complete)
    monkeypatch.setattr(uploads, "parts_etag", lambda etags: '"other"')
    upload(root, there)
    assert bucket(server, "keyed") == contents(root)
    (root / "notes" / "extra.bin").write_bytes(bytes(9_000))

    def read(found: s3.S3Object, at: int, nbytes: int, into: bytearray | None = None) -> bytearray:
        right = s3.Bucket.read(there.bucket, found, at, nbytes, into)
        return bytearray(b"x" * nbytes) if "extra" in found.key else right

    monkeypatch.setattr(there.bucket, "read", read)
    with pytest.raises(errors.StorageError, match=r"extra\.bin: expected sha256 .* deleted there"):
        upload(root, there)


class LengthlessHandler(BaseHTTPRequestHandler):
    """Answers as a store does through a wire that bends a header's name."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Bontent-Length", "5")
        self.send_header("ETag", '"e"')
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_an_answer_without_its_headers_is_tried_again() -> None:
    with listening(LengthlessHandler) as endpoint, pytest.raises(retry.TransientError):
        s3.Bucket("bucket", http.HttpClient(), endpoint_url=endpoint).head("key")


def test_ctrl_c_is_prompt_and_harmless(server: str, root: Path, tmp_path: Path) -> None:
    (root / "notes" / "extra.bin").write_bytes(random.Random(3).randbytes(60_000_000))
    upload(root, store(server, "stop"), Selection(include=("notes/*",)))
    line = command("download", "s3://bucket/stop", tmp_path / "new", "--endpoint-url", server)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=30)
    assert (process.returncode, "run the same command again to continue" in shown) in ((130, True), (0, False))
    assert "Traceback" not in shown


@pytest.mark.parametrize("keep", [True, False])
def test_straight_to_the_bucket(server: str, tmp_path: Path, keep: bool) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", [text(i, 5 + i % 60) for i in range(200)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=3_000, buffer_size=40)
    pretokenize(recipe, tmp_path / "local")
    prefix = f"straight-{keep}"
    target = {"store": StoreOptions(server), "upload_to": f"s3://bucket/{prefix}", "keep_local": keep}
    summary = pretokenize(recipe, tmp_path / "out", **target)
    assert (summary.status, summary.uploaded_to) == ("complete", f"s3://bucket/{prefix}")
    there = bucket(server, prefix)
    local = contents(tmp_path / "local")
    assert there.keys() == local.keys()
    assert {p: s for p, s in there.items() if p != "manifest.json"} == {
        p: s for p, s in local.items() if p != "manifest.json"
    }
    assert any((tmp_path / "out").glob("train_*")) is keep
    assert pretokenize(recipe, tmp_path / "out", **target).status == "already complete"
    s3_client(server).delete_object(Bucket="bucket", Key=f"{prefix}/train_000001.npy")
    mended = pretokenize(recipe, tmp_path / "out", **target)
    assert mended.remade == ([] if keep else ["train_000001.npy"])
    assert {**bucket(server, prefix), "manifest.json": ""} == {**there, "manifest.json": ""}
    download(store(server, prefix), tmp_path / "back")
    assert cli("verify", tmp_path / "back", "--deep", 9).returncode == 0


def test_a_part_says_what_is_here_and_what_is_elsewhere(server: str, tmp_path: Path) -> None:
    """Made through a small disk, or fetched in part: what is here is verified, what is not is named."""
    write_parquet(tmp_path / "c" / "a.parquet", [text(i, 5 + i % 60) for i in range(200)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=3_000, buffer_size=40)
    target = {"store": StoreOptions(server), "upload_to": "s3://bucket/part", "keep_local": False}
    pretokenize(recipe, tmp_path / "sent", **target)
    store_flags = ("--endpoint-url", server)
    assert cli("download", "s3://bucket/part", tmp_path / "two", "--shards", "1-2", *store_flags).returncode == 0
    for name, here in (("sent", "nothing here"), ("two", "stored as shards")):
        seen = cli("info", tmp_path / name)
        assert here in seen.stdout
        assert "not here but in s3://bucket/part" in seen.stdout
        found = cli("verify", tmp_path / name)
        assert found.returncode == 0, found.stdout
        assert f"what is here of {tmp_path / name} is what its records say" in found.stdout
        with pytest.raises(errors.DataRootError, match=r"a part of a data set: .* in s3://bucket/part"):
            TokenDataset(tmp_path / name)
        deep = cli("verify", tmp_path / name, "--deep", 3)
        assert (deep.returncode, "a part of a data set" in deep.stderr) == (5, True)
    shard = tmp_path / "two" / "train_000001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[500] ^= 1
    shard.write_bytes(damaged)
    assert cli("verify", tmp_path / "two").returncode == 1
    shard.unlink()  # it was here, so it is missing
    assert "is there" in cli("verify", tmp_path / "two").stdout
    there = cli("info", "s3://bucket/part", *store_flags)
    assert (there.returncode, "stored as shards" in there.stdout) == (0, True), there.stderr
    assert cli("info", "s3://bucket/nothing", *store_flags).returncode == 5
    assert cli("download", "s3://bucket/part", tmp_path / "two", *store_flags).returncode == 0
    assert cli("verify", tmp_path / "two", "--deep", 3).returncode == 0


def test_a_shard_that_vanishes_behind_the_run_keeps_the_manifest_back(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", [text(i, 5 + i % 60) for i in range(200)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=3_000, buffer_size=40)
    target = {"store": StoreOptions(server), "upload_to": "s3://bucket/vanished", "keep_local": False}
    real = uploads.Sender.send

    def send(self: uploads.Sender, wanted: dict[str, StoredFile]) -> list[TransferredFile]:
        s3_client(server).delete_object(Bucket="bucket", Key="vanished/train_000001.npy")
        return real(self, wanted)

    monkeypatch.setattr(uploads.Sender, "send", send)
    with pytest.raises(errors.StorageError, match=r"vanished/train_000001\.npy: expected .* found no such object"):
        pretokenize(recipe, tmp_path / "out", **target)
    assert "manifest.json" not in bucket(server, "vanished")
    monkeypatch.setattr(uploads.Sender, "send", real)
    assert pretokenize(recipe, tmp_path / "out", **target).remade == ["train_000001.npy"]
    assert "manifest.json" in bucket(server, "vanished")


def test_straight_to_the_bucket_survives_kills(server: str, tmp_path: Path) -> None:
    for number in range(4):
        write_parquet(tmp_path / "c" / f"{number}.parquet", [text(number * 9_999 + i, 60) for i in range(2_000)])
    flags = ["--dataset", tmp_path / "c", "--tokenizer", TOKENIZER, "--shard-size", 60_000, "--buffer-size", 100]
    assert cli("pretokenize", tmp_path / "local", *flags).returncode == 0
    target = ["--upload-to", "s3://bucket/kills", "--keep-local", "no", "--endpoint-url", server]
    line = command("pretokenize", tmp_path / "out", *flags, *target)
    rng = random.Random(6)
    killed = 0
    for round_ in range(6):
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(sent(tmp_path / "out"))) < 4 * (round_ + 1):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        assert len(list((tmp_path / "out").glob("train_*.npy"))) < 8
    assert killed
    assert cli(*line[3:]).returncode == 0
    there, local = bucket(server, "kills"), contents(tmp_path / "local")
    del there["manifest.json"], local["manifest.json"]
    assert there == local
    assert not list((tmp_path / "out").glob("train_*"))


def sent(root: Path) -> list[str]:
    """Names of the shards and documents that its journal says are in the bucket."""
    path = root / "transfers.json"
    return list(next(iter(json.loads(path.read_bytes()).values()), {})) if path.exists() else []


def test_upload_to_refusals(tmp_path: Path, server: str) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["a text"])
    base = ["pretokenize", tmp_path / "out", "--dataset", tmp_path / "c", "--tokenizer", TOKENIZER]
    for flags, message in (
        (["--keep-local", "no"], "name a bucket with --upload-to"),
        (["--upload-to", tmp_path / "x"], "expected s3://BUCKET/PREFIX"),
        (["--upload-to", "s3://nonesuch/x", "--endpoint-url", server], "NoSuchBucket"),
        (["--upload-to", "s3://bucket/x", "--keep-local", "no", "--consolidated", "--endpoint-url", server], "piece"),
    ):
        result = cli(*base, *flags)
        assert (result.returncode, message in result.stderr) == (6, True), result.stderr
        assert "Traceback" not in result.stderr


def test_folder_store_lists_what_belongs_to_the_data_set(root: Path) -> None:
    (root / "x.partial").write_bytes(b"")
    (root / "tokenmill.log").write_text("")
    assert set(FolderStore(root).files()) == set(contents(root)) - {"x.partial"}


def test_views_travel_with_their_digests(server: str, root: Path, tmp_path: Path) -> None:
    """The record last; a view without its index, or another one in the same place, is refused."""
    (tmp_path / "view.toml").write_text('[[sources]]\nname = "s"\nroot = "root"\n')
    build_view(load_spec(tmp_path / "view.toml"), tmp_path / "view")
    view, there = tmp_path / "view", store(server, "views/view")
    checked = {file.path: file.checked for file in upload(view, there).files}
    assert checked == {"view_begins.bin": "sha256", "view_places.bin": "sha256", "view.json": "etag"}
    upload(root, store(server, "views/root"))
    assert {each.checked for each in download(there, tmp_path / "new" / "view").files} == {"sha256", "twice"}
    download(store(server, "views/root"), tmp_path / "new" / "root")
    assert verify(tmp_path / "new" / "view").passed
    assert np.array_equal(TokenDataset(tmp_path / "new" / "view")[:], TokenDataset(view)[:])
    build_view(ViewSpec(sources=[ViewSource(name="s", root=str(root))], seed=1), tmp_path / "other")
    with pytest.raises(errors.DataRootError, match="holds another view"):
        upload(tmp_path / "other", there)
    with pytest.raises(errors.DataRootError, match="holds another view"):
        download(there, tmp_path / "other")
    (view / "view_places.bin").unlink()
    with pytest.raises(errors.DataRootError, match=r"view_places\.bin is missing"):
        upload(view, store(server, "views/lost"))
    s3_client(server).delete_object(Bucket="bucket", Key="views/view/view_begins.bin")
    with pytest.raises(errors.StorageError, match=r"view_begins\.bin is not there"):
        download(store(server, "views/view"), tmp_path / "partial")

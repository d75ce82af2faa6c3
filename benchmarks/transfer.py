"""`tokenmill upload` and `download` against `aws s3 sync`, whole processes, side by side, on one server.

    python benchmarks/transfer.py FOLDER [--gigabytes 1] [--shard-megabytes 64] [--rounds 3] [--endpoint-url URL]

Needs the packages awscli and moto[server]. Makes shards of random tokens with a manifest in FOLDER. The server
is moto's, started here, unless an endpoint is given (with its keys in AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, and a bucket called `bucket`).

    tokenmill   the command line as a user runs it: SHA-256 of every file compared with the manifest
    aws         aws s3 sync with its defaults, as the original's README has it
    limit       the server's own: whole objects over 8 connections, nothing hashed, nothing stored here
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import urllib3
from botocore.config import Config

from consolidate import make_shards, timed

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
WAYS = ("tokenmill", "aws", "limit")


@contextlib.contextmanager
def server(endpoint: str | None) -> Iterator[str]:
    """The endpoint; moto's if none is given."""
    if endpoint is not None:
        yield endpoint
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    line = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(3)
            url = f"http://127.0.0.1:{port}"
            client(url).create_bucket(Bucket="bucket")
            yield url
        finally:
            process.kill()


def client(endpoint: str):
    config = Config(s3={"addressing_style": "path"}, signature_version="s3v4")
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, config=config)


def empty(endpoint: str, prefix: str) -> None:
    s3 = client(endpoint)
    for entry in s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", []):
        s3.delete_object(Bucket="bucket", Key=entry["Key"])


def lines(endpoint: str, root: Path, out: Path) -> dict[tuple[str, str], list[str]]:
    ours = [sys.executable, "-m", "tokenmill"]
    aws = [sys.executable, "-m", "awscli", "--endpoint-url", endpoint, "s3", "sync", "--quiet"]
    raw = [sys.executable, __file__, "--limit"]
    here = ["--endpoint-url", endpoint, "--quiet"]
    return {
        ("upload", "tokenmill"): [*ours, "upload", str(root), "s3://bucket/tokenmill", *here],
        ("upload", "aws"): [*aws, str(root), "s3://bucket/aws"],
        ("upload", "limit"): [*raw, "upload", "--endpoint-url", endpoint, str(root)],
        ("download", "tokenmill"): [*ours, "download", "s3://bucket/source", str(out), *here],
        ("download", "aws"): [*aws, "s3://bucket/source", str(out)],
        ("download", "limit"): [*raw, "download", "--endpoint-url", endpoint, str(root)],
    }


def limit(way: str, endpoint: str, root: Path) -> None:
    """Move whole objects as fast as the server does."""
    s3, pool = client(endpoint), urllib3.PoolManager(maxsize=8, retries=False)

    def put(path: Path) -> None:
        key = {"Bucket": "bucket", "Key": f"limit/{path.name}"}
        pool.request("PUT", s3.generate_presigned_url("put_object", Params=key), body=path.read_bytes())

    def get(path: Path) -> None:
        key = {"Bucket": "bucket", "Key": f"source/{path.name}"}
        answer = pool.request("GET", s3.generate_presigned_url("get_object", Params=key), preload_content=False)
        while answer.read1(1 << 20):
            pass
        answer.release_conn()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put if way == "upload" else get, sorted(root.glob("train_*.npy"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--shard-megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--endpoint-url")
    parser.add_argument("--limit", choices=["upload", "download"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, value in KEYS.items():
        os.environ.setdefault(name, value)
    if arguments.limit:
        limit(arguments.limit, arguments.endpoint_url, arguments.folder)
        return
    root, out = arguments.folder / "transfer-benchmark", arguments.folder / "transfer-out"
    make_shards(root, int(arguments.gigabytes * 1e9), arguments.shard_megabytes * 1_000_000)
    for path in root.glob("train_*.npy"):  # the manifest speaks of sidecars
        path.with_name(path.name.replace("train", "documents").replace("npy", "parquet")).write_bytes(b"")
    edit_documents(root)
    gigabytes = sum(path.stat().st_size for path in root.glob("train_*.npy")) / 1e9
    rounds: list[dict[tuple[str, str], tuple[float, float]]] = []
    try:
        with server(arguments.endpoint_url) as endpoint:
            subprocess.run([*lines(endpoint, root, out)["upload", "aws"][:-1], "s3://bucket/source"], check=True)
            for number in range(arguments.rounds):
                rounds.append({})
                for name, line in lines(endpoint, root, out).items():
                    empty(endpoint, f"{name[1]}/")
                    shutil.rmtree(out, ignore_errors=True)
                    (root / "transfers.json").unlink(missing_ok=True)
                    rounds[-1][name] = timed(line)
                shown = "  ".join(f"{way} {what} {s:.1f} s" for (way, what), (s, _) in rounds[-1].items())
                print(f"round {number + 1}: {shown}", flush=True)
    finally:
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n{gigabytes:.2f} GB in shards of {arguments.shard_megabytes} MB, medians of {len(rounds)} rounds")
    print(f"{'':<20} {'MB/s':>6} {'tokenmill is':>13} {'peak GB':>8}")
    for way in ("upload", "download"):
        for what in WAYS:
            seconds = statistics.median(r[way, what][0] for r in rounds)
            ratio = statistics.median(r[way, what][0] / r[way, "tokenmill"][0] for r in rounds)
            peak = max(r[way, what][1] for r in rounds)
            print(f"{way + ' ' + what:<20} {gigabytes / seconds * 1000:6.0f} {ratio:12.2f}x {peak:8.2f}")


def edit_documents(root: Path) -> None:
    """Let the manifest say what the sidecars, empty here, are."""
    from tokenmill.dataroot import manifest

    made = manifest.load(root)
    for shard in made.shards:
        shard.documents_sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest.save(root, made)


if __name__ == "__main__":
    main()

"""A campaign against tokenmill: kills, power loss, damage, broken wires, odd input, failing disks, races, bad servers.

    make campaign SECONDS=600
    python tests/campaign.py --seconds 60 --only kills --seed 7

Every kind draws one case after the other from a seed of its own and checks what must hold: nothing that is durable is
lost, nothing wrong passes for right, every failure is an error of ours, and the same command makes it whole. The seed
of a case that fails is printed, and makes the same case again. `docs/reliability.md` says what is tried, and what not.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tenacity

from conftest import command, text
from support.servers import AWS, Proxy, listening, moto
from support.transfers import bucket as in_bucket
from tokenmill.cli.demo import TOKENIZER
from tokenmill.cli.first_shard import first_shard
from tokenmill.corpus.corpus import find_corpus
from tokenmill.dataroot import layout, manifest, npy
from tokenmill.dataroot.atomic import translate_read_errors
from tokenmill.errors import TokenmillError
from tokenmill.interchange.export import export
from tokenmill.interchange.importing import import_data
from tokenmill.interchange.output import load_export
from tokenmill.options import StoreOptions
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.remote import http, retry, s3
from tokenmill.shards.consolidate import consolidate
from tokenmill.transfer import download as downloads
from tokenmill.transfer import upload as uploads
from tokenmill.transfer.stores import OURS, FolderStore, StoredFile
from tokenmill.verification.verify import verify
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec
from tokenmill.views.write import write_view

Random = random.Random
DATA = (".npy", ".parquet", ".bin", ".idx")
"""Endings of the files whose bytes the recipe defines."""
REFUSALS = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8})
"""Exit codes that are no bug of ours (70) and no signal."""
CUT_NBYTES = 512


# What all kinds work on


class Job(NamedTuple):
    """A command that makes a data root, and what it makes."""

    begin: str | None
    """The data root it begins with; None: none."""
    arguments: Callable[[Path], list[object]]
    """Of the command line, given the data root."""
    call: Callable[[Path], object]
    """The same from Python."""
    expected: dict[str, str]
    """Digests of the files that it leaves."""
    makes_export: bool = False
    """Whether that is the directory of an export, and no data root."""


class Field:
    """A small corpus in several formats, finished data roots of it, and the jobs that make them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        make_corpus(self.corpus)
        self.recipe = Recipe(
            dataset=str(self.corpus), tokenizer=str(TOKENIZER), buffer_size=50, shard_size=2_000, seq_len=64, seed=5
        )
        roots = folder / "roots"
        self.roots = {name: roots / name for name in ("shards", "both", "consumed", "straight", "first")}
        pretokenize(self.recipe, self.roots["shards"], on_bad_rows="skip")
        shutil.copytree(self.roots["shards"], self.roots["both"])
        consolidate(self.roots["both"])
        shutil.copytree(self.roots["shards"], self.roots["consumed"])
        consolidate(self.roots["consumed"], consume=True)
        pretokenize(self.recipe, self.roots["straight"], on_bad_rows="skip", consolidated=True)
        pretokenize(first_shard(self.recipe), self.roots["first"], on_bad_rows="skip")
        build_view(
            ViewSpec(sources=[ViewSource(name="a", root=str(self.roots["both"]))], seed=3, seq_len=64), folder / "view"
        )
        self.roots |= {name: roots / name for name in ("written", "exported", "linked", "imported")}
        write_view(folder / "view", self.roots["written"])
        export(folder / "view", self.roots["exported"], "megatron")
        incoming: dict[str, Any] = {"shard_size": 2_000, "seq_len": 64}
        import_data(self.roots["exported"], self.roots["linked"], "megatron", **incoming)
        import_data(self.roots["exported"], self.roots["imported"], "megatron", **incoming, copy=True)
        importing: list[object] = ["--from", "megatron", "--shard-size", 2_000, "--seq-len", 64, "--quiet"]
        exported = self.roots.pop("exported")  # no data root
        flags: list[object] = ["--dataset", self.corpus, "--tokenizer", TOKENIZER, "--buffer-size", 50, "--seed", 5]
        flags += ["--shard-size", 2_000, "--seq-len", 64, "--on-bad-rows", "skip", "--quiet"]

        def job(name: str, begin: str | None, line: Callable[[Path], list[object]], call: Callable[[Path], object]):
            return Job(begin, line, call, digests(self.roots[name]))

        self.jobs = {
            "pretokenize": job(
                "shards",
                None,
                lambda root: ["pretokenize", root, *flags],
                lambda root: pretokenize(self.recipe, root, on_bad_rows="skip"),
            ),
            "pretokenize --consolidated": job(
                "straight",
                None,
                lambda root: ["pretokenize", root, *flags, "--consolidated"],
                lambda root: pretokenize(self.recipe, root, on_bad_rows="skip", consolidated=True),
            ),
            "consolidate": job("both", "shards", lambda root: ["consolidate", root, "--quiet"], consolidate),
            "consolidate --consume": job(
                "consumed",
                "shards",
                lambda root: ["consolidate", root, "--consume", "--quiet"],
                lambda root: consolidate(root, consume=True),
            ),
            "test-shard": job(
                "first",
                None,
                lambda root: ["test-shard", root, *flags],
                lambda root: pretokenize(first_shard(self.recipe), root, on_bad_rows="skip"),
            ),
            "download": job(
                "both",
                None,
                lambda root: ["download", self.roots["both"], root, "--quiet"],
                lambda root: downloads.download(str(self.roots["both"]), root),
            ),
            "view write": job(
                "written",
                None,
                lambda root: ["view", "write", folder / "view", root, "--quiet"],
                lambda root: write_view(folder / "view", root),
            ),
            "import": job(
                "linked",
                None,
                lambda root: ["import", exported, root, *importing],
                lambda root: import_data(exported, root, "megatron", **incoming),
            ),
            "import --copy": job(
                "imported",
                None,
                lambda root: ["import", exported, root, *importing, "--copy"],
                lambda root: import_data(exported, root, "megatron", **incoming, copy=True),
            ),
            "export": Job(
                None,
                lambda root: ["export", folder / "view", root, "--to", "megatron", "--quiet"],
                lambda root: export(folder / "view", root, "megatron"),
                digests(exported),
                makes_export=True,
            ),
        }
        self._records: dict[str, list[Event]] = {}
        self._recorder: Path | None = None

    def begin(self, job: Job, root: Path) -> None:
        """Put a data root in the state in which a job finds it."""
        if job.begin is not None:
            shutil.copytree(self.roots[job.begin], root)

    def recorded(self, name: str) -> list[Event]:
        """What an undisturbed run of a job does to its files; made once."""
        if name not in self._records:
            folder = self.folder / f"recorded-{len(self._records)}"
            root, log = folder / "root", folder / "log"
            folder.mkdir()
            self.begin(self.jobs[name], root)
            preload = {"LD_PRELOAD": str(self.recorder), "RECORDED": str(root), "RECORD": str(log)}
            subprocess.run(command(*self.jobs[name].arguments(root)), env=os.environ | preload, check=True, timeout=120)
            self._records[name] = list(read_events(log.read_bytes(), str(root)))
        return self._records[name]

    @property
    def recorder(self) -> Path:
        """The library that records, compiled once."""
        if self._recorder is None:
            self._recorder = self.folder / "recorder.so"
            source = Path(__file__).with_name("recorder.c")
            line = ["cc", "-shared", "-fPIC", "-O1", "-o", self._recorder, source, "-ldl", "-lpthread"]
            subprocess.run(line, check=True)
        return self._recorder


def make_corpus(folder: Path) -> None:
    """About 30,000 tokens in every format that is read; some rows null, empty, or bad."""
    folder.mkdir(parents=True)
    texts: list[Any] = [None if i % 37 == 5 else "" if i % 41 == 3 else text(i, 4 + i % 70) for i in range(420)]
    pq.write_table(pa.table({"text": texts[:120]}), folder / "a.parquet", row_group_size=30)
    table = pa.table({"text": texts[120:200]})
    with pa.OSFile(str(folder / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    lines = [json.dumps({"text": each}) for each in texts[200:300]]
    (folder / "c.jsonl").write_text("\n".join([*lines, '{"text": 7}', "no JSON"]) + "\n")
    lines = [json.dumps({"text": each}) for each in texts[300:420]]
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def digests(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir()) if p.suffix in DATA}


def check_records(root: Path) -> None:
    """Whatever a record says is there and proven, is."""
    if not root.is_dir():
        return
    state, record = manifest.load(root), manifest.load_consolidated(root)
    held = b""
    if record is not None and state is not None:
        for name in (layout.TOKENS, layout.TOKENS + layout.PARTIAL_SUFFIX):
            if (root / name).exists():
                held = (root / name).read_bytes()
    for shard in state.shards if state else []:
        path = root / layout.shard_name(shard.index)
        if path.exists():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256, f"{path.name} is not as recorded"
        else:
            assert state is not None
            itemsize = state.itemsize
            begin = shard.index * state.recipe.shard_size * itemsize
            tokens = held[begin : begin + shard.tokens * itemsize]
            header = npy.npy_header(np.dtype(state.stored_dtype), shard.tokens)
            assert hashlib.sha256(header + tokens).hexdigest() == shard.sha256, f"shard {shard.index} is lost"


def check_whole(root: Path, job: Job) -> None:
    """The job is done, and what it made is what an undisturbed run makes."""
    assert digests(root) == job.expected
    assert not [path.name for path in root.iterdir() if path.name.endswith(".partial")]
    if job.makes_export:
        record = load_export(root)
        assert record is not None
        assert record.complete
        return
    result = verify(root)
    assert result.passed, result.findings


def run(job: Job, root: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = command(*job.arguments(root))
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


# Kinds: each makes one case


def kills(field: Field, rng: Random, folder: Path) -> None:
    """SIGKILL, SIGTERM or Ctrl-C at any moment, several times; then the same command to its end."""
    job = field.jobs[rng.choice(list(field.jobs))]
    root = folder / "root"
    field.begin(job, root)
    for _ in range(rng.randint(1, 3)):
        # Start-up takes most of a run this small: most signals should fall into the work.
        with subprocess.Popen(command(*job.arguments(root)), stderr=subprocess.PIPE, text=True) as process:
            watched = rng.random() < 0.7
            before = entries(root)
            while watched and process.poll() is None and entries(root) == before:
                time.sleep(0.001)
            try:
                process.wait(rng.uniform(0, 0.25 if watched else 1.5))
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            said = process.communicate(timeout=60)[1]
        # Ctrl-C while Python itself starts, before a line of the command line has run, is Python's to tell.
        assert "Traceback" not in said or ("KeyboardInterrupt" in said and "tokenmill/cli" not in said), said
        check_records(root)
    done = run(job, root)
    assert done.returncode == 0, done.stderr
    check_whole(root, job)


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


class Event(NamedTuple):
    """Something done: c created, w written, t truncated, a allocated, s synced, r renamed, u removed, m folder made,
    l linked to a file elsewhere."""

    kind: str
    path: str
    """Relative to the data root; empty: that itself."""
    other: str
    offset: int
    data: bytes


def read_events(log: bytes, root: str) -> Iterator[Event]:
    """What `recorder.c` wrote."""
    head = struct.Struct("<cQQII")
    at = 0
    while at < len(log):
        kind, offset, nbytes, first, second = head.unpack_from(log, at)
        at += head.size
        paths = log[at : at + first].decode(), log[at + first : at + first + second].decode()
        at += first + second
        data = log[at : at + nbytes]
        at += len(data)
        path, other = (each.removeprefix(root).lstrip("/") for each in paths)
        yield Event(kind.decode(), path, other, offset, data)


class Inode:
    """A file: what is durable of it, and what was done since."""

    def __init__(self) -> None:
        self.durable = b""
        self.pending: list[Event] = []

    def sync(self) -> None:
        self.durable, self.pending = self.after(self.pending), []

    def after(self, events: list[Event]) -> bytes:
        data = bytearray(self.durable)
        for event in events:
            if event.kind == "t":
                del data[event.offset :]
            data.extend(bytes(max(0, event.offset - len(data))))
            if event.kind == "w":
                data[event.offset : event.offset + len(event.data)] = event.data
        return bytes(data)

    def survived(self, rng: Random) -> bytes:
        """What a disk may hold that lost its power: any of the blocks written since, in any order."""
        how = rng.random()
        if how < 0.3:
            return self.durable
        if how < 0.4:
            return self.after(self.pending)
        kept = []
        for event in self.pending:
            if event.kind != "w":
                if rng.random() < 0.5:
                    kept.append(event)
                continue
            for at in range(0, len(event.data), CUT_NBYTES):
                if rng.random() < 0.5:
                    kept.append(event._replace(offset=event.offset + at, data=event.data[at : at + CUT_NBYTES]))
        return self.after(kept)


class Disk:
    """Files of one folder, of which only what was synced, and any part of the rest, outlives a loss of power."""

    def __init__(self, root: Path | None) -> None:
        self._has_folder = root is not None
        self._names: dict[str, Inode] = {}
        for path in sorted(root.iterdir()) if root is not None else []:
            self._names[path.name] = Inode()
            self._names[path.name].durable = path.read_bytes()
        self._durable = dict(self._names)
        self._pending: list[tuple[Event, Inode]] = []
        """What was done to names since the folder was synced, and to which file."""

    def do(self, event: Event) -> None:
        if event.kind == "m":
            self._has_folder = True
        elif event.kind == "s" and not event.path:
            self._durable, self._pending = dict(self._names), []
        elif event.kind == "s":
            if event.path in self._names:  # else a folder in it, whose files are made anew
                self._names[event.path].sync()
        elif event.kind in ("w", "t", "a"):
            self._names[event.path].pending.append(event)
        else:
            inode = Inode() if event.kind in ("c", "l") else self._names[event.path]
            if event.kind == "l":
                inode.durable = Path("/", event.path).read_bytes()
            self._pending.append((event, inode))
            rename(self._names, event, inode)

    def lose_power(self, rng: Random, root: Path) -> None:
        """Write what is left to a folder."""
        if not self._has_folder:
            return
        names = dict(self._durable)
        # A journal keeps the order of names, and how far it came is open; not every file system has one.
        kept = self._pending[: rng.randint(0, len(self._pending))]
        if rng.random() < 0.3:
            kept = [each for each in self._pending if rng.random() < 0.7]
        for event, inode in kept:
            if event.kind != "r" or names.get(event.path) is inode:
                rename(names, event, inode)
        root.mkdir()
        for name, inode in names.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(inode.survived(rng))


def rename(names: dict[str, Inode], event: Event, inode: Inode) -> None:
    """Do to the names of a folder what was done to them."""
    if event.kind == "c":
        names[event.path] = inode
    elif event.kind == "l":
        names[event.other] = inode
    else:
        names.pop(event.path, None)
        if event.kind == "r":
            names[event.other] = inode


def power(field: Field, rng: Random, folder: Path) -> None:
    """The machine stops at any write, sync or rename: what was durable is what the same command finds."""
    name = rng.choice(list(field.jobs))
    job, events = field.jobs[name], field.recorded(name)
    disk = Disk(field.roots[job.begin] if job.begin else None)
    for event in events[: rng.randint(0, len(events))]:
        disk.do(event)
    root = folder / "root"
    disk.lose_power(rng, root)
    check_records(root)
    job.call(root)
    check_whole(root, job)


def corruptions(field: Field, rng: Random, folder: Path) -> None:
    """One file of a finished data root is damaged: verify finds it."""
    root = folder / "root"
    shutil.copytree(field.roots[rng.choice(list(field.roots))], root)
    names = [name for name in entries(root) if not name.startswith(".") and name not in OURS]
    path = root / rng.choice(names)
    before = path.read_bytes()
    how = rng.choice(["bit", "bit", "byte", "cut", "longer", "zeros", "gone", "swapped", "empty"])
    damaged = damage(before, how, rng)
    if how == "gone":
        path.unlink()
    elif how == "swapped":
        other = root / rng.choice([name for name in names if name != path.name])
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(damaged)
    if path.exists() and same_content(path.name, before, path.read_bytes()):
        return
    with contextlib.suppress(TokenmillError):
        result = verify(root)
        assert not result.passed, f"{path.name}, {how}: passed"


def damage(data: bytes, how: str, rng: Random) -> bytes:
    """Bytes with something wrong in them."""
    changed = bytearray(data)
    if how in ("bit", "byte") and data:
        at = rng.randrange(len(data))
        changed[at] ^= 1 << rng.randrange(8) if how == "bit" else rng.randrange(1, 256)
    elif how == "cut":
        del changed[rng.randrange(len(data) or 1) :]
    elif how == "longer":
        changed += rng.randbytes(rng.randint(1, 5000))
    elif how == "zeros" and data:
        begin = rng.randrange(len(data))
        end = min(len(data), begin + rng.choice([1, 16, 512, 4096]))
        changed[begin:end] = bytes(end - begin)
    elif how == "inserted":
        at = rng.randrange(len(data) + 1)
        changed[at:at] = rng.randbytes(rng.randint(1, 64))
    elif how == "doubled" and data:
        begin = rng.randrange(len(data))
        changed[begin:begin] = changed[begin : begin + rng.randint(1, 4096)]
    elif how == "empty":
        changed.clear()
    return bytes(changed)


def same_content(name: str, before: bytes, after: bytes) -> bool:
    """Whether nothing was changed: JSON says the same however it is spaced."""
    if before == after:
        return True
    if not name.endswith((".json", ".jsonl")):
        return False
    try:
        if name.endswith(".json"):
            return json.loads(before) == json.loads(after)
        return list(map(json.loads, before.splitlines())) == list(map(json.loads, after.splitlines()))
    except ValueError:
        return False


def network(field: Field, rng: Random, folder: Path) -> None:
    """An upload or a download over a wire that resets, truncates, flips bits, stalls, and answers 503."""
    root = field.roots[rng.choice(["shards", "both", "straight"])]
    expected = digests(root)
    prefix = f"{folder.name}"
    with quick_network(), serving_bucket() as endpoint:
        proxy = Proxy(endpoint)
        proxy.rng, proxy.rate = Random(rng.random()), rng.choice([0.005, 0.02, 0.05, 0.15])
        direct, faulty = StoreOptions(endpoint), StoreOptions(proxy.url)
        url = f"s3://bucket/{prefix}"
        try:
            with contextlib.suppress(TokenmillError):
                uploads.upload(root, url, store=faulty)
            there = in_bucket(endpoint, prefix)
            assert "manifest.json" not in there or expected.items() <= there.items(), "a manifest over lost files"
            uploads.upload(root, url, store=direct)
            assert expected.items() <= in_bucket(endpoint, prefix).items()
            with contextlib.suppress(TokenmillError):
                downloads.download(url, folder / "back", store=faulty)
            if (folder / "back").is_dir():
                # A bit that flipped in the name of a request makes one more object: a real store refuses its signature.
                here = digests(folder / "back")
                assert {name: here[name] for name in here.keys() & expected.keys()}.items() <= expected.items()
            downloads.download(url, folder / "back", store=direct)
            assert expected.items() <= digests(folder / "back").items()  # a flipped bit in a name makes one more
        finally:
            proxy.close()


_server: list[Any] = []


@contextlib.contextmanager
def serving_bucket() -> Iterator[str]:
    """One S3 server for all cases."""
    if not _server:
        stack = contextlib.ExitStack()
        _server.extend([stack.enter_context(moto()), stack])
    yield _server[0]


def close_servers() -> None:
    if _server:
        _server[1].close()
        _server.clear()


@contextlib.contextmanager
def quick_network() -> Iterator[None]:
    """Time limits and waits of a fraction of a second, parts of 2 KB; credentials for loopback."""
    saved = [
        (retry, "backoff", tenacity.wait_none()),
        (retry, "CALL_SECONDS", 1.5),
        (http, "STALL_SECONDS", 0.25),
        (s3, "STALL_SECONDS", 0.25),
        (downloads, "PART_NBYTES", 2_048),
        (uploads, "PART_NBYTES", 2_048),
        (uploads, "WHOLE_NBYTES", 2_048),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in saved]
    environment = dict(os.environ)
    os.environ.update(AWS)
    for where, name, value in saved:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
        os.environ.clear()
        os.environ.update(environment)


FUZZED = """
import sys, traceback
from pathlib import Path
from tokenmill.encoding.encoder import Encoder
from tokenmill.errors import TokenmillError
from tokenmill.options import StoreOptions
from tokenmill.corpus.corpus import find_corpus
from tokenmill.transfer.stores import OURS
from tokenmill.encoding.tokenizer import load_tokenizer
open_encoder = lambda path: Encoder(load_tokenizer(path), backend="auto", special_in_text="parse", dtype="auto")
encoder = open_encoder(sys.argv[1])
for line in sys.stdin:
    path = Path(line.rstrip())
    print("begin", path.name, flush=True)
    try:
        if path.name == "tokenizer.json":
            open_encoder(str(path)).require_equal_backends()
        else:
            reader = find_corpus(str(path), options=StoreOptions(max_document_nbytes=1 << 26)).open(0)
            for span in reader.spans():
                encoder.encode(reader.read(span), where=path.name, first_row=span.first_row, on_bad_rows="skip")
    except TokenmillError:
        pass
    except Exception:
        print("BUG", path, traceback.format_exc(), flush=True)
    print("end", path.name, flush=True)
"""
"""Reads damaged files, one a line of standard input."""


def fuzz(field: Field, rng: Random, folder: Path) -> None:
    """Forty damaged source files or tokenizers: an error of ours, or text; a native library's death is told by name."""
    files = []
    for number in range(40):
        source = rng.choice([*sorted(field.corpus.iterdir()), TOKENIZER / "tokenizer.json"])
        data = source.read_bytes()
        for _ in range(rng.choice([1, 1, 2, 5])):
            data = damage(data, rng.choice(["bit", "byte", "cut", "zeros", "inserted", "doubled", "longer"]), rng)
        path = folder / f"{number}" / source.name
        path.parent.mkdir()
        path.write_bytes(data)
        if source.name == "tokenizer.json":
            shutil.copy(TOKENIZER / "tokenizer_config.json", path.parent)
        files.append(path)
    rest = list(files)
    while rest:
        line = [sys.executable, "-c", FUZZED, str(TOKENIZER)]
        done = subprocess.run(
            line, input="".join(f"{path}\n" for path in rest), capture_output=True, text=True, timeout=600, check=False
        )
        assert "BUG" not in done.stdout, done.stdout
        ended = done.stdout.count("end ")
        if done.returncode == 0:
            return
        fatal, rest = rest[ended], rest[ended + 1 :]
        told = subprocess.run(
            command("pretokenize", folder / "out", "--dataset", fatal, "--tokenizer", TOKENIZER),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert told.returncode == 3, (done.stderr, told.stderr)
        assert fatal.name in told.stderr
        shutil.rmtree(folder / "out", ignore_errors=True)


FAILING = """
import errno, os, pathlib, random, sys
from tokenmill.cli import main
rng = random.Random(int(sys.argv.pop(1)))
left, code = rng.randint(1, 40), rng.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES])
lasting = rng.random() < 0.5
def failing(original):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0 or (left < 0 and lasting):
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)
    return call
for where, names in ((os, ("fsync", "fdatasync", "posix_fallocate")), (pathlib.Path, ("replace", "unlink", "mkdir"))):
    for name in names:
        if hasattr(where, name):
            setattr(where, name, failing(getattr(where, name)))
main()
"""
"""The command line on a disk that fails at the n-th step, once or from there on; a seed comes first."""

LIMITED = """
import random, resource, signal, sys
from tokenmill.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
del sys.argv[1]
main()
"""
"""The command line where no file may be larger than so many bytes: the kernel cuts writes short."""


def disk(field: Field, rng: Random, folder: Path) -> None:
    """Writes, syncs, renames and removals fail: an error of ours, and the same command goes on when they do not."""
    job = field.jobs[rng.choice(list(field.jobs))]
    root = folder / "root"
    field.begin(job, root)
    line = command(*job.arguments(root))[3:]
    if rng.random() < 0.6:
        start = [sys.executable, "-c", FAILING, str(rng.randrange(1 << 30))]
    else:
        start = [sys.executable, "-c", LIMITED, str(rng.choice([0, 1, 127, 128, 1000, 4_000, 4_200, 20_000, 60_000]))]
    done = subprocess.run([*start, *line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in REFUSALS, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Logging error" not in done.stderr, done.stderr
    check_records(root)
    again = run(job, root)
    assert again.returncode == 0, again.stderr
    check_whole(root, job)


def sending(field: Field, rng: Random, folder: Path) -> None:
    """A file fails, changes or goes while it is uploaded: an error of ours, and no manifest over wrong bytes."""
    root, kept = folder / "root", field.roots[rng.choice(["shards", "both", "straight"])]
    shutil.copytree(kept, root)
    expected = digests(kept)
    victim = rng.choice([name for name in entries(root) if not name.startswith(".") and name not in OURS])
    how = rng.choice(["error", "gone", "bit", "cut", "longer", "zeros", "empty"])
    left = rng.randint(1, 12)
    read = FolderStore.read

    def failing(store: FolderStore, file: StoredFile, offset: int, nbytes: int, into: bytearray | None = None) -> bytes:
        nonlocal left
        left -= 1
        if how == "error" and file.path == victim and left <= 0:
            with translate_read_errors(root / victim):
                raise OSError(errno.EIO, "Input/output error")
        if left == 0 and how == "gone":
            (root / victim).unlink()
        elif left == 0 and how != "error":
            (root / victim).write_bytes(damage((root / victim).read_bytes(), how, rng))
        return read(store, file, offset, nbytes, into)

    with quick_network(), serving_bucket() as endpoint:
        options, url = StoreOptions(endpoint), f"s3://bucket/{folder.name}"
        FolderStore.read = failing  # type: ignore[method-assign]
        try:
            with contextlib.suppress(TokenmillError):
                uploads.upload(root, url, store=options)
        finally:
            FolderStore.read = read  # type: ignore[method-assign]
        there = in_bucket(endpoint, folder.name)
        assert "manifest.json" not in there or expected.items() <= there.items(), (victim, how)
        shutil.copy2(kept / victim, root / victim)
        uploads.upload(root, url, store=options)
        assert digests(kept).items() <= in_bucket(endpoint, folder.name).items(), (victim, how)
        downloads.download(url, folder / "back", store=options)
        assert verify(folder / "back").passed


def races(field: Field, rng: Random, folder: Path) -> None:
    """Two to four commands on one data root at once: each does its work or says what stands against it."""
    root = folder / "root"
    if rng.random() < 0.5:
        shutil.copytree(field.roots["shards"], root)
    makers = [field.jobs["pretokenize"].arguments(root), ["consolidate", root, "--quiet"]]
    lookers: list[list[object]] = [["verify", root], ["info", root], ["stats", root], ["where", root, "--sample", 3]]
    lines = [rng.choice(makers), *(rng.choice([*makers, *makers, *lookers]) for _ in range(rng.randint(1, 3)))]
    processes = []
    for line in lines:
        process = subprocess.Popen(command(*line), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        processes.append(process)
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.5)]))
    for line, process in zip(lines, processes, strict=True):
        said = process.communicate(timeout=120)[1]
        assert process.returncode in REFUSALS, (line, process.returncode, said)
        assert "Traceback" not in said, (line, said)
    check_records(root)
    field.jobs["pretokenize"].call(root)
    consolidate(root)
    assert field.jobs["consolidate"].expected.items() <= digests(root).items()
    assert verify(root).passed


def hostile(field: Field, rng: Random, folder: Path) -> None:
    """A server that answers anything at all: an error of ours in bounded time, and no wrong file under its name."""
    seed = rng.random()
    answers = Random(seed)
    whole = (field.roots["first"] / "train_000000.npy").read_bytes()

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                for piece in hostile_answer(answers, self.path, whole):
                    self.wfile.write(piece)
                    if answers.random() < 0.05:
                        time.sleep(0.3)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with quick_network(), listening(Server) as url:
        options = StoreOptions(url, anonymous=True)
        what: list[Callable[[], object]] = [
            lambda: downloads.download("s3://bucket/data", folder / "root", store=options),
            lambda: uploads.upload(field.roots["first"], "s3://bucket/data", store=options),
            lambda: read_corpus("s3://bucket/corpus", options),
            lambda: read_corpus(f"{url}/corpus/a.parquet", options),
            lambda: read_corpus(f"{url}/corpus/a.jsonl.gz", options),
        ]
        began = time.monotonic()
        with contextlib.suppress(TokenmillError):
            rng.choice(what)()
        took = time.monotonic() - began
    assert took < 120, f"{took:.0f} s"
    (field.roots["first"] / layout.TRANSFERS).unlink(missing_ok=True)
    for name in entries(folder / "root"):
        # Without a manifest the store's word is all there is; with one, its digests are.
        assert (folder / "root" / name).resolve().is_relative_to(folder.resolve())
    assert entries(folder) in ([], ["root"])


def read_corpus(url: str, options: StoreOptions) -> None:
    corpus = find_corpus(url, options=options)
    for index in range(min(3, len(corpus.files))):
        reader = corpus.open(index)
        for span in itertools.islice(reader.spans(), 100):
            reader.read(span)


def hostile_answer(rng: Random, path: str, whole: bytes) -> Iterator[bytes]:
    """Something like an answer."""
    status = rng.choice(["200 OK", "206 Partial Content", "301 Moved", "307 Moved", "403 No", "404 No", "416 No"] * 2)
    status = rng.choice([status, status, "500 Error", "503 Slow Down", "100 Continue", "999 What", "-1", ""])
    names = ["a.jsonl", "../evil.npy", "/etc/evil", "x" * 300, "a//b", "manifest.json", "train_000000.npy", "\\x", "é"]
    objects = "".join(
        f"<Contents><Key>{rng.choice(['data/', 'corpus/', ''])}{rng.choice(names)}</Key>"
        f"<Size>{rng.choice([0, 1, len(whole), -1, 1 << 62, 1 << 64, 'x'])}</Size>"
        f"<ETag>{rng.choice(['', chr(34) + '0' * 32 + chr(34), hashlib.md5(whole).hexdigest()])}</ETag></Contents>"
        for _ in range(rng.randint(0, 5))
    )
    truncated = rng.choice(["true", "false", "false", "maybe"])
    listing = (
        f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>"
        f"<NextContinuationToken>{rng.randint(0, 3)}</NextContinuationToken>{objects}</ListBucketResult>"
    ).encode()
    body = rng.choice(
        [whole, whole[: rng.randrange(len(whole))], b"", rng.randbytes(500), listing, b'{"version": 2}', b"<Error/>"]
    )
    if "list-type" in path and rng.random() < 0.8:
        status, body = "200 OK", listing
    length = rng.choice([len(body)] * 4 + [0, -1, len(body) + 1, max(0, len(body) - 1), 10**12, "many"])
    headers = [
        f"Content-Length: {length}",
        rng.choice(["", f"ETag: {rng.choice(['x', chr(34) * 3, hashlib.md5(whole).hexdigest()])}"]),
        rng.choice(["", "Location: /again", "Location: file:///etc/passwd", "Location: http://127.0.0.1:1/"]),
        rng.choice(["", "Content-Encoding: gzip", "Transfer-Encoding: chunked", "Retry-After: 0"]),
        rng.choice(["", f"Content-Range: bytes 0-{rng.randint(-5, 5000)}/{rng.choice([len(whole), -3, '*'])}"]),
        rng.choice(["", "", "X-Long: " + "x" * 70_000, "\x00: y", "no colon"]),
    ]
    yield f"HTTP/1.1 {status}\r\n".encode()
    yield "".join(f"{header}\r\n" for header in headers if header).encode("latin-1") + b"\r\n"
    yield body


KINDS: dict[str, Callable[[Field, Random, Path], None]] = {
    "kills": kills,
    "power": power,
    "corruptions": corruptions,
    "network": network,
    "fuzz": fuzz,
    "disk": disk,
    "sending": sending,
    "races": races,
    "hostile": hostile,
}


def one(kind: str, seed: int, field: Field, folder: Path) -> None:
    """Make one case; `folder` is its own, and is removed when nothing was wrong."""
    case = folder / f"{kind}-{seed}"
    case.mkdir()
    KINDS[kind](field, Random(f"{kind} {seed}"), case)
    shutil.rmtree(case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, help="of the first case of each kind (default: by the clock)")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; may be repeated")
    options = parser.parse_args()
    first = options.seed if options.seed is not None else int(time.time())
    kinds = options.only or [kind for kind in KINDS if kind != "power" or sys.platform == "linux"]
    logging.getLogger("tokenmill").setLevel(logging.CRITICAL)
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    failed: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    print(f"campaign of {options.seconds:.0f} s, seeds from {first}, in {folder}", flush=True)
    field = Field(folder / "field")
    end = time.monotonic() + options.seconds
    try:
        while time.monotonic() < end:
            kind = min(kinds, key=lambda kind: spent[kind])  # each gets its share of the time
            began = time.monotonic()
            seed = first + counts[kind]
            counts[kind] += 1
            try:
                one(kind, seed, field, folder)
            except Exception:  # noqa: BLE001  # whatever it is, it is what is looked for
                failed.append(f"--only {kind} --seed {seed}")
                print(f"FAILED {failed[-1]}, files in {folder}/{kind}-{seed}\n{traceback.format_exc()}", flush=True)
            spent[kind] += time.monotonic() - began  # type: ignore[assignment]
    finally:
        close_servers()
    for kind in kinds:
        said = (KINDS[kind].__doc__ or "").splitlines()[0]
        print(f"{kind:12} {counts[kind]:6} cases  seeds {first} to {first + counts[kind] - 1}  {said}")
    print(f"{sum(counts.values())} cases, {len(failed)} failed")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

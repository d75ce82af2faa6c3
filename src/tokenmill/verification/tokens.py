"""Verify tokens: every byte of shards, `tokens.bin` and `sample_ids.bin`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Consolidated
from tokenmill.errors import StorageError
from tokenmill.verification import sample_ids as verify_ids
from tokenmill.verification.findings import Checks, shard_header

_ID_RANGE_NBYTES = 1 << 28
"""Size of the range of tokens whose ids one process computes again."""


class TokenChecks(Checks):
    """Digests, ids of samples, ids of tokens."""

    def check(self) -> None:
        """Everything that only reading tells."""
        shards = self.job.expected_shards()
        itemsize = self.job.dtype.itemsize
        data_nbytes = sum(tokens for tokens, _ in shards) * itemsize
        files = [self.root / f"train_{index:06d}.npy" for index in range(len(shards))]
        present = [path for path in files if path.is_file()]
        tokens_path, ids_path = self.root / layout.TOKENS, self.root / layout.SAMPLE_IDS
        self.job.to_read_nbytes = sum(path.stat().st_size for path in present)
        record = self.job.record if self.job.has_tokens_file and tokens_path.is_file() else None
        if record is not None:
            self.job.to_read_nbytes += 3 * tokens_path.stat().st_size if shards else 2 * tokens_path.stat().st_size
        if present:
            steps = [
                self._shard_step(path, tokens, digest) for path, (tokens, digest) in zip(files, shards, strict=True)
            ]
            self.job.group(f"{len(present)} shards: sha256, ids below the vocabulary size", *steps)
        if record is not None:
            stretches = self._stretch_steps(shards, itemsize) if data_nbytes == tokens_path.stat().st_size else []
            self.job.group(
                "tokens.bin: sha256, that of every shard in it, ids below the vocabulary size",
                lambda: self.job.check_digest(tokens_path, record.tokens_sha256),
                *stretches,
            )
            if ids_path.is_file():
                self.job.group(
                    "sample_ids.bin: sha256, every id made again",
                    lambda: self.job.check_digest(ids_path, record.sample_ids_sha256),
                    *self._id_steps(record, tokens_path, ids_path),
                )

    def _shard_step(self, path: Path, tokens: int, digest: str) -> Callable[[], None]:
        header, nbytes = layout.NPY_HEADER_NBYTES, tokens * self.job.dtype.itemsize

        def step() -> None:
            if not path.is_file():
                return  # told by the check of files
            found = hashlib.sha256(b"".join(self.job.chunks(path, 0, header)))
            at = header
            for chunk in self.job.chunks(path, header, path.stat().st_size):
                found.update(chunk)
                self._check_range(path.name, chunk, (at - header) // self.job.dtype.itemsize)
                at += len(chunk)
            position = "the file"
            if found.hexdigest() != digest:
                position = self._first_difference(path, nbytes) or position
            self.job.same(path.name, position, "sha256", expected=digest, found=found.hexdigest())

        return step

    def _check_range(self, name: str, chunk: memoryview, first_token: int) -> None:
        """Ids must be below the vocabulary size."""
        if self.job.manifest is None:
            return
        limit = self.job.manifest.tokenizer.vocab_size
        ids = np.frombuffer(chunk[: len(chunk) // self.job.dtype.itemsize * self.job.dtype.itemsize], self.job.dtype)
        if len(ids) and int(ids.max()) >= limit:
            at = int(np.argmax(ids >= limit))
            self.job.require(
                False, name, f"token {first_token + at}", "ids", expected=f"below {limit}", found=int(ids[at])
            )

    def _first_difference(self, path: Path, nbytes: int) -> str | None:
        """Return where a shard first differs from its stretch of `tokens.bin`, if there is one to compare with."""
        index, tokens = int(path.name[6:-4]), self.root / layout.TOKENS
        sizes = [count * self.job.dtype.itemsize for count, _ in self.job.expected_shards()]
        begin = sum(sizes[:index])
        if not self.job.has_tokens_file or not tokens.is_file():
            return None
        pairs = zip(
            map(bytes, self.job.chunks(path, layout.NPY_HEADER_NBYTES, layout.NPY_HEADER_NBYTES + nbytes)),
            map(bytes, self.job.chunks(tokens, begin, begin + nbytes)),
            strict=False,
        )
        at = layout.NPY_HEADER_NBYTES
        for mine, other in pairs:
            if mine != other:
                both = min(len(mine), len(other))
                differs = np.frombuffer(mine[:both], np.uint8) != np.frombuffer(other[:both], np.uint8)
                return f"byte {at + (int(np.argmax(differs)) if differs.any() else both)}, where tokens.bin differs"
            at += len(mine)
        return "bytes 0 to 127"

    def _stretch_steps(self, shards: list[tuple[int, str]], itemsize: int) -> list[Callable[[], None]]:
        """Return a check for every shard's stretch of `tokens.bin`."""
        path, steps, begin = self.root / layout.TOKENS, list[Callable[[], None]](), 0

        def step(index: int, tokens: int, digest: str, begin: int) -> None:
            found = hashlib.sha256(shard_header(self.job.dtype, tokens))
            at = begin
            for chunk in self.job.chunks(path, begin, begin + tokens * itemsize):
                found.update(chunk)
                self._check_range(path.name, chunk, at // itemsize)
                at += len(chunk)
            position = f"bytes {begin} to {at - 1}, the tokens of train_{index:06d}.npy"
            self.job.same(path.name, position, "sha256 as a shard", expected=digest, found=found.hexdigest())

        for index, (tokens, digest) in enumerate(shards):
            steps.append(partial(step, index, tokens, digest, begin))
            begin += tokens * itemsize
        return steps

    def _id_steps(self, record: Consolidated, tokens: Path, sample_ids: Path) -> list[Callable[[], None]]:
        """Make ids again in processes, a range each."""
        window = record.seq_len * (4 if record.id_scheme == "templar-v1" else self.job.dtype.itemsize)
        if record.samples != record.tokens // record.seq_len:
            return []  # told by the check of records; what an id covers cannot be known
        stored = min(record.samples, sample_ids.stat().st_size // 8)
        samples = max(1, _ID_RANGE_NBYTES // window)

        def step(first: int) -> None:
            end = min(first + samples, stored)
            line = [sys.executable, "-I", "-S", verify_ids.__file__, tokens, sample_ids, window, first, end]
            # A group of its own: Ctrl-C at a terminal is for the process that asks.
            apart: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
            result = subprocess.run(list(map(str, line)), check=False, stdout=subprocess.PIPE, text=True, **apart)
            if result.returncode:
                raise StorageError(
                    f"{sample_ids}: a process that makes sample ids again was lost (exit code {result.returncode})",
                    next_step="verify again; if it was killed, give it more memory or fewer threads (--num-proc)",
                )
            if result.stdout:
                sample, expected, found = result.stdout.split()
                self.job.same(
                    sample_ids.name,
                    f"sample {sample}, bytes {8 * int(sample)} to {8 * int(sample) + 7}",
                    f"id of tokens {int(sample) * record.seq_len} on",
                    expected=expected,
                    found=found,
                )
            self.job.read((end - first) * window)

        return [partial(step, first) for first in range(0, stored, samples)]

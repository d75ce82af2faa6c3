"""Verify records: whether they agree with themselves, with each other, and with the sizes of the files."""

from __future__ import annotations

import hashlib
import json
import tokenize
from collections import Counter

import msgspec
import numpy as np

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot.manifest import Consolidated, Manifest
from tokenmill.verification.findings import Checks

_SAY_NOTHING: dict[str, object] = {
    "metadata_columns": [],
    "bos": "none",
    "bos_token": None,
    "fim_rate": 0.0,
    "fim_spm_rate": 0.5,
    "fim_tokens": None,
}
"""Values of later fields of the recipe with which they are not in the fingerprint."""


class RecordChecks(Checks):
    """Everything that needs no reading of tokens."""

    def check(self) -> None:
        """Everything that needs no reading of tokens."""
        if self.job.manifest is not None:
            manifest = self.job.manifest
            self.job.group("manifest.json agrees with itself", lambda: self._check_manifest(manifest))
        if self.job.record is not None:
            record = self.job.record
            self.job.group("consolidated.json agrees with the rest", lambda: self._check_record(record))
        self.job.group("files: there, none too many, sizes, headers", self._check_files)

    def _check_digests(self, name: str) -> None:
        """Every field is as it was written; records of version 1 say nothing of that."""
        fields = json.loads((self.root / name).read_bytes())
        digests = fields.pop("digests", {})
        if not digests and fields.get("version", 1) == 1:
            return
        for field in {**fields, **digests}:
            found = None
            if field in fields:
                text = json.dumps(fields[field], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                found = hashlib.sha256(text.encode()).hexdigest()
            self.job.same(name, field, "SHA-256 in digests", expected=digests.get(field), found=found)

    def _check_manifest(self, manifest: Manifest) -> None:
        same, name = self.job.same, layout.MANIFEST
        self._check_digests(name)
        recipe, size = manifest.recipe, manifest.recipe.shard_size
        same(name, "complete", "the data set", expected=True, found=manifest.complete)
        self.job.require(len(manifest.shards) > 0, name, "shards", "the data set", expected="1 or more", found=0)
        same(name, "damaged", "shards to be made again", expected=0, found=len(manifest.damaged))
        same(name, "fingerprint", "of the recipe", expected=self._fingerprint(), found=manifest.fingerprint)
        for index, shard in enumerate(manifest.shards):
            at = f"shards[{index}]"
            same(name, f"{at}.index", "shards are numbered without gaps", expected=index, found=shard.index)
            last = index == len(manifest.shards) - 1
            fits = 0 < shard.tokens <= size if last else shard.tokens == size
            self.job.require(
                fits,
                name,
                f"{at}.tokens",
                "size of a shard",
                expected=f"{size}{' or less' if last else ''}",
                found=shard.tokens,
            )
            counted = sum(count.documents for count in shard.ledger)
            same(name, f"{at}.documents", "documents in its ledger", expected=counted, found=shard.documents)
            before = manifest.shards[index - 1].next_cursor.position if index else 0
            self.job.require(
                shard.next_cursor.position >= before,
                name,
                f"{at}.next_cursor",
                "the order goes forward",
                expected=f"{before} or more",
                found=shard.next_cursor.position,
            )
        tokens, documents = (sum(getattr(s, f) for s in manifest.shards) for f in ("tokens", "documents"))
        same(name, "tokens", "sum over the shards", expected=tokens, found=manifest.tokens)
        same(name, "documents", "sum over the shards", expected=documents, found=manifest.documents)
        total = recipe.total_tokens
        if total is not None:
            self.job.require(
                tokens <= total, name, "tokens", "end of the stream", expected=f"{total} or less", found=tokens
            )
        if recipe.dtype == "uint16":
            vocabulary = manifest.tokenizer.vocab_size
            self.job.require(
                vocabulary <= 1 << 16,
                name,
                "recipe.dtype",
                "holds every id",
                expected="65536 ids or less",
                found=vocabulary,
            )
        self._check_ledger(manifest)
        self._check_skipped(manifest)

    def _fingerprint(self) -> str:
        recipe = json.loads((self.root / layout.MANIFEST).read_bytes())["recipe"]
        silent = {field for field, value in _SAY_NOTHING.items() if recipe.get(field, value) == value}
        fields = {field: value for field, value in recipe.items() if field not in silent | {"dataset", "tokenizer"}}
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()

    def _check_ledger(self, manifest: Manifest) -> None:
        same, name = self.job.same, layout.MANIFEST
        same(
            name,
            "ledger",
            "source files",
            expected=[file.path for file in manifest.files],
            found=[entry.path for entry in manifest.ledger],
        )
        counts = np.zeros((len(manifest.files), 5), object)  # 64 bits may not hold what a record says
        for count in [*(count for shard in manifest.shards for count in shard.ledger), *manifest.tail]:
            if self.job.require(
                0 <= count.file < len(manifest.files),
                name,
                "shards[].ledger",
                "source file of a count",
                expected=f"0 to {len(manifest.files) - 1}",
                found=count.file,
            ):
                counts[count.file] += (count.documents, count.null, count.empty, count.special, count.bad)
        ended = manifest.tokens == manifest.recipe.total_tokens
        for entry, file, found in zip(manifest.ledger, manifest.files, counts.tolist(), strict=False):
            at = f"ledger[{entry.path}]"
            sums = (entry.documents, entry.null, entry.empty, entry.special, entry.bad)
            same(name, at, "documents, null, empty, special, bad of all shards", expected=tuple(found), found=sums)
            if file.rows is not None or not ended:  # a file that the stream ends in need not have been counted
                same(name, at, "rows of the file", expected=file.rows or 0, found=entry.rows)
            rows = entry.documents + entry.null + entry.empty + entry.bad + entry.unused
            same(name, at, "rows = documents + null + empty + bad + unused", expected=entry.rows, found=rows)
            self.job.require(
                entry.unused == 0 or (ended and entry.unused > 0),
                name,
                at,
                "rows after the end of the stream",
                expected="0 or more" if ended else 0,
                found=entry.unused,
            )
            self.job.require(
                entry.special <= entry.documents,
                name,
                at,
                "documents with control-token strings",
                expected=f"{entry.documents} or less",
                found=entry.special,
            )

    def _check_skipped(self, manifest: Manifest) -> None:
        """Every bad row is listed, once."""
        path = self.root / layout.SKIPPED
        lines = path.read_bytes().splitlines() if path.is_file() else []
        if manifest.skipped_sha256 is not None:
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
            self.job.same(layout.SKIPPED, "the file", "SHA-256", expected=manifest.skipped_sha256, found=found)
        try:
            listed = {(entry["file"], entry["row"]) for entry in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError, RecursionError):
            listed = set()
        known = {entry.path for entry in manifest.ledger}
        for file, row in sorted(listed, key=str):
            if file not in known:
                what = "source file of a row that was left out"
                self.job.require(False, layout.SKIPPED, f"row {row}", what, expected="one of manifest.json", found=file)
        counts = Counter(file for file, _ in listed)
        for entry in manifest.ledger:
            count = counts[entry.path]
            what = "rows of the file that were left out"
            self.job.same(layout.SKIPPED, f"lines of {entry.path}", what, expected=entry.bad, found=count)

    def _check_record(self, record: Consolidated) -> None:
        same, name, manifest = self.job.same, layout.CONSOLIDATED, self.job.manifest
        self._check_digests(name)
        same(name, "complete", "the consolidation", expected=True, found=record.complete)
        samples = record.tokens // record.seq_len if record.seq_len > 0 else 0
        same(name, "samples", "tokens // seq_len", expected=samples, found=record.samples)
        if record.shards:
            tokens = sum(shard.tokens for shard in record.shards)
            same(name, "tokens", "sum over the shards copied", expected=tokens, found=record.tokens)
        if manifest is None:
            return
        same(name, "tokens", "those of manifest.json", expected=manifest.tokens, found=record.tokens)
        same(name, "dtype", "that of manifest.json", expected=manifest.recipe.dtype, found=record.dtype)
        for index, (copied, shard) in enumerate(zip(record.shards, manifest.shards, strict=False)):
            expected, found = (shard.tokens, shard.sha256), (copied.tokens, copied.sha256)
            same(name, f"shards[{index}]", "that of manifest.json", expected=expected, found=found)

    def _check_files(self) -> None:
        expected = self.job.expected_shards()
        present = {path.name for path in self.root.glob(layout.SHARD_GLOB)}
        wanted = [f"train_{index:06d}.npy" for index in range(len(expected))]
        if present or not self.job.has_tokens_file:
            for name, (tokens, _) in zip(wanted, expected, strict=True):
                if name not in self.job.elsewhere:
                    self._check_shard_file(name, tokens)
        for name in sorted(present - set(wanted)):
            self._surplus(name)
        documents = [f"documents_{index:06d}.parquet" for index in range(len(expected))] if self.job.manifest else []
        there = {path.name for path in self.root.glob(layout.DOCUMENTS_GLOB)}
        for name in documents:
            self._check_there(name, (self.root / name).is_file() or name in self.job.elsewhere)
        for name in sorted(there - set(documents)):
            self._surplus(name)
        if self.job.record is not None and self.job.record.complete:
            sizes = {
                layout.TOKENS: self.job.record.tokens * self.job.dtype.itemsize,
                layout.SAMPLE_IDS: self.job.record.samples * 8,
            }
            for name, nbytes in sizes.items():
                if name not in self.job.elsewhere:
                    self._check_size(name, nbytes)
        elif self.job.record is None:
            for name in (layout.TOKENS, layout.SAMPLE_IDS):
                if (self.root / name).exists():
                    self._surplus(name)

    def _surplus(self, name: str) -> None:
        self.job.require(
            False, name, "the file", "belongs to the data set", expected="no such file", found="it is there"
        )

    def _check_there(self, name: str, there: bool) -> bool:
        return self.job.require(there, name, "the file", "is there", expected="a file", found="none")

    def _check_size(self, name: str, expected: int) -> bool:
        path = self.root / name
        if not self._check_there(name, path.is_file()):
            return False
        return self.job.same(name, "the file", "size in bytes", expected=expected, found=path.stat().st_size)

    def _check_shard_file(self, name: str, tokens: int) -> None:
        if not self._check_size(name, layout.NPY_HEADER_NBYTES + tokens * self.job.dtype.itemsize):
            return
        try:
            with atomic.translate_read_errors(self.root / name):
                array = np.load(self.root / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            self.job.require(False, name, "bytes 0 to 127", "NPY header", expected="that of a 1-D array", found=error)
            return
        found = (array.dtype.str, array.shape)
        self.job.same(name, "bytes 0 to 127", "dtype and shape", expected=(self.job.dtype.str, (tokens,)), found=found)

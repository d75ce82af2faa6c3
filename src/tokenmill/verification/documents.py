"""Verify documents: the sidecars against the tokens and the ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Manifest, ShardRecord
from tokenmill.verification.findings import Checks

_SCHEMA = pa.schema(
    [
        pa.field("start", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
_WITH_TEXT_XXH3 = _SCHEMA.append(pa.field("text_xxh3", pa.uint64(), nullable=False))


class DocumentChecks(Checks):
    """Where documents begin and end, and what they come from."""

    def check(self) -> None:
        """Every sidecar."""
        if self.job.manifest is not None:
            manifest = self.job.manifest
            self.job.group(
                "documents: sha256, without gaps, EOS at every end, the ledger's counts",
                lambda: self._check_documents(manifest),
            )

    def _check_documents(self, manifest: Manifest) -> None:
        paths = {file.path: index for index, file in enumerate(manifest.files)}
        counted = np.zeros(len(manifest.files), np.int64)
        schema = _WITH_TEXT_XXH3 if manifest.documents_version > 1 else _SCHEMA
        for column in manifest.recipe.metadata:
            schema = schema.append(pa.field(column.name, pa.type_for_alias(column.arrow_type)))
        expected_start: int | None = 0
        """None: not known, because the sidecar before is not here, or not readable."""
        for shard in manifest.shards:
            name = f"documents_{shard.index:06d}.parquet"
            path = self.root / name
            if not path.is_file():  # elsewhere, or told by the check of files
                expected_start = None
                continue
            self.job.check_digest(path, shard.documents_sha256)
            try:
                # Arrow opens no path that is not UTF-8, and threads of its own would outlive an error.
                with path.open("rb") as file:
                    table = pq.ParquetFile(file).read(use_threads=False).cast(schema)
                table.validate(full=True)  # damage can leave names that are not UTF-8
                start, tokens, row = (table[column].to_numpy() for column in ("start", "tokens", "row"))
                source = table["source"].unify_dictionaries().combine_chunks()
            except (pa.ArrowException, ValueError, OSError) as error:
                self.job.require(
                    False, name, "the file", "is a sidecar", expected="parquet", found=str(error).split("\n")[0]
                )
                expected_start = None
                continue
            self.job.same(name, "the file", "documents", expected=shard.documents, found=len(start))
            if len(start):
                begins = int(start[0]) if expected_start is None else expected_start
                expected_start = self._check_rows(shard, name, start, tokens, begins)
                self._check_tokens(name, start + tokens - 1, "EOS", manifest.tokenizer.eos_id)
                if manifest.recipe.bos == "prepend":
                    self._check_tokens(name, start, "BOS", manifest.tokenizer.bos_id or 0)
                files = self._files_of(name, source, paths)
                self._check_source_rows(name, files, row)
                found = np.bincount(files[files >= 0], minlength=len(counted))
                self._check_ledger(shard, name, found)
                counted += found
        if expected_start is not None:
            self.job.require(
                expected_start >= manifest.tokens,
                layout.MANIFEST,
                "tokens",
                "documents reach the end of the stream",
                expected=f"{manifest.tokens} or more",
                found=expected_start,
            )
        if any(layout.documents_name(shard.index) in self.job.elsewhere for shard in manifest.shards):
            return
        for entry, count in zip(manifest.ledger, counted.tolist(), strict=False):
            what = "documents in the sidecars"
            self.job.same(layout.MANIFEST, f"ledger[{entry.path}]", what, expected=entry.documents, found=count)

    def _check_ledger(self, shard: ShardRecord, name: str, found: NDArray[np.int64]) -> None:
        """Documents of each source file are as many as the shard's own ledger has."""
        expected = np.zeros(len(found), object)  # the sum of two counts may need more than 64 bits
        for count in shard.ledger:
            if 0 <= count.file < len(expected):  # others are told by the check of records
                expected[count.file] += count.documents
        differs = np.flatnonzero(expected != found)
        if len(differs):
            at = int(differs[0])
            what = f"documents of source file {at}, by manifest.json"
            self.job.same(name, "the file", what, expected=int(expected[at]), found=int(found[at]))

    def _check_rows(
        self, shard: ShardRecord, name: str, start: NDArray[np.int64], tokens: NDArray[np.int64], expected_start: int
    ) -> int:
        """Check that documents follow one another and start in their shard; return where the next one must start."""
        assert self.job.manifest is not None
        ends = start + tokens
        wanted = np.concatenate([[expected_start], ends[:-1]])
        wrong = np.flatnonzero((start != wanted) | (tokens < 1))
        if len(wrong):
            at = int(wrong[0])
            found = f"{start[at]}, {tokens[at]} tokens"
            self.job.require(False, name, f"row {at}", "start of a document", expected=int(wanted[at]), found=found)
        first = shard.index * self.job.manifest.recipe.shard_size
        outside = np.flatnonzero((start < first) | (start >= first + shard.tokens))
        if len(outside):
            at = int(outside[0])
            expected = f"from {first} to {first + shard.tokens - 1}"
            self.job.require(False, name, f"row {at}", "starts in its shard", expected=expected, found=int(start[at]))
        return int(ends[-1])

    def _check_tokens(self, name: str, ends: NDArray[np.int64], what: str, expected_id: int) -> None:
        """Every document ends in EOS, and begins with BOS if it should, where that is in the stream."""
        assert self.job.manifest is not None
        inside = np.flatnonzero((ends >= 0) & (ends < self.job.manifest.tokens))
        if not self.job.has_tokens_file:
            size = self.job.manifest.recipe.shard_size
            gone = [index for index in np.unique(ends[inside] // size).tolist() if self._is_elsewhere(index)]
            inside = inside[~np.isin(ends[inside] // size, gone)]
        found = self._tokens_at(ends[inside])
        wrong = np.flatnonzero(found != expected_id)
        if len(wrong):
            at = int(inside[wrong[0]])
            self.job.require(
                False,
                name,
                f"row {at}",
                f"{what} at token {ends[at]} of the stream",
                expected=expected_id,
                found=int(found[wrong[0]]) if found[wrong[0]] >= 0 else "no such token",
            )

    def _is_elsewhere(self, shard: int) -> bool:
        return layout.shard_name(shard) in self.job.elsewhere or layout.TOKENS in self.job.elsewhere

    def _tokens_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return tokens of the stream at ascending positions; -1 where a file does not have them."""
        assert self.job.manifest is not None
        found = np.full(len(positions), -1, np.int64)
        joined = self.root / layout.TOKENS
        if self.job.has_tokens_file and joined.is_file():
            if joined.stat().st_size == 0:  # told by the check of files; nothing of it can be mapped
                return found
            stored = np.memmap(self.root / layout.TOKENS, np.uint8, "r")
            self._pick(
                stored[: len(stored) // self.job.dtype.itemsize * self.job.dtype.itemsize].view(self.job.dtype),
                positions,
                found,
            )
            return found
        size = self.job.manifest.recipe.shard_size
        for index in np.unique(positions // size).tolist():
            path = self.root / f"train_{index:06d}.npy"
            if path.is_file() and path.stat().st_size > layout.NPY_HEADER_NBYTES:
                bytes_ = np.memmap(path, np.uint8, "r", layout.NPY_HEADER_NBYTES)
                here = positions // size == index
                picked = np.full(int(here.sum()), -1, np.int64)
                whole = bytes_[: len(bytes_) // self.job.dtype.itemsize * self.job.dtype.itemsize].view(self.job.dtype)
                self._pick(whole, positions[here] - index * size, picked)
                found[here] = picked
        return found

    @staticmethod
    def _pick(tokens: NDArray[Any], positions: NDArray[np.int64], found: NDArray[np.int64]) -> None:
        inside = positions < len(tokens)
        found[inside] = tokens[positions[inside]]

    def _files_of(self, name: str, source: pa.DictionaryArray, paths: dict[str, int]) -> NDArray[np.int64]:
        """Index of every document's source file; -1 if the manifest does not list it."""
        names = source.dictionary.to_pylist()
        known = np.array([paths.get(path, -1) for path in names], np.int64)
        files: NDArray[np.int64] = known[source.indices.to_numpy()]
        unknown = np.flatnonzero(files < 0)
        if len(unknown):
            at = int(unknown[0])
            self.job.require(
                False, name, f"row {at}", "source file", expected="one of manifest.json", found=source[at].as_py()
            )
        return files

    def _check_source_rows(self, name: str, files: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """Rows lie inside their source files."""
        assert self.job.manifest is not None
        # Of a file that the stream ends in, and that is read front to back, the rows were not counted.
        most = np.iinfo(np.int64).max
        is_view = self.job.manifest.view is not None  # and their numbers are not known where a view was written
        known_rows = (None if is_view else file.rows for file in self.job.manifest.files)
        rows = np.array([most if count is None else count for count in known_rows], np.int64)
        known = np.flatnonzero(files >= 0)
        outside = known[(row[known] < 0) | (row[known] >= rows[files[known]])]
        if len(outside):
            at = int(outside[0])
            expected = f"below {rows[files[at]]}"
            self.job.require(False, name, f"row {at}", "row of the source file", expected=expected, found=int(row[at]))

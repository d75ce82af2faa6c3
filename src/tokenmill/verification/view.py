"""Verify views: the index against its record, and every document of it against the sidecars of its sources.

The rules of `docs/format.md` are written here a second time, and hold for each document on its own.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.manifest import Manifest
from tokenmill.dataroot.view_record import SourceRecord, ViewRecord
from tokenmill.encoding.text_hash import bytes_hash
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.view import PADDING_PLACE
from tokenmill.verification.findings import Checked, Finding


class _Listed(NamedTuple):
    """Documents of a source, by its sidecars; arrays of shape `(documents,)`."""

    start: NDArray[np.int64]
    tokens: NDArray[np.int64]
    row: NDArray[np.int64]
    file: NDArray[np.int64]
    """Index of the source file in the manifest; -1 for one that it does not list."""
    hashes: NDArray[np.uint64]
    """Hashes of the texts, or of the tokens where there are none."""


class _Entries(NamedTuple):
    """Entries of the index that lie in a source; arrays of shape `(entries,)`."""

    number: NDArray[np.int64]
    start: NDArray[np.int64]
    """Counted in the stream of the source."""
    tokens: NDArray[np.int64]


class ViewChecks:
    """Checks of a view; its sources are verified by themselves.

    Args:
        folder: of the view.
        record: what it says of itself.
        quick: only sizes, and whether the sources are those that it was built from.
    """

    def __init__(self, folder: Path, record: ViewRecord, *, quick: bool) -> None:
        self._quick = quick
        self.folder = folder
        self.record = record
        self.findings: list[Finding] = []
        self.checked: list[Checked] = []
        self.nbytes = 0

    def check(self) -> None:
        """Make all checks; those that need the index are left out where it is not what the record says."""
        begins = self._index(layout.VIEW_BEGINS, self.record.entries + 1, "<i8")
        places = self._index(layout.VIEW_PLACES, self.record.entries, "<i8")
        if self.record.stages:
            self._check_stages()
        if begins is not None:
            ends, expected = (int(begins[0]), int(begins[-1])), (0, self.record.tokens + self.record.padding)
            what = "first and last entry"
            self._require(ends == expected, layout.VIEW_BEGINS, "the file", what, expected=expected, found=ends)
        taken = sum(source.taken for source in self.record.sources)
        documents = self.record.documents
        self._require(
            taken == documents, layout.VIEW, "documents", "sum over the sources", expected=taken, found=documents
        )
        self._note("index: size" if self._quick else "index: size, sha256")
        manifests_ = [self._pinned(source) for source in self.record.sources]
        self._note("sources: the data roots that the view was built from")
        if self._quick or begins is None or places is None or self.findings:
            return
        lengths = np.diff(begins)
        base = row = 0
        keys = np.zeros(len(places), np.uint64)
        for source, manifest in zip(self.record.sources, manifests_, strict=True):
            number = np.flatnonzero((places >= base) & (places < base + source.tokens))
            if self.record.stages:
                outside = number[(begins[number] < row) | (begins[number + 1] > row + source.span)][:1]
                what = "in the part of the row that its source has"
                self._require(
                    not len(outside),
                    layout.VIEW_BEGINS,
                    f"entry {[*outside]}",
                    what,
                    expected=f"{row} to {row + source.span}",
                    found="others",
                )
                row += source.span
            listed = None if manifest is None else self._listed(source, manifest)
            if manifest is not None and listed is not None:
                entries = _Entries(number, places[number] - base, lengths[number])
                at = self._check_source(source, manifest, listed, entries)
                if at is not None and self.record.shuffle == "documents":
                    keys[number] = self._keys(source, manifest, listed, at)
            base += source.tokens
        outside = np.flatnonzero((places < (PADDING_PLACE if self._packs else 0)) | (places >= base))
        if len(outside):
            at_entry, place = f"entry {outside[0]}", int(places[outside[0]])
            self._require(False, layout.VIEW_PLACES, at_entry, "place", expected=f"0 to {base - 1}", found=place)
        if self._packs and not self.findings:
            self._check_samples(begins, places)
        if not self.findings:
            self._check_order(begins, places, keys)
        self._note("documents: whole, once, by the rules of holdout, removal, duplicates and order")

    def _note(self, what: str) -> None:
        self.checked.append(Checked(what, len(self.findings) - sum(each.findings for each in self.checked)))

    def _require(self, holds: bool, file: str, position: str, what: str, *, expected: object, found: object) -> bool:
        if not holds:
            self.findings.append(Finding(file, position, what, str(expected), str(found)))
        return holds

    @property
    def _packs(self) -> bool:
        return self.record.packing == "best-fit"

    def _index(self, name: str, entries: int, dtype: str) -> NDArray[Any] | None:
        path, expected_nbytes, sha256 = (
            self.folder / name,
            entries * np.dtype(dtype).itemsize,
            self.record.index_sha256[name],
        )
        if not self._require(path.is_file(), name, "the file", "is there", expected="a file", found="none"):
            return None
        nbytes = path.stat().st_size
        if not self._require(
            nbytes == expected_nbytes, name, "the file", "size in bytes", expected=expected_nbytes, found=nbytes
        ):
            return None
        if not self._quick:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.nbytes += nbytes
            self._require(digest == sha256, name, "the file", "sha256", expected=sha256, found=digest)
        return np.memmap(path, dtype, "r") if entries else np.empty(0, np.int64)

    def _check_stages(self) -> None:
        """Check the schedule of a mixture against its rule, and what it takes of each source."""
        shape = (len(self.record.stages), 2, layout.SCHEDULE_PERIOD)
        schedule = self._index(layout.VIEW_SCHEDULE, math.prod(shape), "<u2")
        names = [source.name for source in self.record.sources]
        taken = dict.fromkeys(names, 0)
        for number, stage in enumerate(self.record.stages):
            where, shares = f"stage {number + 1}", stage.shares
            total = sum(shares.values())
            expected = layout.SCHEDULE_PERIOD
            is_whole = self._require(
                total == expected and set(shares) <= set(names) and all(shares.values()),
                layout.VIEW,
                where,
                "sum of the shares of its sources",
                expected=expected,
                found=total,
            )
            if schedule is None or not is_whole:
                continue
            period = schedule.reshape(shape)[number]
            drawn = _schedule(tuple((name, names.index(name), share) for name, share in shares.items()))
            wrong = np.flatnonzero((period != drawn).any(axis=0))
            if len(wrong):
                at, places = f"{where}, place {wrong[0]}", (drawn[:, wrong[0]], period[:, wrong[0]])
                what = "source, and rank in the period"
                self._require(False, layout.VIEW_SCHEDULE, at, what, expected=places[0], found=places[1])
            periods, rest = divmod(stage.samples, layout.SCHEDULE_PERIOD)
            more = np.bincount(drawn[0, :rest], minlength=len(names))
            counts = {name: share * periods + int(more[names.index(name)]) for name, share in shares.items()}
            what = "samples of each source"
            self._require(stage.taken == counts, layout.VIEW, where, what, expected=counts, found=stage.taken)
            for name, count in counts.items():
                taken[name] += count
        for source in self.record.sources:
            whole, most = source.span // self.record.seq_len, Fraction(repr(source.max_epochs or 0)) * source.samples
            self._require(
                source.samples == whole, layout.VIEW, source.name, "samples", expected=whole, found=source.samples
            )
            what, found = "samples that the stages take", taken[source.name]
            self._require(found <= most, layout.VIEW, source.name, what, expected=f"at most {int(most)}", found=found)
        self._note("schedule: shares, order and epochs of each stage")

    def _check_samples(self, begins: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Check that no piece lies in two samples, and that padding is where a sample ends."""
        length = self.record.seq_len
        edges = np.arange(0, int(begins[-1]) + 1, length)
        at = np.minimum(np.searchsorted(begins, edges), len(begins) - 1)
        wrong = np.flatnonzero(begins[at] != edges)
        if len(wrong) or int(begins[-1]) % length:
            sample = f"sample {wrong[0]}" if len(wrong) else "the last sample"
            self._require(False, layout.VIEW_BEGINS, sample, "begins with an entry", expected="yes", found="no")
        padding = np.flatnonzero(places == PADDING_PLACE)
        wrong = padding[(begins[padding + 1] % length != 0) | (begins[padding] % length == 0)]
        if len(wrong):
            what = "padding at the end of a sample"
            self._require(False, layout.VIEW_PLACES, f"entry {wrong[0]}", what, expected="yes", found="no")
        tokens = int((begins[padding + 1] - begins[padding]).sum())
        self._require(
            tokens == self.record.padding,
            layout.VIEW,
            "padding",
            "tokens",
            expected=self.record.padding,
            found=tokens,
        )

    def _root(self, source: SourceRecord) -> Path:
        return self.folder / source.root

    def _pinned(self, source: SourceRecord) -> Manifest | None:
        root, where = self._root(source), "the data root"
        manifest = manifests.load(root) if root.is_dir() else None
        if manifest is None:
            self._require(False, source.name, where, "is there", expected=root, found="no manifest")
            return None
        shards = "\n".join(shard.sha256 for shard in manifest.shards)
        pin, sha256 = hashlib.sha256(shards.encode()).hexdigest(), manifest.tokenizer.sha256
        self._require(
            sha256 == self.record.tokenizer_sha256,
            source.name,
            where,
            "sha256 of tokenizer.json",
            expected=self.record.tokenizer_sha256,
            found=sha256,
        )
        for what, expected, found in (
            ("tokens", source.tokens, manifest.tokens),
            ("dtype", self.record.dtype, manifest.recipe.dtype),
            ("identity of documents", source.identity, "text" if manifest.documents_version > 1 else "tokens"),
        ):
            self._require(expected == found, source.name, where, what, expected=expected, found=found)
        is_it = self._require(
            pin == source.pin, source.name, where, "digest of its shards", expected=source.pin, found=pin
        )
        return manifest if is_it else None

    def _listed(self, source: SourceRecord, manifest: Manifest) -> _Listed | None:
        """Return all documents of a source; None, with a finding, where a sidecar cannot be read."""
        numbers = {file.path: number for number, file in enumerate(manifest.files)}
        pieces: list[list[NDArray[Any]]] = []
        for shard in manifest.shards:
            path = self._root(source) / f"documents_{shard.index:06d}.parquet"
            try:
                with path.open("rb") as file:
                    table = pq.ParquetFile(file).read(use_threads=False)
                table.validate(full=True)
                names = table["source"].combine_chunks()
                known = np.array([numbers.get(name, -1) for name in names.dictionary.to_pylist()] or [-1], np.int64)
                piece = [table[name].to_numpy() for name in ("start", "tokens", "row")]
                piece.append(known[names.indices.to_numpy()])
                if source.identity == "text":
                    piece.append(table["text_xxh3"].to_numpy())
            except (pa.ArrowException, ValueError, OSError, KeyError, AttributeError) as error:
                what = str(error).split("\n")[0]
                self._require(False, source.name, path.name, "is a sidecar", expected="parquet", found=what)
                return None
            pieces.append(piece)
        start, tokens, row, file_, *rest = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        if rest:
            return _Listed(start, tokens, row, file_, rest[0])
        stream = DataRoot(self._root(source), manifest, manifests.load_consolidated(self._root(source))).tokens()
        bounds = zip(start.tolist(), np.minimum(start + tokens, stream.tokens).tolist(), strict=True)
        hashes = [bytes_hash(stream.read(begin, end).tobytes()) for begin, end in bounds]
        return _Listed(start, tokens, row, file_, np.array(hashes, np.uint64))

    def _check_source(
        self, source: SourceRecord, manifest: Manifest, listed: _Listed, entries: _Entries
    ) -> NDArray[np.int64] | None:
        """Check the entries that lie in a source; return their documents, by number, if each of them is one."""
        documents, name = len(listed.start), source.name
        longest = self.record.seq_len if self._packs else 1 << 62
        at = np.searchsorted(listed.start, entries.start, side="right") - 1
        offset = entries.start - listed.start[at] if documents else entries.start
        wrong = np.flatnonzero((at < 0) | (offset % longest != 0)) if documents else entries.number
        if len(wrong):
            entry, found = f"entry {entries.number[wrong[0]]}", f"token {entries.start[wrong[0]]} of {name}"
            self._require(
                False, layout.VIEW_PLACES, entry, "where a document begins", expected="a document", found=found
            )
            return None
        pieces = np.minimum(listed.tokens[at] - offset, longest)
        wrong = np.flatnonzero(pieces != entries.tokens)
        if len(wrong):
            entry, found = f"entry {entries.number[wrong[0]]}", str(entries.tokens[wrong[0]])
            expected = int(pieces[wrong[0]])
            self._require(False, layout.VIEW_BEGINS, entry, "tokens of the document", expected=expected, found=found)
        twice = len(at) - len(np.unique(entries.start))
        self._require(twice == 0, layout.VIEW_PLACES, name, "documents that are there twice", expected=0, found=twice)
        full = np.flatnonzero(entries.tokens == longest)  # what is left of a document may lie before these
        by_piece = full[np.argsort(entries.start[full])]
        before, after = by_piece[:-1], by_piece[1:]
        wrong = np.flatnonzero((at[before] == at[after]) & (entries.number[before] > entries.number[after]))
        if len(wrong):
            entry, what = f"entry {entries.number[after[wrong[0]]]}", "comes after what precedes it in its document"
            self._require(False, layout.VIEW_PLACES, entry, what, expected="yes", found="no")
        taken, present = np.unique(at, return_counts=True)
        lacking = np.flatnonzero(present < -(-listed.tokens[taken] // longest))
        if len(lacking):
            document, what = f"document {taken[lacking[0]]} of {name}", "pieces"
            whole = int(-(-listed.tokens[taken[lacking[0]]] // longest))
            self._require(False, layout.VIEW_PLACES, document, what, expected=whole, found=int(present[lacking[0]]))
        count = len(taken)
        self._require(count == source.taken, layout.VIEW, name, "documents taken", expected=source.taken, found=count)
        every = count + sum(source.left_out.values())
        self._require(
            every == documents, layout.VIEW, name, "documents taken and left out", expected=documents, found=every
        )
        self._check_choice(source, manifest, listed, taken)
        return at

    def _check_choice(self, source: SourceRecord, manifest: Manifest, listed: _Listed, at: NDArray[np.int64]) -> None:
        """No document is taken that the rules leave out."""
        counts: dict[str, int] = {}
        hashes = listed.hashes[at]
        if self.record.holdout:
            limit = math.ceil(Fraction(self.record.holdout) * 2**64)
            held_out = hashes < np.uint64(limit)
            counts["on the other side of the holdout"] = int(
                np.count_nonzero(held_out != (self.record.split == "validation"))
            )
        if self.record.duplicates == "first":
            counts["with the text of another"] = len(at) - len(np.unique(hashes))
        named = [entry.rsplit(None, 1) for entry in source.removed]
        odd = [words[0] for words in named if len(words) == 1 and not re.fullmatch(r"[0-9a-f]{16}", words[0])]
        self._require(not odd, layout.VIEW, source.name, "entries of a removal list", expected="a hash", found=odd[:1])
        removed = np.array([int(words[0], 16) for words in named if words[0] not in odd and len(words) == 1], np.uint64)
        gone = np.isin(hashes, removed, kind="sort")  # NumPy 2.0 has no table of 64 bits without sign
        files = {file.path: number for number, file in enumerate(manifest.files)}
        rows = {(files.get(words[0]), int(words[1])) for words in named if len(words) == 2 and words[1].isdecimal()}
        for index in np.flatnonzero(np.isin(listed.row[at], np.array([row for _, row in rows], np.int64))).tolist():
            gone[index] |= (int(listed.file[at[index]]), int(listed.row[at[index]])) in rows
        counts["that were to be removed"] = int(np.count_nonzero(gone))
        for what, found in counts.items():
            self._require(found == 0, source.name, "documents", what, expected=0, found=found)

    def _keys(
        self, source: SourceRecord, manifest: Manifest, listed: _Listed, at: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Return the key of each document: SplitMix64 of its row, seeded by a digest of seed, source and file."""
        seeds = [
            hashlib.blake2b(
                f"{self.record.seed}\0{source.name}\0{file.path}".encode(), digest_size=8, person=b"tokenmill view"
            ).digest()
            for file in manifest.files
        ]
        state = np.frombuffer(b"".join(seeds), "<u8")[listed.file[at]]
        z = state + np.uint64(0x9E3779B97F4A7C15) * (listed.row[at] + 1).astype(np.uint64)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        found: NDArray[np.uint64] = z ^ z >> np.uint64(31)
        return found

    def _check_order(self, begins: NDArray[np.int64], places: NDArray[np.int64], keys: NDArray[np.uint64]) -> None:
        ranks: NDArray[Any] = keys if self.record.shuffle == "documents" else places
        part = np.zeros(len(places), np.int64)
        if self.record.stages:
            part = np.searchsorted(
                np.cumsum([source.span for source in self.record.sources]), begins[:-1], side="right"
            )
        pieces = np.flatnonzero(places >= 0)
        ordered = [(pieces, part)]
        if self._packs:  # the documents of each sample, and the first documents of all samples
            sample = begins[:-1] // self.record.seq_len
            ordered = [(pieces, sample), (np.flatnonzero(np.diff(sample, prepend=-1)), part)]
        for entries, inside in ordered:
            before, after = entries[:-1], entries[1:]
            wrong = np.flatnonzero((ranks[after] < ranks[before]) & (inside[after] == inside[before]))
            if len(wrong):
                what = f"comes after document {before[wrong[0]]} in the order {self.record.shuffle!r}"
                entry = f"entry {after[wrong[0]]}"
                self._require(False, layout.VIEW_PLACES, entry, what, expected="yes", found="no")


@functools.lru_cache(maxsize=16)
def _schedule(shares: tuple[tuple[str, int, int], ...]) -> NDArray[np.int64]:
    """Return source and rank of each place of a period; of name, number and share of each source."""
    period = layout.SCHEDULE_PERIOD
    windows = sorted(
        (rank * period // share, ((rank + 1) * period - 1) // share, name, number, rank)
        for name, number, share in shares
        for rank in range(share)
    )
    found, following = np.empty((2, period), np.int64), 0
    released: list[tuple[int, str, int, int]] = []
    for place in range(period):
        while following < period and windows[following][0] <= place:
            heapq.heappush(released, windows[following][1:])
            following += 1
        found[:, place] = heapq.heappop(released)[2:]
    return found

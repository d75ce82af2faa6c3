"""Verify deep: stored tokens against the source itself, by the reference backend. Reads only.

Two questions that digests cannot answer: are the tokens those of the text, and is the order the
recipe's? Some documents are encoded again, and one whole shard is rebuilt.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.corpus.choice import RULES
from tokenmill.corpus.corpus import Corpus, find_corpus
from tokenmill.corpus.order import file_order, row_order
from tokenmill.corpus.reader import first_line
from tokenmill.dataroot import layout
from tokenmill.encoding.hf import CannotEncodeError, HFBackend
from tokenmill.encoding.text_hash import bytes_hash
from tokenmill.encoding.tokenizer import TokenizerFile, load_tokenizer, with_special_tokens
from tokenmill.errors import SourceError, TokenizerError
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.documents import Document, documents_of
from tokenmill.options import StoreOptions
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.verification.findings import VerifyRun, shard_header
from tokenmill.verification.plain_reader import PlainRow, read_rows

_ORDER_ROWS = 1 << 20
_ENDLESS = 1 << 40
"""Rows of a file that were not counted."""


def verify_deep(
    job: VerifyRun,
    documents: int,
    *,
    dataset: Sequence[str] | None = None,
    tokenizer: str | None = None,
    store: StoreOptions = StoreOptions(),  # noqa: B008  # immutable
) -> None:
    """Add findings to `job`.

    Raises:
        SourceError: the corpus is not where the recipe, or `dataset`, says.
        TokenizerError: likewise the tokenizer, or it is another one.
    """
    deep = DeepRun(job, dataset, tokenizer, store)
    job.group("source files: there, sizes", deep.check_files)
    job.group("the probe: ids as recorded", deep.check_probe)
    if job.findings:
        return  # what is stored is known to be wrong: nothing to compare with
    rng = np.random.default_rng(int(deep.manifest.fingerprint[:15], 16))
    wanted = np.sort(rng.choice(deep.manifest.documents, min(documents, deep.manifest.documents), replace=False))
    shard = int(rng.integers(len(deep.manifest.shards)))
    job.group(f"{len(wanted)} documents encoded again from the source", lambda: deep.check_documents(wanted))
    job.group(f"train_{shard:06d}.npy rebuilt from the source", lambda: deep.rebuild(shard))


def _draws(text_xxh3: int, seed: int) -> list[float]:
    """Return the numbers that decide how a document is taken apart; the rule of `docs/format.md` once more."""
    found, mask = [], (1 << 64) - 1
    for number in range(1, 5):
        z = (text_xxh3 + (seed + number) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        found.append(((z ^ z >> 31) >> 11) / (1 << 53))
    return found


class DeepRun:
    """Compares a data root with its corpus: documents encoded again, and one shard rebuilt."""

    def __init__(
        self, job: VerifyRun, dataset: Sequence[str] | None, tokenizer: str | None, store: StoreOptions
    ) -> None:
        assert job.manifest is not None
        self.job = job
        self.manifest = job.manifest
        recipe = self.manifest.recipe
        datasets = dataset if dataset is not None else recipe.dataset
        if not isinstance(datasets, str) and len(datasets) == 1:
            datasets = datasets[0]
        if dataset is None:
            store = store._replace(revision=self.manifest.source_revision)
        only = [file.path for file in self.manifest.files] if self.manifest.source_rules < RULES else None
        where = datasets, recipe.text_column, recipe.text_separator
        self.corpus: Corpus = find_corpus(*where, store, only=only, metadata=recipe.metadata)
        loaded = self._load_tokenizer(tokenizer)
        self.engine = HFBackend(loaded, special_in_text=recipe.special_in_text)
        self.tokenizer = self.engine.resolved(loaded)
        self.root = DataRoot(job.root, self.manifest, job.record)

    def _load_tokenizer(self, name: str | None) -> TokenizerFile:
        recorded = self.manifest.tokenizer
        revision = recorded.revision if name is None else None
        loaded = load_tokenizer(name or recorded.name, eos_token=self.manifest.recipe.eos_token, revision=revision)
        if loaded.sha256 != recorded.sha256:
            raise TokenizerError(
                f"tokenizer {loaded.name}: expected tokenizer.json sha256 {recorded.sha256}, found {loaded.sha256}",
                next_step="give the one that made the data set with --tokenizer",
            )
        return with_special_tokens(loaded, self.manifest.recipe)

    def check_files(self) -> None:
        """The corpus must be the one that was read."""
        found = {file.path: file.nbytes for file in self.corpus.files}
        for file in self.manifest.files:
            self.job.same(
                self.corpus.name_of(file.path),
                "the file",
                "size in bytes",
                expected=file.nbytes,
                found=found.get(file.path, "no such file"),
            )

    def check_probe(self) -> None:
        """The reference backend must still give the ids it gave, and the end-of-sequence token the id it had."""
        expected_id = self.manifest.tokenizer.eos_id
        found_id = self.tokenizer.eos_id
        self.job.same(layout.MANIFEST, "tokenizer.eos_id", "id of EOS", expected=found_id, found=expected_id)
        for text, expected in self.manifest.tokenizer.probe.items():
            try:
                found: object = self._ids(text)
            except CannotEncodeError as error:
                found = str(error)
            self.job.same(layout.MANIFEST, "tokenizer.probe", f"ids of {text!r}", expected=expected, found=found)

    def check_documents(self, numbers: NDArray[np.int64]) -> None:
        """Documents by their number in stream order."""
        bounds = np.cumsum([0, *(shard.documents for shard in self.manifest.shards)])
        index = self.root.documents()
        wanted: list[Document] = []
        for shard in range(len(self.manifest.shards)):
            rows = numbers[(numbers >= bounds[shard]) & (numbers < bounds[shard + 1])] - bounds[shard]
            if len(rows):
                wanted += documents_of(index.sidecar(shard).take(rows))
        stream = self.root.tokens()
        for document, tokens in self._encoded(wanted):
            if self._check_length(document, len(tokens)):
                end = min(document.start + document.tokens, stream.tokens)
                self._compare(document, tokens[: end - document.start], stream.read(document.start, end))

    def _check_length(self, document: Document, found: int) -> bool:
        name = layout.documents_name(document.start // self.manifest.recipe.shard_size)
        position = f"{document.source} row {document.row}"
        return self.job.same(name, position, "tokens of a document", expected=found, found=document.tokens)

    def _compare(self, document: Document, expected: NDArray[np.uint32], found: NDArray[np.uint32]) -> None:
        differs = np.flatnonzero(expected != found)
        if len(differs):
            at = int(differs[0])
            self.job.require(
                False,
                self._file_of(document.start + at),
                f"token {document.start + at} of the stream",
                f"token {at} of {document.source} row {document.row}",
                expected=int(expected[at]),
                found=int(found[at]),
            )

    def _file_of(self, token: int) -> str:
        if self.job.has_tokens_file:
            return layout.TOKENS
        return layout.shard_name(token // self.manifest.recipe.shard_size)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.engine.encode(pa.array([text], pa.large_string()))[0].tolist() if text else []
        return found

    def _encode(self, text: str) -> NDArray[np.uint32]:
        """Return the tokens of a document, with what surrounds and divides its text."""
        fim, bos_id = self.tokenizer.fim, self.tokenizer.bos_id
        begin = [] if bos_id is None else [bos_id]
        draws = [] if fim is None else _draws(bytes_hash(text.encode()), fim.seed)
        if fim is None or not draws[0] < fim.rate:
            body = self._ids(text)
        else:
            low, high = sorted(min(len(text), math.floor(draw * (len(text) + 1))) for draw in draws[1:3])
            lead = self.manifest.tokenizer.fim_lead
            of_lead = len(self._ids(lead))
            prefix = self._ids(text[:low])
            middle, suffix = (
                self._ids(lead + part)[of_lead:] if part else [] for part in (text[low:high], text[high:])
            )
            of_prefix, of_middle, of_suffix = fim.ids
            if draws[3] < fim.spm_rate:
                body = [of_prefix, of_suffix, *suffix, of_middle, *prefix, *middle]
            else:
                body = [of_prefix, *prefix, of_suffix, *suffix, of_middle, *middle]
        return np.array([*begin, *body, self.tokenizer.eos_id], np.uint32)

    def _encoded(self, documents: list[Document]) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
        """Yield documents with their tokens, read and encoded again, file by file and row group by row group."""
        by_file: dict[str, dict[int, Document]] = defaultdict(dict)
        for document in documents:
            by_file[document.source][document.row] = document
        for source, rows in sorted(by_file.items()):
            for row, found in self._rows(source, sorted(rows)):
                text = found.text
                if self.job.require(
                    bool(text), source, f"row {row}", "has text", expected="a document", found="no text"
                ):
                    self._check_identity(rows[row], found)
                    yield rows[row], self._encode(text or "")

    def _check_identity(self, document: Document, row: PlainRow) -> None:
        """What the sidecar says of a document is what the source says."""
        name = layout.documents_name(document.start // self.manifest.recipe.shard_size)
        position = f"{document.source} row {document.row}"
        if document.text_xxh3 is not None:
            found = bytes_hash((row.text or "").encode())
            self.job.same(name, position, "text_xxh3", expected=found, found=document.text_xxh3)
        for column in self.manifest.recipe.metadata:
            expected, stored = row.value(column.path), document.metadata[column.name]
            is_nan = expected != expected and stored != stored  # noqa: PLR0124  # which nothing else is
            what = f"metadata column {column.name}"
            self.job.require(is_nan or expected == stored, name, position, what, expected=expected, found=stored)

    def _rows(self, source: str, rows: Sequence[int]) -> Iterator[tuple[int, PlainRow]]:
        """Yield ascending rows of a source file, read in the plainest way there is."""
        file = next((file for file in self.corpus.files if file.path == source), None)
        name = self.corpus.name_of(source)
        if file is None:
            raise SourceError(f"{name}: the file is gone", next_step="restore the file")
        wanted = set(rows)
        last = rows[-1]
        opened = self.corpus.location.open(file)
        try:
            with pa.PythonFile(opened, "r") if isinstance(opened, RemoteFile) else pa.OSFile(str(opened)) as data:
                for row, value in enumerate(read_rows(data, source, self.corpus, wanted)):
                    if row in wanted:
                        yield row, value
                    if row >= last:
                        return
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise SourceError(f"{name}: cannot be read: {first_line(error)}", next_step="restore the file") from None

    def rebuild(self, shard: int) -> None:
        """Make a shard again from the source: the order by itself, then the text of its rows."""
        record = self.manifest.shards[shard]
        begin = shard * self.manifest.recipe.shard_size
        end = begin + record.tokens
        name = layout.documents_name(shard)
        documents = self.root.documents().between(begin, end)
        emitted = self._emitted(shard)
        with_text = {(document.source, document.row) for document in documents}
        without_text = [row for row in emitted if row not in with_text]
        ours = [row for row in emitted if row in with_text]
        theirs = [(document.source, document.row) for document in documents]
        differs = next((i for i, both in enumerate(zip(ours, theirs, strict=False)) if both[0] != both[1]), None)
        if differs is None and len(ours) != len(theirs):
            differs = min(len(ours), len(theirs))
        if differs is not None:
            expected, found = (rows[differs] if differs < len(rows) else "none" for rows in (ours, theirs))
            where = f"document {differs} of those in {layout.shard_name(shard)}"
            self.job.require(False, name, where, "source row in the recipe's order", expected=expected, found=found)
            return
        self._check_without_text(without_text)
        with tempfile.TemporaryFile() as scratch:
            scratch.truncate(record.tokens * self.job.dtype.itemsize)
            made = np.memmap(scratch, self.job.dtype, "r+", shape=(record.tokens,))
            for document, tokens in self._encoded(documents):
                if not self._check_length(document, len(tokens)):
                    return
                first, last = max(begin, document.start), min(end, document.start + document.tokens)
                made[first - begin : last - begin] = tokens[first - document.start : last - document.start]
            header = shard_header(self.job.dtype, record.tokens)
            found_digest = hashlib.sha256(header)
            found_digest.update(made.data)
        what = "sha256 of the shard rebuilt"
        name = layout.shard_name(shard)
        self.job.same(name, "the file", what, expected=found_digest.hexdigest(), found=record.sha256)

    def _emitted(self, shard: int) -> list[tuple[str, int]]:
        """Return the source rows that the order emits from the shard's first token to its last."""
        recipe, files = self.manifest.recipe, self.manifest.files
        first = self.manifest.shards[shard - 1].next_cursor.position if shard else 0
        cursor = self.manifest.shards[shard].next_cursor
        end = cursor.position + (cursor.offset > 0)
        order = row_order(recipe.order, seed=recipe.seed, buffer_size=recipe.buffer_size)
        sequence = file_order(len(files), kind=recipe.order, seed=recipe.seed).tolist()
        # The file that the stream ends in, if it is read front to back, was not read to its end: as long as need be.
        counts = {index: _ENDLESS if (rows := files[index].rows) is None else rows for index in sequence}
        starts = np.cumsum([0, *(counts[index] for index in sequence[: self._reached(sequence)])])
        pieces: list[NDArray[np.int64]] = []
        done = 0

        def take(rows: NDArray[np.int64]) -> None:
            nonlocal done
            pieces.append(rows[max(0, first - done) : max(0, end - done)])
            done += len(rows)

        for index in sequence:
            at = 0
            while at < counts[index] and done < end:
                take(order.push(min(_ORDER_ROWS, counts[index] - at)))
                at += _ORDER_ROWS
            if done >= end:
                break
        else:
            take(order.finish())
        rows = np.concatenate(pieces)
        file = np.searchsorted(starts, rows, side="right") - 1
        return [(files[sequence[f]].path, int(row)) for f, row in zip(file.tolist(), rows - starts[file], strict=True)]

    def _reached(self, sequence: list[int]) -> int:
        """Return how many files, in reading order, the stream can have come to: up to the first that has no end."""
        files = self.manifest.files
        return next((n + 1 for n, index in enumerate(sequence) if files[index].rows is None), len(sequence))

    def _check_without_text(self, rows: list[tuple[str, int]]) -> None:
        """Rows that became no document must have no text."""
        by_file: dict[str, list[int]] = defaultdict(list)
        for source, row in rows:
            by_file[source].append(row)
        for source, wanted in by_file.items():
            for row, found in self._rows(source, sorted(wanted)):
                is_bad = not all(map(found.can_be_stored, self.manifest.recipe.metadata))
                is_right = is_bad or not found.text
                text = f"{found.text!r:.60}"
                what = "became no document"
                self.job.require(is_right, source, f"row {row}", what, expected="no text", found=text)

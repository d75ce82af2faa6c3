"""Manifest: what a data root holds, how it was made, and the digests that prove it.

`manifest.json` is replaced atomically, last, after every shard. Its records are what a resumed run
trusts; `consolidated.json` is its counterpart for `tokens.bin`. `docs/format.md` describes the fields.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from tokenmill.dataroot import atomic, layout
from tokenmill.errors import DataRootError
from tokenmill.options import LARGEST_COUNT
from tokenmill.recipe import Positive, Recipe
from tokenmill.redact import escape_surrogates

VERSION = 3
_OLDEST = 1
"""Records of version 1 carry no digests of their fields, those of version 2 no `documents_version`; they are read, and
become version 3 when next written."""

Natural = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_COUNT)]

UNREADABLE = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)
"""What bytes that are no record of ours make the decoder raise."""

_NINES = bytes(ord("9") if chr(byte).isdecimal() else 0 for byte in range(256))
"""Makes every digit a nine, and all else no digit."""

_ITEMSIZES: dict[layout.DTypeName, int] = {"uint8": 1, "uint16": 2, "uint32": 4}


class Cursor(msgspec.Struct, frozen=True):
    """Where a shard begins in the output order."""

    position: Natural = 0
    """Rows that the order emits before the row the shard begins in."""
    offset: Natural = 0
    """Tokens of that row which the shard before holds."""


class Count(msgspec.Struct, array_like=True):
    """Rows of one source file that the order emitted; written as `[file, documents, null, empty, special, bad]`."""

    file: int
    """Index into `Manifest.files`."""
    documents: int = 0
    null: int = 0
    empty: int = 0
    special: int = 0
    """Documents (among those counted) that hold a control-token string."""
    bad: int = 0
    """Rows that are not what their format says, left out on request; see `skipped.jsonl`."""

    @property
    def rows(self) -> int:
        return self.documents + self.null + self.empty + self.bad

    def add(self, other: Count) -> None:
        self.documents += other.documents
        self.null += other.null
        self.empty += other.empty
        self.special += other.special
        self.bad += other.bad


class ShardRecord(msgspec.Struct):
    """A finished shard."""

    index: Natural
    tokens: Natural
    sha256: str
    """SHA-256 of the whole file, header included."""
    documents: Natural
    """That start in the shard."""
    documents_sha256: str
    """SHA-256 of the documents sidecar."""
    next_cursor: Cursor
    """Where the next shard begins."""
    mtime_ns: int
    """Modification time of the finished file: a file with another time is hashed before it is trusted."""
    ledger: list[Count]
    """Rows of documents that start in the shard, and the rows without text before them, by source file."""


class TokenizerRecord(msgspec.Struct):
    """What encoded the text."""

    name: str
    revision: str | None
    sha256: str
    vocab_size: Natural
    eos_id: Natural
    probe: dict[str, list[int]]
    bos_id: Natural | None = None
    """Begins every document, if the recipe says so."""
    fim_ids: tuple[Natural, Natural, Natural] | None = None
    """Sentinels before prefix, middle and suffix of documents that were taken apart."""
    fim_lead: str = ""
    """What came before middle and suffix while they were encoded; its ids are not stored."""


class FileRecord(msgspec.Struct):
    """A source file; `rows` once they were counted."""

    path: str
    nbytes: Natural
    rows: Natural | None = None
    etag: str | None = None
    """What identified its content in the store it came from."""


class FileLedger(msgspec.Struct):
    """What became of the rows of one source file."""

    path: str
    rows: int
    documents: int
    null: int
    empty: int
    special: int
    unused: int
    """Number of rows after the end of the stream (`total_tokens`)."""
    bad: int = 0


class ViewOrigin(msgspec.Struct):
    """The view that a data root was written from; `view_record.ViewRecord` says what the fields mean."""

    seed: Natural
    shuffle: str
    holdout: float
    split: str
    duplicates: str
    begins_sha256: str
    places_sha256: str
    sources: dict[str, str]
    """The pin of each source, by its name."""


class ImportOrigin(msgspec.Struct, omit_defaults=True):
    """The files of others that a data root was imported from."""

    format: str
    source: str
    is_guess: bool
    """Whether documents end where EOS is, as the format does not say where they do."""
    appended_eos: bool = False
    """Whether documents that did not end with EOS were given one."""


class Manifest(msgspec.Struct, kw_only=True):
    """All of `manifest.json`."""

    version: int = VERSION
    complete: bool = False
    recipe: Recipe
    """With `dtype` and `eos_token` resolved."""
    fingerprint: str
    tokenizer: TokenizerRecord
    software: dict[str, str]
    """Versions that made the last shards."""
    files: list[FileRecord]
    """In path order."""
    source_rules: int = 1
    """By which the files of the corpus were chosen (`choice.RULES`)."""
    notes: list[str] = []
    """What a user should know of the corpus and the tokenizer: what was left out, which engine encoded and why."""
    source_revision: str | None = None
    """The commit that was read, if the corpus is a hub's."""
    shards: list[ShardRecord] = []
    damaged: list[ShardRecord] = []
    """Records of shards whose files are no longer theirs: what making them again must give."""
    tokens: Natural = 0
    documents: Natural = 0
    tail: list[Count] = []
    """Rows without text after the last document."""
    ledger: list[FileLedger] = []
    """Set when the data set is complete."""
    documents_version: Annotated[int, msgspec.Meta(ge=1, le=layout.DOCUMENTS_VERSION)] = 1
    """Version of the documents sidecars; see `layout.DOCUMENTS_VERSION`."""
    view: ViewOrigin | None = None
    """What the data root was written from, if it was a view: `files` then have the documents taken as their rows."""
    imported: ImportOrigin | None = None
    """What the data root was imported from, if it was: `files` then are those files, and rows their documents."""
    skipped_sha256: str | None = None
    """SHA-256 of `skipped.jsonl`, set when the data set is complete and has one."""
    digests: dict[str, str] = {}
    """SHA-256 of every other field, by name, as it is stored (`field_digest`)."""

    @property
    def stored_dtype(self) -> layout.DTypeName:
        """Data type of the tokens.

        Raises:
            DataRootError: the recipe is not resolved, so another program wrote the manifest.
        """
        if self.recipe.dtype == "auto":
            raise DataRootError(
                f"{layout.MANIFEST}: expected recipe.dtype uint16 or uint32, found auto",
                next_step="restore the manifest that tokenmill wrote",
            )
        return self.recipe.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return _ITEMSIZES[self.stored_dtype]

    def is_of(self, other: Manifest) -> bool:
        """Return whether both are of one data set: the same recipe, tokenizer and corpus."""
        ours, theirs = ([(file.path, file.nbytes) for file in manifest.files] for manifest in (self, other))
        etags = [(a.etag, b.etag) for a, b in zip(self.files, other.files, strict=False)]
        return (
            self.fingerprint == other.fingerprint
            and self.tokenizer.sha256 == other.tokenizer.sha256
            and ours == theirs
            and all(None in pair or pair[0] == pair[1] for pair in etags)
        )

    @property
    def is_begun(self) -> bool:
        """Whether any shard was made."""
        return bool(self.shards or self.damaged)

    def add(self, record: ShardRecord) -> None:
        """Enter a finished shard."""
        self.damaged = [shard for shard in self.damaged if shard.index != record.index]
        bisect.insort(self.shards, record, key=lambda shard: shard.index)
        self.tokens += record.tokens
        self.documents += record.documents

    def shard(self, index: int) -> ShardRecord | None:
        """Return the record of a shard; None if it is not finished."""
        at = bisect.bisect_left(self.shards, index, key=lambda shard: shard.index)
        found = self.shards[at : at + 1]
        return found[0] if found and found[0].index == index else None

    def expected(self, index: int) -> ShardRecord | None:
        """Return what shard `index` was when it was made before, if it was."""
        return next((shard for shard in self.damaged if shard.index == index), None)

    def cursor(self, index: int) -> Cursor:
        """Return where shard `index` begins in the output order; the shard before it must be finished."""
        before = self.shard(index - 1)
        return before.next_cursor if before else Cursor()

    def position(self, index: int) -> int:
        """Token of the stream at which shard `index` begins; the shard before it must be finished."""
        before = self.shard(index - 1)
        return before.index * self.recipe.shard_size + before.tokens if before else 0


class CopiedShard(msgspec.Struct):
    """A shard that `tokens.bin` holds."""

    tokens: Natural
    sha256: str
    """SHA-256 of the whole shard file, header included."""
    mtime_ns: int
    """Modification time of that file: one with another time is copied again."""


class Consolidated(msgspec.Struct, kw_only=True):
    """All of `consolidated.json`: what `tokens.bin` and `sample_ids.bin` are, or are to become.

    A record of its own beside the manifest because shards without a manifest are consolidated too.
    """

    version: int = VERSION
    complete: bool = False
    dtype: layout.DTypeName
    seq_len: Positive
    id_scheme: layout.IdScheme
    tokens: Natural = 0
    samples: Natural = 0
    tokens_sha256: str = ""
    sample_ids_sha256: str = ""
    shards: list[CopiedShard] = []
    """What is durable in `tokens.bin` so far, in order; empty where the tokens never were shard files."""
    digests: dict[str, str] = {}
    """As those of the manifest."""

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return _ITEMSIZES[self.dtype]

    @property
    def window_nbytes(self) -> int:
        """Bytes of tokens that a sample id covers."""
        return layout.id_window_nbytes(self.id_scheme, seq_len=self.seq_len, itemsize=self.itemsize)

    @property
    def tokens_nbytes(self) -> int:
        """Size of `tokens.bin`."""
        return self.tokens * self.itemsize

    @property
    def sample_ids_nbytes(self) -> int:
        """Size of `sample_ids.bin`."""
        return self.samples * layout.ID_NBYTES

    @property
    def settings(self) -> tuple[str, int, str]:
        """What decides the bytes of both files, given the tokens."""
        return self.dtype, self.seq_len, self.id_scheme


class Record(Protocol):
    """What all records have."""

    version: int
    digests: dict[str, str]


T = TypeVar("T", bound=Record)


def load(root: Path, *, proven: bool = True) -> Manifest | None:
    """Load the manifest of a data root; None if it has none. `proven=False` also reads one whose fields were changed.

    Raises:
        DataRootError: it cannot be read, is not ours, or was changed.
    """
    return load_record(root / layout.MANIFEST, Manifest, proven=proven)


def load_consolidated(root: Path, *, proven: bool = True) -> Consolidated | None:
    """Load the record of a data root's consolidation; None if there was none. As `load`."""
    return load_record(root / layout.CONSOLIDATED, Consolidated, proven=proven)


def load_records(root: Path, *, proven: bool = True) -> tuple[Manifest | None, Consolidated | None]:
    """Load the manifest and the record of the consolidation, of which there must be one. As `load`.

    Raises:
        DataRootError: there is neither, or one cannot be read.
    """
    found = load(root, proven=proven), load_consolidated(root, proven=proven)
    if found == (None, None):
        raise DataRootError(
            f"{root}: expected {layout.MANIFEST} or {layout.CONSOLIDATED}, found neither",
            next_step="give a directory that tokenmill pretokenize or consolidate made",
        )
    return found


def load_record(path: Path, kind: type[T], *, proven: bool = True) -> T | None:
    """Load the record that a file holds; None if there is no such file. As `load`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataRootError(f"{path}: cannot be read: {error.strerror}", next_step="check the permissions") from None
    return decode(data, kind, str(path), proven=proven)


def decode(data: bytes, kind: type[T], name: str, *, proven: bool = True) -> T:
    """Return the record that `data` holds.

    Raises:
        DataRootError: it is not ours, or a field is not what its digest says; `name` says which record.
    """
    try:
        record = msgspec.json.decode(data, type=kind)
        stored: dict[str, Any] = msgspec.json.decode(data)
        _refuse_large_integers(data)
    except UNREADABLE as error:
        raise DataRootError(
            f"{name}: not a tokenmill manifest: {error}",
            next_step="restore it, or choose another directory",
        ) from None
    if not _OLDEST <= record.version <= VERSION:
        raise DataRootError(
            f"{name}: expected manifest version {_OLDEST} to {VERSION}, found {record.version}",
            next_step="use the tokenmill version that made it, or choose another directory",
        )
    if proven and (record.digests or record.version > _OLDEST):
        expected: dict[str, str] = record.digests
        found: dict[str, str] = {name: field_digest(value) for name, value in stored.items() if name != "digests"}
        changed = sorted(field for field in {*found, *expected} if found.get(field) != expected.get(field))
        if changed:
            raise DataRootError(
                f"{name}: changed since tokenmill wrote it: {', '.join(changed)} differ from their SHA-256 in digests",
                next_step="restore the file from a copy; tokenmill verify checks it and everything else",
            )
    return record


def _refuse_large_integers(data: bytes) -> None:
    """Require that the integers of a record fit into 64 bits, with a sign: counts are added up as such.

    Raises:
        ValidationError: one does not.
    """
    # As an expression that begins with so many of one byte is found ten times faster than one of digits.
    for run in re.finditer(b"9" * 19 + b"9*", data.translate(_NINES)):
        begin, end = run.span()
        begin -= data[begin - 1 : begin] == b"-"
        number = data[begin:end]
        is_integer = data[begin - 1 : begin] in b" \t\r\n:,[" and data[end : end + 1] in b" \t\r\n,]}"
        if is_integer and (len(number) > 20 or abs(int(number)) >= 1 << 63):
            raise msgspec.ValidationError(f"expected integers of 64 bits, found {number[:40].decode()}")


def field_digest(value: Any) -> str:
    """SHA-256 of a field of a record: of its JSON with sorted keys, no blanks, and characters beyond ASCII as UTF-8."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def save(root: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically."""
    atomic.write_whole(root / layout.MANIFEST, encode(manifest))


def save_consolidated(root: Path, record: Consolidated) -> None:
    """Replace the record of the consolidation atomically."""
    atomic.write_whole(root / layout.CONSOLIDATED, encode(record))


def save_if_changed(root: Path, manifest: Manifest) -> None:
    """Replace the manifest unless it is stored as it is."""
    if (root / layout.MANIFEST).read_bytes() != encode(manifest):
        save(root, manifest)


def encode(record: Record) -> bytes:
    """Return a record as it is stored, its digests made anew.

    Raises:
        DataRootError: a path in it is not UTF-8, which JSON must be.
    """
    record.version = VERSION
    # Other threads may change the record meanwhile, so digests and content are made of one copy.
    stored: dict[str, Any] = msgspec.to_builtins(record)
    try:
        stored["digests"] = record.digests = {
            field: field_digest(value) for field, value in stored.items() if field != "digests"
        }
    except UnicodeEncodeError as error:
        raise DataRootError(
            f"{escape_surrogates(error.object)} is not UTF-8, which records must be",
            next_step="rename it, or give a link to it whose name is UTF-8",
        ) from None
    return msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n"

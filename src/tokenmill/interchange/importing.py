"""Import: the files of a trainer → a data root with sidecars, on which all of tokenmill works. A kill loses no shard.

A file that is all tokens and nothing else becomes `tokens.bin` by a hard link; what else there is goes into shards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import pyarrow as pa

from tokenmill.dataroot import atomic, layout, npy
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.earlier_run import refuse_foreign, set_damaged_aside
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.dataroot.manifest import Consolidated, Cursor, FileRecord, ImportOrigin, Manifest, TokenizerRecord
from tokenmill.dataroot.proof import choose_scheme, is_whole
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.encoding.encoder import EMPTY, Encoder
from tokenmill.encoding.tokenizer import load_tokenizer
from tokenmill.errors import DataRootError, ImportDataError
from tokenmill.interchange.export import FORMATS
from tokenmill.interchange.format import Format
from tokenmill.interchange.incoming import DocumentBlock, Hints, Incoming, Tokens, find_files, find_record, whole_pieces
from tokenmill.interchange.output import ExportRecord, require_room
from tokenmill.loading.data_root import Piece
from tokenmill.progress import also_shown
from tokenmill.recipe import DEFAULT_SHARD_SIZE, Recipe
from tokenmill.redact import escape_surrogates
from tokenmill.shards.consolidate import consolidate
from tokenmill.shards.ledger import balance, complete
from tokenmill.shards.pack import EmittedRows, ShardSlice, cut
from tokenmill.shards.recorder import Recorder
from tokenmill.shards.shard import ShardWriter
from tokenmill.shards.token_sink import FileSink, LinkedSink, TokenSink

RAW = "raw"
"""Files that are nothing but tokens: `.bin`, or `.npy` with NumPy's header."""
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class ImportReport(msgspec.Struct, kw_only=True):
    """What an import did."""

    root: str
    format: str
    status: str
    """`complete`, or `already complete`."""
    tokens: int
    documents: int
    shards: int
    linked: bool
    """Whether `tokens.bin` is a hard link to the file that was imported."""
    is_guess: bool
    """Whether documents end where EOS is, as the format does not say where they do."""
    notes: list[str]
    seconds: float


class _Raw:
    """Files without anything but tokens, perhaps behind the header of `.npy`."""

    def open(self, source: Path, hints: Hints) -> Incoming:
        paths = find_files(source, hints.split, "*{split}*.bin", "*{split}*.npy", "*.bin", "*.npy")
        pieces: list[Piece] = []
        dtypes = set()
        for path in paths:
            with path.open("rb") as file:
                head = file.read(1 << 10)
            if head.startswith(b"\x93NUMPY"):
                try:
                    header = npy.parse_npy_header(head)
                except ValueError as error:
                    raise ImportDataError(f"{path}: {error}", next_step="check --from") from None
                dtypes.add(np.dtype(header.dtype).newbyteorder("<"))
                pieces.append(Piece(path, header.tokens, header.nbytes))
            else:
                itemsize = hints.itemsize(path)
                dtypes.add(np.dtype(f"<u{itemsize}"))
                pieces += whole_pieces([path], itemsize)
        if len(dtypes) != 1:
            raise ImportDataError(f"{source}: files of several types", next_step="import each kind alone")
        return Tokens(pieces, dtypes.pop())


def import_data(
    source: Path | str,
    root: Path | str,
    kind: str,
    *,
    split: str = "train",
    tokenizer: str | None = None,
    eos_id: int | None = None,
    dtype: str | None = None,
    seq_len: int = 2048,
    shard_size: int = DEFAULT_SHARD_SIZE,
    append_eos: bool = False,
    copy: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    progress: bool = False,
) -> ImportReport:
    """Make a data root of files in the format of a trainer, or continue an earlier import.

    Args:
        source: the directory or file; of Megatron also the prefix.
        root: the data root; made if it does not exist.
        kind: a name of `export.FORMATS`, or `raw` for `.bin` and `.npy` that are nothing but tokens.
        split: `train` or `val`, of directories that have both.
        tokenizer: what made the tokens; None where `export.json` says it, or `eos_id` is given.
        eos_id: id that ends a document; None takes that of the tokenizer.
        dtype: `uint16` or `uint32`, of files that do not say it.
        seq_len: tokens per training sample.
        shard_size: tokens per shard.
        append_eos: give each document that does not end with EOS one; else such data is refused.
        copy: copy the tokens where a hard link could stand for them.
        on_progress: called with tokens read and, about, tokens to read.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        ImportDataError: the files are not of that format, or not whole; ids lie outside the vocabulary; documents do
            not end with EOS.
        TokenizerError: the tokenizer cannot be loaded.
        DataRootError: the directory holds something else.
        StorageError: the disk is full or cannot be written. Finished shards stay, and the same call continues.
    """
    started = time.monotonic()
    source, root = Path(source), Path(root)
    record = find_record(source, split)
    known = _tokenizer(source, tokenizer, eos_id, None if record is None else _of_record(record))
    hints = Hints(split, None if dtype is None else _DTYPES[dtype], known.record.eos_id, record)
    try:
        incoming = _format(kind).open(source, hints)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # of files that others wrote
        raise ImportDataError(
            f"{source}: cannot be read as {kind}: {type(error).__name__}: {error}",
            next_step="check --from; a file of the set may be missing or damaged: get it again",
        ) from error
    fresh = _new_manifest(source, kind, incoming, known, seq_len=seq_len, shard_size=shard_size, append_eos=append_eos)
    atomic.make_root(root)
    with also_shown(on_progress, wanted=progress, what="tokens") as tell:
        with lock_data_root(root):
            manifest = _agreeing(root, fresh)
            atomic.remove_partials(root)
            linked, joined = _choose_link(root, manifest, incoming, copy=copy or append_eos)
            set_damaged_aside(root, manifest, sidecars_alone=linked is not None or joined)
            was_complete = manifest.complete and not manifest.damaged and (linked is None or joined)
            if not was_complete:
                _make_missing(root, manifest, incoming, linked, tell, append_eos=append_eos)
        if linked is not None and not was_complete:
            itemsize = manifest.itemsize
            consolidate(root, on_progress=lambda done, total: tell((total + done) // itemsize, 2 * total // itemsize))
    return ImportReport(
        root=str(root),
        format=kind,
        status="already complete" if was_complete else "complete",
        tokens=manifest.tokens,
        documents=manifest.documents,
        shards=len(manifest.shards),
        linked=linked is not None,
        is_guess=incoming.is_guess,
        notes=manifest.notes,
        seconds=round(time.monotonic() - started, 3),
    )


def _choose_link(root: Path, manifest: Manifest, incoming: Incoming, *, copy: bool) -> tuple[Path | None, bool]:
    """Return the file that `tokens.bin` is a link to, None if tokens are copied; and whether `tokens.bin` is whole.

    What was begun as shards continues as shards, and what was begun as a link as that.
    """
    before = manifests.load_consolidated(root)
    begun_as_shards = manifest.is_begun and (before is None or any(root.glob(layout.SHARD_GLOB)))
    joined = before is not None and is_whole(root, before) and not begun_as_shards
    source = incoming.whole_file
    if source is None or begun_as_shards or incoming.dtype.itemsize != manifest.itemsize:
        return None, joined
    if joined:
        return (source if (root / layout.TOKENS).samefile(source) else None), True
    if before is None and (copy or not _can_be_linked(source, root)):
        return None, False
    return source, False


def _can_be_linked(source: Path, root: Path) -> bool:
    """Whether a file can have a second name there, and be opened for writing, as an unfinished `tokens.bin` is."""
    second = root / (layout.TOKENS + layout.PARTIAL_SUFFIX)
    second.unlink(missing_ok=True)  # a kill right here leaves it
    try:
        os.link(source, second)
    except OSError:
        return False
    second.unlink()
    return os.access(source, os.W_OK)


def _make_missing(
    root: Path,
    manifest: Manifest,
    incoming: Incoming,
    linked: Path | None,
    tell: Callable[[int, int], None],
    *,
    append_eos: bool,
) -> None:
    """Make the shards that are missing, or what is known of them where a link stands for their tokens."""
    if linked is None:
        stored = sum(path.stat().st_size for path in incoming.files)
        require_room(root, max(0, stored * manifest.itemsize // incoming.dtype.itemsize))
    manifest.complete = False
    manifests.save(root, manifest)
    if linked is not None:
        seq_len = manifest.recipe.seq_len
        scheme = choose_scheme(manifest.recipe, tokens=None, seq_len=seq_len)
        record = Consolidated(dtype=manifest.stored_dtype, seq_len=seq_len, id_scheme=scheme)
        manifests.save_consolidated(root, record)
        # Not beside a link that a killed run left: to rename one name of a file to another of it does nothing.
        atomic.remove(root, layout.TOKENS, layout.TOKENS + layout.PARTIAL_SUFFIX)
        with atomic.translate_write_errors(root / layout.TOKENS):
            os.link(linked, root / layout.TOKENS)
    _Importer(root, manifest, incoming, linked, tell, append_eos=append_eos).run()
    balance(root, manifest)
    complete(root, manifest)


class _Known(NamedTuple):
    """What is known of the tokenizer."""

    record: TokenizerRecord
    eos_token: str | None


def _of_record(record: ExportRecord) -> TokenizerRecord:
    return TokenizerRecord(record.tokenizer, None, record.tokenizer_sha256, record.vocab_size, record.eos_id, {})


def _tokenizer(source: Path, name: str | None, eos_id: int | None, told: TokenizerRecord | None) -> _Known:
    """Return the tokenizer that made the tokens.

    Raises:
        ImportDataError: nothing says what ends a document, or two say different things.
    """
    if name is not None:
        encoder = Encoder(load_tokenizer(name, eos_token=None), backend="hf", special_in_text="parse", dtype="auto")
        loaded = encoder.tokenizer
        found = TokenizerRecord(
            loaded.name, loaded.revision, loaded.sha256, loaded.vocab_size, loaded.eos_id, encoder.probe
        )
        if told is not None and told.sha256 != found.sha256:
            raise ImportDataError(
                f"{source}: was made with another tokenizer, tokenizer.json sha256 {told.sha256}, than {name}, "
                f"{found.sha256}",
                next_step="give that tokenizer, or none",
            )
        if eos_id is not None:
            found.eos_id = eos_id
        return _Known(found, loaded.eos_token if found.eos_id == loaded.eos_id else None)
    if told is not None:
        return _Known(told, None)
    if eos_id is None:
        raise ImportDataError(
            f"{source}: nothing says which token ends a document",
            next_step="give the tokenizer with --tokenizer, or the id with --eos-id",
        )
    return _Known(TokenizerRecord("unknown", None, "", 1 << 32, eos_id, {}), None)


def _format(kind: str) -> Format | _Raw:
    if kind == RAW:
        return _Raw()
    if kind not in FORMATS:
        raise ImportDataError(f"format {kind!r}: not known", next_step=f"choose one of {', '.join([*FORMATS, RAW])}")
    return FORMATS[kind]


def _new_manifest(
    source: Path,
    kind: str,
    incoming: Incoming,
    known: _Known,
    *,
    seq_len: int,
    shard_size: int,
    append_eos: bool,
) -> Manifest:
    tokenizer = known.record
    limit = 1 << 8 * min(4, incoming.dtype.itemsize)
    if tokenizer.sha256 == "":
        tokenizer.vocab_size = limit
    dtype = "uint16" if incoming.dtype.itemsize <= 2 else "uint32"
    recipe = Recipe(
        dataset=escape_surrogates(source),
        tokenizer=tokenizer.name,
        order="sequential",
        shard_size=shard_size,
        seq_len=seq_len,
        dtype=dtype,  # type: ignore[arg-type]
        eos_token=known.eos_token,
    )
    notes = []
    if incoming.is_guess:
        notes.append(
            f"{kind} does not say where documents end: they are taken to end with id {tokenizer.eos_id}, which may "
            "stand in a text as well"
        )
    if append_eos:
        notes.append(f"documents that did not end with id {tokenizer.eos_id} were given one")
    return Manifest(
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        tokenizer=tokenizer,
        software={},
        files=[FileRecord(_name(source, path), path.stat().st_size) for path in incoming.files],
        notes=notes,
        imported=ImportOrigin(kind, escape_surrogates(source), incoming.is_guess, append_eos),
    )


def _name(source: Path, path: Path) -> str:
    name = path.relative_to(source).as_posix() if source.is_dir() else path.name
    if escape_surrogates(name) != name:
        raise ImportDataError(
            f"{path}: its name is not UTF-8, which records must be",
            next_step="rename it, or give a link to it whose name is UTF-8",
        )
    return name


def _agreeing(root: Path, fresh: Manifest) -> Manifest:
    """Return the manifest of an earlier run, which must be of the same files; the fresh one if there was none."""
    found = manifests.load(root)
    if found is None:
        refuse_foreign(root)
        return fresh
    if found.imported is not None and not found.is_begun:  # nothing was made: there is nothing to agree with
        return fresh
    if found.imported != fresh.imported or not found.is_of(fresh):
        what = found.recipe.difference(fresh.recipe) or "other files, or with and without --append-eos"
        raise DataRootError(f"{root}: holds another data set: {what}", next_step="choose another directory")
    return found


class _Importer:
    """Writes the shards that are missing."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        incoming: Incoming,
        linked: Path | None,
        on_progress: Callable[[int, int], None],
        *,
        append_eos: bool,
    ) -> None:
        self._root = root
        self._manifest = manifest
        self._incoming = incoming
        self._linked = linked
        self._on_progress = on_progress
        self._append_eos = append_eos
        self._total = sum(path.stat().st_size for path in incoming.files) // incoming.dtype.itemsize
        if linked is not None:  # it is read again, for the ids of samples
            self._total *= 2
        self._recorder = Recorder(root, manifest)
        self._done = {shard.index for shard in manifest.shards}
        self._dtype = npy.token_dtype(manifest.recipe.dtype)
        self._paths = pa.array([file.path for file in manifest.files], pa.string())
        self._writer: ShardWriter | None = None
        self._rows = np.zeros(len(manifest.files), np.int64)

    def run(self) -> None:
        """Read all documents, and write those of missing shards."""
        position = emitted = 0
        try:
            for block, is_last in self._blocks():
                block = self._with_ends(block) if self._append_eos else block  # noqa: PLW2901
                rows = self._emitted_rows(block, is_last=is_last)
                begin, end = position, position + len(block.tokens)
                for part in cut(begin, rows.length, shard_size=self._manifest.recipe.shard_size, stop=end):
                    if part.shard not in self._done:
                        cursor = Cursor(emitted + part.end - (part.cut_at > 0), part.cut_at)
                        self._write(rows, part, position, cursor)
                    position += part.tokens
                position, emitted = end, emitted + len(rows)
                self._rows[block.file] += len(rows)
                self._on_progress(position, max(position, self._total))
            if self._writer is not None:
                self._publish(Cursor(emitted))
        except BaseException:
            if self._writer is not None:
                self._writer.discard()
            self._recorder.abandon()
            raise
        for file, count in zip(self._manifest.files, self._rows.tolist(), strict=True):
            file.rows = count

    def _blocks(self) -> Iterator[tuple[DocumentBlock, bool]]:
        """Yield documents, and whether they are the last; those without tokens go with one that has some."""
        waiting: DocumentBlock | None = None
        for block in self._incoming.blocks(self._manifest.tokenizer.eos_id):
            if waiting is not None:
                yield waiting, False
            waiting = block
        if waiting is not None:
            yield waiting, True

    def _with_ends(self, block: DocumentBlock) -> DocumentBlock:
        """Return the documents, each of which ends with EOS; those without tokens stay so."""
        ends = np.cumsum(block.lengths)
        filled = np.flatnonzero(block.lengths)
        eos_id = self._manifest.tokenizer.eos_id
        without = filled[block.tokens[ends[filled] - 1] != eos_id]
        lengths = block.lengths.copy()
        lengths[without] += 1
        return block._replace(lengths=lengths, tokens=np.insert(block.tokens, ends[without], eos_id))

    def _emitted_rows(self, block: DocumentBlock, *, is_last: bool) -> EmittedRows:
        """Return the documents as rows; ids must be of the vocabulary, and EOS at the end of each document.

        Where the last one of all has no EOS it was cut off: it continues after the end of the stream.
        """
        path, tokenizer = self._incoming.files[block.file], self._manifest.tokenizer
        lengths = block.lengths.astype(np.int64)
        count, ends = len(lengths), np.cumsum(lengths)
        if len(block.tokens) and (largest := int(block.tokens.max())) >= tokenizer.vocab_size:
            at = int(np.searchsorted(ends, int(block.tokens.argmax()), side="right"))
            raise ImportDataError(
                f"{path}: document {block.first_row + at}: expected ids below {tokenizer.vocab_size}, found {largest}",
                next_step="check --tokenizer, --from and --dtype",
            )
        starts = ends - lengths
        filled = np.flatnonzero(lengths)
        wrong = filled[block.tokens[ends[filled] - 1] != tokenizer.eos_id]
        if is_last and len(wrong) and wrong[-1] == filled[-1]:
            lengths[wrong[-1]] += 1
            wrong = wrong[:-1]
        if len(wrong):
            raise ImportDataError(
                f"{path}: document {block.first_row + int(wrong[0])}: expected id {tokenizer.eos_id} at its end, found "
                f"{int(block.tokens[ends[wrong[0]] - 1])}",
                next_step="give the id that ends documents with --eos-id, or give each document one with --append-eos",
            )
        return EmittedRows(
            [cast(npy.TokenArray, block.tokens.astype(self._dtype, copy=False))],
            np.zeros(count, np.int64),
            starts,
            lengths,
            np.where(lengths > 0, 0, EMPTY).astype(np.uint8),
            np.full(count, block.file, np.int64),
            np.arange(block.first_row, block.first_row + count),
            np.zeros(count, np.uint64),
        )

    def _write(self, rows: EmittedRows, part: ShardSlice, position: int, cursor: Cursor) -> None:
        if self._writer is None:
            tokens = self._manifest.recipe.shard_size
            self._writer = ShardWriter(
                self._root,
                part.shard,
                self._sink(part.shard, tokens),
                tokens=tokens,
                dtype=self._dtype,
                paths=self._paths,
                schema=documents_schema(self._manifest),
            )
        self._writer.append(rows, part, position)
        if self._writer.is_full:
            self._publish(cursor)

    def _sink(self, shard: int, tokens: int) -> TokenSink:
        if self._linked is not None:
            return LinkedSink(self._linked, shard * tokens * self._dtype.itemsize)
        return FileSink(self._root / layout.shard_name(shard), npy.npy_header(self._dtype, tokens))

    def _publish(self, cursor: Cursor) -> None:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        self._recorder.record(writer.finish(cursor, self._manifest.expected(writer.index)))

"""Source, stage 1: corpus → files → spans → Arrow text. Today: local parquet files.

A corpus is a list of files in path order. A file is cut into spans along its row groups; large
row groups are streamed, so memory follows the span and not the row group. Spans never influence
output bytes.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.errors import SourceError

SUFFIX = ".parquet"

SPAN_TEXT_NBYTES = 4 << 20
"""Text per span: enough that gigatoken's per-call caches pay, little enough to stay in memory."""

_SPAN_MAX_ROWS = 8192
"""Where the footer misleads about the text (a dictionary holds repeated values once)."""
_READ_NBYTES = 1 << 20
"""Read at once from a column chunk, which may be as large as the file."""

_MEND = "mend, replace or exclude the file, then run the same command again"


class SourceFile(msgspec.Struct, frozen=True):
    """A file of the corpus."""

    path: str
    """Relative to the corpus, with `/`: what records and messages call it."""
    nbytes: int


class Span(NamedTuple):
    """A contiguous run of rows of one file, inside one unit of reading."""

    first_row: int
    rows: int
    unit: int
    """Which run of row groups of the file holds it."""


class Corpus(NamedTuple):
    """The files of a data set, in path order."""

    root: Path
    files: tuple[SourceFile, ...]
    text_column: str

    def open(self, index: int, *, span_rows: int | None = None) -> ParquetFile:
        """Open a file of the corpus to plan and read its spans."""
        return ParquetFile(self.root / self.files[index].path, self.text_column, span_rows)


def find_corpus(dataset: str | Sequence[str], text_column: str) -> Corpus:
    """The files that `dataset` means: a directory (searched recursively), a glob, a file, or a list of files.

    Raises:
        SourceError: nothing there, or nothing in it.
    """
    root, paths = _expand([dataset] if isinstance(dataset, str) else list(dataset))
    names = sorted({path.relative_to(root).as_posix() for path in paths})
    files = []
    for name in names:
        try:
            files.append(SourceFile(name, (root / name).stat().st_size))
        except OSError as error:
            raise SourceError(f"{root / name}: {error.strerror}", next_step=_MEND) from None
    return Corpus(root, tuple(files), text_column)


def _expand(patterns: list[str]) -> tuple[Path, list[Path]]:
    """The folder names are relative to, and the files."""
    if not patterns:
        raise SourceError("the list of source files is empty", next_step="name the corpus with --dataset")
    if len(patterns) == 1 and Path(patterns[0]).is_dir():
        root = Path(patterns[0]).absolute()
        return root, _files_below(root)
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            paths.extend(_files_below(Path(pattern).absolute()))
            continue
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        named = [Path(match).absolute() for match in matches if not Path(match).is_dir()]
        if not named:
            raise SourceError(f"{pattern}: no such file or directory, and no file matches it", next_step=_hint(pattern))
        paths.extend(named)
    other = next((path for path in paths if path.suffix != SUFFIX), None)
    if other is not None:
        raise SourceError(
            f"{other}: expected a {SUFFIX} file, found {other.suffix or 'no suffix'}",
            next_step="name parquet files only, for example with the glob '*.parquet'",
        )
    return Path(os.path.commonpath([path.parent for path in paths])), paths


def _files_below(root: Path) -> list[Path]:
    """Every file that is named like one of ours, links followed; a dangling one is found to be so later."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(f"{folder}/{name}") not in seen]
        seen.update(os.path.realpath(f"{folder}/{name}") for name in folders)
        found.extend(Path(folder, name) for name in names if name.endswith(SUFFIX))
    if not found:
        raise SourceError(f"{root}: no *{SUFFIX} files in it", next_step="give the directory that holds them")
    return found


def _hint(pattern: str) -> str:
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", pattern):
        return (
            f"to use the hub's data set of that name, fetch it first: hf download --repo-type dataset {pattern} "
            "--local-dir corpus, then --dataset corpus"
        )
    return "check the path given with --dataset"


class ParquetFile:
    """One parquet file: its rows, its spans, and their text. Threads may read different spans at once.

    Args:
        path: of the file.
        text_column: the column that holds the documents.
        span_rows: rows per span; None chooses about `SPAN_TEXT_NBYTES` of text.

    Raises:
        SourceError: not readable, not parquet, or no such column of text.
    """

    def __init__(self, path: Path, text_column: str, span_rows: int | None = None) -> None:
        self.path = path
        self.column = text_column
        self._span_rows = span_rows
        try:
            with pq.ParquetFile(path) as file:
                self._metadata = file.metadata
                self._schema = file.schema_arrow
        except FileNotFoundError:
            raise _gone(path) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{path}: not a readable parquet file: {_first_line(error)}", next_step=_MEND) from None
        self._check_column()
        self.rows = int(self._metadata.num_rows)
        self._units = list(self._plan_units())
        self.wanted: frozenset[Span] | None = None
        """The spans that will be read; None: all."""
        self._readers: dict[int, _UnitReader] = {}
        self._lock = threading.Lock()

    def _check_column(self) -> None:
        if self.column not in self._schema.names:
            raise SourceError(
                f"{self.path}: no column {self.column!r}: found the columns {', '.join(self._schema.names)}",
                next_step="name the text column with --text-column",
            )
        if self._schema.names.count(self.column) > 1:
            raise SourceError(f"{self.path}: two columns are called {self.column!r}", next_step=_MEND)
        kind = self._schema.field(self.column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        text_kinds = (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.binary(),
            pa.large_binary(),
            pa.binary_view(),
        )
        if kind not in text_kinds:
            raise SourceError(
                f"{self.path}: column {self.column!r}: expected strings, found {kind}",
                next_step="name the text column with --text-column",
            )

    @property
    def text_nbytes(self) -> int:
        """Size of the text, from the file's footer: what the column holds less a length per row."""
        column = sum(self._group_text_nbytes(group) for group in range(self._metadata.num_row_groups))
        return max(0, column - 4 * self.rows)

    def _group_text_nbytes(self, group: int) -> int:
        metadata = self._metadata.row_group(group)
        index = self._schema.get_field_index(self.column)
        # Nested neighbours shift leaf columns, so look the text column up by its path.
        for leaf in range(index, metadata.num_columns):
            column = metadata.column(leaf)
            if column.path_in_schema == self.column:
                return int(column.total_uncompressed_size)
        raise AssertionError(f"{self.path}: column {self.column} vanished from the footer")

    def _plan_units(self) -> Iterator[_Unit]:
        """Neighbouring row groups, joined until they hold a span."""
        first_row, rows, nbytes = 0, 0, 0
        groups: list[int] = []
        for group in range(self._metadata.num_row_groups):
            groups.append(group)
            rows += self._metadata.row_group(group).num_rows
            nbytes += self._group_text_nbytes(group)
            enough = rows >= self._span_rows if self._span_rows else nbytes >= SPAN_TEXT_NBYTES
            if enough or group == self._metadata.num_row_groups - 1:
                if rows:
                    spans = max(1, round(nbytes / SPAN_TEXT_NBYTES), -(-rows // _SPAN_MAX_ROWS))
                    yield _Unit(first_row, rows, tuple(groups), self._span_rows or -(-rows // spans))
                first_row, rows, nbytes, groups = first_row + rows, 0, 0, []

    def spans(self) -> list[Span]:
        """All rows of the file, cut into spans, in row order."""
        return [span for index in range(len(self._units)) for span in self._unit_spans(index)]

    def _unit_spans(self, index: int) -> list[Span]:
        unit = self._units[index]
        return [
            Span(unit.first_row + offset, min(unit.span_rows, unit.rows - offset), index)
            for offset in range(0, unit.rows, unit.span_rows)
        ]

    def read(self, span: Span) -> pa.Array:
        """The text column of a span, shape `(rows,)`, nulls kept.

        Each span is read once. Spans of one unit are decoded in sequence: whoever asks first decodes
        up to its own and keeps what came before for its callers (see `keep_only`).

        Raises:
            SourceError: the row group is damaged.
        """
        unit = self._units[span.unit]
        with self._lock:
            reader = self._readers.get(span.unit)
            if reader is None:
                spans = self._unit_spans(span.unit)
                reader = _UnitReader(self, self._batches(unit), unit.groups, spans)
                self._readers[span.unit] = reader
        text = reader.take(span)
        if reader.exhausted:
            with self._lock:
                self._readers.pop(span.unit, None)
        return text

    def keep_only(self, spans: Collection[Span]) -> None:
        """Say which spans will be read, so that none is kept for nobody."""
        self.wanted = frozenset(spans)

    def _batches(self, unit: _Unit) -> Iterator[pa.RecordBatch]:
        # A reader of its own: Arrow does not promise that threads may share one. pre_buffer pays for
        # remote stores and only copies here; Arrow's threads would fight the encoders for the cores.
        file = pq.ParquetFile(
            self.path,
            metadata=self._metadata,
            buffer_size=_READ_NBYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        with file:
            yield from file.iter_batches(
                unit.span_rows, row_groups=list(unit.groups), columns=[self.column], use_threads=False
            )

    def damaged_groups(self, groups: tuple[int, ...]) -> str:
        """Which of these row groups cannot be read, as words."""
        for group in groups:
            try:
                with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                    file.read_row_group(group, columns=[self.column])
            except (pa.ArrowException, OSError):
                return f"row group {group}"
        return f"row groups {groups[0]} to {groups[-1]}"


class _Unit(NamedTuple):
    """A run of row groups that is decoded front to back."""

    first_row: int
    rows: int
    groups: tuple[int, ...]
    span_rows: int


class _UnitReader:
    """Hands out the spans of a unit in any order near their own while decoding it once."""

    def __init__(
        self, file: ParquetFile, batches: Iterator[pa.RecordBatch], groups: tuple[int, ...], spans: list[Span]
    ) -> None:
        self._file = file
        self._batches = batches
        self._groups = groups
        self._to_decode = deque(spans)
        self._ready: dict[Span, pa.Array] = {}
        self._error: SourceError | None = None
        self._lock = threading.Lock()

    @property
    def exhausted(self) -> bool:
        return not self._to_decode and not self._ready

    def take(self, span: Span) -> pa.Array:
        with self._lock:
            if self._error is not None:
                raise self._error
            while span not in self._ready:
                decoded = self._to_decode.popleft()
                try:
                    text = self._decode(decoded.rows)
                except SourceError as error:
                    self._error = error  # for those who wait for later spans
                    raise
                if self._file.wanted is None or decoded in self._file.wanted:
                    self._ready[decoded] = text
            return self._ready.pop(span)

    def _decode(self, rows: int) -> pa.Array:
        """The next `rows` rows; Arrow may return them in several batches."""
        pieces: list[pa.Array] = []
        missing = rows
        while missing > 0:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise self._damaged(f"expected {rows} more rows, found {rows - missing}") from None
            except FileNotFoundError:
                raise _gone(self._file.path) from None
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(_first_line(error)) from None
            pieces.append(batch.column(0))
            missing -= len(batch)
        return pieces[0] if len(pieces) == 1 else pa.concat_arrays([_large(piece) for piece in pieces])

    def _damaged(self, what: str) -> SourceError:
        where = self._file.damaged_groups(self._groups)
        return SourceError(f"{self._file.path}: {where}: cannot be read: {what}", next_step=_MEND)


def _large(texts: pa.Array) -> pa.Array:
    """With 64-bit offsets: together, pieces may pass 2 GB."""
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return texts.cast(large.get(texts.type, texts.type))


def _gone(path: Path) -> SourceError:
    return SourceError(f"{path}: the file is gone", next_step="restore it, then run the same command again")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

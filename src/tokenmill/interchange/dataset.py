"""Data set: what an export reads, a data root or a view: tokens, where documents begin, and what they come from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import TokenizerRecord
from tokenmill.dataroot.view_record import pin_of
from tokenmill.errors import DataRootError, ExportError
from tokenmill.loading.data_root import TokenStream
from tokenmill.loading.view import OpenView, open_root
from tokenmill.recipe import MetadataColumn
from tokenmill.views.origins import Origins, metadata_columns

CHUNK_TOKENS = 1 << 22
"""Tokens that are read, hashed and written at once."""
_ORIGINS = 1 << 18
"""Documents whose origins are looked up at once."""
_RESIDENT_NBYTES = 256 << 20
"""Resident limit of the data set's files; more of them stays in the system's cache, if it has room."""
_COUNTED_TOKENS = 1 << 18
"""Looked at at once: what a comparison makes of them stays in the processor's cache."""
_STARTS_TOKENS = 1 << 28
"""Tokens whose documents are looked up at once."""


class ExportedDataset:
    """A finished data set.

    Args:
        root: a data root with a manifest, or a view.

    Raises:
        DataRootError: it is neither, or is not finished.
        ExportError: nothing says which tokenizer made it.
    """

    def __init__(self, root: Path) -> None:
        self.found = open_root(root)
        self.root = root
        if isinstance(self.found, OpenView) and self.found.view.padding_id is not None:
            raise ExportError(
                f"{root}: its samples are packed with padding, which other formats cannot tell from text",
                next_step='export a view with packing = "concat"; trainers read this one through tokenmill.torch',
            )
        self.stream = self.found.tokens()
        if isinstance(self.stream, TokenStream):
            self.stream.limit_resident(_RESIDENT_NBYTES)
        tokenizer, documents = self.found.tokenizer, self.found.document_count
        if tokenizer is None or documents is None:
            raise ExportError(
                f"{root}: expected a {layout.MANIFEST}, which says where documents begin and how many ids there are; "
                "found none",
                next_step="only data sets that tokenmill made can be exported",
            )
        self.tokenizer: TokenizerRecord = tokenizer
        self.documents: int = documents
        self.tokens = self.stream.tokens
        self.dtype: np.dtype[Any] = self.stream.dtype
        self.seq_len = self.found.seq_len
        self._digest: str | None = None
        self._inner_eos = 0

    @property
    def samples(self) -> int:
        """Number of whole samples."""
        return self.tokens // self.seq_len

    @property
    def cuts_documents(self) -> bool:
        """Whether documents lie in pieces, as samples are put in an order of their own."""
        return isinstance(self.found, OpenView) and self.found.cuts_documents

    @property
    def arranged(self) -> str:
        """What was done to the samples of a view that cuts documents."""
        assert isinstance(self.found, OpenView)
        return "drawn by weight" if self.found.view.stages else "shuffled"

    @property
    def identity(self) -> str:
        """SHA-256 that tells this data set from all others."""
        if isinstance(self.found, OpenView):
            return self.found.view.samples_sha256
        assert self.found.manifest is not None
        return pin_of(self.found.manifest)

    @property
    def whole_file(self) -> Path | None:
        """The file that holds all tokens and nothing else, if there is one."""
        is_joined = self.found.record is not None and self.found.record.complete
        return self.root / layout.TOKENS if is_joined else None

    @property
    def metadata(self) -> list[MetadataColumn]:
        """The metadata columns of its sidecars; of a view those of all sources."""
        if isinstance(self.found, OpenView):
            return [MetadataColumn.parse(column) for column in metadata_columns(self.found)]
        assert self.found.manifest is not None
        return list(self.found.manifest.recipe.metadata)

    def chunks(self, tokens: int = CHUNK_TOKENS) -> Iterator[NDArray[Any]]:
        """Yield all tokens, so many at once; the first time they are hashed and looked at, too.

        Raises:
            DataRootError: after the last of them, if `tokens.bin` is not what its record says.
        """
        ranges = ((at, min(at + tokens, self.tokens)) for at in range(0, self.tokens, tokens))
        if self._digest is not None:
            yield from (self.stream.read(begin, end) for begin, end in ranges)
            return
        sha256, eos = hashlib.sha256(), 0
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hashing:
            hashed: Future[None] | None = None
            for begin, end in ranges:
                chunk = np.ascontiguousarray(self.stream.read(begin, end))
                if hashed is not None:
                    hashed.result()
                hashed = hashing.submit(sha256.update, chunk.data.cast("B"))
                for at in range(0, len(chunk), _COUNTED_TOKENS):
                    eos += int(np.count_nonzero(chunk[at : at + _COUNTED_TOKENS] == self.tokenizer.eos_id))
                yield chunk
            if hashed is not None:
                hashed.result()
        self._refuse_damaged(sha256.hexdigest())
        self._digest, self._inner_eos = sha256.hexdigest(), eos - self.documents + (not self.ends_with_eos)

    def _refuse_damaged(self, found: str) -> None:
        record = None if isinstance(self.found, OpenView) or self.whole_file is None else self.found.record
        if record is not None and record.tokens_sha256 not in ("", found):
            raise DataRootError(
                f"{self.whole_file}: expected sha256 {record.tokens_sha256} by {layout.CONSOLIDATED}, found {found}",
                next_step=f"run: tokenmill verify {self.root}",
            )

    @property
    def ends_with_eos(self) -> bool:
        """Whether the last document is whole; where `total_tokens` cut it off it has no end."""
        return self.tokens > 0 and int(self.stream.read(self.tokens - 1, self.tokens)[0]) == self.tokenizer.eos_id

    def digest(self) -> str:
        """SHA-256 of all tokens as they are stored, little-endian."""
        if self._digest is None:
            for _ in self.chunks():
                pass
        assert self._digest is not None
        return self._digest

    def inner_eos(self) -> int:
        """Number of EOS ids inside documents, where no document ends; none is known of a view that cuts documents."""
        self.digest()
        return 0 if self.cuts_documents else self._inner_eos

    def starts(self) -> Iterator[NDArray[np.int64]]:
        """Yield the first token of each document, in order, some at once."""
        index = self.found.documents()
        for begin in range(0, self.tokens, _STARTS_TOKENS):
            yield index.starts_between(begin, min(begin + _STARTS_TOKENS, self.tokens))

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each document, EOS included, in order, some at once; the last may be cut off."""
        waiting = np.empty(0, np.int64)
        for starts in self.starts():
            bounds = np.concatenate([waiting, starts])
            if len(bounds) > 1:
                yield np.diff(bounds)
            waiting = bounds[-1:]
        if len(waiting):
            yield np.array([self.tokens - int(waiting[0])])

    def origins(self, scratch: Path) -> Iterator[pa.Table]:
        """Yield `source`, `row` and the metadata columns of each document, in order, some at once.

        Args:
            scratch: a directory for files of a view that may be larger than memory; deleted at the end.
        """
        columns = self.metadata
        if not isinstance(self.found, OpenView):
            for table in self.found.documents().tables():
                yield table.select(["source", "row", *(column.name for column in columns)])
            return
        index = self.found.open_index()
        try:
            Origins.write(scratch, self.found, index, columns)
            origins = Origins(scratch)
            paths = pa.array([file.path for file in self.found.files], pa.string())
            for first in range(0, self.documents, _ORIGINS):
                origin = origins.read(first, min(first + _ORIGINS, self.documents))
                source = pa.DictionaryArray.from_arrays(pa.array(origin.file, pa.int32()), paths)
                table = pa.table({"source": source, "row": origin.row})
                if origin.metadata is not None:
                    for name in origin.metadata.column_names:
                        table = table.append_column(name, origin.metadata[name])
                yield table
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

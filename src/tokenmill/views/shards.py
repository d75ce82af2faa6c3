"""Shards: a view → shards with their sidecars, each on its own, on a thread or in another process."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.manifest import Cursor, Manifest, ShardRecord
from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.errors import DataRootError
from tokenmill.loading.view import OpenView, open_view
from tokenmill.shards.pack import EmittedRows, ShardSlice
from tokenmill.shards.shard import ShardWriter
from tokenmill.shards.token_sink import FileSink
from tokenmill.views.gather import Buckets, Gatherer, Places
from tokenmill.views.origins import Origins

BLOCK_TOKENS = 1 << 21
"""Tokens of documents that are read and written at once."""
BUCKETS, ORIGINS = ".buckets", ".origins"
"""Folders of a data root while it is written."""


class StoppedError(Exception):
    """Another shard failed."""


class ViewShards:
    """Writes shards of a view; threads share one.

    Args:
        opened: the view.
        root: the data root.
        manifest: of the data set.
        through_disk: whether documents are in buckets on disk.

    `Origins.write`, and where documents go through the disk `Buckets.fill`, were called before.
    """

    def __init__(self, opened: OpenView, root: Path, manifest: Manifest, *, through_disk: bool) -> None:
        self.stopped = False
        self._root = root
        self._manifest = manifest
        self._index = opened.open_index()
        self._gatherer: Gatherer = Places([source.tokens() for source in opened.sources], self._index)
        if through_disk:
            self._gatherer = Buckets(root / BUCKETS, self._gatherer, opened.view.places_sha256)
        self._origins = Origins(root / ORIGINS)
        self._dtype = npy.token_dtype(manifest.recipe.dtype)
        self._paths = pa.array([file.path for file in manifest.files], pa.string())

    def write(self, shard: int, temp_suffix: str = "") -> ShardRecord:
        """Make a shard durable and return its record; `temp_suffix` as of `atomic.AtomicFile`.

        Raises:
            StorageError: the disk is full, or cannot be written.
        """
        begins, size = self._index.begins, self._manifest.recipe.shard_size
        begin = shard * size
        end = min(begin + size, int(begins[-1]))
        header = npy.npy_header(self._dtype, end - begin)
        writer = ShardWriter(
            self._root,
            shard,
            FileSink(self._root / layout.shard_name(shard), header, temp_suffix),
            tokens=end - begin,
            dtype=self._dtype,
            paths=self._paths,
            schema=documents_schema(self._manifest),
            temp_suffix=temp_suffix,
        )
        try:
            first = int(np.searchsorted(begins, begin, side="right")) - 1
            last = int(np.searchsorted(begins, end, side="left"))
            while first < last:
                stop = int(np.searchsorted(begins, int(begins[first]) + BLOCK_TOKENS, side="right")) - 1
                stop = min(last, max(first + 1, stop))
                self._append(writer, shard, (first, stop), (begin, end))
                first = stop
            at = int(np.searchsorted(begins, end, side="right")) - 1
            cursor = Cursor(at, end - int(begins[at])) if end < int(begins[-1]) else Cursor(len(begins) - 1, 0)
            return writer.finish(cursor, self._manifest.expected(shard))
        except BaseException:
            writer.discard()
            raise
        finally:
            # The next shard reads other pages of these; together they grow with the documents of the view.
            self._index.release()
            self._origins.release()

    def _append(self, writer: ShardWriter, shard: int, documents: tuple[int, int], tokens: tuple[int, int]) -> None:
        """Append the tokens of some documents that lie in the shard."""
        if self.stopped:
            raise StoppedError
        first, stop = documents
        begins = self._index.begins[first : stop + 1]
        lengths = np.diff(begins)
        data: NDArray[Any] = self._gatherer.read(first, stop)
        count = stop - first
        block = EmittedRows(
            [data],
            np.zeros(count, np.int64),
            begins[:-1] - begins[0],
            lengths,
            np.zeros(count, np.uint8),
            *self._origins.read(first, stop),
        )
        begin, end = max(tokens[0], int(begins[0])), min(tokens[1], int(begins[-1]))
        cut_at = end - int(begins[-2]) if end < int(begins[-1]) else 0
        part = ShardSlice(shard, 0, count, begin - int(begins[0]), end - begin, cut_at)
        writer.append(block, part, begin)


class ShardTask(NamedTuple):
    """What all tasks of a run on a cluster share."""

    run: str
    """A random name of the run, which a file in the data root repeats."""
    view: Path
    root: Path
    manifest: Manifest
    through_disk: bool


_opened: dict[str, ViewShards] = {}
"""By the name of the run: at most one."""


def write_shard(task: ShardTask, shard: int) -> ShardRecord:
    """Do as `ViewShards.write` in a process of a cluster.

    Raises:
        DataRootError: the view or the data root is not there on this machine.
    """
    try:
        found = (task.root / layout.RUN).read_text()
    except OSError:
        found = ""
    opened = open_view(task.view) if task.view.is_dir() else None
    if found != task.run or opened is None:
        raise DataRootError(
            f"{task.root if found != task.run else task.view}: is not there on {socket.gethostname()}, or is another "
            "one: every machine must see it",
            next_step="use storage that all machines share",
        )
    if task.run not in _opened:
        _opened.clear()
        _opened[task.run] = ViewShards(opened, task.root, task.manifest, through_disk=task.through_disk)
    return _opened[task.run].write(shard, f".{uuid.uuid4().hex[:12]}")

"""Destination: the bucket that a data set is sent to as it is made."""

from __future__ import annotations

from pathlib import Path

from tokenmill.dataroot import atomic, layout
from tokenmill.dataroot.manifest import Manifest, ShardRecord
from tokenmill.errors import StorageError
from tokenmill.options import StoreOptions
from tokenmill.transfer.selection import Records
from tokenmill.transfer.stores import BucketStore, FolderStore, open_store
from tokenmill.transfer.upload import Sender


class Destination:
    """Sends the files of a data root, whose lock is held, to a bucket.

    Args:
        root: the data root.
        manifest: of the data set.
        url: `s3://BUCKET/PREFIX`.
        store: how to reach the bucket.
        keep_local: whether shards stay in the data root once they are in the bucket.

    Raises:
        StorageError: `url` is no bucket, or the bucket cannot be listed or holds another data set.
    """

    def __init__(self, root: Path, manifest: Manifest, url: str, store: StoreOptions, *, keep_local: bool) -> None:
        opened = open_store(url, store)
        if not isinstance(opened, BucketStore):
            raise StorageError(
                f"{url}: expected s3://BUCKET/PREFIX for --upload-to",
                next_step="to write to a directory, make the data root there",
            )
        self._root = root
        self._manifest = manifest
        self._keep_local = keep_local
        self.sender = Sender(root, opened, Records(manifest))

    def send_shard(self, record: ShardRecord) -> None:
        """Send a finished shard and its sidecar, the sidecar first."""
        shard, documents = layout.shard_name(record.index), layout.documents_name(record.index)
        here = FolderStore(self._root)
        self.sender.send_file(here.file(documents), record.documents_sha256)
        self.sender.send_file(here.file(shard), record.sha256)
        if not self._keep_local:
            self._remove(shard, documents)

    def send_all(self) -> None:
        """Send what is not there yet of a finished data set, the manifest last."""
        self.sender.send(FolderStore(self._root).files())
        if not self._keep_local:
            indices = [record.index for record in self._manifest.shards]
            self._remove(*map(layout.shard_name, indices), *map(layout.documents_name, indices))
            self.sender.flush()

    def _remove(self, *names: str) -> None:
        self.sender.flush()  # a run that continues after a kill must know that what is not here is there
        atomic.remove(self._root, *names)
        self.sender.note_gone(*names)

"""The lock of a data root: one run at a time writes to it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import filelock

from tokenmill.dataroot import layout
from tokenmill.dataroot.atomic import translate_write_errors
from tokenmill.errors import DataRootError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
_LOCK_SECONDS = 1.0
"""A process that was killed may take a moment to release its lock."""


def _no_locks(root: Path, reason: str) -> DataRootError:
    return DataRootError(
        f"{root}: its file system has no locks ({reason}), which keep two runs from writing to one data root",
        next_step="use a directory on a local disk, or mount the file system with locks (NFS: with lockd and without "
        "nolock; Lustre: with flock)",
    )


@contextlib.contextmanager
def lock_data_root(root: Path) -> Iterator[None]:
    """Hold the data root's lock; the operating system releases it when the process ends, however it ends.

    Raises:
        DataRootError: another process holds it.
    """
    # Without this, filelock takes a file's existence for a lock where there is none, and a kill would leave it held.
    lock = filelock.FileLock(root / layout.LOCK, fallback_to_soft=False)
    with translate_write_errors(root):
        try:
            lock.acquire(timeout=_LOCK_SECONDS, poll_interval=0.02)
        except filelock.Timeout:
            raise DataRootError(
                f"{root}: another tokenmill process is at work on this data root",
                next_step="wait for it, stop it, or choose another directory",
            ) from None
        except (NotImplementedError, OSError) as error:
            number = getattr(error, "errno", None) or errno.ENOSYS
            if number not in _NO_LOCKS:
                raise
            raise _no_locks(root, errno.errorcode[number]) from None
    try:
        yield
    finally:
        lock.release()

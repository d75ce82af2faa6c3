"""Locks: a file system that has none is told as such, whatever the version of the lock's library does about it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from tokenmill.dataroot.lock import lock_data_root
from tokenmill.errors import DataRootError, StorageError


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(DataRootError, match=rf"its file system has no locks \({errno.errorcode[number]}\)[\s\S]*NFS"),
        lock_data_root(tmp_path),
    ):
        pass


def test_other_errors_are_told_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="Input/output error"), lock_data_root(tmp_path):
        pass


def test_the_lock_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            lock_data_root(tmp_path),
            pytest.raises(DataRootError, match="another tokenmill process"),
            lock_data_root(tmp_path),
        ):
            pass

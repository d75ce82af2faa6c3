"""Leftovers: temporary folders of tasks that were killed, told apart from those of tasks that run."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

PREFIX = "tokenmill-task-"
"""Start of the names of folders that shards only pass through."""


def process_space() -> str:
    """Return a name for the space in which process ids are unique: a machine, or a container of one.

    Containers of a machine may share its temporary folder.
    """
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # no file, but Linux's way to ask
    except OSError:
        namespace = 0
    return f"{hashlib.sha256(f'{socket.gethostname()} {_boot()}'.encode()).hexdigest()[:8]}.{namespace}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def remove_leftovers() -> None:
    """Remove what tasks left on this machine that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        space, _, rest = path.name.removeprefix(PREFIX).partition("-")
        pid = rest.partition("-")[0]
        if os.name == "posix" and space == process_space() and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:  # alive, and another user's
                continue

"""Processes that compute sample ids: threads would hold one another up for the interpreter's lock."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenmill.dataroot import layout, sample_ids
from tokenmill.errors import StorageError

_APART: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
"""Ctrl-C at a terminal must not reach the workers: the process that asks closes their input."""


class IdWorkers:
    """Processes that read windows of a file and answer with their ids, started as they are needed."""

    def __init__(self, path: Path, window_nbytes: int, count: int) -> None:
        self.count = count
        self._command = [sys.executable, "-I", "-S", sample_ids.__file__, str(path), str(window_nbytes)]
        self._askers = ThreadPoolExecutor(count, thread_name_prefix="ids")
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []

    def submit(self, offset: int, nbytes: int) -> Future[bytes]:
        """Return the ids of the windows in these bytes, which must be written already."""
        return self._askers.submit(self._ask, offset, nbytes)

    def _ask(self, offset: int, nbytes: int) -> bytes:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **_APART)
            self._started.append(worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        expected = -(-nbytes // int(self._command[-1])) * layout.ID_NBYTES
        try:
            worker.stdin.write(sample_ids.REQUEST.pack(offset, nbytes))
            worker.stdin.flush()
            answer = worker.stdout.read(expected)
        except OSError as error:
            raise _worker_lost(worker, str(error.strerror)) from None
        if len(answer) != expected:
            raise _worker_lost(worker, f"expected {expected} bytes of ids, found {len(answer)}")
        self._idle.put(worker)
        return answer

    def close(self) -> None:
        self._askers.shutdown(wait=True, cancel_futures=True)
        for worker in self._started:
            assert worker.stdin is not None
            assert worker.stdout is not None
            with contextlib.suppress(OSError):  # a worker that died: its error was told, or its answer not needed
                worker.stdin.close()
            worker.stdout.close()
            worker.wait()


def _worker_lost(worker: subprocess.Popen[bytes], what: str) -> StorageError:
    return StorageError(
        f"a process that makes sample ids was lost (pid {worker.pid}, exit code {worker.poll()}): {what}",
        next_step="run the same command again: it resumes after what is durable; if it was killed, give it more memory",
    )

"""Crash: a source file over which a native library ends the process is named, and the run ends with an error.

On Linux the command line works in a child process. When that is ended by a fault (SIGABRT, SIGSEGV, SIGBUS, ...), the
parent, which has loaded nothing, has the files that were opened last read again, each in a process of its own, and
says which of them did it. Signals, exit codes and the way a process ends are those of the child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenmill.errors import SourceError

_FAULTS = frozenset({signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL}) | (
    frozenset({signal.SIGBUS}) if hasattr(signal, "SIGBUS") else frozenset()
)
_SLOTS = 256
"""Names of files that are kept: those opened last."""
_SLOT_NBYTES = 4096
_PROBE_SECONDS = 300
_PR_SET_PDEATHSIG = 1  # prctl(2)
_SI_USER = 0
"""`si_code` of a signal that a process sent to this one alone (sigaction(2)); a terminal sends its own to all."""

_opened: mmap.mmap | None = None
"""Shared by parent and child."""
_next_slot = 0


def note_opened(path: str, *columns: str) -> None:
    """Remember a source file that is about to be read, and the columns that are read of it, the text's first."""
    global _next_slot  # noqa: PLW0603  # one per process, as the processes are
    if _opened is None:
        return
    data = "\0".join([path, *columns]).encode(errors="surrogateescape")[: _SLOT_NBYTES - 1]
    at = (_next_slot % _SLOTS) * _SLOT_NBYTES
    _opened[at : at + _SLOT_NBYTES] = data.ljust(_SLOT_NBYTES, b"\0")
    _next_slot += 1


def supervise() -> None:
    """Go on in a child process; this call returns there. The parent ends as the child does.

    Raises:
        SourceError: in the parent; a source file ended the child.
    """
    global _opened  # noqa: PLW0603
    if sys.platform != "linux":
        return
    _opened = mmap.mmap(-1, _SLOTS * _SLOT_NBYTES)
    watched = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before that could be said
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    status = _await(child, watched)
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if number in _FAULTS and (suspects := list(_last_opened())):
        raise _explained(signal.Signals(number), suspects)
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(parent, number)
    os._exit(128 + number)


def _await(child: int, watched: set[signal.Signals]) -> int:
    """Return how the child ended; signals sent to this process alone are passed on to it."""
    while True:
        info = signal.sigwaitinfo(watched)
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
        elif info.si_code <= _SI_USER:
            os.kill(child, info.si_signo)


def _last_opened() -> Iterator[tuple[str, ...]]:
    """Yield paths with their columns, each once."""
    assert _opened is not None
    seen = set()
    for at in range(0, len(_opened), _SLOT_NBYTES):
        data = bytes(_opened[at : at + _SLOT_NBYTES]).rstrip(b"\0").decode(errors="surrogateescape")
        opened = tuple(data.split("\0"))
        if data and opened not in seen:
            seen.add(opened)
            yield opened


def _explained(fault: signal.Signals, suspects: list[tuple[str, ...]]) -> SourceError:
    """Return which of the files ends a process that reads it."""
    for path, *columns in suspects:
        if Path(path).is_file() and _is_fatal(path, *columns):
            return SourceError(
                f"{path}: the library that reads it ends the process ({fault.name}): the file is damaged in a way it "
                "does not survive",
                next_step="mend, replace or exclude the file, then run the same command again",
            )
    names = ", ".join(path for path, *_ in suspects[:5])
    return SourceError(
        f"a library ended the process ({fault.name}) while one of {len(suspects)} source files was read: {names}",
        next_step="exclude these files one by one to find which, and report it; finished shards are kept",
    )


def _is_fatal(path: str, *columns: str) -> bool:
    line = [sys.executable, "-m", "tokenmill.corpus.crash", path, *columns]
    try:
        done = subprocess.run(line, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode < 0


def _read_through(path: str, text_column: str, *metadata: str) -> None:
    from tokenmill.corpus.corpus import find_corpus
    from tokenmill.recipe import MetadataColumn

    reader = find_corpus([path], text_column, metadata=tuple(map(MetadataColumn.parse, metadata))).open(0)
    for span in reader.spans():
        reader.read(span)


if __name__ == "__main__":
    _read_through(*sys.argv[1:])

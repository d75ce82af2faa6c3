"""Whole processes: how long they take, and how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def run_measured(line: list[str]) -> tuple[float, float, bytes]:
    """Run a command: its seconds, its peak memory in GB, and what it printed."""
    os.sync()  # no command pays for the unwritten pages of another
    begin = time.perf_counter()
    run = subprocess.Popen(line, stdout=subprocess.PIPE)
    printed = run.stdout.read()
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = status
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(line[:6])} failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, printed

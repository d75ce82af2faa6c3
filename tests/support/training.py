"""Runs `examples/local_train.py` with several ranks: forked from a process that has loaded PyTorch, which takes 3 s."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from support.servers import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "local_train.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch._dynamo", "tokenmill.torch", "pyarrow.parquet"])


def run_ranks(arguments: Sequence[str], ranks: int, log: Path) -> list[str]:
    """Run the example as `torchrun` runs it; return the lines that its ranks print.

    Args:
        arguments: of the example.
        ranks: number of processes.
        log: file for what they print.
    """
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world["OMP_NUM_THREADS"] = "1"
    processes = [
        _context.Process(target=_run, args=([str(EXAMPLE), *arguments], world | {"RANK": str(rank)}, log))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    printed = log.read_text()
    log.unlink()
    assert [process.exitcode for process in processes] == [0] * ranks, printed
    return printed.splitlines()


def _run(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as a process that was started afresh has it
    os.environ.update(environment)
    sys.argv = arguments
    with log.open("a", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        runpy.run_path(arguments[0], run_name="__main__")

"""Engine: where tasks run. Here, threads of this process; encoding releases the GIL."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class TaskEngine(Protocol):
    """Runs tasks; `workers` of them at once."""

    workers: int

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def shutdown(self) -> None:
        """Drop tasks that have not begun; wait for the others."""
        ...


class ThreadEngine:
    """Tasks on a pool of threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._pool.submit(task, *args, **kwargs)

    def shutdown(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Lookahead(Iterator[T]):
    """The items of an iterator, some of them taken ahead on a thread of its own.

    What the iterator raises is raised in its turn.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._coming = deque(self._pool.submit(self._next) for _ in range(depth))

    def _next(self) -> list[T]:
        """The next item, alone in a list; nothing in it at the end."""
        return list(itertools.islice(self._items, 1))

    def __next__(self) -> T:
        item = self._coming.popleft().result()
        if not item:
            self._coming.appendleft(self._pool.submit(self._next))  # for whoever asks again
            raise StopIteration
        self._coming.append(self._pool.submit(self._next))
        return item[0]

    def close(self) -> None:
        """Take no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

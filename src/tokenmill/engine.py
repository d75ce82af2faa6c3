"""Engine: where tasks run. Here, threads of this process; encoding releases the GIL. `ray.py` has a cluster."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class TaskEngine(Protocol):
    """Runs tasks; `workers` of them at once."""

    workers: int

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def shutdown(self) -> None:
        """Drop tasks that have not begun; wait for the others."""
        ...


class Kept(NamedTuple):
    """What a task returned and stays where it was made, until a task that gets `reference` needs it."""

    reference: object
    nbytes: int


class ClusterEngine(Protocol):
    """Runs tasks in other processes, on this machine or others.

    Tasks and their arguments are pickled; arguments that are references (`share`, `submit_split`) arrive as what
    they refer to. A task whose process or machine is lost is run again, so it must give the same every time;
    what it raises is raised by its future.
    """

    @property
    def workers(self) -> int: ...

    @property
    def memory_nbytes(self) -> int:
        """For what is kept, on all machines together."""
        ...

    def share(self, value: object) -> object:
        """Bring a value to the machines once; a reference to it."""
        ...

    def submit(self, task: Callable[..., T], /, *args: object) -> Future[T]: ...

    def submit_split(self, task: Callable[..., tuple[Any, T]], /, *args: object) -> Future[tuple[object, T]]:
        """The same for a task that returns a pair, the first of which is kept: a reference to it, and the second."""
        ...

    def held(self, target: str) -> AbstractContextManager[None]:
        """Be the only run of this cluster that writes to `target`.

        Raises:
            DataRootError: another is at work on it.
        """
        ...

    def describe(self) -> str:
        """What it is doing, in a few words."""
        ...

    def drop(self) -> None:
        """Be done with all tasks: what they still give is nobody's; they may run to their end."""
        ...


def mapped(future: Future[T], change: Callable[[T], U]) -> Future[U]:
    """A future of what `change` makes of the result."""
    changed: Future[U] = Future()

    def settle(done: Future[T]) -> None:
        try:
            changed.set_result(change(done.result()))
        except BaseException as error:  # noqa: BLE001  # it is for whoever asks
            changed.set_exception(error)

    future.add_done_callback(settle)
    return changed


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

"""Cluster engine: what a cluster must offer so that a run can use it. `tokenmill.ray.RayEngine` offers it for Ray."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class ClusterEngine(Protocol):
    """Runs tasks in other processes, on this machine or on others.

    Tasks and their arguments are pickled; arguments that are references (`share`, `submit_split`) arrive as the values
    they refer to. A task whose process or machine is lost is run again, so it must return the same result every time.
    An exception that a task raises is raised by its future.
    """

    @property
    def workers(self) -> int: ...

    @property
    def memory_nbytes(self) -> int:
        """Memory for values that are kept, on all machines together."""
        ...

    def share(self, value: object) -> object:
        """Bring a value to the machines once and return a reference to it."""
        ...

    def submit(self, task: Callable[..., T], /, *args: object) -> Future[T]: ...

    def submit_split(self, task: Callable[..., tuple[Any, T]], /, *args: object) -> Future[tuple[object, T]]:
        """Run a task that returns a pair, keep the first value on the cluster, and give a reference in its place."""
        ...

    def hold(self, target: str) -> AbstractContextManager[None]:
        """Be the only run of this cluster that writes to `target`.

        Raises:
            DataRootError: another run is at work on it.
        """
        ...

    def describe(self) -> str:
        """Describe what the cluster is doing, in a few words."""
        ...

    def drop(self) -> None:
        """Abandon all tasks. They may run to their end, but their results are discarded."""
        ...


def map_future(future: Future[T], change: Callable[[T], U]) -> Future[U]:
    """Return a future of `change` applied to the result."""
    changed: Future[U] = Future()

    def settle(done: Future[T]) -> None:
        try:
            changed.set_result(change(done.result()))
        except BaseException as error:  # noqa: BLE001  # raised by the future, to its caller
            changed.set_exception(error)

    future.add_done_callback(settle)
    return changed

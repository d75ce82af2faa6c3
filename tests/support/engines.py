"""Clusters for tests: one that pickles as a real one does, in this process; and Ray's, if it is installed."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tokenmill import errors
from tokenmill.pipeline import tasks


class PicklingEngine:
    """Tasks on threads of this process whose arguments and results are pickled on the way; counts what happens."""

    memory_nbytes = 1 << 40

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers)
        self._leases: set[str] = set()
        self._lock = threading.Lock()
        self.done: list[tuple[str, tuple[Any, ...]]] = []
        """Names and arguments of the tasks that were begun; None for each reference."""
        self.live_nbytes = self.peak_nbytes = 0
        self.delay = 0.0

    def share(self, value: object) -> object:
        return _Reference(self, value)

    def submit(self, task: Callable[..., Any], /, *args: object) -> Future[Any]:
        return self._pool.submit(self._run, task, args)

    def submit_split(self, task: Callable[..., Any], /, *args: object) -> Future[Any]:
        def split() -> tuple[object, object]:
            kept, rest = self._run(task, args)
            return _Reference(self, kept), rest

        return self._pool.submit(split)

    def _run(self, task: Callable[..., Any], args: tuple[object, ...]) -> Any:
        self.done.append((task.__name__, tuple(None if isinstance(arg, _Reference) else arg for arg in args)))
        time.sleep(self.delay)
        found = [arg.load() if isinstance(arg, _Reference) else pickle.loads(pickle.dumps(arg)) for arg in args]
        return pickle.loads(pickle.dumps(task(*found)))

    @contextlib.contextmanager
    def hold(self, target: str) -> Iterator[None]:
        if target in self._leases:
            raise errors.DataRootError(f"{target}: held", next_step="wait")
        self._leases.add(target)
        yield
        self._leases.remove(target)

    def describe(self) -> str:
        return "1 nodes"

    def drop(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def note(self, nbytes: int) -> None:
        with self._lock:
            self.live_nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)


class _Reference:
    """A pickled value; what it takes counts as long as anyone refers to it."""

    def __init__(self, engine: PicklingEngine, value: object) -> None:
        self._engine = engine
        self._data = pickle.dumps(value)
        self._nbytes = 0 if isinstance(value, tasks.PackedContext) else len(self._data)
        engine.note(self._nbytes)

    def load(self) -> object:
        return pickle.loads(self._data)

    def __del__(self) -> None:
        self._engine.note(-self._nbytes)

    def __reduce__(self) -> Any:
        raise AssertionError("references travel as arguments only")

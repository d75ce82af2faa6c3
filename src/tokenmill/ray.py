"""Ray: tasks on the machines of a cluster; the one module that imports Ray (extra `ray`). No logic of a run is here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tokenmill.errors import DataRootError, EngineError, TokenmillError
from tokenmill.pipeline.cluster_engine import map_future

T = TypeVar("T")

_NAMESPACE = "tokenmill"
_RETRIES = 8
"""Retries of a task whose process or machine was lost; a task that raises an error is not run again."""
_STORE_SHARE = 0.6
"""Share of the object store for spans that wait; the rest is for the copies that machines hold of each other's."""
LEASE_SECONDS = 15.0
"""For a run that was killed to be noticed."""
_LOOK_SECONDS = 2.0
_CONNECT_SECONDS = 10.0


class RayEngine:
    """A Ray cluster (a `pipeline.cluster_engine.ClusterEngine`). Use as a context manager.

    Where the program is connected to Ray already (in a job, or by its own `ray.init`), that connection is used.

    Args:
        address: `HOST:PORT` of the cluster's head, `auto` for the one this machine belongs to, or `local`; None takes
            `$RAY_ADDRESS`, else `auto`. No cluster is ever started but by `local`.

    Raises:
        EngineError: Ray is not installed, no cluster is there, or it has no processors.
    """

    def __init__(self, address: str | None = None) -> None:
        self._ray = _import_ray()
        self._connected = not self._ray.is_initialized()
        self._own_variables: tuple[str, ...] = ()
        """Variables that were set in the environment, to be removed at the end."""
        if self._connected:
            address = address or os.environ.get("RAY_ADDRESS") or "auto"
            if address == "local" and not _has_token():
                # Ray would write a token to ~/.ray, which turns authentication on for every later cluster of the user.
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
                self._own_variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
            _connect(self._ray, address)
        self._remote: dict[Callable[..., Any], Any] = {}
        self._in_flight: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._resources: dict[str, float] = {}
        self._nodes = 0
        self._look_due = 0.0
        if self.workers == 0:
            self.close()
            raise EngineError(
                "the Ray cluster has no processors for tasks",
                next_step="start a machine: ray start --address HEAD:6379",
            )

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; what it still does for us ends."""
        self.drop()
        if self._connected:
            self._ray.shutdown()
        for name in self._own_variables:
            os.environ.pop(name, None)

    @property
    def workers(self) -> int:
        """Processors of the cluster, which may come and go."""
        self._look()
        return int(self._resources.get("CPU", 0))

    @property
    def memory_nbytes(self) -> int:
        self._look()
        return int(_STORE_SHARE * self._resources.get("object_store_memory", 0))

    def _look(self) -> None:
        if time.monotonic() >= self._look_due:
            try:
                self._resources = self._ray.cluster_resources()
                self._nodes = sum(node["Alive"] for node in self._ray.nodes())
            except self._ray.exceptions.RayError as error:
                raise _meant(self._ray, error) from None
            self._look_due = time.monotonic() + _LOOK_SECONDS

    def share(self, value: object) -> object:
        return self._ray.put(value)

    def submit(self, task: Callable[..., T], /, *args: object) -> Future[T]:
        return self._noted(self._remote_of(task).remote(*args))

    def submit_split(self, task: Callable[..., tuple[Any, T]], /, *args: object) -> Future[tuple[object, T]]:
        kept, rest = self._remote_of(task).options(num_returns=2).remote(*args)
        return map_future(self._noted(rest), lambda found: (kept, found))

    def _remote_of(self, task: Callable[..., Any]) -> Any:
        if task not in self._remote:
            self._remote[task] = self._ray.remote(num_cpus=1, max_retries=_RETRIES, retry_exceptions=False)(task)
        return self._remote[task]

    def _noted(self, reference: Any) -> Future[Any]:
        """Return a future of what a reference stands for, its errors as ours."""
        arriving: Future[Any] = reference.future()
        settled: Future[Any] = Future()
        with self._lock:
            self._in_flight.add(settled)

        def settle(done: Future[Any]) -> None:
            with self._lock:
                if settled not in self._in_flight:
                    return  # dropped
                self._in_flight.discard(settled)
            error = done.exception()
            if error is None:
                settled.set_result(done.result())
            else:
                settled.set_exception(_meant(self._ray, error))

        arriving.add_done_callback(settle)
        return settled

    @contextmanager
    def hold(self, target: str) -> Iterator[None]:
        """Be the only run of this cluster that writes to `target`: an actor of that name lives as long as this run.

        Raises:
            DataRootError: another is at work on it.
        """
        name = f"writer-{hashlib.sha256(target.encode()).hexdigest()[:32]}"
        lease = self._ray.remote(num_cpus=0, max_restarts=-1)(_Lease).options(name=name, namespace=_NAMESPACE)
        patience = time.monotonic() + LEASE_SECONDS
        while True:
            try:
                actor = lease.remote()
                break
            except ValueError:  # the name is taken
                if time.monotonic() > patience:
                    raise DataRootError(
                        f"{target}: another tokenmill run of this Ray cluster is at work on it",
                        next_step="wait for it, stop it, or choose another place",
                    ) from None
                time.sleep(1)
        try:
            yield
        finally:
            with contextlib.suppress(self._ray.exceptions.RayError):  # it went with its cluster
                self._ray.kill(actor)

    def describe(self) -> str:
        self._look()
        with self._lock:
            return f"{self._nodes} nodes, {self.workers} processors, {len(self._in_flight)} tasks"

    def drop(self) -> None:
        # Ray (2.60) aborts this process where a task is cancelled that waits for its arguments. So they run on: few,
        # none of which finds a data root to write to that was left; and none outlives the connection.
        with self._lock:
            dropped, self._in_flight = self._in_flight, set()
        for future in dropped:  # otherwise callers blocked on these futures would hang once the connection is closed
            future.set_exception(EngineError("the run is over", next_step="run the same command again"))


class _Lease:
    """Nothing but its name."""


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise EngineError("Ray is not installed", next_step="run: pip install 'tokenmill[ray]'") from None
    return ray


def _has_token() -> bool:
    """Return whether the user said anything of authentication."""
    told = any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return told or Path("~/.ray/auth_token").expanduser().exists()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "://" in address:
        raise EngineError(
            f"{address}: expected HOST:PORT, auto or local",
            next_step="give the address of the head's own port, for example HEAD:6379; a Ray job needs none",
        )
    host, colon, port = (_last_address() if address == "auto" else address).rpartition(":")
    try:
        if colon and port.isdecimal():  # Ray itself would keep trying for minutes
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if re.search(r"auth|token", str(error), re.IGNORECASE):
            raise EngineError(
                f"the Ray cluster at {address} wants another token, or any: {reason}",
                next_step="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the cluster's token; "
                "where the cluster has none, RAY_AUTH_MODE=disabled",
            ) from None
        raise EngineError(
            f"no Ray cluster at {address}: {reason}",
            next_step="start one (ray start --head here, ray start --address HEAD:6379 on the others), name it with "
            "--ray-address HOST:PORT or RAY_ADDRESS, or try it on this machine with --ray-address local; "
            "docs/cluster.md tells more",
        ) from None


def _last_address() -> str:
    """Return the address of the cluster that this machine joined last, which may be gone; empty if there is none."""
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return Path(temporary, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _meant(ray: Any, error: BaseException) -> BaseException:
    """Return what a task raised, as it raised it; the cluster's own troubles as an error that says what to do."""
    if isinstance(error, ray.exceptions.RayTaskError):
        if not isinstance(error.cause, ray.exceptions.RayError):
            return error.cause if isinstance(error.cause, TokenmillError) else error
        error = error.cause  # what it was to get could not be had
    if isinstance(error, ray.exceptions.RayError):
        reason = next(iter(str(error).splitlines()), "")
        return EngineError(
            f"the Ray cluster failed: {type(error).__name__}: {reason}",
            next_step="look at the cluster (ray status, its logs; if memory ran out, a smaller --chunk-size), then run "
            "the same command again: finished shards are kept",
        )
    return error

"""Retry: what can go wrong on a network; what is transient is tried again, with backoff and jitter, and counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import tenacity

from tokenmill.errors import TokenmillError

log = logging.getLogger("tokenmill")

T = TypeVar("T")

TRIES = 8
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for more than this is not waited for so long."""

_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})

_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


class TransientError(Exception):
    """A fault that may be gone at the next try.

    Args:
        message: what went wrong, in a few words.
        retry_after: seconds the server asked to wait.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def is_transient(status: int, code: str = "") -> bool:
    """Whether an HTTP status, or the code S3 gives with it, may be another at the next try."""
    return status in (408, 425, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES


class AnswerError(Exception):
    """The server answered that it will not.

    Args:
        status: of HTTP.
        message: what it said, in a line; holds no part of the request.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status} {message}".strip())
        self.status = status


class ChangedError(Exception):
    """The object is not the one that was listed."""


def asked(
    what: str,
    retrier: Retrier,
    task: Callable[[], T],
    *,
    kind: type[TokenmillError],
    changed: type[TokenmillError],
    login: str,
) -> T:
    """The result of a task on a store, transient faults tried again.

    Args:
        what: is read or written.
        kind: of error when it is refused, gone, or still failing.
        changed: when it is no longer what was listed.
        login: what to do when the store wants other credentials.
    """
    again = "then run the same command again: what is finished is kept"
    try:
        return retrier(task)
    except TransientError as error:
        message, step = f"failed {TRIES} times in a row: {error}", f"check the network, {again}"
        raise kind(f"{what}: {message}", next_step=step) from None
    except ChangedError as error:
        raise changed(
            f"{what}: changed while it was read: {error}",
            next_step="restore the file, or start in another directory",
        ) from None
    except AnswerError as error:
        if error.status in (401, 403):
            raise kind(f"{what}: access denied: {error}", next_step=f"{login}, {again}") from None
        if error.status in (404, 410):
            step = "check the name; if the file is gone, restore it, then run the same command again"
            raise kind(f"{what}: not there: {error}", next_step=step) from None
        step = f"do what it says, {again}"
        raise kind(f"{what}: refused: {error}", next_step=step) from None


class Retrier:
    """Calls tasks until they succeed, from any thread.

    A task says with `TransientError` that another try is worth it; the last one's is raised when there
    have been `TRIES`. Everything else it raises passes at once.
    """

    def __init__(self) -> None:
        self.count = 0
        """Tries that failed and were followed by another."""
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, task: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_any(tenacity.stop_after_attempt(TRIES), tenacity.stop_when_event_set(self._stopped)),
            wait=_wait,
            sleep=tenacity.sleep_using_event(self._stopped),
            before_sleep=self._note,
            reraise=True,
        )
        return retrying(task)

    def __reduce__(self) -> tuple[type[Retrier], tuple[()]]:
        return Retrier, ()  # in another process it counts for itself

    def stop(self) -> None:
        """Let nobody wait any longer: the run is ending."""
        self._stopped.set()

    def _note(self, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self.count += 1
        assert state.outcome is not None
        log.warning("try %d failed: %s", state.attempt_number, state.outcome.exception())


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, TransientError) else 0.0
    return max(_backoff(state), min(asked, MAX_RETRY_AFTER_SECONDS))

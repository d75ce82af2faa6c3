"""Retry: what can go wrong on a network; what is transient is tried again, with backoff and jitter, and counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import tenacity

log = logging.getLogger("tokenmill")

T = TypeVar("T")

TRIES = 8
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for more than this is not waited for so long."""

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

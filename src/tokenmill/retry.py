"""Retry: what can go wrong on a network; what is transient is tried again, with backoff and jitter, and counted."""

from __future__ import annotations

import email.utils
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import tenacity

from tokenmill.errors import TokenmillError

log = logging.getLogger("tokenmill")
say = logging.getLogger("tokenmill.say")
"""What a user should see at once."""

T = TypeVar("T")

TRIES = 8
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for more than this is not waited for so long."""

SAID_WAIT_SECONDS = 5.0
"""A wait of that length is said while it lasts."""

_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
_TRANSIENT_CODES |= {"ThrottlingException", "RequestThrottled", "TooManyRequests", "OperationAborted", "BadDigest"}

_LOGIN_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
)
_LOGIN_CODES |= {"SignatureDoesNotMatch", "AccessDenied", "InvalidClientTokenId", "UnrecognizedClientException"}
_STEPS_BY_CODE = {
    "RequestTimeTooSkewed": "set this machine's clock: it differs from the store's by more than the store allows",
    "AuthorizationHeaderMalformed": "name the bucket's region in AWS_REGION",
    "PermanentRedirect": "name the bucket's region in AWS_REGION, or its own endpoint with --endpoint-url",
    "IllegalLocationConstraintException": "name the bucket's region in AWS_REGION",
    "InvalidRegion": "name the bucket's region in AWS_REGION",
    "NoSuchBucket": "check the bucket's name, and --endpoint-url",
    "GatedRepo": "accept the terms of the data set on its page at the hub, and set HF_TOKEN to a token of that user",
}
"""What to do about what a store calls an error, whatever HTTP status comes with it."""

_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


class TransientError(Exception):
    """A fault that may be gone at the next try.

    Args:
        message: what went wrong, in a few words.
        retry_after: seconds the server asked to wait.
        limited: whether the server says that there were too many requests.
    """

    def __init__(self, message: str, retry_after: float = 0.0, *, limited: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.limited = limited


def is_transient(status: int, code: str = "") -> bool:
    """Whether an HTTP status, or the code S3 gives with it, may be another at the next try."""
    if code in _LOGIN_CODES or code in _STEPS_BY_CODE:
        return False
    return status in (408, 425, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES


def is_limit(status: int, code: str = "") -> bool:
    """Whether an answer says that there were too many requests."""
    return status == 429 or code in ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests")


def stated_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, however it says so; 0 if it does not.

    `Retry-After` in seconds or as a date (RFC 9110, 10.2.3), `x-ms-retry-after-ms`, `RateLimit: "name";r=0;t=SECONDS`
    (draft-ietf-httpapi-ratelimit-headers; r is what is left), `X-RateLimit-Reset` in seconds or as a Unix time.
    """
    given = {name.lower(): value.strip() for name, value in headers.items()}
    waits = [_retry_after(given.get("retry-after", ""))]
    if milliseconds := _number(given.get("x-ms-retry-after-ms", "")):
        waits.append(milliseconds / 1000)
    for policy in given.get("ratelimit", "").split(","):
        left, wait = (re.search(rf";\s*{key}=(\d+)", policy) for key in "rt")
        if wait is not None and (left is None or int(left[1]) == 0):
            waits.append(float(wait[1]))
    reset = _number(given.get("x-ratelimit-reset", ""))
    if reset and _number(given.get("x-ratelimit-remaining", "0")) == 0:
        waits.append(reset - time.time() if reset > 1e9 else reset)
    return max(0.0, *waits)


def _number(value: str) -> float:
    return float(value) if re.fullmatch(r"\d{1,15}(\.\d+)?", value) else 0.0


def _retry_after(value: str) -> float:
    date = email.utils.parsedate_tz(value) if not _number(value) else None
    try:
        return email.utils.mktime_tz(date) - time.time() if date else _number(value)
    except (ValueError, OverflowError):
        return 0.0


class AnswerError(Exception):
    """The server answered that it will not.

    Args:
        status: of HTTP; 0 where there was no answer.
        message: what it said, in a line; holds no part of the request.
        code: what the store calls the error.
        host: that answered, with its port.
        next_step: what to do about it, if that is known.
    """

    def __init__(self, status: int, message: str, *, code: str = "", host: str = "", next_step: str = "") -> None:
        super().__init__(f"HTTP {status} {message}".strip() if status else message)
        self.status = status
        self.code = code or (message if message.isalnum() else "")
        self.host = host
        self.next_step = next_step


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
        message, step = f"failed {retrier.tries} times in a row: {error}", f"check the network, {again}"
        if error.limited:
            step = f"wait until the server allows more requests (HF_TOKEN raises the hub's limits), {again}"
        raise kind(f"{what}: {message}", next_step=step) from None
    except ChangedError as error:
        raise changed(
            f"{what}: changed while it was read: {error}",
            next_step="restore the file, or start in another directory",
        ) from None
    except AnswerError as error:
        if error.next_step or error.code in _STEPS_BY_CODE:
            step = error.next_step or _STEPS_BY_CODE[error.code]
            raise kind(f"{what}: refused: {error}", next_step=f"{step}, {again}") from None
        if error.status in (401, 403) or error.code in _LOGIN_CODES:
            raise kind(f"{what}: access denied: {error}", next_step=f"{login}, {again}") from None
        if error.status in (404, 410):
            step = "check the name; if the file is gone, restore it, then run the same command again"
            raise kind(f"{what}: not there: {error}", next_step=step) from None
        step = f"do what it says, {again}"
        raise kind(f"{what}: refused: {error}", next_step=step) from None


class Retrier:
    """Calls tasks until they succeed, from any thread.

    A task says with `TransientError` that another try is worth it; the last one's is raised when there
    have been `tries`. Everything else it raises passes at once.
    """

    def __init__(self, tries: int = TRIES) -> None:
        self.tries = tries
        self.count = 0
        """Tries that failed and were followed by another."""
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, task: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.tries), tenacity.stop_when_event_set(self._stopped)
            ),
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
        if state.upcoming_sleep >= SAID_WAIT_SECONDS:
            say.warning("waiting %.0f s, as the server asks: %s", state.upcoming_sleep, state.outcome.exception())


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, TransientError) else 0.0
    asked = asked and asked + 0.1  # a moment too early would cost a try
    return max(_backoff(state), min(asked, MAX_RETRY_AFTER_SECONDS))

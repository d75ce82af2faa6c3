"""Retry: what can go wrong on a network; what is transient is tried again, with backoff and jitter, and counted."""

from __future__ import annotations

import email.utils
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import tenacity

from tokenmill.errors import TokenmillError

log = logging.getLogger("tokenmill")
say = logging.getLogger("tokenmill.say")
"""What a user should see at once."""

T = TypeVar("T")

TRIES = 8
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for more than this is not waited for so long."""

CALL_SECONDS = 120.0
"""For the whole answer to a question: a page of a listing is a megabyte at most."""

MOST_ENTRIES = 10_000_000
"""Most entries of a listing: one with more never ends, or lists a prefix that was not meant."""
FEW_PAGES = 1000
"""Pages after which a listing must have come to one entry a page at least."""

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
    "TemporaryRedirect": "name the bucket's region in AWS_REGION, or its own endpoint with --endpoint-url",
    "IllegalLocationConstraintException": "name the bucket's region in AWS_REGION",
    "InvalidRegion": "name the bucket's region in AWS_REGION",
    "NoSuchBucket": "check the bucket's name, and --endpoint-url",
    "GatedRepo": "accept the terms of the data set on its page at the hub, and set HF_TOKEN to a token of that user",
}
"""What to do about what a store calls an error, whatever HTTP status comes with it."""

backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


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
    """Return whether an HTTP status, or the code S3 gives with it, may be another at the next try."""
    if code in _LOGIN_CODES or code in _STEPS_BY_CODE:
        return False
    return status in (408, 425, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES


def is_limit(status: int, code: str = "") -> bool:
    """Return whether an answer says that there were too many requests."""
    return status == 429 or code in ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests")


def stated_wait(headers: Mapping[str, str]) -> float:
    """Return seconds that a server asks to wait, however it says so; 0 if it does not.

    `Retry-After` in seconds or as a date (RFC 9110, 10.2.3), `x-ms-retry-after-ms`, `RateLimit: "name";r=0;t=SECONDS`
    (draft-ietf-httpapi-ratelimit-headers; r is what is left), `X-RateLimit-Reset` in seconds or as a Unix time.
    """
    given = {name.lower(): value.strip() for name, value in headers.items()}
    now = _unix_time(given.get("date", "")) or time.time()  # the server's clock: ours may be wrong
    after = given.get("retry-after", "")
    waits = [_number(after) or (_unix_time(after) or now) - now]
    if milliseconds := _number(given.get("x-ms-retry-after-ms", "")):
        waits.append(milliseconds / 1000)
    for policy in given.get("ratelimit", "").split(","):
        left, wait = (re.search(rf";\s*{key}=(\d+)", policy) for key in "rt")
        if wait is not None and (left is None or int(left[1]) == 0):
            waits.append(float(wait[1]))
    reset = _number(given.get("x-ratelimit-reset", ""))
    if reset and _number(given.get("x-ratelimit-remaining", "0")) == 0:
        waits.append(reset - now if reset > 1e9 else reset)
    return max(0.0, *waits)


def _number(value: str) -> float:
    return float(value) if re.fullmatch(r"\d{1,15}(\.\d+)?", value) else 0.0


def _unix_time(value: str) -> float:
    """Return a date of HTTP as seconds since 1970; 0 if it is none."""
    try:
        date = email.utils.parsedate_tz(value)
        return email.utils.mktime_tz(date) if date else 0.0
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


class Pages:
    """Counts what a listing has come to, page by page, so that one that never ends is found out.

    Args:
        name: of what is listed.
        kind: of the error.
    """

    def __init__(self, name: str, kind: type[TokenmillError]) -> None:
        self._name, self._kind = name, kind
        self._pages = self._entries = 0
        self._seen: set[str] = set()

    def add(self, entries: int, following: str) -> None:
        """Take note of a page with so many entries, and of what names the next one.

        Raises:
            TokenmillError: of that kind; the next page was listed before, or there is no end in sight.
        """
        self._pages, self._entries = self._pages + 1, self._entries + entries
        again = following in self._seen
        if again or self._entries > MOST_ENTRIES or (self._pages >= FEW_PAGES and self._entries < self._pages):
            raise self._kind(
                f"{self._name}: the listing does not end: {self._entries} entries on {self._pages} pages so far"
                + (", and the next page was listed before" if again else ""),
                next_step="name a part of it; if there are not so many files, the server is at fault",
            )
        self._seen.add(following)


def run_within(seconds: float, task: Callable[[], T], host: str) -> T:
    """Run a task that must be done in time, whatever the server does meanwhile, and return its result.

    Time limits of sockets are for one read each, and a server that sends a byte a second meets them for ever. The
    task has a thread of its own, which is abandoned when time is up: it cannot be ended from outside, and it does
    not keep the process alive.

    Raises:
        TransientError: time is up.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((task(), None))
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that waits)
            done.put((None, error))

    threading.Thread(target=run, name="request", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TransientError(f"{host}: no whole answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast(T, result)


def call_with_retries(
    what: str,
    retrier: Retrier,
    task: Callable[[], T],
    *,
    kind: type[TokenmillError],
    changed: type[TokenmillError],
    login: str,
) -> T:
    """Run a task on a store, again after transient faults, and return its result.

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
        """End all waits: the run is ending."""
        self._stopped.set()

    def _note(self, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self.count += 1
        assert state.outcome is not None
        log.warning("try %d failed: %s", state.attempt_number, state.outcome.exception())
        if state.upcoming_sleep >= SAID_WAIT_SECONDS:
            error = state.outcome.exception()
            asked = ", as the server asks" if getattr(error, "retry_after", 0.0) else ""
            say.warning("waiting %.0f s%s: %s", state.upcoming_sleep, asked, error)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, TransientError) else 0.0
    asked = asked and asked + 0.1  # a moment too early would cost a try
    return max(backoff(state), min(asked, MAX_RETRY_AFTER_SECONDS))

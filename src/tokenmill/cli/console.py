"""Console: what a person sees, and how a run ends: messages, the log file, signals, tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import click

from tokenmill.redact import escape_surrogates, redact

log = logging.getLogger("tokenmill")
say = logging.getLogger("tokenmill.say")
"""Messages that a user should see at once."""
log.addHandler(logging.NullHandler())  # until there is a data root to keep a log in

RESUME = "run the same command again to continue"
GRACE_SECONDS = 1.0
RAY_GRACE_SECONDS = 15.0
"""A run has to tell the cluster that it ends."""


class InterruptedByUserError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Not an `Exception`, so that no handler of errors takes it for one."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write a traceback to standard error, without what may be a credential in it."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def echo_lines(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    for line in lines:
        click.echo(line)


def print_result(found: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print a result as JSON, or as lines for a person."""
    import msgspec

    if not as_json:
        echo_lines(lines)
        return
    try:
        data = msgspec.json.encode(found)
    except UnicodeEncodeError:  # a path that is not UTF-8, which JSON must be
        data = msgspec.json.encode(_escaped(msgspec.to_builtins(found)))
    click.echo(data)


def _escaped(value: Any) -> Any:
    """Return what JSON is made of, with bytes of paths that are not UTF-8 written out."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list | tuple) else value


class _MessageHandler(logging.Handler):
    """Prints messages on standard error, above the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"tokenmill: {redact(record.getMessage())}", err=True)


def show_messages() -> None:
    """Print the messages of a run that its user should see at once."""
    say.addHandler(_MessageHandler())


def show_log() -> None:
    """Print the whole log on standard error (`-v`)."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: record.name != say.name)  # those are shown as messages
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class _RedactingFormatter(logging.Formatter):
    """Formats records without what may be a credential."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LogFile(logging.FileHandler):
    """The log file of a data root. Where it cannot be written, a message says so once, and the run continues."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exc_info()[1]
        if not self._has_failed:
            self._has_failed = True
            click.echo(
                f"tokenmill: {self.baseFilename}: the log cannot be written: {error}; it is incomplete", err=True
            )


def log_to(root: Path) -> None:
    """Write the log to a file of the data root.

    Raises:
        StorageError: the file cannot be opened.
    """
    from tokenmill.dataroot import layout
    from tokenmill.dataroot.atomic import translate_write_errors

    path = root / layout.LOG
    with translate_write_errors(path):
        handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def exit_interrupted(what: str, stop: InterruptedByUserError) -> NoReturn:
    """End the process after a signal; `what` tells the user what is left."""
    log.info("interrupted")
    click.echo(f"tokenmill: stopped: {what}", err=True)
    sys.exit(stop.exit_code)


@contextmanager
def end_on_signals(describe: Callable[[], str]) -> Iterator[None]:
    """Catch signals as `catch_signals` does, and end the process after one with what `describe` says is left."""
    catch_signals(describe)
    try:
        yield
    except InterruptedByUserError as stop:
        exit_interrupted(describe(), stop)


def catch_signals(describe: Callable[[], str] = lambda: RESUME, seconds: float = GRACE_SECONDS) -> None:
    """Let the first Ctrl-C or SIGTERM end the run cleanly, and a second one at once.

    A run that does not end within `seconds` is ended: a library may be working on a document of a gigabyte. Nothing
    durable is lost by that, as nothing is by a kill. `describe` returns what the user is told in that case.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise InterruptedByUserError(number)

    def end_late() -> None:
        number = os.read(told, 1)[0]
        time.sleep(seconds)
        try:
            os.write(2, f"\ntokenmill: stopped: {describe()}\n".encode(errors="replace"))
        finally:
            os._exit(128 + number)

    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=end_late, daemon=True).start()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def settle_signals() -> None:
    """Have signals raise no more exceptions: the work is over, and nothing would catch them as the process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
        elif callable(handler):  # of `catch_signals`, whose thread still ends a process that does not end by itself
            signal.signal(number, lambda number, frame: None)


def program_name() -> str:
    """Return how the user can call this program again: by its path, if it was called by that."""
    return sys.argv[0] if Path(sys.argv[0]).name == "tokenmill" else "tokenmill"

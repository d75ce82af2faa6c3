"""Progress: what a person sees during a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.pipeline.driver import OnProgress, Progress

PLAIN_SECONDS = 10.0
"""Time between lines where the output is not a terminal."""
_LIVE_SECONDS = 0.2
_RATE_WINDOW_SECONDS = 30.0
"""The rate and the time left follow the last half minute."""


class _Line:
    """Turns progress into a line of text."""

    def __init__(self) -> None:
        self.expected_tokens = 0
        self._seen: list[tuple[float, int]] = []

    def note(self, progress: Progress) -> None:
        """Remember when so many tokens were there."""
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] >= _LIVE_SECONDS:
            self._seen.append((now, progress.tokens))
        while now - self._seen[0][0] > _RATE_WINDOW_SECONDS and len(self._seen) > 2:
            self._seen.pop(0)

    def text(self, progress: Progress) -> str:
        now = time.monotonic()
        elapsed = now - self._seen[0][0]
        rate = (progress.tokens - self._seen[0][1]) / elapsed if elapsed > 0 else 0.0
        expected = max(self.expected_tokens, progress.tokens)
        share = progress.tokens / expected if expected else 0.0
        left = duration((expected - progress.tokens) / rate) if rate else "?"
        memory = _peak_memory()
        return (
            f"{count(progress.tokens)} tokens {share:4.0%}  {count(rate)}/s  {progress.documents:,} documents  "
            f"shard {progress.shard}  {left} left"
            + (f"  {memory / 1e9:.2f} GB memory at most" if memory else "")
            + (f"  {progress.retries:,} retries" if progress.retries else "")
            + (f"  {progress.cluster}" if progress.cluster else "")
        )


class Display:
    """Where `pipeline.pretokenize` reports to; `expected_tokens` comes from the preflight."""

    def __init__(self, show: OnProgress, line: _Line) -> None:
        self.show = show
        self._line = line

    def expect(self, tokens: int) -> None:
        self._line.expected_tokens = tokens


@contextmanager
def display(*, quiet: bool) -> Iterator[Display]:
    """Show progress on standard error: live on a terminal, a line every ten seconds elsewhere, or nothing."""
    line = _Line()
    with _outlet(quiet=quiet) as (seconds, put):
        yield Display(_paced(seconds, line, put), line)


@contextmanager
def byte_display(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show the bytes that are done, of all bytes, in the same way."""

    def line(done: int, total: int, rate: float) -> str:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB {_share(done, total)}  {rate / 1e6:.0f} MB/s"

    with _display(line, quiet=quiet) as show:
        yield show


@contextmanager
def count_display(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how many things are done, of all, in the same way; `what` is their name."""

    def line(done: int, total: int, rate: float) -> str:
        return f"{done:,} of {total:,} {what} {_share(done, total)}  {count(rate)}/s"

    with _display(line, quiet=quiet) as show:
        yield show


def _share(done: int, total: int) -> str:
    return f"{done / total if total else 1.0:4.0%}"


@contextmanager
def _display(line: Callable[[int, int, float], str], *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a line of what is done, of how much, and how much in a second; and how long the rest will take."""
    started = time.monotonic()

    with _outlet(quiet=quiet) as (seconds, put):
        due = time.monotonic() + seconds

        def show(done: int, total: int) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + seconds
                rate = done / max(1e-9, time.monotonic() - started)
                put(f"{line(done, total, rate)}  {duration((total - done) / rate) if done else '?'} left")

        yield show


@contextmanager
def _outlet(*, quiet: bool) -> Iterator[tuple[float, Callable[[str], None]]]:
    """How often to show a line, and how."""
    if quiet:
        yield math.inf, lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            yield _LIVE_SECONDS, lambda text: live.update(Text(text), refresh=True)
    else:
        yield PLAIN_SECONDS, lambda text: print(text, file=sys.stderr, flush=True)  # noqa: T201


def _peak_memory() -> int:
    """Return the most memory that this process had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _paced(seconds: float, line: _Line, put: Callable[[str], None]) -> OnProgress:
    due = time.monotonic() + seconds

    def show(progress: Progress) -> None:
        nonlocal due
        line.note(progress)
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            put(line.text(progress))

    return show


def count(number: float) -> str:
    """Return a number with a unit people read at a glance: `28.1 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`2:05` or `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Progress: how far a run is, and how a person sees it: a bar on a terminal or in a notebook, plain lines elsewhere.

The one module that imports `rich`.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import StorageError

PLAIN_SECONDS = 10.0
"""Time between lines where the output is not a terminal, and between rows of the log after its first minute."""
ROW_SECONDS = 1.0
"""Time between rows of `--metrics`, and of the log in its first minute."""
_LIVE_SECONDS = 0.2
_RATE_WINDOW_SECONDS = 30.0
"""The rate and the time left follow the last half minute."""

_ROW = b'{"time":'
"""Begins a row."""
PROGRESS = "progress "
"""Begins the rows of a log."""
_LOG_TAIL_NBYTES = 1 << 16
_ENDED = re.compile(rb" INFO interrupted$| ERROR ", re.MULTILINE)
"""What a run logs last when it does not come to its end."""
"""The last row is looked for in so many bytes."""

TOKENIZING = "tokenizing"
"""The phase in which tokens come."""


class Progress(NamedTuple):
    """How far a run of `pretokenize` is."""

    tokens: int = 0
    """Number of tokens of the data set, those of earlier runs included."""
    documents: int = 0
    shard: int = 0
    """Index of the shard that is being written."""
    waiting_nbytes: int = 0
    """Size of encoded tokens that wait for their turn in the order."""
    retries: int = 0
    """Number of requests to a store that failed and were tried again."""
    cluster: str = ""
    """What the cluster is doing; empty without a cluster."""
    phase: str = TOKENIZING
    """What the run does now."""
    done: int = 0
    """How much of the phase is done, where it can be counted: rows in the shuffle."""
    of: int = 0


OnProgress = Callable[[Progress], None]


class ProgressRow(msgspec.Struct, kw_only=True):
    """What the progress line shows: a line of `--metrics`, and, after the word `progress`, of a data root's log."""

    time: float
    """Seconds since 1970."""
    seconds: float
    """Since the run began."""
    phase: str
    done: int
    of: int
    """Size of the phase, where it can be counted; else 0."""
    tokens: int
    expected_tokens: int
    """Estimate of the plan; 0 before there is one."""
    documents: int
    shard: int
    tokens_per_second: float
    """Over the last half minute of tokenizing."""
    seconds_left: float | None
    memory_nbytes: int
    """Resident now, in this process; 0 where the system does not tell."""
    retries: int
    cluster: str


class RunMonitor:
    """What `pretokenize` reports to: keeps the last report, and makes rows of it."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._latest = Progress(phase="starting")
        self._expected = 0
        self._seen: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self.on_phase: Callable[[], None] = lambda: None

    def show(self, progress: Progress) -> None:
        """Take a report; `pretokenize` calls this."""
        is_new = progress.phase != self._latest.phase
        self._latest = progress
        if is_new:
            self.on_phase()

    def expect(self, tokens: int) -> None:
        """Take the plan's estimate of all tokens."""
        self._expected = tokens

    def row(self) -> ProgressRow:
        """Return how far the run is now."""
        with self._lock:
            now, latest = time.monotonic(), self._latest
            if latest.phase != TOKENIZING:
                self._seen.clear()
            elif not self._seen or now - self._seen[-1][0] >= _LIVE_SECONDS:
                self._seen.append((now, latest.tokens))
            while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_WINDOW_SECONDS:
                self._seen.popleft()
            rate = 0.0
            if self._seen and now > self._seen[0][0]:
                rate = (latest.tokens - self._seen[0][1]) / (now - self._seen[0][0])
            expected = max(self._expected, latest.tokens)
            return ProgressRow(
                time=round(time.time(), 3),
                seconds=round(now - self._started, 3),
                phase=latest.phase,
                done=latest.done,
                of=latest.of,
                tokens=latest.tokens,
                expected_tokens=expected,
                documents=latest.documents,
                shard=latest.shard,
                tokens_per_second=round(rate),
                seconds_left=round((expected - latest.tokens) / rate, 1) if rate else None,
                memory_nbytes=resident_nbytes(),
                retries=latest.retries,
                cluster=latest.cluster,
            )


class ShownProgress(NamedTuple):
    """What a progress line says."""

    what: str
    share: float | None
    """Share of the work that is done, from 0 to 1; None where it is not known."""
    detail: str

    @property
    def text(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        return "  ".join(filter(None, (self.what, share, self.detail)))


def shown_row(row: ProgressRow) -> ShownProgress:
    """Return the line of a run."""
    memory = f"{row.memory_nbytes / 1e9:.2f} GB memory" if row.memory_nbytes else ""
    rest = [memory, f"{row.retries:,} retries" if row.retries else "", row.cluster]
    if row.phase != TOKENIZING:
        counted = f" {row.done:,}/{row.of:,}" if row.of else ""
        share = row.done / row.of if row.of else None
        tokens = f"{count(row.tokens)} tokens" if row.tokens else ""
        return ShownProgress(row.phase + counted, share, "  ".join(filter(None, [tokens, *rest])))
    share = row.tokens / row.expected_tokens if row.expected_tokens else 0.0
    detail = [
        f"{count(row.tokens)} tokens",
        f"{count(row.tokens_per_second)}/s" if row.tokens_per_second else "",
        "" if row.seconds_left is None else f"{duration(row.seconds_left)} left",
        f"{row.documents:,} documents",
        f"shard {row.shard}",
        *rest,
    ]
    return ShownProgress(row.phase, share, "  ".join(filter(None, detail)))


@contextmanager
def run_display(
    *, quiet: bool = False, metrics: Path | None = None, log: Callable[[ProgressRow], None] = lambda row: None
) -> Iterator[RunMonitor]:
    """Show the progress of a run: a bar on a terminal and in a notebook, else a line per phase and every ten seconds.

    Args:
        quiet: show nothing.
        metrics: file that gets a row each second, as JSON; made anew.
        log: gets a row each second for a minute, then every ten seconds.
    """
    monitor = RunMonitor()
    with _open_metrics(metrics) as write, _outlet(quiet=quiet) as (seconds, put):
        outlets: list[Callable[[ProgressRow], None]] = [lambda row: put(shown_row(row)), write, log]
        due = [0.0] * len(outlets)
        lock = threading.Lock()

        def tick(*, is_new_phase: bool = False) -> None:
            with lock:
                now, row = time.monotonic(), monitor.row()
                pauses = (seconds, ROW_SECONDS, ROW_SECONDS if row.seconds < 60 else PLAIN_SECONDS)
                for number, (pause, give) in enumerate(zip(pauses, outlets, strict=True)):
                    if is_new_phase or now >= due[number]:
                        due[number] = now + pause
                        give(row)

        monitor.on_phase = lambda: tick(is_new_phase=True)
        with _ticking(tick):
            yield monitor
        last = monitor.row()
        write(last)
        log(last)


def logged_rows(path: Path) -> list[ProgressRow]:
    """Return the rows of a data root's log, of all its runs; none where there is no log."""
    try:
        with path.open("rb") as file:
            return [row for line in file if (row := _row_of(line)) is not None]
    except OSError:
        return []


def last_logged_row(path: Path) -> ProgressRow | None:
    """Return the last row of a data root's log; None where there is none, or the run said after it that it ended."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_NBYTES))
            lines = file.readlines()
    except OSError:
        return None
    for line in reversed(lines):
        if (row := _row_of(line)) is not None or _ENDED.search(line) is not None:
            return row
    return None


def _row_of(line: bytes) -> ProgressRow | None:
    _, found, row = line.partition(f" INFO {PROGRESS}".encode())
    if not found:
        return None
    try:
        return msgspec.json.decode(row, type=ProgressRow)
    except (msgspec.DecodeError, UnicodeDecodeError):  # half a line, where a disk was full, or a kill came
        return None


@contextmanager
def byte_display(*, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show the bytes that are done, of all bytes, in the same way."""

    def detail(done: int, total: int, rate: float) -> str:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" + (f"  {rate / 1e6:.0f} MB/s" if rate else "")

    with _display(detail, quiet=quiet) as show:
        yield show


@contextmanager
def count_display(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how many things are done, of all, in the same way; `what` is their name."""

    def detail(done: int, total: int, rate: float) -> str:
        return f"{done:,} of {total:,} {what}" + (f"  {count(rate)}/s" if rate else "")

    with _display(detail, quiet=quiet) as show:
        yield show


@contextmanager
def also_shown(
    on_progress: Callable[[int, int], None], *, wanted: bool, what: str = "bytes"
) -> Iterator[Callable[[int, int], None]]:
    """Show how many bytes, or other things, are done, if that is wanted, besides calling `on_progress`."""
    if not wanted:
        yield on_progress
        return
    with byte_display() if what == "bytes" else count_display(what) as show:

        def both(done: int, total: int) -> None:
            show(done, total)
            on_progress(done, total)

        yield both


@contextmanager
def _display(detail: Callable[[int, int, float], str], *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show what is done, of how much, how much in a second, and how long the rest will take."""
    started = time.monotonic()
    latest: list[tuple[int, int]] = []
    with _outlet(quiet=quiet) as (seconds, put):
        due = [started + seconds]

        def tick() -> None:
            now = time.monotonic()
            if latest and now >= due[0] and latest[0][0] < latest[0][1]:
                due[0] = now + seconds
                done, total = latest[0]
                rate = done / max(1e-9, now - started)
                left = f"  {duration((total - done) / rate)} left" if done else ""
                put(ShownProgress("", done / total if total else 1.0, detail(done, total, rate) + left))

        def show(done: int, total: int) -> None:
            latest[:] = [(done, total)]

        with _ticking(tick):
            yield show


@contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Call `tick` a few times a second on a thread, so that a line lives while one step takes long."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(_LIVE_SECONDS):
            tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _outlet(*, quiet: bool) -> Iterator[tuple[float, Callable[[ShownProgress], None]]]:
    """How often to show a line, and how."""
    if quiet:
        yield math.inf, lambda shown: None
    elif sys.stderr.isatty() or _is_notebook():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        def column(field: str) -> TextColumn:
            text = Column(no_wrap=True, overflow="ellipsis")
            return TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=text)

        columns = (column("what"), BarColumn(bar_width=20), column("percent"), column("detail"))
        with Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
            task = bar.add_task("", what="", percent="", detail="")

            def put(shown: ShownProgress) -> None:
                done = None if shown.share is None else min(1.0, shown.share)
                percent = "" if done is None else f"{done:4.0%}"
                total = None if done is None else 1.0
                with suppress(OSError):  # as below
                    bar.update(task, completed=done or 0.0, total=total, what=shown.what, percent=percent)
                    bar.update(task, detail=shown.detail, refresh=True)

            yield _LIVE_SECONDS, put
    else:

        def print_line(shown: ShownProgress) -> None:
            with suppress(OSError):  # who read it is gone; the work is not
                print(shown.text, file=sys.stderr, flush=True)  # noqa: T201

        yield PLAIN_SECONDS, print_line


def _is_notebook() -> bool:
    """Whether a notebook shows the output, and has the widgets that a bar needs."""
    notebook: Any = sys.modules.get("IPython")
    return (
        notebook is not None
        and type(notebook.get_ipython()).__name__ == "ZMQInteractiveShell"
        and find_spec("ipywidgets") is not None
    )


@contextmanager
def _open_metrics(path: Path | None) -> Iterator[Callable[[ProgressRow], None]]:
    if path is None:
        yield lambda row: None
        return
    try:
        if path.is_fifo():
            raise _not_for_rows(path, "a pipe, whose reader could hold up the run")
        if path.is_file():
            with path.open("rb") as before:
                if before.read(len(_ROW)) not in (_ROW, b""):
                    raise _not_for_rows(path, "a file of something else")
        file = path.open("wb", buffering=0)
    except OSError as error:
        raise _cannot_write(path, error) from None
    failed: list[OSError] = []

    def write(row: ProgressRow) -> None:
        try:
            if not failed:
                file.write(msgspec.json.encode(row) + b"\n")
        except OSError as error:
            failed.append(error)

    with file:
        yield write
    if failed:
        raise _cannot_write(path, failed[0])


def _not_for_rows(path: Path, found: str) -> StorageError:
    return StorageError(f"{path}: expected a file for rows of --metrics, found {found}", next_step="name another")


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: the rows of --metrics cannot be written: {error.strerror}",
        next_step="give another file; the data set itself is not touched by this",
    )


def resident_nbytes() -> int:
    """Return the memory of this process that is resident; 0 where the system does not tell."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            pages = int(file.read().split()[1])
        import resource

        return pages * resource.getpagesize()
    except (OSError, ImportError):
        return _peak_nbytes()


def _peak_nbytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count(number: float) -> str:
    """Return a number with a unit people read at a glance: `28.1 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def plural(number: int, what: str) -> str:
    """Return a number and what it counts: `1 shard`, `1,200 shards`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def duration(seconds: float) -> str:
    """`2:05` or `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

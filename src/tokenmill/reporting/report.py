"""Report: a data root or a view → one HTML file."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from tokenmill.comparison.compare import Comparison
from tokenmill.dataroot import atomic
from tokenmill.errors import ExtraError, QueryError, StorageError
from tokenmill.options import OnBytes
from tokenmill.progress import also_shown
from tokenmill.redact import escape_surrogates
from tokenmill.reporting.figures import figures

_BEGINNING = b"<!doctype html>"


def _require_report(path: Path) -> None:
    """Refuse to replace what is no page: a file of the data root, say, or a device."""
    with atomic.translate_read_errors(path):
        if not path.exists():
            return
        beginning = b""
        if path.is_file():
            with path.open("rb") as file:
                beginning = file.read(len(_BEGINNING))
    if beginning != _BEGINNING:
        raise StorageError(
            f"{path}: is there and is no HTML page, and would be replaced", next_step="give another file with -o"
        )


def _loaded(path: Path | str | None) -> Comparison | None:
    if path is None:
        return None
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Comparison)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise QueryError(
            f"{path}: no comparison of tokenizers: {error}",
            next_step="make it with: tokenmill tokenizers compare ... --json > FILE",
        ) from None


class ReportSummary(msgspec.Struct):
    """What `report` wrote."""

    path: str
    nbytes: int
    seconds: float


def report(
    root: Path | str,
    output: Path | str = "report.html",
    *,
    comparison: Path | str | None = None,
    on_progress: OnBytes = lambda done, total: None,
    progress: bool = False,
) -> ReportSummary:
    """Write one self-contained HTML page that shows a finished data root or a view.

    Args:
        root: the data root or view.
        output: the file; replaced if it exists, whole or not at all.
        comparison: JSON file that `tokenmill tokenizers compare --json` printed; becomes a section of the page.
        on_progress: called with bytes of tokens read and bytes to read.
        progress: show it on standard error, or in the notebook, as the command line does.

    Raises:
        DataRootError: the data set is not finished.
        QueryError: `comparison` is no such file.
        ExtraError: the extra `report` is not installed.
        StorageError: the file cannot be written, or is there and no page.
    """
    started = time.monotonic()
    try:
        from tokenmill.reporting.page import page
    except ImportError as error:
        raise ExtraError(
            f"a report needs the extra report: {error}", next_step="run: pip install 'tokenmill[report]'"
        ) from None
    path = Path(output)
    _require_report(path)
    with also_shown(on_progress, wanted=progress) as tell:
        found = figures(Path(root), _loaded(comparison), on_progress=tell)
    data = page(found).encode("utf-8", "backslashreplace")
    atomic.write_whole(path, data)
    return ReportSummary(escape_surrogates(path), len(data), round(time.monotonic() - started, 3))

"""Figures: a data root or a view → all that its report shows, as plain values. Reads only."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from tokenmill.comparison.compare import Comparison
from tokenmill.dataroot import layout
from tokenmill.dataroot.manifest import Manifest
from tokenmill.dataroot.view_record import ViewRecord
from tokenmill.errors import DataRootError, TokenizerError
from tokenmill.loading.arrangement import Mixture
from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.info import Info, info
from tokenmill.loading.order_quality import OrderQuality, order_quality
from tokenmill.loading.provenance import DocumentSlice, Sample, show_samples
from tokenmill.loading.stats import Stats, stats
from tokenmill.loading.view import PADDING_PLACE, OpenView, open_root
from tokenmill.options import OnBytes
from tokenmill.progress import TOKENIZING, ProgressRow, logged_rows
from tokenmill.redact import escape_surrogates
from tokenmill.remote.hub import SITE

SAMPLES = 100
"""Random samples that a reader can look into."""
_SHOWN_TOKENS = 250_000
_SHOWN_NBYTES = 3_200_000
"""Tokens of all of them together, and their size, that the page holds; of longer samples it has the beginning."""
_WINDOWS = 60
"""Stretches of a mixture's run in which its sources are counted."""
_LONGEST_VALUE = 200
"""Characters of a metadata value that are shown."""
_RUN_ROWS = 600
_VALUES_NBYTES = 300_000
"""Size of the metadata values that the page holds; of more it has those with the most tokens."""
_FOLDERS_UP = 8


class Flow(msgspec.Struct):
    """Documents or rows that go from one place to another."""

    source: str
    target: str
    count: int


class Share(msgspec.Struct):
    """What a source gives to a stretch of a mixture's run."""

    stage: int
    """From 1."""
    begin: int
    """First sample of the stretch."""
    end: int
    source: str
    share: float
    """Share of the stretch's samples, from 0 to 1."""


class Fill(msgspec.Struct):
    """Samples that hold so much padding."""

    low: float
    """Share of the sample that is text, in percent; likewise `high`."""
    high: float
    samples: int


class SampleDocument(msgspec.Struct):
    """A document, or a part of it, in a sample that is shown."""

    source: str
    row: int
    link: str | None
    """Where a browser finds the source file; None where it cannot."""
    first: int
    """First token of it here, counted in the document; likewise `end`, one past the last."""
    end: int
    tokens: int
    """Tokens of the whole document, EOS included."""
    metadata: dict[str, str]
    texts: list[str]
    """What each token adds to the text; empty while a character is not whole."""
    ids: list[int]


class ShownSample(msgspec.Struct):
    """A sample that a reader can look into."""

    sample: int
    id: str | None
    begin: int
    """First token of it in the stream."""
    tokens: int
    """Tokens of the whole sample; the documents may have the first of them only."""
    padding: int
    documents: list[SampleDocument]


class Run(msgspec.Struct):
    """One run of `pretokenize`, from the log of the data root."""

    rows: list[ProgressRow]


class Figures(msgspec.Struct, kw_only=True):
    """All that a report shows. What is None is not known, or does not apply."""

    name: str
    root: str
    tokenizer: str
    """Name of the tokenizer; empty where it is not known."""
    seq_len: int
    samples: int
    nbytes: int
    """Size of the tokens."""
    info: Info | None
    """What `info` says of a data root; None for a view."""
    view: ViewRecord | None
    stats: Stats
    order: OrderQuality | None
    order_note: str
    """Why there is no `order`."""
    flow: list[Flow]
    shares: list[Share]
    fill: list[Fill]
    runs: list[Run]
    shown: list[ShownSample]
    comparison: Comparison | None
    """A comparison of tokenizers, if one is given."""
    shown_note: str
    """Why there are no samples, or of each only the beginning."""


def figures(
    root: Path, comparison: Comparison | None = None, *, on_progress: OnBytes = lambda done, total: None
) -> Figures:
    """Read a finished data root or a view, every token of it once or twice; `comparison` is passed on.

    Raises:
        DataRootError: it is not finished.
    """
    found = open_root(root)
    counted = stats(root, on_progress=on_progress)
    for column, values in (counted.tokens_by_value or {}).items():
        if values is not None and counted.tokens_by_value is not None:
            counted.tokens_by_value[column] = _largest(values, _VALUES_NBYTES // len(counted.tokens_by_value))
    order, order_note = _order(root)
    shown, shown_note = _shown(found)
    stream = found.tokens()
    is_view = isinstance(found, OpenView)
    return Figures(
        name=escape_surrogates(root.resolve().name),
        root=escape_surrogates(root),
        tokenizer=found.tokenizer.name if found.tokenizer is not None else "",
        seq_len=found.seq_len,
        samples=stream.tokens // found.seq_len,
        nbytes=stream.tokens * stream.dtype.itemsize,
        info=None if is_view else info(root),
        view=found.view if isinstance(found, OpenView) else None,
        stats=counted,
        order=order,
        order_note=order_note,
        flow=_flow_of_view(found.view) if isinstance(found, OpenView) else _flow(found.manifest),
        shares=_shares(found) if isinstance(found, OpenView) else [],
        fill=_fill(found) if isinstance(found, OpenView) else [],
        runs=_runs(logged_rows(root / layout.LOG)),
        shown=shown,
        comparison=comparison,
        shown_note=shown_note,
    )


def _largest(values: dict[str, int], room: int) -> dict[str, int]:
    """Return the values with the most tokens, as many as there is room for, in bytes."""
    if len(msgspec.json.encode(values)) <= room:
        return values
    kept: dict[str, int] = {}
    for name, tokens in sorted(values.items(), key=lambda item: -item[1]):
        room -= len(name.encode()) + 20
        if room < 0:
            break
        kept[name] = tokens
    return kept


def _order(root: Path) -> tuple[OrderQuality | None, str]:
    try:
        return order_quality(root), ""
    except DataRootError as error:
        return None, error.message


def _flow(manifest: Manifest | None) -> list[Flow]:
    """Return what became of the rows of the corpus, reason by reason."""
    if manifest is None:
        return []
    rows = "entries" if manifest.imported else "rows"
    source = f"{rows} of {len(manifest.files):,} files"
    outcomes = {
        "documents": sum(entry.documents for entry in manifest.ledger),
        "without a value (null)": sum(entry.null for entry in manifest.ledger),
        "without text (empty)": sum(entry.empty for entry in manifest.ledger),
        "not what their format says (bad)": sum(entry.bad for entry in manifest.ledger),
        "after the end of the stream (unused)": sum(entry.unused for entry in manifest.ledger),
    }
    return [Flow(source, outcome, count) for outcome, count in outcomes.items()]


_REASONS = {
    "unfinished": "cut off at the end of their data root",
    "where": "excluded by the condition",
    "removed": "named in the removal list",
    "split": "on the other side of the holdout",
    "duplicate": "with the text of an earlier document",
}


def _flow_of_view(view: ViewRecord) -> list[Flow]:
    flows = []
    for source in view.sources:
        flows.append(Flow(source.name, "in the view", source.taken))
        flows += [Flow(source.name, _REASONS.get(why, why), count) for why, count in source.left_out.items()]
    return flows


def _shares(found: OpenView) -> list[Share]:
    """Return what each source gives to each stretch of the run, stage by stage; exact, from the schedule."""
    arrangement = found.arrangement()
    if not isinstance(arrangement, Mixture):
        return []
    names = [source.name for source in found.view.sources]
    shares = []
    before = 0
    for number, stage in enumerate(arrangement.stages, start=1):
        stretches = max(1, round(_WINDOWS * stage.samples / max(1, arrangement.samples)))
        edges = np.unique(np.linspace(0, stage.samples, stretches + 1).astype(np.int64)).tolist()
        for begin, end in itertools.pairwise(edges):
            taken = stage.taken(end) - stage.taken(begin)
            shares += [
                Share(number, before + begin, before + end, name, int(count) / (end - begin))
                for name, count in zip(names, taken.tolist(), strict=True)
                if stage.shares[names.index(name)]
            ]
        before += stage.samples
    return shares


def _fill(found: OpenView) -> list[Fill]:
    """Return how many samples of an epoch are filled to which degree; none where nothing is padded."""
    if found.view.packing == "concat":
        return []
    index = found.open_index()
    samples = -(-int(index.begins[-1]) // found.seq_len)
    padded = np.flatnonzero(index.places == PADDING_PLACE)
    padding = np.bincount(
        index.begins[padded] // found.seq_len, index.begins[padded + 1] - index.begins[padded], minlength=samples
    )
    filled = 100.0 * (found.seq_len - padding) / found.seq_len
    edges = (0.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
    bins = [Fill(low, high, int(((filled >= low) & (filled < high)).sum())) for low, high in itertools.pairwise(edges)]
    return [*bins, Fill(100.0, 100.0, int((filled == 100).sum()))]


def _runs(rows: Sequence[ProgressRow]) -> list[Run]:
    """Divide the rows of a log by runs; of long ones, rows at even distances."""
    runs: list[Run] = []
    for row in rows:
        if not runs or row.seconds < runs[-1].rows[-1].seconds:
            runs.append(Run([]))
        runs[-1].rows.append(row)
    working = [run for run in runs if any(row.phase == TOKENIZING for row in run.rows)]
    return [Run([*run.rows[: -1 : -(-len(run.rows) // _RUN_ROWS)], run.rows[-1]]) for run in working]


def random_samples(samples: int, name: str) -> list[int]:
    """Return `SAMPLES` of so many samples, ascending; the same each time for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    chosen = np.random.default_rng(seed).choice(samples, min(samples, SAMPLES), replace=False)
    return sorted(chosen.tolist())


def _shown(found: DataRoot | OpenView) -> tuple[list[ShownSample], str]:
    samples = found.tokens().tokens // found.seq_len
    if samples == 0:
        return [], f"there is no whole sample of {found.seq_len:,} tokens"
    if found.tokenizer is None:
        return [], "there is no manifest, so the tokenizer and the sources are not known"
    chosen = random_samples(samples, f"{found.tokenizer.sha256}/{samples}")
    limit = min(found.seq_len, _SHOWN_TOKENS // len(chosen))
    links = _Links(found)
    try:
        shown = [_shown_sample(found, sample, links) for sample in show_samples(found, chosen, limit=limit)]
    except TokenizerError as error:
        return [], error.message
    while (nbytes := _size(shown)) > _SHOWN_NBYTES:
        if limit > 1:
            limit = max(1, int(limit * 0.97 * _SHOWN_NBYTES / nbytes))
            for sample in shown:
                _cut(sample, limit)
        else:  # it is their metadata that takes the room
            shown = shown[::2]
    note = "" if limit == found.seq_len else f"Of each sample the page holds the first {limit:,} tokens."
    return shown, note


def _size(shown: list[ShownSample]) -> int:
    """Return about how many bytes of a page samples take: some characters stand as codes of six."""
    data = msgspec.json.encode(shown)
    return len(data) + 5 * sum(data.count(character) for character in b"<>&")


def _cut(sample: ShownSample, limit: int) -> None:
    kept: list[SampleDocument] = []
    for part in sample.documents:
        room = limit - sum(len(each.ids) for each in kept)
        if room <= 0:
            break
        part.texts, part.ids = part.texts[:room], part.ids[:room]
        part.end = part.first + len(part.ids)
        kept.append(part)
    if kept != sample.documents or sum(len(part.ids) for part in kept) == limit:
        sample.padding = 0  # it comes last
    sample.documents = kept


def _shown_sample(found: DataRoot | OpenView, sample: Sample, links: _Links) -> ShownSample:
    place = sample.place
    documents = [
        SampleDocument(
            part.source,
            part.row,
            links.of(part),
            part.document_begin,
            part.document_end,
            part.document_tokens,
            {name: str(value)[:_LONGEST_VALUE] for name, value in part.metadata.items() if value is not None},
            [token.text for token in sample.tokens[part.begin - place.begin : part.end - place.begin]],
            [token.id for token in sample.tokens[part.begin - place.begin : part.end - place.begin]],
        )
        for part in place.documents
    ]
    padding = place.end - place.begin - sum(part.end - part.begin for part in place.documents)
    return ShownSample(place.sample or 0, place.sample_id, place.begin, found.seq_len, padding, documents)


class _Links:
    """Finds where a browser can open a source file."""

    def __init__(self, found: DataRoot | OpenView) -> None:
        if isinstance(found, OpenView):
            pairs = zip(found.view.sources, found.sources, strict=True)
            self._manifests = {f"{source.name}/": root.manifest for source, root in pairs}
        else:
            self._manifests = {"": found.manifest}
        self._known: dict[str, str | None] = {}

    def of(self, part: DocumentSlice) -> str | None:
        """Return the address of the file of a document, with its row as the fragment."""
        if part.source not in self._known:
            self._known[part.source] = self._file(part.source)
        file = self._known[part.source]
        return None if file is None else f"{file}#row={part.row}"

    def _file(self, source: str) -> str | None:
        for prefix, manifest in self._manifests.items():
            if manifest is not None and source.startswith(prefix):
                return source_link(manifest, source.removeprefix(prefix))
        return None


def source_link(manifest: Manifest, path: str) -> str | None:
    """Return where a browser finds a source file: at the hub, on a web server, or on this disk; None if nowhere."""
    if manifest.imported is not None:
        datasets: Sequence[str] = [manifest.imported.source]
    else:
        dataset = manifest.recipe.dataset
        datasets = [dataset] if isinstance(dataset, str) else dataset
    quoted = urllib.parse.quote(path)
    for entry in datasets:
        scheme, mark, rest = entry.partition("://")
        if not mark and manifest.source_revision is None:
            if (here := _local(Path(entry), path)) is not None:
                return here
        elif scheme in ("http", "https"):
            if entry.split("?")[0].endswith(f"/{path.rpartition('/')[2]}"):
                return entry
        elif scheme == "hf" or not mark:
            name = "/".join((rest if mark else entry).removeprefix("datasets/").split("/")[:2]).partition("@")[0]
            return f"{SITE}/datasets/{name}/blob/{manifest.source_revision or 'main'}/{quoted}"
    return None


def _local(dataset: Path, path: str) -> str | None:
    """Return the file of a corpus of this machine: paths are relative to the folder that all its files are in."""
    for folder in (dataset, *list(dataset.absolute().parents)[:_FOLDERS_UP]):
        with contextlib.suppress(OSError):  # a folder that may not be looked into
            if (folder / path).is_file():
                return (folder / path).resolve().as_uri()
    return None

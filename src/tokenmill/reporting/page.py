"""Page: figures → one HTML file that loads nothing. The one module that imports Jinja (extra `report`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

import jinja2
import msgspec
from markupsafe import Markup

from tokenmill import __version__
from tokenmill.loading.order_quality import Measure
from tokenmill.progress import count, duration, plural
from tokenmill.reporting import charts
from tokenmill.reporting.figures import Figures

_LONGEST_NAME = 200
"""Characters of a name, or of a value, in a chart or a table."""
_LONGEST_TABLE = 300
"""Rows of a table; of a longer one the page has the first."""


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    number: bool = False
    code: bool = False


class Block(NamedTuple):
    """A part of a section."""

    kind: str
    """`text`, `chart`, `table` or `samples`."""
    text: str = ""
    title: str = ""
    chart: str = ""
    head: Sequence[Cell] = ()
    rows: Sequence[Sequence[Cell]] = ()
    folded: bool = False


class Section(NamedTuple):
    """A section of the page."""

    id: str
    title: str
    blocks: list[Block]


def page(figures: Figures) -> str:
    """Return the HTML of a report, UTF-8, in both themes."""
    specs: dict[str, charts.Spec] = {}
    made = [make(figures, specs) for make in _SECTIONS]
    sections = [section for section in made if section is not None and section.blocks]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_file("page.html"))
    return template.render(
        version=__version__,
        figures=figures,
        kind="View" if figures.view else "Data root",
        subtitle=_subtitle(figures),
        tiles=_tiles(figures),
        sections=sections,
        css=Markup(_file("page.css")),  # ours
        js=Markup(_file("page.js")),
        bundle=Markup(charts.bundle().replace("</script", "<\\/script")),
        data=_script_json(figures),
        charts=_script_json(specs),
    )


def _file(name: str) -> str:
    return (files("tokenmill.reporting") / name).read_text("utf-8")


def _script_json(value: object) -> Markup:
    """Return JSON that can stand in a `<script>`: nothing in it is taken for markup, or for the end of a line."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # no markup is left in it


def _n(number: float) -> Cell:
    return Cell(f"{number:,}" if isinstance(number, int) else f"{number:,.4g}", number=True)


def _t(text: object, *, code: bool = False) -> Cell:
    return Cell(str(text), code=code)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, folded: bool = False) -> Block:
    kept = list(rows)
    if len(kept) > _LONGEST_TABLE:
        title = f"{title} (the first {_LONGEST_TABLE:,} of {len(kept):,})"
        kept = kept[:_LONGEST_TABLE]
    is_number = [bool(kept) and cell.number for cell in kept[0]] if kept else [False] * len(head)
    heads = [Cell(text, number=number) for text, number in zip(head, is_number, strict=True)] if head else []
    return Block("table", title=title, head=heads, rows=kept, folded=folded)


def _subtitle(figures: Figures) -> str:
    if figures.view is not None:
        names = ", ".join(source.name for source in figures.view.sources)
        return f"Samples of {figures.seq_len:,} tokens from the data roots {names}"
    if figures.info is not None and figures.info.recipe is not None and figures.info.tokenizer is not None:
        dataset = figures.info.recipe.dataset
        corpus = dataset if isinstance(dataset, str) else ", ".join(dataset)
        return f"Tokens of {corpus} by {figures.info.tokenizer.name}"
    return "Tokens without a manifest"


class _Tile(NamedTuple):
    name: str
    value: str
    note: str = ""


def _tiles(figures: Figures) -> list[_Tile]:
    stats = figures.stats
    tiles = [
        _Tile("Tokens", f"{stats.tokens:,}", f"{figures.nbytes / 1e9:,.3f} GB"),
        _Tile("Samples", f"{figures.samples:,}", f"of {figures.seq_len:,} tokens"),
    ]
    if stats.documents is not None:
        tiles.append(_Tile("Documents", f"{stats.documents:,}", f"mean {_mean(stats.document_tokens):,.0f} tokens"))
    if stats.text_nbytes_by_source and stats.tokens_by_source:
        tokens = sum(stats.tokens_by_source.values())
        ratio = sum(stats.text_nbytes_by_source.values()) / max(1, tokens)
        tiles.append(_Tile("Bytes per token", f"{ratio:.3f}", "of text, in UTF-8"))
    of = f"of {stats.vocab_size:,}" if stats.vocab_size else ""
    tiles.append(_Tile("Token ids in use", f"{stats.distinct_ids:,}", of))
    if stats.repeated_texts is not None:
        tiles.append(_Tile("Repeated texts", f"{stats.repeated_texts.documents:,}", "documents that repeat one"))
    if figures.order is not None:
        telling = _telling(figures.order.measures)
        random = sum(measure.is_random for measure in telling)
        if telling:
            tiles.append(_Tile("Order", f"{random} of {len(telling)}", "measures as random"))
    return tiles


def _mean(lengths: Mapping[str, float] | None) -> float:
    return lengths["mean"] if lengths else 0.0


def _made(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    blocks: list[Block] = []
    info, view = figures.info, figures.view
    if info is not None and info.recipe is not None and info.tokenizer is not None:
        recipe = info.recipe
        rows = [
            ("complete", "yes" if info.complete else "no"),
            ("corpus", recipe.dataset if isinstance(recipe.dataset, str) else ", ".join(recipe.dataset)),
            ("source files", f"{info.files or 0:,}, {(info.source_nbytes or 0) / 1e9:,.3f} GB"),
            ("tokenizer", f"{info.tokenizer.name}, {info.tokenizer.vocab_size:,} ids"),
            ("tokenizer.json", f"sha256 {info.tokenizer.sha256}"),
            ("end of document", f"{recipe.eos_token} = {info.tokenizer.eos_id}"),
            ("stored as", f"{' and '.join(info.stored_as)}, {info.dtype}"),
            ("made with", ", ".join(f"{name} {number}" for name, number in info.software.items())),
            ("fingerprint", info.fingerprint or ""),
        ]
        blocks.append(_table("", (), [(_t(name), _t(value)) for name, value in rows]))
        settings = msgspec.to_builtins(recipe)
        fields = [(_t(name), _t(_setting(value), code=True)) for name, value in settings.items()]
        blocks.append(_table("Every setting of the recipe", (), fields, folded=True))
    if view is not None:
        rows = [
            ("tokenizer", figures.tokenizer),
            (
                "order",
                {"documents": "documents shuffled", "samples": "samples shuffled"}.get(view.shuffle, "as stored"),
            ),
            ("seed", f"{view.seed}"),
            ("packing", view.packing),
            ("split", f"{view.split} of a holdout of {view.holdout:g}" if view.holdout else "none"),
            ("duplicates", "the first of each text is taken" if view.duplicates == "first" else "kept"),
            ("stored as", view.dtype),
            ("tokenizer.json", f"sha256 {view.tokenizer_sha256}"),
        ]
        blocks.append(_table("", (), [(_t(name), _t(value)) for name, value in rows]))
        sources = [
            (_t(source.name), _t(source.root), _n(source.documents), _n(source.taken), _t(source.where or ""))
            for source in view.sources
        ]
        blocks.append(_table("Its data roots", ("name", "data root", "documents", "taken", "where"), sources))
    notes = info.notes if info is not None else view.notes if view is not None else []
    blocks += [Block("text", text=f"Note: {note}") for note in notes]
    return Section("made", "How it was made", blocks)


def _setting(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _ledger(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    blocks: list[Block] = []
    if sum(flow.count for flow in figures.flow):
        specs["flow"] = charts.flow(figures.flow)
        total = sum(flow.count for flow in figures.flow)
        what = "Documents of the data roots" if figures.view else "Every row of the corpus"
        blocks.append(Block("chart", title=f"{what}, and what became of it", chart="flow"))
        rows = [(_t(f.source), _t(f.target), _n(f.count), _t(f"{f.count / total:.3%}")) for f in figures.flow]
        blocks.append(_table("Every reason, with its count", ("from", "to", "count", "share"), rows, folded=True))
    if figures.info is not None and figures.info.ledger:
        head = ("source file", "rows", "documents", "null", "empty", "bad", "control strings", "unused")
        entries = [
            (_t(e.path), *map(_n, (e.rows, e.documents, e.null, e.empty, e.bad, e.special, e.unused)))
            for e in figures.info.ledger
        ]
        blocks.append(_table("The ledger, file by file", head, entries, folded=True))
    return Section("ledger", "Ledger", blocks)


def _sources(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    stats, blocks = figures.stats, []
    if stats.tokens_by_source:
        whole = " of one epoch" if figures.view and figures.view.stages else ""
        blocks += _bars(specs, "sources", f"Tokens{whole} by source file", stats.tokens_by_source, "tokens")
        if stats.text_nbytes_by_source is not None:
            largest = sorted(stats.tokens_by_source.items(), key=lambda item: -item[1])
            ratios = {name: stats.text_nbytes_by_source[name] / max(1, tokens) for name, tokens in largest}
            blocks += _bars(specs, "ratios", "Bytes of text per token, by source file", ratios, "bytes per token")
    for number, (column, values) in enumerate((stats.tokens_by_value or {}).items()):
        if values:
            blocks += _bars(specs, f"values-{number}", f"Tokens by {column}", values, "tokens")
        elif values is None:
            blocks.append(Block("text", text=f"{column} has too many different values to be counted by."))
    return Section("sources", "Where tokens come from", blocks)


def _bars(specs: dict[str, charts.Spec], chart: str, title: str, values: Mapping[str, float], what: str) -> list[Block]:
    ranked = [(name[:_LONGEST_NAME], value) for name, value in values.items()]
    if what == "tokens":
        ranked.sort(key=lambda item: -item[1])
    specs[chart] = charts.bars(ranked, what, figures="," if what == "tokens" else ".3f")
    shown = ""
    if len(values) > charts.MOST_BARS:
        shown = f" (the {charts.MOST_BARS} with the most tokens, of {len(values):,})"
    rows = [(_t(name), _n(value)) for name, value in ranked]
    return [
        Block("chart", title=title + shown, chart=chart),
        _table(f"{title}, as a table", ("name", what), rows, folded=True),
    ]


def _documents(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    stats, blocks = figures.stats, []
    if stats.document_histogram:
        specs["lengths"] = charts.lengths(stats.document_histogram, figures.seq_len)
        blocks.append(Block("chart", title="Lengths of documents", chart="lengths"))
    if stats.document_tokens:
        head = [name if name == "mean" else f"{name}%" for name in stats.document_tokens]
        values = [Cell(f"{value:,.0f}", number=True) for value in stats.document_tokens.values()]
        blocks.append(_table("Percentiles of their tokens", ["", *head], [[_t("tokens"), *values]]))
    if stats.repeated_texts is not None:
        same = stats.repeated_texts
        text = f"{plural(same.texts, 'text')} more than once, {plural(same.documents, 'document')} that repeat one."
        blocks.append(Block("text", text=f"Exact duplicates: {text}"))
    if stats.duplicates is not None:
        ids = stats.duplicates
        text = f"{plural(ids.ids, 'sample id')} more than once, {plural(ids.samples, 'sample')} that repeat one."
        blocks.append(Block("text", text=f"Duplicate samples: {text}"))
    return Section("documents", "Documents", blocks)


def _tokens(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    stats = figures.stats
    specs["ranks"] = charts.ranks(stats.rank_frequency)
    blocks = [Block("chart", title="How often tokens occur, by their rank", chart="ranks")]
    top = [
        (_t(repr(token.text) if token.text else token.name or ""), _n(token.id), _n(token.count),
         _t(f"{token.count / stats.tokens:.2%}"))
        for token in stats.top
    ]  # fmt: skip
    blocks.append(_table("The most frequent tokens", ("token", "id", "count", "share"), top, folded=True))
    if stats.control_tokens:
        rows = [(_t(token.name), _n(token.id), _n(token.count)) for token in stats.control_tokens]
        blocks.append(_table("Control tokens that stand in the text", ("token", "id", "count"), rows))
    elif stats.control_tokens is not None:
        blocks.append(Block("text", text="No control token stands in the text, besides those that surround documents."))
    if figures.info is not None and figures.info.ledger:
        special = sum(entry.special for entry in figures.info.ledger)
        blocks.append(Block("text", text=f"{plural(special, 'document')} with the string of a control token."))
    return Section("tokens", "Tokens", blocks)


def _comparison(figures: Figures, specs: dict[str, charts.Spec]) -> Section | None:
    found = figures.comparison
    if found is None:
        return None
    specs["tokenizers"] = charts.tokenizers(found.tokenizers)
    text = (
        f"On a sample of {found.documents:,} documents, {found.nbytes / 1e6:,.1f} MB, of {found.corpus}; lines are "
        "intervals of 95% confidence."
    )
    head = ("tokenizer", "ids", "bytes per token", "tokens, to the first", "ids in use", "parts of characters",
            "unknown", "documents changed", "tokens of all", "size of all", "speed")  # fmt: skip
    rows = [
        (_t(each.name), _n(each.vocab_size), _t(each.bytes_per_token.text), _t(each.relative_tokens.text),
         _n(each.used_ids), _t(f"{each.byte_share:.3%}"), _t(f"{each.unknown_share:.3%}"), _t(f"{each.lost_share:.2%}"),
         _n(each.projected_tokens), _t(f"{each.projected_nbytes / 1e9:,.3f} GB {each.dtype}"),
         _t(f"{count(each.tokens_per_second)}/s"))
        for each in found.tokenizers
    ]  # fmt: skip
    longest = [(_t(each.name), _t(", ".join(repr(token.text) for token in each.longest))) for each in found.tokenizers]
    blocks = [
        Block("text", text=text),
        Block("chart", title="Bytes of text per token", chart="tokenizers"),
        _table("", head, rows),
        _table("Their longest tokens", ("tokenizer", "tokens"), longest, folded=True),
    ]
    groups = {"source file": [each.by_source for each in found.tokenizers]}
    groups |= {column: [each.by_value[column] for each in found.tokenizers] for column in found.tokenizers[0].by_value}
    for what, estimates in groups.items():
        cells = [(_t(name), *(_t(each[name].text) for each in estimates)) for name in estimates[0]]
        heads = (what, *(each.name for each in found.tokenizers))
        blocks.append(_table(f"Bytes per token, by {what}", heads, cells, folded=True))
    return Section("tokenizers", "Tokenizers", [*blocks, *(Block("text", text=f"Note: {n}") for n in found.notes)])


def _order(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    if figures.order is None:
        return Section("order", "Order", [Block("text", text=f"Not measured: {figures.order_note}")])
    blocks = [
        Block(
            "text",
            text="The band holds 99 of 100 random permutations of the same documents; the diamond is a shuffle "
            "through a buffer of 10,000 documents.",
        )
    ]
    telling = _telling(figures.order.measures)
    if len(telling) < len(figures.order.measures):
        text = (
            "Measures that are the same for any order of these documents, such as of files of one each, are left out."
        )
        blocks.append(Block("text", text=text))
    for number, measure in enumerate(telling):
        specs[f"order-{number}"] = charts.order(measure)
        verdict = "as random" if measure.is_random else "not random"
        blocks.append(Block("chart", title=f"{measure.name}: {verdict}", chart=f"order-{number}"))
    head = ("measure", "found", "random", "low", "high", "buffer", "verdict")
    rows = [
        (_t(m.name), *map(_n, (m.found, m.random, m.low, m.high, m.buffer)), _t("as random" if m.is_random else "not"))
        for m in telling
    ]
    blocks.append(_table("The measures as a table", head, rows, folded=True))
    return Section("order", "Order", blocks)


def _telling(measures: Sequence[Measure]) -> list[Measure]:
    """Return the measures that can tell one order from another."""
    return [measure for measure in measures if measure.low < measure.high]


def _mixture(figures: Figures, specs: dict[str, charts.Spec]) -> Section | None:
    view = figures.view
    if view is None or not view.stages:
        return None
    specs["shares"] = charts.shares(figures.shares)
    blocks = [Block("chart", title="Shares of the sources over the run", chart="shares")]
    taken = dict.fromkeys((source.name for source in view.sources), 0)
    epoch = {source.name: source.samples for source in view.sources}
    rows = []
    for number, stage in enumerate(view.stages, start=1):
        for name, here in stage.taken.items():
            taken[name] += here
            share = f"{here / max(1, stage.samples):.4f}"
            rows.append((_t(number), _t(name), _n(here), _n(here * view.seq_len), _t(share),
                         _n(taken[name] / max(1, epoch[name]))))  # fmt: skip
    head = ("stage", "source", "samples", "tokens", "share", "epochs so far")
    blocks.append(_table("Stages and sources", head, rows))
    return Section("mixture", "Mixture", blocks)


def _packing(figures: Figures, specs: dict[str, charts.Spec]) -> Section | None:
    view = figures.view
    if view is None:
        return None
    if view.packing == "concat":
        text = "Samples are cut from the row of documents: every sample is full, and documents are cut at its ends."
        return Section("packing", "Packing", [Block("text", text=text)])
    specs["fill"] = charts.fill(figures.fill)
    row = view.tokens + view.padding
    text = (
        f"Documents are packed by best-fit decreasing: {view.padding:,} tokens of padding "
        f"({view.padding / max(1, row):.3%}), {view.cut:,} documents cut, as they are longer than a sample."
    )
    blocks = [Block("text", text=text), Block("chart", title="How full samples are", chart="fill")]
    head = ("filled with text, from %", "to %", "samples")
    rows = [(_t(f"{each.low:g}"), _t(f"{each.high:g}"), _n(each.samples)) for each in figures.fill]
    return Section("packing", "Packing", [*blocks, _table("As a table", head, rows, folded=True)])


def _run(figures: Figures, specs: dict[str, charts.Spec]) -> Section | None:
    if figures.view is not None:
        return None
    if not figures.runs:
        text = "The log of the data root has no progress of a run: it was made from Python, moved without its log, or "
        return Section("run", "The run", [Block("text", text=text + "by an earlier version.")])
    blocks = []
    if any(sum(row.tokens_per_second > 0 for row in run.rows) > 1 for run in figures.runs):
        specs["speed"] = charts.run(figures.runs, "tokens_per_second", "tokens per second")
        blocks.append(Block("chart", title="Tokens per second, over the half minute before", chart="speed"))
    specs["memory"] = charts.run(figures.runs, "memory_nbytes", "bytes of memory")
    blocks.append(Block("chart", title="Memory", chart="memory"))
    head = ("run", "time", "tokens at its beginning", "tokens at its end", "mean speed", "most memory")
    rows = []
    for number, run in enumerate(figures.runs, start=1):
        first, last = run.rows[0], run.rows[-1]
        begun = min((row.tokens for row in run.rows if row.tokens), default=0) if number > 1 else first.tokens
        mean = count((last.tokens - begun) / max(1e-9, last.seconds))
        memory = max(row.memory_nbytes for row in run.rows) / 1e9
        cells = (_t(duration(last.seconds)), _n(begun), _n(last.tokens), _t(f"{mean}/s"), _t(f"{memory:.2f} GB"))
        rows.append((_t(number), *cells))
    return Section("run", "The run", [*blocks, _table("Runs", head, rows)])


def _digests(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    rows: list[Sequence[Cell]] = []
    info, view = figures.info, figures.view
    if info is not None:
        record = info.consolidated
        if record is not None and record.complete:
            rows += [(_t("tokens.bin"), _n(record.tokens), _t(record.tokens_sha256, code=True))]
            rows += [(_t("sample_ids.bin"), _n(record.samples), _t(record.sample_ids_sha256, code=True))]
        rows += [(_t(shard.name), _n(shard.tokens), _t(shard.sha256, code=True)) for shard in info.shards]
    if view is not None:
        rows += [(_t(name), _t(""), _t(digest, code=True)) for name, digest in view.index_sha256.items()]
        rows += [(_t(f"pin of {source.name}"), _n(source.tokens), _t(source.pin, code=True)) for source in view.sources]
        rows += [(_t("all samples"), _n(view.samples), _t(view.samples_sha256, code=True))]
    return Section("digests", "Digests", [_table("SHA-256", ("file", "entries", "sha256"), rows)])


def _browser(figures: Figures, specs: dict[str, charts.Spec]) -> Section:
    if not figures.shown:
        return Section("samples-section", "Samples", [Block("text", text=f"None are here: {figures.shown_note}")])
    text = (
        f"{len(figures.shown)} samples, drawn at random. Tokens are shaded in turn; a line stands above each document, "
        f"or part of one, with its source file, its row, and which of its tokens are here. {figures.shown_note}"
    )
    return Section("samples-section", "Samples", [Block("text", text=text), Block("samples")])


_SECTIONS = (
    _made,
    _ledger,
    _sources,
    _documents,
    _tokens,
    _comparison,
    _order,
    _mixture,
    _packing,
    _run,
    _browser,
    _digests,
)

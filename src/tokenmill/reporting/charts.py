"""Charts: figures → Vega-Lite. The one module that imports Altair, and Vega, which draws it (extra `report`).

Colours are CSS variables of the page, so that one drawing serves the light theme, the dark one and print.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import msgspec
import vl_convert

from tokenmill.comparison.compare import TokenizerFigures
from tokenmill.loading.order_quality import Measure
from tokenmill.loading.stats import LengthBin
from tokenmill.reporting.figures import Fill, Flow, Run, Share

Spec = dict[str, Any]
"""A Vega-Lite specification."""

MOST_BARS = 30
_BAR_HEIGHT = 22
_HEIGHT = 240
_FLOW_HEIGHT = 46
"""Least height of an outcome in a flow, in pixels, however few rows it has."""
_STEPS = 24
_THINNEST = 0.008
_COLOURS = [f"var(--c{number})" for number in range(1, 9)]
_TEXT = "currentColor"
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'
"""That of the page; Vega measures text with it."""


def bundle() -> str:
    """Return the JavaScript that draws specifications: Vega, Vega-Lite and Vega-Embed, as `window.vegaEmbed`."""
    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub asks for what is optional


def _finished(chart: Any, description: str, *, height: int | None = _HEIGHT) -> Spec:
    """Return the specification of a chart as wide as the page lets it be."""
    sized = chart.properties(width="container", description=description)
    if height is not None:
        sized = sized.properties(height=height)
    styled = sized.configure(
        background="transparent",
        font=_FONT,
        axis=alt.AxisConfig(
            labelColor=_TEXT,
            titleColor=_TEXT,
            gridColor="var(--grid)",
            domainColor="var(--grid)",
            tickColor="var(--grid)",
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelLimit=260,
        ),
        legend=alt.LegendConfig(labelColor=_TEXT, titleColor=_TEXT, labelFontSize=12, labelLimit=260, orient="bottom"),
        view=alt.ViewConfig(stroke=None),
        range=alt.RangeConfig(category=_COLOURS),
        bar=alt.BarConfig(color=_COLOURS[0]),
        line=alt.LineConfig(color=_COLOURS[0]),
        point=alt.MarkConfig(color=_COLOURS[0]),
        rect=alt.RectConfig(color=_COLOURS[0]),
        area=alt.AreaConfig(color=_COLOURS[0]),
        text=alt.MarkConfig(color=_TEXT, fontSize=12),
    )
    spec: Spec = styled.to_dict()
    spec.pop("$schema", None)
    return spec


def _data(rows: Sequence[dict[str, Any]]) -> Any:
    return alt.Data(values=list(rows))


def bars(values: Sequence[tuple[str, float]], what: str, *, figures: str = ",") -> Spec:
    """Draw the first values as bars, each with its name."""
    rows = [{"name": name, "value": value} for name, value in values[:MOST_BARS]]
    base = alt.Chart(_data(rows)).encode(
        y=alt.Y("name:N", sort=None, title=None),
        x=alt.X("value:Q", title=what, axis=alt.Axis(format="~s", tickCount=6)),
        tooltip=[alt.Tooltip("name:N", title=" "), alt.Tooltip("value:Q", title=what, format=figures)],
    )
    return _finished(base.mark_bar(), f"Bars: {what}", height=max(2, len(rows)) * _BAR_HEIGHT)


def lengths(bins: Sequence[LengthBin], seq_len: int) -> Spec:
    """Draw how many documents have which length, on a logarithmic scale, with the length of a sample marked."""
    rows = [
        {
            "low": each.low - 0.5,
            "high": each.high - 0.5,
            "first": each.low,
            "last": each.high - 1,
            "documents": each.documents,
            "tokens": each.tokens,
            "zero": 0,
        }
        for each in bins
    ]
    scale = alt.Scale(type="log", nice=False)
    histogram = (
        alt.Chart(_data(rows))
        .mark_rect(stroke="var(--page)", strokeWidth=1)
        .encode(
            x=alt.X(
                "low:Q",
                scale=scale,
                title="tokens of a document, EOS included",
                axis=alt.Axis(format="~s", tickCount=8),
            ),
            x2="high:Q",
            y=alt.Y("documents:Q", title="documents", axis=alt.Axis(format="~s")),
            y2="zero:Q",
            tooltip=[alt.Tooltip(f"{name}:Q", format=",") for name in ("first", "last", "documents", "tokens")],
        )
    )
    mark = alt.Chart(_data([{"at": seq_len, "label": f"seq_len {seq_len:,}"}]))
    rule = mark.mark_rule(color="var(--c2)", strokeWidth=2).encode(x=alt.X("at:Q", scale=scale))
    label = mark.mark_text(color="var(--c2)", align="left", dx=5, dy=-6).encode(
        x=alt.X("at:Q", scale=scale), y=alt.value(8), text="label:N"
    )
    return _finished(histogram + rule + label, "Histogram of document lengths, logarithmic, with seq_len marked")


def ranks(frequency: Sequence[tuple[int, int]]) -> Spec:
    """Draw how often tokens occur against their rank, both on logarithmic scales."""
    rows = [{"rank": rank, "count": count} for rank, count in frequency]
    chart = (
        alt.Chart(_data(rows))
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X(
                "rank:Q",
                scale=alt.Scale(type="log"),
                title="rank of the token",
                axis=alt.Axis(format="~s", tickCount=8),
            ),
            y=alt.Y(
                "count:Q", scale=alt.Scale(type="log"), title="occurrences", axis=alt.Axis(format="~s", tickCount=6)
            ),
            tooltip=[alt.Tooltip("rank:Q", format=","), alt.Tooltip("count:Q", format=",")],
        )
    )
    return _finished(chart, "Line: occurrences of a token against its rank, both logarithmic")


def flow(flows: Sequence[Flow]) -> Spec:
    """Draw what goes from where to where as ribbons that are as thick as there is of it."""
    drawn = [each for each in flows if each.count]
    total = sum(each.count for each in drawn)
    sources, targets = list(dict.fromkeys(f.source for f in drawn)), list(dict.fromkeys(f.target for f in drawn))
    space = 1.0 / max(len(sources), len(targets))
    left, right = (_stacked(drawn, names, space) for names in ("source", "target"))
    ribbons = []
    for number, each in enumerate(drawn):
        thick = _thick(each, total)
        for step in range(_STEPS + 1):
            x = step / _STEPS
            ease = x * x * (3 - 2 * x)
            top = left[number] + (right[number] - left[number]) * ease
            ribbons.append(
                {
                    "ribbon": number,
                    "x": x,
                    "top": top,
                    "bottom": top + thick,
                    "target": each.target,
                    "source": each.source,
                    "count": each.count,
                }
            )
    bottom = max(at + _thick(each, total) for side in (left, right) for at, each in zip(side, drawn, strict=True))
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("top:Q", axis=None, scale=alt.Scale(domain=[bottom, -0.04]))
    colour = alt.Color("target:N", sort=targets, legend=None)
    area = (
        alt.Chart(_data(ribbons))
        .mark_area(opacity=0.45, interpolate="monotone", stroke="var(--page)", strokeWidth=0.5)
        .encode(
            x=x,
            y=y,
            y2="bottom:Q",
            detail="ribbon:N",
            color=colour,
            tooltip=["source:N", "target:N", alt.Tooltip("count:Q", format=",")],
        )
    )
    labels = [
        *_labels(drawn, left, "source", 0.0),
        *_labels(drawn, right, "target", 1.0),
    ]
    nodes = alt.Chart(_data(labels))
    rectangles = nodes.mark_bar(size=10).encode(x=x, y=y, y2="bottom:Q", color=alt.value("var(--node)"))
    texts = [
        nodes.transform_filter(f"datum.x == {side}")
        .mark_text(align=align, dx=dx, baseline="top", fontSize=13)
        .encode(x=x, y=y, text="label:N")
        for side, align, dx in ((0.0, "left", 12), (1.0, "right", -12))
    ]
    height = max(150, round(_FLOW_HEIGHT * max(len(sources), len(targets)) * 1.3))
    return _finished(alt.layer(area, rectangles, *texts), "Flow of rows or documents to their outcomes", height=height)


def _thick(flow: Flow, total: int) -> float:
    """Return how thick a ribbon is; the thinnest ones are drawn so that they can be seen."""
    return max(_THINNEST, flow.count / total)


def _stacked(flows: Sequence[Flow], side: str, space: float) -> list[float]:
    """Return where each ribbon begins on one side: those of one node together, nodes at least `space` apart."""
    total = sum(each.count for each in flows)
    begins = [0.0] * len(flows)
    at = 0.0
    for node in dict.fromkeys(getattr(each, side) for each in flows):
        first = at
        for number, each in enumerate(flows):
            if getattr(each, side) == node:
                begins[number] = at
                at += _thick(each, total)
        at = max(at + 0.05, first + space)
    return begins


def _labels(flows: Sequence[Flow], begins: Sequence[float], side: str, x: float) -> list[Spec]:
    """Return the nodes of one side, each with its name, its count and its share."""
    total = sum(each.count for each in flows)
    labels = []
    for name in dict.fromkeys(getattr(each, side) for each in flows):
        mine = [number for number, each in enumerate(flows) if getattr(each, side) == name]
        count = sum(flows[number].count for number in mine)
        top = min(begins[number] for number in mine)
        text = f"{name}: {count:,} ({count / total:.2%})"
        thick = sum(_thick(flows[number], total) for number in mine)
        labels.append({"x": x, "top": top, "bottom": top + thick, "label": text})
    return labels


def order(measure: Measure) -> Spec:
    """Draw a measure of an order beside what a random permutation gives, and what a buffer gives."""
    points = [
        {"what": "this data set", "value": measure.found},
        {"what": "shuffle through a buffer", "value": measure.buffer},
        {"what": "random permutation, mean", "value": measure.random},
    ]
    x = alt.X("value:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(format=".4~g", tickCount=6))
    band = (
        alt.Chart(_data([{"low": measure.low, "high": measure.high}]))
        .mark_rect(opacity=0.25, color="var(--c3)")
        .encode(
            x=alt.X("low:Q", scale=alt.Scale(zero=False)),
            x2="high:Q",
            tooltip=[alt.Tooltip("low:Q", title="99% of random ones, from"), alt.Tooltip("high:Q", title="to")],
        )
    )
    dots = (
        alt.Chart(_data(points))
        .mark_point(filled=True, size=130, opacity=1)
        .encode(
            x=x,
            shape=alt.Shape(
                "what:N", sort=None, title=None, scale=alt.Scale(range=["circle", "diamond", "triangle-up"])
            ),
            color=alt.Color(
                "what:N", sort=None, title=None, scale=alt.Scale(range=["var(--c1)", "var(--c2)", "var(--c3)"])
            ),
            tooltip=["what:N", alt.Tooltip("value:Q", format=".6~g")],
        )
    )
    return _finished(band + dots, f"{measure.name}: found, of a buffer, and 99% of random permutations", height=44)


def shares(stretches: Sequence[Share]) -> Spec:
    """Draw which share of the samples each source gives, over the run, with the stages marked."""
    rows: list[Spec] = []
    top: dict[int, float] = {}
    for each in stretches:
        low = top.get(each.begin, 0.0)
        top[each.begin] = low + each.share
        rows.append(msgspec.to_builtins(each) | {"low": low, "high": top[each.begin]})
    sources = list(dict.fromkeys(each.source for each in stretches))
    area = (
        alt.Chart(_data(rows))
        .mark_rect()
        .encode(
            x=alt.X("begin:Q", title="sample of the run", axis=alt.Axis(format="~s", tickCount=8)),
            x2="end:Q",
            y=alt.Y("low:Q", title="share", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            y2="high:Q",
            color=alt.Color("source:N", sort=sources, title=None),
            tooltip=["source:N", "stage:O", alt.Tooltip("begin:Q", format=","), alt.Tooltip("share:Q", format=".2%")],
        )
    )
    begins = {each.stage: min(s.begin for s in stretches if s.stage == each.stage) for each in stretches}
    marks = alt.Chart(_data([{"at": begin, "label": f"stage {stage}"} for stage, begin in begins.items()]))
    rules = marks.mark_rule(color=_TEXT, strokeDash=[4, 3]).encode(x="at:Q")
    labels = marks.mark_text(align="left", dx=5, baseline="bottom").encode(x="at:Q", y=alt.value(-3), text="label:N")
    return _finished(area + rules + labels, "Shares of the sources over the run, stage by stage")


def fill(bins: Sequence[Fill]) -> Spec:
    """Draw how many samples are filled to which degree."""
    rows = [
        {"label": "full" if each.low == each.high else f"{each.low:g} to {each.high:g}%", "samples": each.samples}
        for each in bins
    ]
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("label:N", sort=None, title="filled with text", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("samples:Q", title="samples", axis=alt.Axis(format="~s")),
            tooltip=["label:N", alt.Tooltip("samples:Q", format=",")],
        )
    )
    return _finished(chart, "Bars: samples by how full they are", height=180)


def run(runs: Sequence[Run], field: str, title: str) -> Spec:
    """Draw a figure of the rows of the log over the time of each run."""
    rows = [
        {"seconds": row.seconds, "value": getattr(row, field), "run": f"run {number}"}
        for number, each in enumerate(runs, start=1)
        for row in each.rows
        if field != "tokens_per_second" or row.tokens_per_second
    ]
    chart = (
        alt.Chart(_data(rows))
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("seconds:Q", title="seconds since the run began", axis=alt.Axis(tickCount=8)),
            y=alt.Y("value:Q", title=title, axis=alt.Axis(format="~s")),
            color=alt.Color("run:N", sort=None, title=None, legend=alt.Undefined if len(runs) > 1 else None),
            tooltip=["run:N", alt.Tooltip("seconds:Q", format=",.1f"), alt.Tooltip("value:Q", format=",")],
        )
    )
    return _finished(chart, f"Line: {title} over the run", height=160)


def tokenizers(found: Sequence[TokenizerFigures]) -> Spec:
    """Draw the bytes per token of tokenizers, with their intervals."""
    rows = [
        {"name": each.name, "value": each.bytes_per_token.value, "low": each.bytes_per_token.low,
         "high": each.bytes_per_token.high}
        for each in found
    ]  # fmt: skip
    base = alt.Chart(_data(rows)).encode(y=alt.Y("name:N", sort=None, title=None))
    bar = base.mark_bar(opacity=0.55).encode(
        x=alt.X("value:Q", title="bytes per token", axis=alt.Axis(tickCount=6)),
        tooltip=["name:N", *(alt.Tooltip(f"{field}:Q", format=".3f") for field in ("value", "low", "high"))],
    )
    line = base.mark_rule(color=_TEXT, strokeWidth=2).encode(x="low:Q", x2="high:Q")
    return _finished(bar + line, "Bars: bytes per token by tokenizer", height=max(2, len(rows)) * _BAR_HEIGHT)

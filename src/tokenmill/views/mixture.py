"""Mixture: weights and stages → how many samples of which source, and the schedule that draws them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.dataroot.layout import SCHEDULE_PERIOD as PERIOD
from tokenmill.dataroot.view_record import StageRecord, most_samples
from tokenmill.errors import RecipeError
from tokenmill.loading.arrangement import MixedStage
from tokenmill.views.schedule import integer_shares, make_period
from tokenmill.views.spec import MOST_EPOCHS, ViewSource, ViewSpec


class Mixed(NamedTuple):
    """The stages of a mixture."""

    stages: list[StageRecord]
    schedule: NDArray[np.uint16]
    """Source and rank of each place of a period, for each stage; shape `(stages, 2, PERIOD)`."""


class _End(NamedTuple):
    """Where a source has given all that it may."""

    sample: int
    """The first sample of the stage that the source could not give."""
    source: ViewSource


def mix(spec: ViewSpec, samples: Mapping[str, int], seq_len: int, left_out: Mapping[str, Mapping[str, int]]) -> Mixed:
    """Plan the stages of a mixture.

    Args:
        spec: what the user asks for; its sources are in order.
        samples: of one epoch of each source, by its name.
        seq_len: tokens per sample.
        left_out: documents of each source that are not in the view, by reason.

    Raises:
        RecipeError: a source would have to begin more epochs than it may, or has no sample.
    """
    sources = {source.name: source for source in spec.sources}
    taken = dict.fromkeys(sources, 0)
    records: list[StageRecord] = []
    schedule: list[NDArray[np.uint16]] = []
    for number, stage in enumerate(spec.mixed_stages, start=1):
        weights = stage.weights or {}
        try:
            shares = integer_shares({name: weights.get(name, 0.0) for name in sources})
        except ValueError as error:
            raise RecipeError(f"view, stage {number}: {error}", next_step="correct the weights") from None
        for name, share in shares.items():
            if share and not samples[name]:
                reasons = ", ".join(f"{count} ({why})" for why, count in left_out[name].items())
                raise RecipeError(
                    f"view, stage {number}: source {name!r} has no whole sample of {seq_len} tokens, and a weight of "
                    f"{weights[name]:g}" + (f"; documents of it were left out: {reasons}" if reasons else ""),
                    next_step="leave fewer of its documents out, give it the weight 0, or make seq_len shorter",
                )
        period = make_period(shares)
        mixed = MixedStage(0, np.array(list(shares.values()), np.int64), *period)
        left = {
            name: most_samples(source.max_epochs, samples[name]) - taken[name]
            for name, source in sources.items()
            if shares[name]
        }
        end = _end(mixed, list(sources), sources, left)
        length = stage.samples or (stage.tokens or 0) // seq_len
        if stage.samples is None and stage.tokens is None:
            length = end.sample
        if length == 0 and stage.tokens:
            raise RecipeError(
                f"view, stage {number}: has no whole sample: {stage.tokens} tokens, and samples of {seq_len}",
                next_step="make the stage longer, or leave it out",
            )
        if end.sample == 0:
            raise RecipeError(
                f"view, stage {number}: source {end.source.name!r} has nothing left: it has {samples[end.source.name]} "
                f"samples, and may be taken {end.source.max_epochs:g} times",
                next_step="raise its max_epochs, give it the weight 0 in this stage, or make earlier stages shorter",
            )
        begin = sum(record.samples for record in records)
        if end.sample < length:
            share, name = shares[end.source.name], end.source.name
            needed = Fraction(int(mixed.taken(length)[list(sources).index(name)]) + taken[name], samples[name])
            raise RecipeError(
                f"view: source {name!r} has {samples[name]} samples, and may be taken {end.source.max_epochs:g} times: "
                f"it would have to be taken again at sample {begin + end.sample}, which is sample {end.sample} of the "
                f"{length} of stage {number}",
                next_step=f"what fits: a stage of {end.sample} samples (tokens = {end.sample * seq_len}), or a share "
                f"of less than {left[name] / length:.4g} of the stage (it is {share / PERIOD:.4g})"
                + (f", or max_epochs = {_rounded_up(needed)}" if needed <= MOST_EPOCHS else ""),
            )
        counts = dict(zip(sources, mixed.taken(length).tolist(), strict=True))
        for name, count in counts.items():
            taken[name] += count
        records.append(
            StageRecord(
                samples=length,
                shares={name: share for name, share in shares.items() if share},
                taken={name: count for name, count in counts.items() if shares[name]},
            )
        )
        schedule.append(np.stack(period))
    return Mixed(records, np.stack(schedule))


def _end(stage: MixedStage, names: list[str], sources: Mapping[str, ViewSource], left: Mapping[str, int]) -> _End:
    """Return which source of a stage, with so many samples left each, has none first, and where."""
    by_source = np.argsort(stage.source, kind="stable")
    firsts = np.searchsorted(stage.source[by_source], np.arange(len(names) + 1))
    ends = []
    for number, name in enumerate(names):
        if name in left:
            places = by_source[firsts[number] : firsts[number + 1]]
            periods, rank = divmod(left[name], len(places))
            ends.append(_End(periods * PERIOD + int(places[rank]), sources[name]))
    return min(ends, key=lambda end: (end.sample, end.source.name))


def _rounded_up(epochs: Fraction) -> str:
    return f"{float(-(-epochs * 10_000 // 1) / 10_000):.10g}"

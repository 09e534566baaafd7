"""The picture of a comparison: loss by step, mean over seeds with a band, and the difference to the first variant."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashmhf.comparison.results import ComparisonResult, VariantResult
from flashmhf.reports.comparison_figures import line_style
from flashmhf.reports.lines import BAND_ALPHA
from flashmhf.reports.smoothing import smoothed
from flashmhf.reports.style import GREY, in_figure, legend_below, new_figure, plain
from flashmhf.reports.ticks import plain_ticks
from flashmhf.reports.verdicts import verdict_lines

INCHES = (5.0, 4.7)  # without the legend
TITLE_CHARACTERS = 60  # in a line
MAX_TITLE_LINES = 3
SETTLED = 0.1  # of the steps, after which losses are in the picture; before, they fall too far to share its scale

BySeed = dict[int, np.ndarray]


def seed_bands(result: ComparisonResult, *, titled: bool = True) -> Figure:
    """Training loss of each variant, smoothed, and below it the paired difference; the verdicts are its title."""
    figure = new_figure(*INCHES)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    variants = _shown(result)
    steps, curves = _curves(result, variants)
    tops = [_band(above, result, row, steps, curves[row.variant]) for row in variants if curves[row.variant]]
    for row in variants:
        if (differences := _differences(result, row, curves)) and row.difference is not None:
            _band(below, result, row, steps, differences)
    below.axhline(0, color=GREY, linewidth=1)
    above.set_ylabel("training loss (nats/token)")
    below.set(xlabel="step", ylabel=in_figure(f"difference to {result.settings.variants[0]}"))
    for axes in (above, below):
        plain(axes)
    plain_ticks(below.xaxis, whole=True)
    if tops:
        above.set_ylim(top=max(tops))
        legend_below(figure)
    lines = [line for sentence in verdict_lines(result) for line in textwrap.wrap(sentence, TITLE_CHARACTERS)]
    if titled and len(lines) <= MAX_TITLE_LINES:
        above.set_title("\n".join(map(in_figure, lines)), fontsize=9, loc="left")
    return figure


def caption(result: ComparisonResult) -> str:
    """What lines and bands are."""
    return (
        "Training loss by step, smoothed: mean over seeds, with a band from the lowest to the highest seed; the first "
        f"steps are above the picture. Below, the paired difference to {result.settings.variants[0]}, likewise."
    )


def _shown(result: ComparisonResult) -> list[VariantResult]:
    """The variants; with the ablations only if there is but one."""
    plain_ones = [row for row in result.variants if row.ablation is None]
    return plain_ones if len(plain_ones) > 1 else list(result.variants)


def _curves(result: ComparisonResult, variants: list[VariantResult]) -> tuple[list[float], dict[str, BySeed]]:
    """Steps that all finished runs have logged, and for each variant and seed the losses at them."""
    names = {row.variant for row in variants}
    runs = [run for run in result.runs if run.finished and run.variant in names and run.curve.steps]
    common = sorted(set.intersection(*(set(run.curve.steps) for run in runs))) if runs else []
    curves: dict[str, BySeed] = {name: {} for name in names}
    for run in runs if common else ():
        losses = dict(zip(run.curve.steps, run.curve.losses, strict=True))
        curves[run.variant][run.seed] = smoothed([losses[step] for step in common])
    return [float(step) for step in common], curves


def _differences(result: ComparisonResult, row: VariantResult, curves: dict[str, BySeed]) -> BySeed:
    """To the first variant on the same backbone, by seed."""
    first = next(
        other.variant
        for other in result.variants
        if (other.model, other.ffn_type, other.ablation) == (row.model, result.settings.variants[0], None)
    )
    mine, theirs = curves[row.variant], curves.get(first, {})
    return {seed: mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()}


def _band(axes: Axes, result: ComparisonResult, row: VariantResult, steps: list[float], by_seed: BySeed) -> float:
    """Draws the mean, with a band from the lowest to the highest; returns the highest once losses have settled."""
    values = np.stack(list(by_seed.values()))
    low, high = values.min(0), values.max(0)
    colour, style = line_style(result, row)
    seeds = f"{len(values)} seeds" if len(values) > 1 else "1 seed"
    label = in_figure(f"{row.variant}, {seeds}")
    axes.plot(steps, values.mean(0), linewidth=1.6, label=label, color=colour, linestyle=style)
    axes.fill_between(steps, low, high, color=colour, alpha=BAND_ALPHA, linewidth=0)
    return float(high[int(SETTLED * len(high)) :].max())

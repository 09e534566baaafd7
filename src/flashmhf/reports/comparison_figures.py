"""Figures of a comparison: loss against size, differences, bars, gates; the lines of its curves."""

from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from flashmhf.comparison.results import ComparisonResult, Curve, GateUsage, RunResult, Spread, VariantResult
from flashmhf.reports.heads import draw_map
from flashmhf.reports.lines import Line, Trace
from flashmhf.reports.quantities import Captioned, Chart, losses_against, settled
from flashmhf.reports.style import (
    COLOURS,
    FIGURE_INCHES,
    GREY,
    LINE_STYLES,
    in_figure,
    legend_below,
    new_axes,
    new_figure,
    plain,
)
from flashmhf.reports.ticks import logarithmic

MIN_SIZES = 3  # for a power law
MIN_SPREAD = 0.05  # between bars; smaller differences are in the table
BAR_INCHES = (0.7, 0.45)  # of a figure without bars, of a bar

Loss = Literal["curve", "validation_curve"]
Size = Literal["parameters", "forward_flops_per_token"]
Measure = Literal["tokens_per_second", "peak_memory_mib"]


def loss_curves(result: ComparisonResult) -> dict[str, list[Captioned]]:
    """Training and validation loss by step, tokens and time: a line per variant, with a band over its seeds."""
    levels = {"unigram entropy": result.unigram_entropy_nats}
    band = "mean over seeds, with a band from the lowest to the highest"
    training = Chart(lines=_lines(result, "curve"), name="Training loss", note=f", smoothed: {band}", levels=levels)
    validation = Chart(
        lines=_lines(result, "validation_curve"), name="Validation loss", note=f": {band}", levels=levels
    )
    return losses_against([training, *settled(training), validation])


def _lines(result: ComparisonResult, loss: Loss) -> list[Line]:
    """Of the runs that finished."""
    lines = []
    for row in result.variants:
        runs = [run for run in result.runs if run.variant == row.variant and run.finished]
        traces = tuple(_trace(run, curve) for run in runs if (curve := getattr(run, loss)).steps)
        colour, style = line_style(result, row)
        if traces:
            lines.append(Line(name=row.variant, traces=traces, colour=colour, style=style, smooth=loss == "curve"))
    return lines


def _trace(run: RunResult, curve: Curve) -> Trace:
    each = run.tokens / run.steps if run.tokens and run.steps else None
    return Trace(
        values=curve.losses,
        steps=curve.steps,
        elapsed_s=curve.elapsed_s,
        tokens=() if each is None else tuple(each * step for step in curve.steps),
    )


def line_style(result: ComparisonResult, row: VariantResult) -> tuple[str, Any]:
    """The layer's colour, and one of several line styles among its variants."""
    names = [other.variant for other in result.variants if other.ffn_type == row.ffn_type]
    return COLOURS[row.ffn_type], LINE_STYLES[names.index(row.variant) % len(LINE_STYLES)]


def sizes_vary(result: ComparisonResult) -> bool:
    """Whether some layer has several sizes, so that loss against size shows more than the table."""
    sizes: dict[str, set[int]] = {}
    for row in result.variants:
        if row.ablation is None:
            sizes.setdefault(row.ffn_type, set()).add(row.parameters)
    return any(len(own) > 1 for own in sizes.values())


def loss_against(result: ComparisonResult, size: Size, label: str) -> Figure:
    """Loss against a size, with a power law for each layer that has enough sizes."""
    figure, axes = new_axes(label, "nats/token")
    points = [
        (variant.ffn_type, variant.ablation, float(getattr(variant, size)), variant.validation_loss.mean)
        for variant in result.variants
        if variant.validation_loss.mean is not None
    ]
    for ffn_type in dict.fromkeys(point[0] for point in points):
        own = sorted(point[2:] for point in points if point[:2] == (ffn_type, None))
        if not own:
            continue
        colour = COLOURS[ffn_type]
        sizes, losses = np.array(own).T
        axes.scatter(sizes, losses, color=colour, label=in_figure(ffn_type), zorder=3)
        if len(set(sizes)) >= MIN_SIZES:
            exponent, log_scale = np.polyfit(np.log(sizes), np.log(losses), 1)
            fitted = np.exp(log_scale) * sizes**exponent
            axes.plot(sizes, fitted, color=colour, label=in_figure(f"{ffn_type}: size^{exponent:.3f}"))
    axes.margins(0.1)
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    legend_below(figure)
    return figure


def differences(result: ComparisonResult) -> Figure | None:
    """Held-out loss minus that of the first variant: each seed, the mean and its interval; None without any."""
    found = [(row, row.difference.nats_per_token) for row in result.variants[::-1] if row.difference is not None]
    if not found:
        return None
    figure, axes = new_axes(
        in_figure(f"held-out loss minus that of {result.settings.variants[0]} (nats/token)"), "", _bar_height(found)
    )
    for height, (row, difference) in enumerate(found):
        colour, _ = line_style(result, row)
        if difference.interval is not None:
            axes.plot(difference.interval, [height, height], color=colour, linewidth=2)
        axes.plot(difference.by_run, [height] * len(difference.by_run), "o", color=colour, alpha=0.4, markersize=4)
        axes.plot([difference.mean], [height], "D", color=colour, markersize=7)
    plain(axes)
    axes.grid(False)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(found)), [in_figure(row.variant) for row, _ in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.1)
    return figure


def bars(result: ComparisonResult, measure: Measure) -> Figure | None:
    """The mean of a measure by variant; whiskers from the lowest to the highest seed. None if all are about equal."""
    spreads: list[tuple[VariantResult, Spread]] = [(row, getattr(row, measure)) for row in result.variants[::-1]]
    rows = [(row.variant, COLOURS[row.ffn_type], spread) for row, spread in spreads if spread.mean is not None]
    means = np.array([spread.mean for _, _, spread in rows])
    if len(means) < 2 or means.max() < (1 + MIN_SPREAD) * means.min():
        return None
    figure = new_figure(FIGURE_INCHES[0], _bar_height(rows))
    axes = figure.subplots()
    ends = np.array([(min(spread.values), max(spread.values)) for _, _, spread in rows]).reshape(-1, 2)
    drawn = axes.barh(
        [in_figure(row[0]) for row in rows],
        means,
        xerr=np.abs(ends.T - means),
        ecolor=GREY,
        color=[row[1] for row in rows],
        height=0.6,
    )
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    return figure


def _bar_height(rows: list[Any]) -> float:
    return BAR_INCHES[0] + BAR_INCHES[1] * len(rows)


def gate_maps(heads: tuple[GateUsage, ...]) -> Figure:
    """Layers by heads: the gate's entropy, and how even the load is."""
    shape = max(head.layer for head in heads) + 1, max(head.head for head in heads) + 1
    figure = new_figure(FIGURE_INCHES[0], 1.3 + 0.3 * shape[0])
    axes = figure.subplots(1, 2)
    entropy, load = np.full(shape, np.nan), np.full(shape, np.nan)
    for head in heads:
        entropy[head.layer, head.head], load[head.layer, head.head] = head.entropy, head.load
    for axis, values, title in zip(axes, (entropy, load), ("gate entropy", "load evenness"), strict=True):
        image = draw_map(axis, values, title, limits=(0.0, 1.0))
    figure.colorbar(image, ax=axes)
    return figure

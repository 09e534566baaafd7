"""Figures of a comparison: curves, loss against size, bars, gates."""

from collections.abc import Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.comparison.results import ComparisonResult, Curve, GateUsage, Spread, VariantResult
from flashmhf.reports.heads import draw_map
from flashmhf.reports.style import COLOURS, FIGURE_INCHES, GREY, in_figure, new_axes

LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
MIN_SIZES = 3  # for a power law
DARK = 0.6  # values below it have a dark colour in a map
MAX_POINTS = 60  # of a curve
MAX_NUMBERS = 64  # written into the cells of a map

Loss = Literal["curve", "validation_curve"]
Size = Literal["parameters", "forward_flops_per_token"]
Measure = Literal["tokens_per_second", "peak_memory_mib"]


def curves(result: ComparisonResult, loss: Loss, against: Literal["step", "time"]) -> Figure:
    """One line per run, one colour per layer, one line style per ablation, and the unigram entropy.

    A curve with more than `MAX_POINTS` points is averaged over as many neighbours as bring it below that.
    """
    figure, axes = new_axes("step" if against == "step" else "seconds of training", "nats/token")
    marker = None if loss == "curve" else "o"
    labelled: set[str] = set()
    for run in result.runs:
        curve: Curve = getattr(run, loss)
        if not curve.losses:
            continue
        label = None if run.variant in labelled else run.variant
        labelled.add(run.variant)
        x, y = averaged(curve.steps if against == "step" else curve.elapsed_s), averaged(curve.losses)
        axes.plot(
            x,
            y,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=label and in_figure(label),
            **line_style(result, run.ffn_type, run.variant),
        )
    axes.axhline(result.unigram_entropy_nats, color=GREY, linestyle="--", linewidth=1, label="unigram entropy")
    if against == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def averaged(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` means of as many neighbours each."""
    together = -(-len(values) // MAX_POINTS)
    return [float(np.mean(values[begin : begin + together])) for begin in range(0, len(values), together)]


def line_style(result: ComparisonResult, ffn_type: str, variant: str) -> dict[str, Any]:
    """The layer's colour, and one of several lines among its variants."""
    names = [row.variant for row in result.variants if row.ffn_type == ffn_type]
    return {"color": COLOURS[ffn_type], "linestyle": LINE_STYLES[names.index(variant) % len(LINE_STYLES)]}


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
            axes.set(xscale="log", yscale="log")
    axes.margins(0.1)
    axes.legend(frameon=False, fontsize=9)
    return figure


def bars(result: ComparisonResult, measure: Measure) -> Figure:
    """The mean of a measure by variant."""
    spreads: list[tuple[VariantResult, Spread]] = [(row, getattr(row, measure)) for row in result.variants[::-1]]
    rows = [(row.variant, COLOURS[row.ffn_type], spread.mean) for row, spread in spreads if spread.mean is not None]
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], 0.6 + 0.4 * len(rows)), layout="constrained")
    drawn = axes.barh(
        [in_figure(row[0]) for row in rows], [row[2] for row in rows], color=[row[1] for row in rows], height=0.6
    )
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    return figure


def gate_maps(heads: tuple[GateUsage, ...]) -> Figure:
    """Layers by heads: the gate's entropy, and how even the load is."""
    shape = max(head.layer for head in heads) + 1, max(head.head for head in heads) + 1
    figure, axes = plt.subplots(1, 2, figsize=(FIGURE_INCHES[0], 1.3 + 0.3 * shape[0]), layout="constrained")
    entropy, load = np.full(shape, np.nan), np.full(shape, np.nan)
    for head in heads:
        entropy[head.layer, head.head], load[head.layer, head.head] = head.entropy, head.load
    for axis, values, title in zip(axes, (entropy, load), ("gate entropy", "evenness of the load"), strict=True):
        image = draw_map(axis, values, title, vmin=0, vmax=1)
        for (layer, head), value in np.ndenumerate(values) if values.size <= MAX_NUMBERS else ():
            shade = "white" if value < DARK else "black"
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure

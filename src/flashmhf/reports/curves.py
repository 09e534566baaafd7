"""Pictures of a comparison: curves, loss against size, bars, gates."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.reports.heads import draw_map
from flashmhf.reports.page import BLUE, FIGURE_INCHES, GREEN, GREY, ORANGE, PURPLE, VERMILION, new_axes

COLOURS = {"flashmhf": BLUE, "swiglu": VERMILION, "mhffn": GREEN, "pkv": PURPLE, "dense_moe": ORANGE}
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
UNIGRAM_COLOUR = GREY
MIN_SIZES = 3  # for a power law
DARK = 0.6  # of the map's colours
MAX_POINTS = 60  # of a curve
MAX_NUMBERS = 64  # written into the fields of a map


def curves(results: dict[str, Any], name: str, against: int, marker: str | None) -> Figure:
    """One line a run, one colour a variant, one dash an ablation, and what a model without context could reach.

    Of more than `MAX_POINTS` points there are means of as many in a row as bring them below it.
    """
    figure, axes = new_axes("step" if against == 0 else "seconds of training", "nats/token")
    labelled: set[str] = set()
    for run in results["runs"]:
        if not run[name]:
            continue
        label = None if run["variant"] in labelled else run["variant"]
        labelled.add(run["variant"])
        points = _means(np.array(run[name], dtype=float)).T
        axes.plot(
            points[against], points[1], marker=marker, markersize=4, linewidth=1.2, label=label, **_style(results, run)
        )
    entropy = results["unigram_entropy_nats"]
    axes.axhline(entropy, color=UNIGRAM_COLOUR, linestyle="--", linewidth=1, label="unigram entropy")
    if against == 0:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def _means(points: np.ndarray) -> np.ndarray:
    together = -(-len(points) // MAX_POINTS)
    return np.array([points[begin : begin + together].mean(0) for begin in range(0, len(points), together)])


def _style(results: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """One dash for each entry of a colour."""
    names = [entry["variant"] for entry in results["variants"] if entry["ffn_type"] == row["ffn_type"]]
    return {"color": COLOURS[row["ffn_type"]], "linestyle": STYLES[names.index(row["variant"]) % len(STYLES)]}


def loss_against(results: dict[str, Any], measure: str, name: str) -> Figure:
    """Loss against a size, with a power law for each variant that has enough sizes."""
    figure, axes = new_axes(name, "nats/token")
    rows = [row for row in results["variants"] if row["validation_loss"]["mean"] is not None]
    for ffn_type, colour in COLOURS.items():
        mine = sorted(
            (row[measure], row["validation_loss"]["mean"])
            for row in rows
            if row["ffn_type"] == ffn_type and row["ablation"] is None
        )
        if not mine:
            continue
        sizes, losses = np.array(mine).T
        axes.scatter(sizes, losses, color=colour, label=ffn_type, zorder=3)
        if len(set(sizes)) >= MIN_SIZES:
            exponent, log_scale = np.polyfit(np.log(sizes), np.log(losses), 1)
            axes.plot(
                sizes, np.exp(log_scale) * sizes**exponent, color=colour, label=f"{ffn_type}: size^{exponent:.3f}"
            )
    if len({row[measure] for row in rows}) >= MIN_SIZES:
        axes.set(xscale="log", yscale="log")
    axes.margins(0.1)
    axes.legend(frameon=False, fontsize=9)
    return figure


def bars(results: dict[str, Any], measure: str) -> Figure:
    rows = [row for row in results["variants"][::-1] if row[measure]["mean"] is not None]
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], 0.6 + 0.4 * len(rows)), layout="constrained")
    names = [row["variant"] for row in rows]
    colours = [COLOURS[row["ffn_type"]] for row in rows]
    bars = axes.barh(names, [row[measure]["mean"] for row in rows], color=colours, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    return figure


def gate_maps(heads: list[dict[str, Any]]) -> Figure:
    """Layers by heads: the gate's entropy, and how even the load is."""
    layers, columns = (max(head[key] for head in heads) + 1 for key in ("layer", "head"))
    figure, axes = plt.subplots(1, 2, figsize=(FIGURE_INCHES[0], 1.3 + 0.3 * layers), layout="constrained")
    titles = {"entropy": "entropy of the gate", "load": "evenness of the load"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = np.full((layers, columns), np.nan)
        for head in heads:
            values[head["layer"], head["head"]] = head[key]
        image = draw_map(axis, values, title, vmin=0, vmax=1)
        for (layer, head), value in np.ndenumerate(values) if values.size <= MAX_NUMBERS else ():
            shade = "white" if value < DARK else "black"
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure

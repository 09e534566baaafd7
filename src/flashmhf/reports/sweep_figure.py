"""Loss against learning rate: one line for each contender and warm-up, all rungs, and the optimum."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from flashmhf.reports.style import COLOURS, GREY, in_figure, legend_below, new_axes
from flashmhf.reports.ticks import plain_number
from flashmhf.sweeping.results import CellResult, ContenderResult, RungResult, TuningResult

MARKERS = "os^Dvph<>"  # of warm-ups
STYLES = ("-", "--", ":", "-.")
HEIGHT = 3.4
HEADROOM, MAX_HEADROOM = 0.25, 1.0  # nats/token above the best of the shortest rung
FAINT = 0.35  # rungs before the last


def losses_by_rate(result: TuningResult, *, all_rungs: bool = True) -> Figure:
    """Colours are contenders, markers and line styles warm-ups. Rungs before the last are faint, or left out."""
    figure, axes = new_axes("learning rate", "validation loss (nats/token)", HEIGHT)
    warmups = sorted(result.settings.warmups)
    drawn = [(contender, rung) for contender in result.contenders for rung in contender.rungs[0 if all_rungs else -1 :]]
    for contender, rung in drawn:
        for index, warmup in enumerate(warmups):
            _draw_line(axes, contender, rung, index, warmup)
    for contender in result.contenders:
        _draw_optimum(axes, contender)
    axes.set_xscale("log")
    axes.set_xticks(sorted({cell.learning_rate for _, rung in drawn for cell in rung.cells}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: plain_number(rate)))
    axes.margins(0.08)
    _limit(axes, result.contenders, [rung for _, rung in drawn])
    legend_below(figure, _legend(result, warmups, all_rungs))
    return figure


def _limit(axes: Axes, contenders: Sequence[ContenderResult], rungs: Sequence[RungResult]) -> None:
    """Cuts off what is far above the best of the shortest rung: a rate that diverges would hide all differences.

    The next best of each contender stays, unless it is very far above.
    """
    means = [[mean for cell in rung.cells if (mean := cell.validation_loss.mean) is not None] for rung in rungs]
    bests = [min(losses) for losses in means if losses]
    low, top = min(bests), max(bests) + max(HEADROOM, max(bests) - min(bests))
    others = [_mean(contender.runner_up) for contender in contenders if contender.runner_up is not None]
    top = max([top, *(loss + 0.1 * (loss - low) for loss in others if loss < low + MAX_HEADROOM)])
    if top < max(max(losses) for losses in means if losses):
        axes.set_ylim(low - 0.08 * (top - low), top)


def _mean(cell: CellResult) -> float:
    mean = cell.validation_loss.mean
    return math.nan if mean is None else mean


def _draw_line(axes: Axes, contender: ContenderResult, rung: RungResult, index: int, warmup: float) -> None:
    cells = [cell for cell in rung.cells if cell.warmup == warmup]
    last = rung == contender.rungs[-1]
    axes.errorbar(
        [cell.learning_rate for cell in cells],
        [_mean(cell) for cell in cells],
        [cell.validation_loss.standard_deviation or 0.0 for cell in cells] if last else None,
        color=COLOURS[contender.ffn_type],
        **_style(index),
        markersize=6 if last else 4,
        linewidth=1.6 if last else 0.9,
        capsize=3,
        alpha=1.0 if last else FAINT,
    )


def _draw_optimum(axes: Axes, contender: ContenderResult) -> None:
    """A star at the best cell; the bar below it is the range of rates that lose little."""
    best, flat, colour = contender.best, contender.flat, COLOURS[contender.ffn_type]
    loss = _mean(best)
    axes.plot([flat.low, flat.high], [loss, loss], color=colour, linewidth=7, alpha=FAINT, solid_capstyle="butt")
    axes.plot([best.learning_rate], [loss], color=colour, **_STAR)


_STAR: dict[str, Any] = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": "none", "zorder": 4}


def _style(index: int) -> dict[str, Any]:
    return {"marker": MARKERS[index % len(MARKERS)], "linestyle": STYLES[index % len(STYLES)]}


def _legend(result: TuningResult, warmups: list[float], all_rungs: bool) -> list[Line2D]:
    steps = [rung.steps for rung in result.contenders[0].rungs]
    handles = [
        Line2D([], [], color=COLOURS[contender.ffn_type], label=in_figure(contender.variant))
        for contender in result.contenders
    ]
    handles += [
        Line2D([], [], color=GREY, **_style(index), label=f"warm-up {100 * warmup:g} %")
        for index, warmup in enumerate(warmups)
    ]
    if all_rungs and len(steps) > 1:
        shorter = ", ".join(f"{number:,}" for number in steps[:-1])
        handles.append(Line2D([], [], color=GREY, alpha=FAINT, marker="o", label=f"{shorter} of {steps[-1]:,} steps"))
    tolerance = result.contenders[0].flat.tolerance
    return [*handles, Line2D([], [], color=GREY, **_STAR, label=f"best, and rates within {tolerance:g}")]

"""A scaling fit as Markdown and as a picture."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flashmhf.comparison.verdict import MIN_SEEDS
from flashmhf.reports.style import BLUE, GREY, PURPLE, colours_of, in_figure, new_figure, plain
from flashmhf.reports.table import Table
from scaling_law import CLAIM, TARGET, Estimate, Fit, SizeRow
from scaling_runs import CONTENDERS

INCHES = (10.4, 4.4)
MIN_RATIO = 1.6  # between labels of sizes
BESIDE = 1.04  # by which a contender's points are shifted


def markdown(found: Fit) -> str:
    """The result as a page."""
    form = "loss = E + A N^-alpha" if found.has_floor else "a pure power law, loss = A N^-alpha: too few sizes for E"
    form += ", and to tell whether it holds" if len(found.sizes) == 2 else ""
    spread = "its own deviations" if found.own_deviations else "the relative deviations of all sizes, pooled"
    where = "at the largest size" if found.own_deviations else "here"
    return "\n".join(
        [
            "# Scaling fit",
            "",
            _table(found).markdown(),
            "",
            "Losses: means over seeds, nats/token. Deviation: standard deviation over seeds of the relative "
            "difference. Last column: seeds that would resolve the paper's difference at this size with 80 % power.",
            "",
            f"N is without embeddings; {form}. Intervals: 95 % over seeds, each size with {spread}; they take the law "
            "for exact.",
            "",
            *(f"- {name}: alpha {value}" for name, value in found.exponents.items()),
            f"- difference of the exponents: {found.exponent_difference}",
            f"- relative difference at 370M: {_percent(found.difference_at_target)} (the paper: {100 * CLAIM:+.2f} %, "
            "one seed, 21 layers against 24, at 174 tokens per parameter instead of those of these runs)",
            *(f"- without {size}: {_percent(difference)}" for size, difference in found.without.items()),
            "",
            _no_verdict(found) if found.verdict is None else found.verdict,
            f"If the deviation over seeds stays what it is {where}, {found.seeds_needed_at_target} seeds of both at "
            "370M itself would settle it with 80 % power.",
            "",
        ]
    )


def _no_verdict(found: Fit) -> str:
    few = next(row for row in found.sizes if row.seeds < MIN_SEEDS)
    return f"No verdict: it requires {MIN_SEEDS} seeds or more at every size, {few.size} has {few.seeds}."


def _table(found: Fit) -> Table:
    columns = (
        "size", "N", "seeds", *CONTENDERS, "difference (%, 95 %)", "deviation (%)", "seeds for 80 % power"
    )  # fmt: skip
    rows = [
        (
            row.size,
            round(row.parameters),
            row.seeds,
            *(f"{mean:.4f}" for mean in _means(row)),
            f"{100 * row.difference:+.2f}" + ("" if row.interval is None else _ends(*row.interval)),
            f"{100 * row.deviation:.2f}",
            row.seeds_needed,
        )
        for row in found.sizes
    ]
    return Table(columns, rows)


def _means(row: SizeRow) -> list[float]:
    return [float(np.mean(row.losses[name])) for name in CONTENDERS]


def _ends(low: float, high: float) -> str:
    return f" [{100 * low:+.2f}, {100 * high:+.2f}]"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.2f}{_ends(estimate.low, estimate.high)} %"


def _thousandths(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def picture(found: Fit) -> Figure:
    """Loss against parameters with both laws, and their relative difference."""
    figure = new_figure(*INCHES)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, found)
    _draw_differences(right, found)
    for axes in (left, right):
        plain(axes)
        axes.set_xscale("log")
        ticks = [row.parameters for row in found.sizes] + [TARGET]
        axes.set_xticks([tick for tick, after in pairwise([*ticks, np.inf]) if after > MIN_RATIO * tick])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number / 1e6:.3g}M"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.set_xlabel("parameters without embeddings")
        axes.legend(frameon=False, fontsize=9)
    return figure


def _draw_losses(axes: Axes, found: Fit) -> None:
    """The contenders' points side by side, since they nearly coincide."""
    for number, (name, colour) in enumerate(zip(CONTENDERS, colours_of(CONTENDERS), strict=True)):
        at = [row.parameters * BESIDE ** (2 * number - 1) for row in found.sizes]
        for one, row in zip(at, found.sizes, strict=True):
            axes.plot([one] * row.seeds, row.losses[name], ".", color=colour, markersize=3)
        means = [_means(row)[number] for row in found.sizes]
        label = in_figure(f"{name}: exponent {_thousandths(found.exponents[name])}")
        axes.plot(at, means, "o", color=colour, markersize=8, markerfacecolor="none", label=label)
        _draw_curve(axes, found, found.curves[name], colour, 1.0)
    axes.set_yscale("log")
    axes.set_ylabel("validation loss (nats/token)")
    axes.set_title("dots: seeds; circles: means; bands: 95 % over seeds; dashed: extrapolated", fontsize=9, loc="left")


def _draw_differences(axes: Axes, found: Fit) -> None:
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axhline(
        100 * CLAIM, color=PURPLE, linewidth=1.4, linestyle="-.", label=f"the paper at 370M: {100 * CLAIM:.2f} %"
    )
    _draw_curve(axes, found, found.difference_curve, BLUE, 100.0)
    for row in found.sizes:
        low, high = row.interval or (row.difference, row.difference)
        label = "mean and 95 % over seeds" if row is found.sizes[0] else None
        _draw_interval(axes, row.parameters, Estimate(value=row.difference, low=low, high=high), "o", label)
    end = found.difference_at_target
    _draw_interval(axes, TARGET, end, "D", f"extrapolated: {_percent(end)}")
    axes.set_ylabel(f"{CONTENDERS[1]} / {CONTENDERS[0]} - 1 (%)")


def _draw_interval(axes: Axes, at: float, estimate: Estimate, marker: str, label: str | None) -> None:
    ends = [[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]]
    axes.errorbar([at], [100 * estimate.value], ends, fmt=marker, color=BLUE, markersize=5, capsize=4, label=label)


def _draw_curve(axes: Axes, found: Fit, curve: tuple[Estimate, ...], colour: str, factor: float) -> None:
    at, last = np.array(found.curve_parameters), found.sizes[-1].parameters
    values, low, high = (factor * np.array([getattr(one, name) for one in curve]) for name in ("value", "low", "high"))
    trained = at <= last
    beyond = at >= at[trained][-1]
    axes.plot(at[trained], values[trained], color=colour, linewidth=1.4)
    axes.plot(at[beyond], values[beyond], color=colour, linewidth=1.4, linestyle="--")
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)

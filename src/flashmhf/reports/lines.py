"""Curves over steps, tokens and time: a line per run, or per variant with a band over its seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashmhf.reports.smoothing import outline, smoothed
from flashmhf.reports.style import FIGURE_INCHES, GREY, in_figure, legend_below, new_axes
from flashmhf.reports.ticks import plain_ticks, time_unit

Against = Literal["steps", "tokens", "time"]
AGAINST: tuple[Against, ...] = ("steps", "tokens", "time")
MAX_POINTS = 600  # of a line; with more, those are kept that stand out
MAX_WITH_RAW = 3  # lines of a figure that shows raw values, too
RARE = (0.5, 99.5)  # percentiles, beyond which values are rare
HEADROOM = 1.08  # of the y axis
GRID_POINTS = 200  # where runs have no x in common
MAX_MARKED = 15  # points that are shown as such
RAW_ALPHA, BAND_ALPHA = 0.3, 0.2


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A quantity of one run: all of one length; tokens are empty if they are not known."""

    values: tuple[float, ...]
    steps: tuple[float, ...]
    elapsed_s: tuple[float, ...]
    tokens: tuple[float, ...] = ()

    def against(self, what: Against) -> tuple[float, ...]:
        return {"steps": self.steps, "tokens": self.tokens, "time": self.elapsed_s}[what]

    def since(self, step: float) -> "Trace":
        """The part from this step on."""
        begin = next((at for at, one in enumerate(self.steps) if one >= step), len(self.steps))
        return Trace(
            values=self.values[begin:],
            steps=self.steps[begin:],
            elapsed_s=self.elapsed_s[begin:],
            tokens=self.tokens[begin:],
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that are drawn as one line.

    Attributes:
        name: in the legend; a line without a name is not in it.
        traces: one per seed, none of them empty.
        style: of the line.
        smooth: draw the mean over neighbours; of one run also the raw values, faintly, if lines are few.
    """

    name: str
    traces: tuple[Trace, ...]
    colour: str
    style: Any = "-"
    smooth: bool = True


def known(lines: Iterable[Line]) -> list[Against]:
    """What the lines can be drawn against: tokens only if those of every trace are known."""
    tokens = all(trace.tokens for line in lines for trace in line.traces)
    return [what for what in AGAINST if what != "tokens" or tokens]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is around the lines of a figure.

    Attributes:
        label: of the y axis.
        height: in inches, without the legend.
        levels: named horizontal lines.
        marks: x of dotted vertical lines.
        from_zero: the y axis begins at 0.
        whole: the x axis begins at 0 and the y axis shows every value; otherwise neither, and rare values are cut off.
        legend: whether there is one.
    """

    label: str
    height: float = FIGURE_INCHES[1]
    levels: Mapping[str, float] = field(default_factory=dict)
    marks: Sequence[float] = ()
    from_zero: bool = False
    whole: bool = True
    legend: bool = True


def draw_lines(lines: Sequence[Line], against: Against, frame: Frame) -> Figure:
    """A figure of the lines; of few lines the raw values, too."""
    longest = max((trace.against(against)[-1] for line in lines for trace in line.traces), default=0.0)
    scale, unit = time_unit(longest) if against == "time" else (1.0, {"steps": "step", "tokens": "tokens"}[against])
    figure, axes = new_axes(f"{unit} of training" if against == "time" else unit, frame.label, frame.height)
    for line in lines:
        _draw(axes, line, against, scale, raw=len(lines) <= MAX_WITH_RAW)
    for name, level in frame.levels.items():
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1, label=in_figure(name))
    low, high = axes.get_xlim()
    for x in frame.marks:
        if low <= x / scale <= high:
            axes.axvline(x / scale, color=GREY, linestyle=":", linewidth=1)
    plain_ticks(axes.xaxis, whole=against != "time")
    if frame.whole:
        axes.set_xlim(left=0)
    else:
        _cut(axes, lines)
    if frame.from_zero:
        axes.set_ylim(0, HEADROOM * max(axes.get_ylim()[1], 1e-9))
    if frame.legend:
        legend_below(figure)
    return figure


def _cut(axes: Axes, lines: Sequence[Line]) -> None:
    """Leaves out the rarest values."""
    values = np.concatenate([trace.values for line in lines for trace in line.traces])
    low, high = np.percentile(values, RARE)
    margin = (HEADROOM - 1) * (high - low)
    if margin > 0:
        axes.set_ylim(low - margin, high + margin)


def common_grid(xs: Sequence[np.ndarray]) -> np.ndarray:
    """The x of the first within the range of all if all have them, else evenly spaced ones; empty without a range."""
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    if low >= high:
        return np.zeros(0)
    own = xs[0][(xs[0] >= low) & (xs[0] <= high)]
    return own if all(np.isin(own, x).all() for x in xs) else np.linspace(low, high, GRID_POINTS)


def _draw(axes: Axes, line: Line, against: Against, scale: float, *, raw: bool) -> None:
    xs = [np.asarray(trace.against(against)) / scale for trace in line.traces]
    values = [np.asarray(trace.values) for trace in line.traces]
    ys = [smoothed(own) for own in values] if line.smooth else values
    grid = common_grid(xs) if len(xs) > 1 else np.zeros(0)
    style = {"color": line.colour, "linestyle": line.style}
    if len(grid):
        stacked = np.stack([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
        axes.fill_between(grid, stacked.min(0), stacked.max(0), color=line.colour, alpha=BAND_ALPHA, linewidth=0)
        _plot(axes, grid, stacked.mean(0), label=_label(line, f", {len(xs)} seeds"), **style)
        return
    for number, (x, own, y) in enumerate(zip(xs, values, ys, strict=True)):
        if raw and not np.array_equal(own, y):
            kept = outline(own, MAX_POINTS)
            axes.plot(x[kept], own[kept], alpha=RAW_ALPHA, linewidth=0.8, **style)
        _plot(axes, x, y, label=_label(line) if number == 0 else None, **style)


def _label(line: Line, addition: str = "") -> str | None:
    return in_figure(line.name + addition) if line.name else None


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    kept = outline(y, MAX_POINTS)
    axes.plot(x[kept], y[kept], linewidth=1.6, marker="o" if len(x) <= MAX_MARKED else None, markersize=4, **style)

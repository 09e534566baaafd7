"""Pictures of rows: one panel a quantity, tokens across and one line a variant, or bars where tokens do not vary."""

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import cell
from flashmhf.reports.page import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

# Kind of benchmark -> (quantity, what distinguishes the lines, what every panel shows by itself).
Panels = dict[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]]
PANELS: Panels = {
    kind: [(quantity, (line,), panel) for quantity in quantities]
    for kind, line, panel, quantities in (
        ("op", "variant", ("measured_pass", "dtype"), ("median_ms", "peak_mib")),
        ("layer", "variant", ("measured_pass", "dtype"), ("median_ms", "peak_mib")),
        ("decode", "variant", ("dtype",), ("median_ms", "ratio_to_copy")),
        ("model", "model", ("task", "dtype"), ("tokens_per_s", "peak_mib")),
    )
}
LABELS = {
    "ratio": "time / SwiGLU's",
    "median_ms": "time, ms",
    "peak_mib": "peak memory, MiB",
    "tokens_per_s": "tokens/s",
    "ratio_to_copy": "rate of reading weights / of copying",
}
LOGARITHMIC = ("peak_mib", "median_ms")
COLOURS = {"flashmhf": BLUE, "swiglu": VERMILION, "naive": GREEN, "blockwise": BLUE, "reference": GREY}
PALETTE = (PURPLE, ORANGE, SKY, GREEN, GREY, VERMILION, BLUE, "black")
WIDTH, HEIGHT = 5.0, 3.4  # of a panel, in inches


@dataclass(frozen=True)
class Panel:
    """One quantity of some rows."""

    title: str
    quantity: str
    lines: dict[str, list[Row]]

    @property
    def across(self) -> bool:
        """Whether tokens vary, so that there is something to draw lines over."""
        return len({row.get("tokens") for rows in self.lines.values() for row in rows}) > 1

    @property
    def height(self) -> float:
        """In inches."""
        return HEIGHT if self.across else 0.9 + 0.35 * len(self.lines)

    @property
    def label(self) -> str:
        return LABELS.get(self.quantity, self.quantity.replace("_", " "))


class PlainLogFormatter(LogFormatter):
    """Labels the ticks that `LogFormatter` would, without powers of ten."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:,.5g}" if super().__call__(value, position) else ""


def panels(kind: str, rows: Iterable[Row], kinds: Panels = PANELS) -> list[Panel]:
    """What there is to draw of the rows of one kind."""
    found = []
    for quantity, line_keys, panel_keys in kinds.get(kind, ()):
        chosen: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            if row.get(quantity) is not None:
                title, line = (", ".join(str(row.get(key)) for key in keys) for keys in (panel_keys, line_keys))
                chosen.setdefault(title, {}).setdefault(line, []).append(row)
        found += [Panel(f"{kind}: {title}", quantity, lines) for title, lines in chosen.items()]
    return found


def grid(chosen: list[Panel], columns: int = 2) -> Figure:
    """All panels in one figure, at most that many beside each other."""
    columns = max(min(columns, len(chosen)), 1)
    lines = max(-(-len(chosen) // columns), 1)  # a figure needs one, also where all variants failed
    heights = [
        max((panel.height for panel in chosen[columns * i : columns * (i + 1)]), default=1) for i in range(lines)
    ]
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(WIDTH * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, chosen, strict=False):
        draw(axis, panel)
        axis.set_title(panel.title, fontsize="medium")
    return figure


def png(figure: Figure) -> bytes:
    """The picture of a figure, which is closed."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    return picture.getvalue()


def draw(axis: Axes, panel: Panel) -> None:
    """Draws a panel without its title; quartiles are whiskers."""
    axis.spines[["top", "right"]].set_visible(False)
    (_lines if panel.across else _bars)(axis, panel)


def _lines(axis: Axes, panel: Panel) -> None:
    for (name, rows), colour in zip(panel.lines.items(), _colours(panel.lines), strict=True):
        values, tokens = [row[panel.quantity] for row in rows], [row["tokens"] for row in rows]
        axis.errorbar(tokens, values, _whiskers(panel, rows), fmt="o-", markersize=4, color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _thousands(tokens)))
    if panel.quantity in LOGARITHMIC:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(PlainLogFormatter())
        axis.yaxis.set_minor_formatter(PlainLogFormatter(labelOnlyBase=False))
    axis.set(xlabel="tokens", ylabel=panel.label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", edgecolor="none")


def _bars(axis: Axes, panel: Panel) -> None:
    names = list(panel.lines)
    rows = [rows[-1] for rows in panel.lines.values()]
    values = [row[panel.quantity] for row in rows]
    bars = axis.barh(names, values, height=0.6, color=_colours(names), xerr=_whiskers(panel, rows), ecolor="black")
    axis.bar_label(bars, [cell(float(value)) for value in values], padding=3)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.spines["bottom"].set_visible(False)
    axis.set(xlabel=panel.label, xticks=[])


def _whiskers(panel: Panel, rows: list[Row]) -> list[list[float]] | None:
    """How far the quartiles are from the median, down and up."""
    if panel.quantity != "median_ms" or any(row.get("lower_quartile_ms") is None for row in rows):
        return None
    return [
        [row["median_ms"] - row["lower_quartile_ms"] for row in rows],
        [row["upper_quartile_ms"] - row["median_ms"] for row in rows],
    ]


def _colours(names: Iterable[str]) -> list[str]:
    """A variant's own, a model's by its layer (`flashmhf-tiny`), or one that is still free, again and again."""
    names = list(names)
    given = {name: COLOURS[name] for name in names if name in COLOURS}
    for name in names:
        own = COLOURS.get(name.partition("-")[0])
        if name not in given and own is not None and own not in given.values():
            given[name] = own
    free = itertools.cycle([colour for colour in PALETTE if colour not in given.values()])
    return [given.get(name) or next(free) for name in names]


def _thousands(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"

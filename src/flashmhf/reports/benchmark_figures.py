"""Pictures of rows: one panel per quantity, with one line per variant over tokens, or bars if tokens do not vary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashmhf.benchmarking.measuring import Row
from flashmhf.reports.style import FIGURE_INCHES, GREY, GRID, colours_of, in_figure, legend_below, new_figure
from flashmhf.reports.table import cell
from flashmhf.reports.ticks import logarithmic, plain_ticks, sizes


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What to draw: a row's key, the keys whose values name a line, and those whose values name a panel."""

    name: str
    line: tuple[str, ...] = ("variant",)
    panel: tuple[str, ...]


QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    kind: tuple(Quantity(name=name, line=(line,), panel=panel) for name in names)
    for kind, line, panel, names in (
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
    "ratio_to_copy": "weights' bandwidth / copy bandwidth",
}
LOGARITHMIC = ("peak_mib", "median_ms")
WIDTH, HEIGHT = FIGURE_INCHES  # of a panel


@dataclass(frozen=True)
class Panel:
    """One quantity of some rows, by line."""

    title: str
    quantity: str
    lines: dict[str, list[Row]]

    @property
    def over_tokens(self) -> bool:
        """Whether tokens vary, so that there are lines to draw."""
        return len({row.get("tokens") for rows in self.lines.values() for row in rows}) > 1

    @property
    def height(self) -> float:
        """In inches."""
        return HEIGHT if self.over_tokens else 0.9 + 0.35 * len(self.lines)

    @property
    def label(self) -> str:
        return LABELS.get(self.quantity, self.quantity.replace("_", " "))

    @property
    def caption(self) -> str:
        """What it shows, such as "peak memory, MiB: layer, forward, float32"."""
        return f"{self.label}: {self.title}"


def panels(kind: str, rows: Sequence[Row], quantities: Mapping[str, Sequence[Quantity]] = QUANTITIES) -> list[Panel]:
    """The panels of the rows of one kind."""
    found = []
    for quantity in quantities.get(kind, ()):
        lines_of: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            if row.get(quantity.name) is not None:
                title, line = (", ".join(str(row.get(key)) for key in keys) for keys in (quantity.panel, quantity.line))
                lines_of.setdefault(title, {}).setdefault(line, []).append(row)
        found += [Panel(f"{kind}, {title}", quantity.name, lines) for title, lines in lines_of.items()]
    return found


def grid(chosen: Sequence[Panel], columns: int = 2) -> Figure:
    """All panels in one figure, at most `columns` side by side."""
    columns = max(min(columns, len(chosen)), 1)
    rows = [chosen[i : i + columns] for i in range(0, len(chosen), columns)] or [()]  # a figure needs a row
    heights = [max((panel.height for panel in row), default=1) for row in rows]
    figure = new_figure(WIDTH * columns, sum(heights))
    axes = figure.subplots(len(rows), columns, height_ratios=heights, squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    colours = line_colours(chosen)
    for axis, panel in zip(axes.flat, chosen, strict=False):
        _draw(axis, panel, colours)
        axis.set_title(in_figure(panel.caption), fontsize="medium")
    legend_below(figure)
    return figure


def line_colours(chosen: Iterable[Panel]) -> dict[str, str]:
    """The colour of each line, the same in all panels."""
    names = list(dict.fromkeys(name for panel in chosen for name in panel.lines))
    return dict(zip(names, colours_of(names), strict=True))


def draw_panel(panel: Panel, colours: Mapping[str, str]) -> Figure:
    """A panel as a figure without a title; `colours` are those of its lines."""
    figure = new_figure(WIDTH, panel.height)
    axis = figure.subplots()
    _draw(axis, panel, colours)
    legend_below(figure)
    return figure


def _draw(axis: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    """Quartiles are whiskers."""
    axis.spines[["top", "right"]].set_visible(False)
    (_lines if panel.over_tokens else _bars)(axis, panel, colours)


def _lines(axis: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for name, rows in panel.lines.items():
        values, tokens = [row[panel.quantity] for row in rows], [row["tokens"] for row in rows]
        axis.errorbar(
            tokens, values, _whiskers(panel, rows), fmt="o-", markersize=4, color=colours[name], label=in_figure(name)
        )
    sizes(axis, {float(row["tokens"]) for rows in panel.lines.values() for row in rows})
    if panel.quantity in LOGARITHMIC:
        logarithmic(axis, "y")
    else:
        plain_ticks(axis.yaxis)
    axis.set(xlabel="tokens", ylabel=panel.label)
    axis.set_axisbelow(True)
    axis.grid(color=GRID)


def _bars(axis: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    names = list(panel.lines)
    rows = [rows[-1] for rows in panel.lines.values()]
    values = [row[panel.quantity] for row in rows]
    bars = axis.barh(
        [in_figure(name) for name in names],
        values,
        height=0.6,
        color=[colours[name] for name in names],
        xerr=_whiskers(panel, rows),
        ecolor=GREY,
    )
    axis.bar_label(bars, [cell(float(value)) for value in values], padding=3)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.spines["bottom"].set_visible(False)
    axis.set(xlabel=panel.label, xticks=[])


def _whiskers(panel: Panel, rows: list[Row]) -> list[list[float]] | None:
    """Distances of the quartiles from the median, down and up."""
    if panel.quantity != "median_ms" or any(row.get("lower_quartile_ms") is None for row in rows):
        return None
    return [
        [row["median_ms"] - row["lower_quartile_ms"] for row in rows],
        [row["upper_quartile_ms"] - row["median_ms"] for row in rows],
    ]

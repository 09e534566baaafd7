"""How figures look: one set of colours, distinct for any colour vision (Okabe and Ito's), plain axes, legends below."""

import functools
import itertools
import re
from collections.abc import Iterable
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from flashmhf.printable import one_line
from flashmhf.reports.ticks import plain_ticks

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666"
)  # fmt: skip
INK, GRID = "#000000", "#eeeeee"
PALETTE = (PURPLE, ORANGE, SKY, GREEN, GREY, VERMILION, BLUE, INK)
COLOURS = {
    "flashmhf": BLUE,
    "swiglu": VERMILION,
    "mhffn": GREEN,
    "pkv": PURPLE,
    "dense_moe": ORANGE,
    "naive": GREEN,
    "chunked": SKY,
    "blockwise": BLUE,
    "onednn": SKY,
    "triton": GREEN,
    "hopper": VERMILION,
    "reference": GREY,
}
LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
FIGURE_INCHES = (5.0, 3.2)
LEGEND_POINTS = 9
CHARACTER_INCHES, KEY_INCHES, ROW_INCHES = 0.08, 0.6, 0.21  # of a legend


def colours_of(names: Iterable[str]) -> list[str]:
    """A layer's own colour, a model's by its layer (`flashmhf-tiny`), or otherwise the next unused one, repeating."""
    names = list(names)
    given = {name: COLOURS[name.lower()] for name in names if name.lower() in COLOURS}
    for name in names:
        own = COLOURS.get(re.split("[-, ]", name.lower())[0])
        if name not in given and own is not None and own not in given.values():
            given[name] = own
    free = itertools.cycle([colour for colour in PALETTE if colour not in given.values()])
    return [given.get(name) or next(free) for name in names]


def in_figure(name: str) -> str:
    """A name as text of a figure: no mathematics, no characters that the font lacks, not left out of a legend."""
    shown = "".join(
        one if ord(one) in _characters() else one.encode("unicode_escape").decode() for one in one_line(name)
    )
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches. Nothing but the caller keeps it, as pyplot would."""
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(x: str, y: str, height: float = FIGURE_INCHES[1]) -> tuple[Figure, Axes]:
    """An empty figure with named axes."""
    figure = new_figure(FIGURE_INCHES[0], height)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Neither a frame nor vertical lines; plain numbers; the grid is below what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)


def legend_below(figure: Figure, handles: Iterable[Artist] | None = None) -> None:
    """One legend for all axes, below them, where it hides no data; the figure grows by its height.

    Args:
        figure: with constrained layout.
        handles: what to explain; else whatever has a label, each label once.
    """
    if handles is None:
        pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    else:
        pairs = [(handle, str(handle.get_label())) for handle in handles]
    shown = {label: handle for handle, label in reversed(pairs)}
    most = int((figure.get_figwidth() - KEY_INCHES) / CHARACTER_INCHES)
    labels = list(dict.fromkeys(label for _, label in pairs))
    if not labels:
        return
    columns = int(figure.get_figwidth() // (KEY_INCHES + CHARACTER_INCHES * min(max(map(len, labels)), most)))
    columns = max(min(columns, len(labels)), 1)
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + ROW_INCHES * rows)
    figure.legend(
        [shown[label] for label in labels],
        [label if len(label) <= most else f"{label[: most - 1]}…" for label in labels],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=LEGEND_POINTS,
    )

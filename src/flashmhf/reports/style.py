"""How figures look: one set of colours, distinct for any colour vision (Okabe and Ito's), and plain axes."""

import functools
import itertools
from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from flashmhf.printable import one_line

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666"
)  # fmt: skip
PALETTE = (PURPLE, ORANGE, SKY, GREEN, GREY, VERMILION, BLUE, "black")
COLOURS = {
    "flashmhf": BLUE,
    "swiglu": VERMILION,
    "mhffn": GREEN,
    "pkv": PURPLE,
    "dense_moe": ORANGE,
    "naive": GREEN,
    "blockwise": BLUE,
    "reference": GREY,
}
FIGURE_INCHES = (5.0, 3.4)


def colours_of(names: Iterable[str]) -> list[str]:
    """A layer's own colour, a model's by its layer (`flashmhf-tiny`), or otherwise the next unused one, repeating."""
    names = list(names)
    given = {name: COLOURS[name] for name in names if name in COLOURS}
    for name in names:
        own = COLOURS.get(name.partition("-")[0])
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


def new_axes(x: str, y: str, height: float = FIGURE_INCHES[1]) -> tuple[Figure, Axes]:
    """An empty figure with named axes."""
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], height), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Neither a frame nor vertical lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")

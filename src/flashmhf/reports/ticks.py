"""Numbers on axes as people write them: no powers of ten, no offsets."""

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import (
    FixedLocator,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

SUFFIXES = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (2e4, 1e3, "k"))  # from a number on: the unit and its name
NARROW, WIDE = 0.7, 2.5  # decades of a logarithmic axis
DIGITS = 6
TIME_UNITS = ((3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))  # from so many seconds on
MAX_SIZES = 8  # that each get a tick


def plain_number(value: float, decimals: int | None = None, size: tuple[float, str] | None = None) -> str:
    """Such as 0.0004, 1,500, 50k and 2.5M.

    Args:
        value: the number.
        decimals: how many, otherwise as many as it has.
        size: the unit and its suffix, otherwise those that fit.
    """
    unit, suffix = _size(value) if size is None else size
    rounded = float(f"{value / unit:.{DIGITS}g}") + 0.0  # no negative zero
    shown = f"{rounded:,.{_decimals(rounded) if decimals is None else decimals}f}"
    return f"{shown}{suffix}" if rounded or not suffix else "0"


def _size(value: float) -> tuple[float, str]:
    return next(((unit, suffix) for least, unit, suffix in SUFFIXES if abs(value) >= least), (1.0, ""))


def _decimals(value: float) -> int:
    """That a number of at most `DIGITS` digits has."""
    return len(np.format_float_positional(float(f"{value:.{DIGITS}g}"), trim="-").partition(".")[2])


class PlainFormatter(Formatter):
    """All ticks of an axis with the same number of decimals and the same suffix."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def set_locs(self, locs: Any) -> None:
        self._ticks = [float(tick) for tick in locs]

    def __call__(self, value: float, position: int | None = None) -> str:
        size = _size(max((abs(tick) for tick in self._ticks), default=value))
        decimals = [_decimals(tick / size[0]) for tick in self._ticks]
        return plain_number(value, max(decimals, default=None), size)


def binary_number(value: float) -> str:
    """Such as 512 and 16k, which is 16384."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def plain_ticks(axis: Axis, *, whole: bool = False) -> None:
    """On a linear axis.

    Args:
        whole: only whole numbers, such as steps.
    """
    axis.set_major_locator(MaxNLocator(nbins="auto", integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PlainFormatter())


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic; call it when everything is drawn, since the ticks depend on the limits."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    if decades < NARROW:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < WIDE else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def sizes(axes: Axes, values: set[float]) -> None:
    """A logarithmic x axis, with a tick at each size if there are few."""
    axes.set_xscale("log", base=2)
    if len(values) <= MAX_SIZES:
        axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_number(value)))


def time_unit(longest_s: float) -> tuple[float, str]:
    """Seconds per unit, and its name, for an axis that ends there."""
    return next((seconds, name) for least, seconds, name in TIME_UNITS if longest_s >= least)

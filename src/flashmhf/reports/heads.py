"""Maps of layers by heads: `flashmhf inspect` as a picture, and as a table."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MultipleLocator

from flashmhf.evaluation.inspection import FIGURES, HeadReport
from flashmhf.files import atomic_write
from flashmhf.reports.style import new_figure
from flashmhf.reports.table import Table
from flashmhf.reports.ticks import PlainFormatter, plain_number

COLUMNS = 5  # of maps
MAP_INCHES = (3.0, 1.2, 0.28)  # width, height without layers, height per layer
SHARES = ("gate_entropy", "load_entropy", "dead_rows", "k_rank", "u_rank", "v_rank")  # from 0 to 1
STEPS = (1, 2, 5, 10)  # of the upper limits of other figures, times a power of ten
MAX_TICKS = 9  # of heads or layers
MAX_NUMBERS = 64  # written into the cells of a map
DARK_SHARE = 0.6  # of the limits, below which colours are dark
ON_DARK, ON_LIGHT = "#fdfdfd", "#0a0a0a"  # text in cells; not the colours that pages replace


def heads_table(reports: list[HeadReport], figures: Sequence[str] | None = None) -> Table:
    """One row per head; all figures, or some."""
    names = ("layer", "head", *(FIGURES if figures is None else figures))
    rows = [[_shown(getattr(report, name)) for name in names] for report in reports]
    return Table([name.replace("_", " ") for name in names], rows)


def _shown(value: float | None) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def draw_heads(reports: list[HeadReport], file: Path) -> None:
    """A PNG with one map of layers by heads for each figure of `flashmhf inspect` that the model has."""
    names = [name for name in FIGURES if getattr(reports[0], name) is not None]
    shape = max(report.layer for report in reports) + 1, max(report.head for report in reports) + 1
    columns = min(COLUMNS, len(names))
    rows, (width, margin, per_layer) = -(-len(names) // columns), MAP_INCHES
    figure = new_figure(width * columns, (margin + per_layer * shape[0]) * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.full(shape, np.nan)
        for report in reports:
            values[report.layer, report.head] = getattr(report, name)
        image = draw_map(axis, values, name.replace("_", " "), limits=limits(name, values))
        figure.colorbar(image, ax=axis, format=PlainFormatter())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    atomic_write(file, drawn.getvalue())


def limits(name: str, values: np.ndarray) -> tuple[float, float]:
    """Of the colours: 0 to 1 for shares, otherwise 0 to a round number, so that pictures of models can be compared."""
    finite = values[np.isfinite(values)]
    if name in SHARES or not finite.size or finite.max() <= 0:
        return 0.0, 1.0
    power = 10.0 ** math.floor(math.log10(finite.max()))
    return 0.0, next(step * power for step in STEPS if step * power >= finite.max())


def draw_map(axis: Axes, values: np.ndarray, title: str, *, limits: tuple[float, float]) -> AxesImage:
    """Draws `values` (layers, heads), few of them as numbers, too; `limits` are those of the colours."""
    low, high = limits
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
    axis.set(title=title, xlabel="head", ylabel="layer")
    for ticks, number in ((axis.yaxis, values.shape[0]), (axis.xaxis, values.shape[1])):
        ticks.set_major_locator(MultipleLocator(-(-number // MAX_TICKS)))
        ticks.set_major_formatter(PlainFormatter())
    for (layer, head), value in np.ndenumerate(values) if values.size <= MAX_NUMBERS else ():
        if math.isfinite(value):
            text = plain_number(float(f"{value:.2g}")) if value < high / 100 else f"{value:.2f}"
            colour = ON_DARK if value < low + DARK_SHARE * (high - low) else ON_LIGHT
            axis.text(head, layer, text, ha="center", va="center", color=colour, fontsize=9)
    return image

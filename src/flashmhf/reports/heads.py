"""Maps of layers by heads: `flashmhf inspect` as a picture, and as a table."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from flashmhf.evaluation.inspection import FIGURES, HeadReport
from flashmhf.files import atomic_write
from flashmhf.reports.table import Table

COLUMNS = 4  # of maps
MAP_INCHES = (3.2, 1.2, 0.28)  # width, height without layers, height per layer


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
    rows, (width, margin, per_layer) = -(-len(names) // COLUMNS), MAP_INCHES
    size = (width * COLUMNS, (margin + per_layer * shape[0]) * rows)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.full(shape, np.nan)
        for report in reports:
            values[report.layer, report.head] = getattr(report, name)
        figure.colorbar(draw_map(axis, values, name.replace("_", " ")), ax=axis)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format="png", dpi=120)
    finally:
        plt.close(figure)
    atomic_write(file, drawn.getvalue())


def draw_map(axis: Axes, values: np.ndarray, title: str, **limits: Any) -> AxesImage:
    """Draws `values` (layers, heads); `limits` are vmin and vmax of the colours."""
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
    axis.set(title=title, xlabel="head", ylabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image

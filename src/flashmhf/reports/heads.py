"""Maps of layers by heads, and `flashmhf inspect` as a picture of them."""

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


def draw_heads(reports: list[HeadReport], file: Path) -> None:
    """A PNG with one map of layers by heads for each figure of `flashmhf inspect` that the model has."""
    figures = [name for name in FIGURES if getattr(reports[0], name) is not None]
    layers, heads = (max(getattr(report, name) for report in reports) + 1 for name in ("layer", "head"))
    columns = 4
    size = (3.2 * columns, (1.2 + 0.28 * layers) * -(-len(figures) // columns))
    figure, axes = plt.subplots(-(-len(figures) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(figures) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, figures, strict=False):
        values = np.full((layers, heads), np.nan)
        for report in reports:
            values[report.layer, report.head] = getattr(report, name)
        figure.colorbar(draw_map(axis, values, name.replace("_", " ")), ax=axis)
    try:
        figure.savefig(file, dpi=120)
    finally:
        plt.close(figure)


def draw_map(axis: Axes, values: np.ndarray, title: str, **limits: Any) -> AxesImage:
    """Colours `values` (layers, heads); `limits` are the colours' vmin and vmax."""
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
    axis.set(title=title, xlabel="head", ylabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image

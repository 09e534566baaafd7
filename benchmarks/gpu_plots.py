"""Pictures of what benchmarks/gpu.py measured: one panel a quantity, tokens across, one line a variant."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Section -> (quantity, what distinguishes the lines, what every panel shows by itself).
PANELS: dict[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "op": [("ratio_to_cublas", ("backend", "dtype", "measured_pass"), ("shape",))],
    "layer": [
        ("ratio", ("variant",), ("shape", "measured_pass")),
        ("peak_mib", ("variant",), ("shape", "measured_pass")),
    ],
    "decode": [("ratio", ("variant",), ("shape",)), ("ratio_to_copy", ("variant",), ("shape",))],
    "growth": [("median_ms", ("variant",), ("shape",)), ("peak_bytes_per_token", ("variant",), ("shape",))],
}
LABELS = {"ratio": "time / SwiGLU's"}
LOGARITHMIC = ("peak_mib", "median_ms")


def plot(sections: dict[str, Any], file: Path) -> None:
    """Writes a PNG of every section that has panels."""
    panels = []
    for name, kinds in PANELS.items():
        for quantity, line_keys, panel_keys in kinds:
            rows = [row for row in sections.get(name, {}).get("rows", []) if row.get(quantity) is not None]
            for panel in sorted({tuple(row[key] for key in panel_keys) for row in rows}):
                chosen = [row for row in rows if tuple(row[key] for key in panel_keys) == panel]
                panels.append((f"{name}: {', '.join(panel)}", quantity, line_keys, chosen))
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.5 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, quantity, line_keys, rows) in zip(axes.flat, panels, strict=False):
        for label in dict.fromkeys(tuple(row[key] for key in line_keys) for row in rows):
            line = [row for row in rows if tuple(row[key] for key in line_keys) == label]
            axis.plot([row["tokens"] for row in line], [row[quantity] for row in line], "o-", label=", ".join(label))
        axis.set(title=title, xlabel="tokens", ylabel=LABELS.get(quantity, quantity.replace("_", " ")))
        axis.set_xscale("log", base=2)
        if quantity in LOGARITHMIC:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)

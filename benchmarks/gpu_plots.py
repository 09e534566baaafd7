"""Pictures of what benchmarks/gpu.py measured: one panel a quantity, tokens across, one line a variant."""

from pathlib import Path

from flashmhf.benchmarking.measuring import Row
from flashmhf.files import atomic_write
from flashmhf.reports.benchmark_figures import Panels, grid, panels, png

PANELS: Panels = {
    "op": [("ratio_to_cublas", ("variant", "measured_pass"), ("device", "shape"))],
    "layer": [
        ("ratio", ("variant",), ("device", "shape", "measured_pass")),
        ("peak_mib", ("variant",), ("device", "shape", "measured_pass")),
    ],
    "decode": [
        ("ratio", ("variant",), ("device", "shape")),
        ("ratio_to_copy", ("variant",), ("device", "shape")),
    ],
    "growth": [
        ("median_ms", ("variant",), ("device", "shape")),
        ("peak_bytes_per_token", ("variant",), ("device", "shape")),
    ],
}


def plot(steps: dict[str, list[Row]], file: Path) -> None:
    """Writes a PNG of every step that has panels, if any has rows."""
    drawn = []
    for name in PANELS:
        rows = sorted(steps.get(name, []), key=lambda row: row.get("tokens", 0))
        drawn += panels(name, rows, PANELS)
    if drawn:
        atomic_write(file, png(grid(drawn, columns=3)))

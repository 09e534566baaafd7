"""Pictures of what benchmarks/gpu.py measured: one panel a quantity, tokens across, one line a variant."""

from pathlib import Path
from typing import Any

from flashmhf.reports.benchmark_figures import Panels, grid, panels, png

PANELS: Panels = {
    "op": [("ratio_to_cublas", ("backend", "dtype", "measured_pass"), ("shape",))],
    "layer": [
        ("ratio", ("variant",), ("shape", "measured_pass")),
        ("peak_mib", ("variant",), ("shape", "measured_pass")),
    ],
    "decode": [("ratio", ("variant",), ("shape",)), ("ratio_to_copy", ("variant",), ("shape",))],
    "growth": [("median_ms", ("variant",), ("shape",)), ("peak_bytes_per_token", ("variant",), ("shape",))],
}


def plot(sections: dict[str, Any], file: Path) -> None:
    """Writes a PNG of every section that has panels."""
    drawn = [panel for name in PANELS for panel in panels(name, sections.get(name, {}).get("rows", []), PANELS)]
    if drawn:
        file.write_bytes(png(grid(drawn, columns=3)))

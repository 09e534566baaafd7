"""Pictures of what benchmarks/gpu.py measured: one panel per quantity, one line per variant over tokens."""

from pathlib import Path

from flashmhf.benchmarking.measuring import Row
from flashmhf.files import atomic_write
from flashmhf.reports.benchmark_figures import Quantity, grid, panels
from flashmhf.reports.render import png

LAYER_PANEL = ("device", "shape", "measured_pass")
QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "op": (Quantity(name="ratio_to_cublas", line=("variant", "measured_pass"), panel=("device", "shape")),),
    "layer": tuple(Quantity(name=name, panel=LAYER_PANEL) for name in ("ratio", "peak_mib")),
    "decode": tuple(Quantity(name=name, panel=("device", "shape")) for name in ("ratio", "ratio_to_copy")),
    "growth": tuple(Quantity(name=name, panel=("device", "shape")) for name in ("median_ms", "peak_bytes_per_token")),
}


def plot(steps: dict[str, list[Row]], file: Path) -> None:
    """Writes a PNG of the steps in QUANTITIES, if any has rows."""
    drawn = []
    for name in QUANTITIES:
        rows = sorted(steps.get(name, []), key=lambda row: row.get("tokens", 0))
        drawn += panels(name, rows, QUANTITIES)
    if drawn:
        atomic_write(file, png(grid(drawn, columns=3)))

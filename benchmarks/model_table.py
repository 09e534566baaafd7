"""The rows of benchmarks/static_model.py, with measurements of the same kernels, as text, CSV and Markdown."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from kernel_table import tile_name
from loop_costs import Clocks

SHOWN = ("1.3b", 16384)  # shape and tokens of the CSV and the short table
SHOWN_DIM = 128  # of the short table
MAX_DIFFERENCE = 0.15
DEVICES = {"H100": "sm_90a", "H200": "sm_90a", "A100": "sm_80"}


class Prediction(NamedTuple):
    """One kernel at one shape: fractions of peak, by the algorithm's FLOPs; clocks of one loop iteration."""

    target: str
    kernel: str
    head_dim: int
    tile: str
    shipped: bool
    clocks: Clocks | None
    programs_per_sm: int | None
    shape: str
    tokens: int
    programs: int | None
    waves: int | None
    overlapped: float
    exposed: float
    measured: float | None = None

    @property
    def flag(self) -> str:
        """Set if the measurement is far from the prediction with full overlap."""
        if self.measured is None or abs(self.measured / self.overlapped - 1) <= MAX_DIFFERENCE:
            return ""
        return f"differs by {self.measured / self.overlapped - 1:+.0%}"


def measured(row: Prediction, lines: list[dict[str, Any]]) -> float | None:
    """The latest measurement of a kernel, tile and shape in bfloat16, as a ratio to cuBLAS; None without one."""
    backend, kernel = ("hopper", row.kernel[7:]) if row.kernel.startswith("hopper_") else ("triton", row.kernel)
    wanted = {"backend": backend, "kernel": kernel, "D": row.head_dim, "shape": row.shape, "tokens": row.tokens}
    found = None
    for line in lines:
        if "ratio_to_cublas" not in line or line.get("dtype") != "bfloat16" or line_target(line) != row.target:
            continue
        same_tile = tile_name(line["tile"]) == row.tile if line.get("tile") else row.shipped
        if same_tile and all(line.get(key) == value for key, value in wanted.items()):
            found = line["ratio_to_cublas"]
    return found


def line_target(line: dict[str, Any]) -> str | None:
    """The device class of a measurement."""
    return next((target for name, target in DEVICES.items() if name in line.get("device", "")), None)


def measurements(folder: Path) -> list[dict[str, Any]]:
    """Every line of benchmarks/gpu.py's results."""
    texts = [text for file in sorted(folder.rglob("*.jsonl")) for text in file.read_text().splitlines()]
    return [json.loads(text) for text in texts]


def write_csv(rows: list[Prediction], file: Path) -> None:
    """One line per kernel, at SHOWN; clocks are of one iteration of one program's main loop."""
    names = [name for name in Prediction._fields if name != "clocks"]
    rows = [row for row in rows if (row.shape, row.tokens) == SHOWN]
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow([*names[:-1], *Clocks._fields, "bound", "measured", "flag"])
        for row in rows:
            values = [getattr(row, name) for name in names[:-1]]
            clocks = (
                [""] * (len(Clocks._fields) + 1) if row.clocks is None else [*map(round, row.clocks), row.clocks.bound]
            )
            cells = [f"{value:.3f}" if isinstance(value, float) else value for value in values]
            writer.writerow([*cells, *clocks, _measured(row), row.flag])


def _clocks(row: Prediction) -> list[str]:
    return [] if row.clocks is None else [*(f"{value:.0f}" for value in row.clocks), row.clocks.bound]


def _measured(row: Prediction) -> str:
    return "unmeasured" if row.measured is None else f"{row.measured:.3f}"


def short_table(rows: list[Prediction]) -> str:
    """The shipped kernels at SHOWN and SHOWN_DIM, as Markdown."""
    lines = [
        f"| target | kernel | tile | {' | '.join(Clocks._fields)} | busiest | of peak | measured |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        if row.shipped and row.head_dim == SHOWN_DIM and (row.shape, row.tokens) == SHOWN:
            clocks = _clocks(row) or ["-"] * (len(Clocks._fields) + 1)
            fraction = f"{row.exposed:.2f} to {row.overlapped:.2f}"
            cells = [row.target, row.kernel, row.tile or "-", *clocks, fraction, f"{_measured(row)} {row.flag}".strip()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def line_of(row: Prediction) -> str:
    clocks = (
        "" if row.clocks is None else " ".join(f"{unit} {value:.0f}" for unit, value in row.clocks._asdict().items())
    )
    return (
        f"{row.target} {row.kernel} D={row.head_dim} {row.tile} {row.shape} T={row.tokens}: {clocks} "
        f"waves {row.waves} fraction {row.exposed:.2f} to {row.overlapped:.2f}, {_measured(row)} {row.flag}"
    )

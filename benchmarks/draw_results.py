"""Draws the README's picture, docs/measured.png, from a committed result: `python benchmarks/draw_results.py`."""

import csv
from pathlib import Path

from flashmhf.benchmarking.measuring import Row
from flashmhf.reports.benchmark_figures import grid, panels
from flashmhf.reports.render import png
from flashmhf.reports.style import GREY

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks/results/cpu_layer_growth.csv"
FILE = ROOT / "docs/measured.png"
PASS = "forward+backward"
NUMBERS = ("median_ms", "lower_quartile_ms", "upper_quartile_ms", "peak_mib")


def read_rows(file: Path) -> list[Row]:
    """The rows of a results.csv of one pass, with the numbers that are drawn."""
    with file.open(newline="") as opened:
        lines = [line for line in csv.DictReader(opened) if line["measured_pass"] == PASS]
    return [{**line, "tokens": int(line["tokens"]), **{name: float(line[name]) for name in NUMBERS}} for line in lines]


def main() -> None:
    rows = read_rows(SOURCE)
    figure = grid(panels(rows[0]["kind"], rows))
    origin = "{machine}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    figure.suptitle(f"{SOURCE.name}: {origin}", fontsize="x-small", color=GREY)
    FILE.write_bytes(png(figure))


if __name__ == "__main__":
    main()

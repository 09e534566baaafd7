"""Draws the README's picture, docs/measured.png, from a committed result: `python benchmarks/draw_results.py`."""

from pathlib import Path

from flashmhf.benchmarking import read_result
from flashmhf.reports.benchmark_figures import grid, panels, png

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "cpu_layer_growth.json"
FILE = ROOT / "docs" / "measured.png"


def main() -> None:
    result = read_result(SOURCE)
    rows = [row for row in result["rows"] if row["measured_pass"] == "forward+backward"]
    figure = grid(panels(result["kind"], rows))
    origin = f"{result['machine']}, torch {result['torch']}, commit {result['commit']}, {result['date']}"
    figure.supxlabel(f"{result['command']}\n{origin}", fontsize="x-small", color="#666666")
    FILE.write_bytes(png(figure))


if __name__ == "__main__":
    main()

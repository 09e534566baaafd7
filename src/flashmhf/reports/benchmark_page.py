"""A benchmark's result as files: JSON, CSV, a picture, and a page."""

from dataclasses import asdict
from pathlib import Path

from flashmhf.benchmarking.results import BenchmarkResult
from flashmhf.files import atomic_write, json_text
from flashmhf.reports.benchmark_figures import draw_panel, grid, line_colours, panels
from flashmhf.reports.benchmark_tables import comparison_summary, comparison_table, rows_table
from flashmhf.reports.render import PAGE_FILE, png, render
from flashmhf.reports.table import Table, cell


def write_results(result: BenchmarkResult, folder: Path) -> None:
    """Writes results.json, .csv and .png and report.html atomically, after all of them have been made."""
    contents: dict[str, str | bytes] = {
        "results.json": json_text(result.to_json(), indent=2) + "\n",
        "results.csv": Table.of(result.records(), empty_columns=True).csv(),
        "results.png": png(grid(panels(result.kind, result.rows))),
        PAGE_FILE: webpage(result),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_write(folder / name, content)


def webpage(result: BenchmarkResult) -> str:
    """The page of a result; it loads nothing from anywhere."""
    origin = result.provenance
    facts = {"command": origin.command, "kind": result.kind, **asdict(origin), **asdict(result.workload)}
    chosen = panels(result.kind, result.rows)
    colours = line_colours(chosen)
    rows, same = rows_table(result.rows)
    return render(
        "benchmark.html",
        title=f"flashmhf bench {result.kind}",
        origin=f"{origin.machine}, {origin.date}, torch {origin.torch}, commit {origin.commit or 'unknown'}.",
        comparison=None if result.comparison is None else comparison_table(result.comparison),
        comparison_lines=[] if result.comparison is None else comparison_summary(result.comparison),
        panels=[(draw_panel(panel, colours), panel.caption) for panel in chosen],
        rows=rows,
        same=[(name, cell(value)) for name, value in same.items()],
        facts=[(name.replace("_", " "), cell(value)) for name, value in facts.items() if value is not None],
    )

"""A benchmark's result as files: JSON, CSV, a picture, and a page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmhf.benchmarking.comparing import IDENTITY, Comparison
from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.results import BenchmarkResult
from flashmhf.files import atomic_write, json_text
from flashmhf.reports.benchmark_figures import draw_panel, grid, panels, png
from flashmhf.reports.render import PAGE_FILE, render
from flashmhf.reports.table import Table


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
    return render(
        "benchmark.html",
        title=f"flashmhf bench {result.kind}",
        origin=f"{origin.machine}, {origin.date}, torch {origin.torch}, commit {origin.commit or 'unknown'}.",
        comparison=None if result.comparison is None else comparison_table(result.comparison),
        comparison_lines=[] if result.comparison is None else comparison_summary(result.comparison),
        panels=[(draw_panel(panel), f"{panel.title}: {panel.label}") for panel in panels(result.kind, result.rows)],
        rows=_spaced(Table.of(result.rows)),
        facts=Table(("", ""), [(name.replace("_", " "), value) for name, value in facts.items()]),
    )


def comparison_table(comparison: Comparison) -> Table:
    """One row per measurement: those parts of its identity that vary, the verdict, the figures."""
    values = {key: {str(row.identity.get(key)) for row in comparison.rows} for key in IDENTITY}
    shown = [key for key in IDENTITY if key in ("variant", "model") or len(values[key]) > 1]
    records: list[Row] = []
    for row in comparison.rows:
        figures = {key: value for key, value in asdict(row).items() if key != "identity"}
        name = ", ".join(_phrase(key, row.identity[key]) for key in shown if key in row.identity)
        records.append({"measurement": name, **figures})
    return _spaced(Table.of(records))


def comparison_summary(comparison: Comparison) -> list[str]:
    """Lines: the count of each verdict, the commits, and what else differs."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts.items())
    commits = f"commit {comparison.old_commit} before, {comparison.new_commit} now"
    warnings = [f"Not the same, which may explain differences: {line}" for line in comparison.environment_changes]
    return [f"{counts}; {commits}", *warnings]


def _phrase(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value}" if isinstance(value, int) else str(value)


def _spaced(table: Table) -> Table:
    """Column names as people write them."""
    return Table([name.replace("_", " ") for name in table.columns], table.rows)

"""Tables of a benchmark's result, for its page and for the terminal; draws nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flashmhf.benchmarking.comparing import IDENTITY, QUARTILES, Comparison
from flashmhf.benchmarking.measuring import Row
from flashmhf.reports.table import Table, cell

ALWAYS = ("variant", "model", "ms")  # columns, whatever is in them
FIRST = ("variant", "model", "tokens", "dtype", "task", "pass", "ms", "ratio", "MiB", "tokens/s")
MISSING = object()
RANGE = ("min_ratio", "max_ratio")
SHORT = {
    "median_ms": "ms",
    "measured_pass": "pass",
    "peak_mib": "MiB",
    "peak_bytes_per_token": "bytes/token",
    "tokens_per_s": "tokens/s",
    "ms_per_token": "ms/token",
    "ratio_to_copy": "of copy bandwidth",
}


def rows_table(rows: Sequence[Row]) -> tuple[Table, Row]:
    """What was measured, one row each, with short headers, the main columns first; and what all rows have in common."""
    shown = [_readable(row) for row in rows]
    there = dict.fromkeys(name for row in shown for name in row)
    names = [*(name for name in FIRST if name in there), *(name for name in there if name not in FIRST)]
    same = {
        name: shown[0][name]
        for name in names
        if name not in ALWAYS and len(rows) > 1 and all(row.get(name, MISSING) == shown[0].get(name) for row in shown)
    }
    records = [{name: row.get(name) for name in names if name not in same} for row in shown]
    return Table.of(records), {name: value for name, value in same.items() if value is not None}


def _readable(row: Row) -> Row:
    """Quartiles are one cell; names without underscores."""
    found: Row = {}
    for name, value in row.items():
        if name == QUARTILES[0]:
            ends = [row.get(quartile) for quartile in QUARTILES]
            found["quartiles"] = None if None in ends else " to ".join(map(cell, ends))
        elif name not in QUARTILES:
            found[SHORT.get(name, name.replace("_", " "))] = value
    return found


def comparison_table(comparison: Comparison) -> Table:
    """One row per measurement: those parts of its identity that vary, the verdict, the figures."""
    values = {key: {str(row.identity.get(key)) for row in comparison.rows} for key in IDENTITY}
    shown = [key for key in IDENTITY if key in ("variant", "model") or len(values[key]) > 1]
    records: list[Row] = []
    for row in comparison.rows:
        figures = {key: value for key, value in asdict(row).items() if key not in ("identity", *RANGE)}
        ends = [getattr(row, name) for name in RANGE]
        figures["range of ratio"] = None if None in ends else " to ".join(map(cell, ends))
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

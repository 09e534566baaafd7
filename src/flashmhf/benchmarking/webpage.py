"""A result as one page: what changed, a figure for each quantity, all rows, and where they come from."""

import html
from typing import Any

import matplotlib.pyplot as plt

from flashmhf.benchmarking.comparing import comparison_summary, comparison_table
from flashmhf.benchmarking.drawing import WIDTH, Panel, draw, panels
from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import cell, telling_columns
from flashmhf.benchmarking.results import FACTS, measured
from flashmhf.reports.page import html_figure, html_table, page

NOTE = (
    "Times are medians of calls that took turns, with the quartiles beside them; ratios are to the first variant of "
    "the same run. On a GPU they are the device's, and host ms is what Python takes to queue a call. Memory is the "
    "allocator's peak: of activations for op and layer, for model of all it holds."
)


def webpage(result: dict[str, Any]) -> str:
    """The page of a result; it loads nothing from anywhere."""
    title = f"flashmhf bench {result['kind']}"
    sections = [f"<p>{html.escape(_origin(result))}</p>"]
    if comparison := result.get("comparison"):
        sections += [
            "<h2>Against the earlier result</h2>",
            *(f"<p>{html.escape(line)}</p>" for line in comparison_summary(comparison)),
            _table(comparison_table(comparison)),
        ]
    sections.append("<h2>Pictures</h2>")
    for panel in panels(result["kind"], result["rows"]):
        sections.append(html_figure(_figure(panel), f"{panel.title}: {panel.label}"))
    facts = [(name, cell(result[name])) for name in ("command", *FACTS, "shape") if name in result]
    sections += [
        "<h2>Rows</h2>", f"<p>{NOTE}</p>", _table(measured(result["rows"])),
        "<h2>Where and with what</h2>", html_table(("", ""), facts),
    ]  # fmt: skip
    return page(title, sections)


def _origin(result: dict[str, Any]) -> str:
    commit = result["commit"] or "unknown"
    return f"{result['machine']}, {result['date']}, torch {result['torch']}, commit {commit}."


def _table(rows: list[Row]) -> str:
    columns = telling_columns(rows)
    names = [name.replace("_", " ") for name in columns]
    return html_table(names, [[cell(row.get(column)) for column in columns] for row in rows])


def _figure(panel: Panel) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, panel.height), layout="constrained")
    draw(axis, panel)
    return figure

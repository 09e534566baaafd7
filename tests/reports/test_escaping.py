"""Names of models as cells and as text of figures."""

import csv
import io
import warnings

import pytest

from flashmhf.reports.benchmark_figures import Panel, draw_panel, line_colours
from flashmhf.reports.render import render
from flashmhf.reports.style import in_figure
from flashmhf.reports.table import Table, cell

NAMES = [
    '=HYPERLINK("http://a.example")',
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "a|b",
    "two\nlines",
    "<script>alert(1)</script>",
    "$x^2$ and $$",
    "[a](http://a.example)",
    "![a][b]",
    "\\|",
    "_hidden",
    "\x1b[31m",
    "漢字\U0001f600",
    "\ud83d",
]


@pytest.mark.parametrize("name", NAMES)
def test_csv(name):
    (_, row) = csv.reader(io.StringIO(Table.of([{"model": name, "ms": -1.5}]).csv()))
    assert row[0].lstrip()[0] not in "=+-@"
    assert row[0].removeprefix("'") == cell(name)
    assert row[1] == "-1.5"
    Table([name], []).csv().encode()


@pytest.mark.parametrize("name", NAMES)
def test_markdown(name):
    head, _, row = Table([name, "ms"], [[name, 1.5]]).markdown().split("\n")
    for line, last in ((head, "ms"), (row, "1.5")):
        unescaped = line.replace("\\\\", "").replace("\\|", "")
        assert unescaped.count("|") == 3
        assert line.endswith(f" | {last} |")
        for active in ("<", "$", "]("):
            assert active not in line.replace("\\" + active, "").replace("\\]", "")
        line.encode()


@pytest.mark.parametrize("name", NAMES)
def test_html(name):
    page = render(
        "run.html", title=name, summary=[(name, name)], losses={}, others=[], starts=Table((name,), [(name,)]),
        warnings=[name], data=[name], options=[("model", name)],
    )  # fmt: skip
    assert "<script" not in page
    page.encode()


@pytest.mark.parametrize("name", NAMES)
def test_figures(name):
    """Names are drawn as they are, without warnings about the font, and not left out of the legend."""
    panel = Panel("op: forward", "median_ms", {name: [{"tokens": n, "median_ms": 1.0} for n in (1, 2)], "b": []})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lines in ({name: panel.lines[name]}, {name: panel.lines[name][:1], "other": panel.lines[name][:1]}):
            one = Panel(panel.title, panel.quantity, lines)
            figure = draw_panel(one, line_colours([one]))
            figure.draw_without_rendering()
            (axis,) = figure.axes
            shown = figure.legends[0].get_texts() if one.over_tokens else axis.get_yticklabels()
            assert in_figure(name) in [text.get_text() for text in shown]
            assert all(not text._preprocess_math(text.get_text())[1] for text in shown)

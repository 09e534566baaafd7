"""Tables: cells as people read them, shown as Markdown, HTML, CSV or text."""

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmhf.printable import one_line

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes text a formula in spreadsheets, at its beginning
NARROW_COLUMNS = 2  # fit on a phone, whatever is in them
TERMINAL_WIDTH = 80
LONG = 28  # characters of a cell, beyond which it may be broken into lines
MARKDOWN = re.compile(r"[\\|<$]|\](?=[(\[])")  # what ends a cell, begins HTML or mathematics, or makes a link


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; the first column names the row, the others are numbers.

    `marked` rows stand out on pages.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    marked: frozenset[int] = frozenset()

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], *, empty_columns: bool = False) -> "Table":
        """One column per key, in the order of first appearance.

        Args:
            records: keys to values; a missing key is an empty cell.
            empty_columns: keep columns that are None throughout.
        """
        keys = dict.fromkeys(key for record in records for key in record)
        columns = [key for key in keys if empty_columns or any(record.get(key) is not None for record in records)]
        return cls(columns, [[record.get(column) for column in columns] for record in records])

    def markdown(self) -> str:
        head, *body = [[in_markdown(text) for text in line] for line in (self.columns, *self._cells())]
        lines = [head, ["---", *("---:" for _ in head[1:])], *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def fitting(self, width: int, least: int) -> str:
        """Aligned, without the last columns that a terminal has no room for; at least the first `least` of them."""
        columns = len(self.columns)
        while columns > least and max(map(len, self._first(columns).aligned().splitlines())) > width:
            columns -= 1
        return self._first(columns).aligned()

    def _first(self, columns: int) -> "Table":
        return Table(self.columns[:columns], [row[:columns] for row in self.rows])

    def aligned(self) -> str:
        """Columns of equal width, for a terminal."""
        head, *body = [[one_line(text) for text in line] for line in (self.columns, *self._cells())]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

        def line(cells: list[str]) -> str:
            name, *numbers = zip(cells, widths, strict=True)
            padded = (number.rjust(width) for number, width in numbers)
            return "  ".join([name[0].ljust(name[1]), *padded]).rstrip()

        return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, body)])

    def html(self) -> str:
        """On a narrow screen a row of a table with more than `NARROW_COLUMNS` becomes a block, a line per cell."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        rows = []
        for number, row in enumerate(self._cells()):
            cells = "".join(map(_html_cell, self.columns, row))
            rows.append(f'<tr class="marked">{cells}</tr>' if number in self.marked else f"<tr>{cells}</tr>")
        kind = "blocks" if len(self.columns) > NARROW_COLUMNS else "columns"
        body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        return f'<div class="scroll"><table class="{kind}">{body}</table></div>'

    def csv(self) -> str:
        """Values as they are, with all their digits; text that spreadsheets would compute begins with a quote."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([[_in_csv(value) for value in row] for row in (self.columns, *self.rows)])
        return text.getvalue()

    def _cells(self) -> Iterable[list[str]]:
        return ([cell(value) for value in row] for row in self.rows)


def _html_cell(name: str, text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ""
    return f'<td{kind} data-label="{html.escape(one_line(name))}">{html.escape(text)}</td>'


def in_markdown(text: str) -> str:
    """Text as it is, in one line."""
    return MARKDOWN.sub(lambda found: "\\" + found[0], one_line(text))


def _in_csv(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(FORMULA) else "") + one_line(value)


def cell(value: Any) -> str:
    """Four digits of a float, thousands separators, nothing for None; text in one line."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(content)}" for key, content in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else one_line(str(value))

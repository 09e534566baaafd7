"""What every report is made of: tables, figures as SVG, and one HTML page that loads nothing from anywhere."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURE_INCHES = (5.0, 3.4)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1a1a1a;
         background: #fff; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
  th:first-child, td:first-child {{ text-align: left; }}
  th {{ font-weight: 600; white-space: normal; vertical-align: bottom; }}
  .figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1.5rem; }}
  figure {{ margin: 1rem 0; min-width: 0; }}
  figure svg {{ width: 100%; max-width: 40rem; height: auto; display: block; }}
  figcaption {{ font-size: 0.9rem; color: #444; }}
  pre {{ background: #f5f5f5; padding: 0.7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
        font-size: 0.85rem; }}
  .prompt {{ color: #777; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_page(title: str, sections: Iterable[str], file: Path) -> None:
    """Writes beside and renames."""
    beside = file.with_name(file.name + ".tmp")
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *sections])
    beside.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
    beside.replace(file)


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column holds names, the others numbers."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def new_axes(x: str, y: str, height: float = FIGURE_INCHES[1]) -> tuple[Figure, Axes]:
    """An empty figure with named axes."""
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], height), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    return figure, axes


def figures(*drawn: tuple[Figure, str]) -> str:
    """Figures with captions, side by side where the page is wide enough."""
    return '<div class="figures">' + "".join(_figure(*one) for one in drawn) + "</div>"


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    caption = html.escape(caption)
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'

"""What the HTML pages share: the frame, tables, figures as SVG. A page is one file that loads nothing from anywhere."""

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

from flashmhf.files import atomic_write

# Okabe and Ito's, told apart with any colour vision.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666"
)  # fmt: skip

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
         background: #fff; overflow-wrap: anywhere; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
  th, td {{ padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
  th {{ font-weight: 600; white-space: normal; vertical-align: bottom; }}
  th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 7rem; }}
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


def page(title: str, sections: Iterable[str]) -> str:
    """The page with that title, which is plain text, and those sections, which are HTML."""
    heading = f"<h1>{html.escape(title)}</h1>"
    return PAGE.format(title=html.escape(title), body="\n".join([heading, *sections]))


def write_page(file: Path, title: str, sections: Iterable[str]) -> None:
    """Writes `page` beside and renames it."""
    atomic_write(file, page(title, sections))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text as a table that scrolls sideways where the screen is narrow; the first column names the row."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_figure(figure: Figure, caption: str) -> str:
    """The figure, which is closed, as SVG as wide as the page."""
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
    return '<div class="figures">' + "".join(html_figure(*one) for one in drawn) + "</div>"

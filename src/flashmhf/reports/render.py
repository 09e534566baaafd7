"""HTML pages from the templates in this package, with figures as inline SVG."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from flashmhf.files import atomic_write
from flashmhf.printable import printable

PAGE_FILE = "report.html"
DOTS_PER_INCH = 150  # of a picture


def render(template: str, **values: Any) -> str:
    """The page that `templates/<template>` makes of the values. Text is escaped, a `Figure` is drawn and closed."""
    return printable(_ENVIRONMENT.get_template(template).render(values))


def write_page(file: Path, template: str, **values: Any) -> None:
    """Renders, then writes atomically."""
    atomic_write(file, render(template, **values))


def png(figure: Figure) -> bytes:
    """The figure as a picture; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    return buffer.getvalue()


def _svg(figure: Figure) -> Markup:
    """As wide as the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    tag, rest = svg[svg.index("<svg") :].split(">", 1)
    return Markup(re.sub(r' (?:width|height)="[^"]*"', "", tag) + ">" + rest)


_ENVIRONMENT = Environment(
    loader=PackageLoader("flashmhf.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["svg"] = _svg

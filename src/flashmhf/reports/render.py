"""HTML pages from the templates in this package, with figures as inline SVG."""

import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from flashmhf.files import atomic_write
from flashmhf.printable import printable
from flashmhf.reports.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, PURPLE, SKY, VERMILION

PAGE_FILE = "report.html"
DOTS_PER_INCH = 150  # of a picture
# Colours of figures that a page replaces by its own, which depend on whether it is light or dark.
ON_PAGE = {
    INK: "currentColor",
    "#ffffff": "var(--paper)",
    GRID: "var(--grid)",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    ORANGE: "var(--orange)",
    SKY: "var(--sky)",
    GREY: "var(--grey)",
}


def render(template: str, **values: Any) -> str:
    """The page that `templates/<template>` makes of the values. Text is escaped, a `Figure` is drawn."""
    return printable(_ENVIRONMENT.get_template(template).render(values))


def write_page(file: Path, template: str, **values: Any) -> None:
    """Renders, then writes atomically."""
    atomic_write(file, render(template, **values))


def png(figure: Figure, dpi: int = DOTS_PER_INCH) -> bytes:
    """The figure as a picture with a palette: a third of the bytes, which matters where it is committed."""
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256).save(picture, format="PNG", optimize=True)
    return picture.getvalue()


def _svg(figure: Figure) -> Markup:
    """As wide as its place in the page, in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    tag, rest = svg[svg.index("<svg") :].split(">", 1)
    for colour, on_page in ON_PAGE.items():
        rest = rest.replace(f": {colour.lower()}", f": {on_page}")
    return Markup(re.sub(r' (?:width|height)="[^"]*"', "", tag) + ">" + rest)


_ENVIRONMENT = Environment(
    loader=PackageLoader("flashmhf.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["svg"] = _svg

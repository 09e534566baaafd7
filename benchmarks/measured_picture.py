"""What scripts share that measure something into a CSV file, print tables of it and draw it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Row = TypeVar("Row")


def main(
    description: str | None,
    *,
    run: Callable[[], list[Row]],
    write_rows: Callable[[list[Row], Path], None],
    read_rows: Callable[[Path], list[Row]],
    tables: Callable[[list[Row]], str],
    draw: Callable[[list[Row], Path], None],
) -> None:
    """The script's command line: RESULTS PICTURE [--draw-only]."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--draw-only", action="store_true", help="from existing results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.draw_only:
        write_rows(run(), arguments.results)
    rows = read_rows(arguments.results)
    print(tables(rows))
    draw(rows, arguments.picture)

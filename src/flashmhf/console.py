"""Everything but results goes to one console on standard error: lines, and bars that lines never break.

Only a terminal has bars, colours and words wrapped at its width. A file or pipe gets plain lines, one per message.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from flashmhf.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINES_EVERY_S = 30.0  # where there is no bar
REFRESHES_PER_S = 2  # of a bar: more would take time from what it is about


@functools.cache
def console() -> "Console":
    """On standard error; honours NO_COLOR."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, markup=False)


def has_bars() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    return sys.stderr is not None and sys.stderr.isatty() and not console().is_dumb_terminal


def write_line(text: str) -> None:
    """One message, above all bars."""
    if not has_bars():
        print(printable(text), file=sys.stderr, flush=True)
        return
    from rich.text import Text

    console().print(Text(printable(text)), overflow="ignore", crop=False)


def progress() -> "Progress":
    """Bars within the width of the terminal, at the bottom of it while they are shown, and gone afterwards."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    return Progress(
        *columns,
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console(),
        transient=True,
        expand=True,
        refresh_per_second=REFRESHES_PER_S,
        disable=not has_bars(),
    )


@contextlib.contextmanager
def progress_bar(title: str, *, note: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar, or a line every half minute where there are none; its function takes what is done and the total."""
    shown_s = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal shown_s
        bars.update(task, completed=done, total=total)
        if bars.disable and time.monotonic() - shown_s > LINES_EVERY_S:
            shown_s = time.monotonic()
            write_line(f"{title}: {done:,} of {total:,} {note}".rstrip())

    with progress() as bars:
        task = bars.add_task(title, total=None, note=note)
        yield advance

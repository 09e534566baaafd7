"""What reaches the terminal: names and text of others are escaped here, on their way out."""

import logging
import sys
import traceback
import warnings
from types import TracebackType

from flashmhf.console import write_line
from flashmhf.printable import one_line, printable

_format_warning = warnings.formatwarning


class _Record(logging.LogRecord):
    """A message of any library's logger; ours are one line."""

    def getMessage(self) -> str:
        escape = one_line if self.name.startswith("flashmhf") else printable
        return escape(super().getMessage())


class _ConsoleHandler(logging.Handler):
    """Log lines above all bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.format(record))
        except Exception:  # as every handler does: a log line never ends the program
            self.handleError(record)


def log_to_console(*, first: bool) -> None:
    """Warnings of all libraries, and what this package does; of several processes, the first one alone tells that."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ConsoleHandler()])
    logging.getLogger("flashmhf").setLevel(logging.INFO if first else logging.WARNING)
    logging.getLogger("flashmhf.ops.backends").setLevel(logging.WARNING)  # `train` and `info` name the backend


def protect() -> None:
    """From here on, logs, warnings and tracebacks of this process are escaped, whoever writes them."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _printable_warning
    sys.excepthook = _print_exception
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding does not have


def say(message: str) -> None:
    """One line on standard error, above all bars."""
    write_line(one_line(message))


def show(text: str, *, verbatim: bool = False) -> None:
    """A command's result on standard output; verbatim unless that is a terminal, for text that others read on."""
    print(text if verbatim and not sys.stdout.isatty() else printable(text))


def _printable_warning(*arguments, **options) -> str:
    return printable(_format_warning(*arguments, **options))


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

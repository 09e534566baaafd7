"""flashmhf report: the page of a training run or a comparison."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Json, check_file, emit, results_only


def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder of a training run, finished or not, or of a comparison.")
    ],
    output: Annotated[str | None, typer.Option(help="The page's file. Default: report.html in DIR.")] = None,
    json: Json = False,
) -> None:
    """Draw a training run (losses, throughput, memory, restarts) or a comparison as one HTML page."""
    with results_only():
        from dataclasses import asdict

        from flashmhf.comparison.results import RESULTS_FILE, read_comparison
        from flashmhf.reports.comparison import write_report
        from flashmhf.reports.comparison_tables import terminal_text
        from flashmhf.reports.render import PAGE_FILE
        from flashmhf.reports.run import write_run_report
        from flashmhf.training.run_log import LOG_FILE

        file = Path(folder) / PAGE_FILE if output is None else Path(output)
        if output is not None:
            check_file(output)
        results = Path(folder) / RESULTS_FILE
        if results.is_file():
            comparison = read_comparison(results)
            with _drawing(results):
                write_report(comparison, file)
                text = terminal_text(comparison) + "\n"
            summary = comparison.as_dict()
        else:
            with _drawing(Path(folder) / LOG_FILE):
                summary = asdict(write_run_report(Path(folder), file))
            text = ", ".join(
                f"{name.replace('_', ' ')} {value:,.6g}" for name, value in summary.items() if value is not None
            )
    emit({**summary, "report": str(file)}, f"{text}\nreport: {file}", json)


@contextlib.contextmanager
def _drawing(file: Path) -> Iterator[None]:
    """A file may hold values of the right types that cannot be drawn, if somebody has changed it."""
    from flashmhf.errors import InputError

    try:
        yield
    except InputError as error:
        raise error if str(file.parent) in str(error) else InputError(f"{error} in {file}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise InputError(f"{file}: cannot be drawn: {type(error).__name__}: {error}") from error

"""flashmhf report: the page of a training run, a comparison or a sweep."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Json, check_file, emit, results_only


def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Of a training run, finished or not, a comparison or a sweep.")
    ],
    output: Annotated[str | None, typer.Option(help="The page's file. Default: report.html in DIR.")] = None,
    json: Json = False,
) -> None:
    """Draw a training run (losses, throughput, memory, restarts), a comparison or a sweep as one HTML page."""
    with results_only():
        from dataclasses import asdict

        from flashmhf.comparison.results import RESULTS_FILE, read_comparison
        from flashmhf.reports.comparison import write_report
        from flashmhf.reports.comparison_tables import terminal_text
        from flashmhf.reports.render import PAGE_FILE
        from flashmhf.reports.run import write_run_report
        from flashmhf.reports.sweep import terminal_text as tuning_text
        from flashmhf.reports.sweep import write_report as write_tuning_report
        from flashmhf.sweeping.results import TUNING_FILE, read_tuning
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
        elif (found := Path(folder) / TUNING_FILE).is_file():
            tuning = read_tuning(found)
            with _drawing(found):
                write_tuning_report(tuning, file, Path(folder))
                text = tuning_text(tuning, Path(folder))
            summary = tuning.as_dict()
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

"""flashmhf report: the page of training runs, a comparison or a sweep."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmhf.cli.output import Json, check_file, emit, results_only

RUNS_PAGE = "runs.html"  # of several runs, in the current folder


def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Of a training run, finished or not, or several; a comparison; a sweep."),
    ],
    output: Annotated[
        str | None,
        typer.Option(help=f"The page's file. Default: report.html in DIR; of several runs {RUNS_PAGE} here."),
    ] = None,
    json: Json = False,
) -> None:
    """Draw a training run, several in the same figures, a comparison or a sweep as one HTML page."""
    with results_only():
        if output is not None:
            check_file(output)
        page = None if output is None else Path(output)
        draw = _draw_one if len(folders) == 1 else _draw_runs
        summary, text, file = draw([Path(folder) for folder in folders], page)
    emit({**summary, "report": str(file)}, f"{text}\nreport: {file}", json)


def _draw_one(folders: list[Path], page: Path | None) -> tuple[dict[str, Any], str, Path]:
    """The result as JSON has it, as text, and the page's file."""
    from flashmhf.comparison.results import RESULTS_FILE
    from flashmhf.reports.render import PAGE_FILE
    from flashmhf.sweeping.results import TUNING_FILE
    from flashmhf.training.run_log import LOG_FILE

    (folder,) = folders
    file = folder / PAGE_FILE if page is None else page
    for name, draw in ((RESULTS_FILE, _comparison), (TUNING_FILE, _sweep)):
        if (folder / name).is_file():
            return *draw(folder / name, page), file
    from flashmhf.reports.run import facts, write_run_report

    with _drawing(folder / LOG_FILE):
        summary = write_run_report(folder, file)
    text = "\n".join(f"{name:<16}{value:>12}" for name, value in facts(summary))
    return vars(summary), text, file


def _draw_runs(folders: list[Path], page: Path | None) -> tuple[dict[str, Any], str, Path]:
    from flashmhf.comparison.results import RESULTS_FILE
    from flashmhf.errors import InputError
    from flashmhf.reports.runs import summary_table, write_runs_report
    from flashmhf.reports.table import TERMINAL_WIDTH
    from flashmhf.sweeping.results import TUNING_FILE
    from flashmhf.training.run_log import LOG_FILE

    for folder in folders:
        if any((folder / name).is_file() for name in (RESULTS_FILE, TUNING_FILE)):
            raise InputError(f"DIR: expected training runs, if several, got {folder}; its runs are in {folder}/runs")
    file = Path(RUNS_PAGE) if page is None else page
    if page is None:
        check_file(RUNS_PAGE)
    with _drawing(folders[0] / LOG_FILE):
        summaries = write_runs_report(folders, file)
    table = summary_table([str(folder) for folder in folders], summaries).fitting(TERMINAL_WIDTH, least=5)
    shown = [{"run": str(folder), **vars(summary)} for folder, summary in zip(folders, summaries, strict=True)]
    return {"runs": shown}, table, file


def _comparison(results: Path, page: Path | None) -> tuple[dict[str, Any], str]:
    from flashmhf.comparison.results import read_comparison
    from flashmhf.reports.comparison import write_files, write_report
    from flashmhf.reports.comparison_tables import terminal_text

    comparison = read_comparison(results)
    with _drawing(results):
        if page is None:
            write_files(comparison, results.parent)
        else:
            write_report(comparison, page, results.parent)
        return comparison.as_dict(), terminal_text(comparison) + "\n"


def _sweep(results: Path, page: Path | None) -> tuple[dict[str, Any], str]:
    from flashmhf.reports.sweep import terminal_text, write_files, write_report
    from flashmhf.sweeping.results import read_tuning

    tuning = read_tuning(results)
    with _drawing(results):
        if page is None:
            write_files(tuning, results.parent)
        else:
            write_report(tuning, page, results.parent)
        return tuning.as_dict(), terminal_text(tuning, results.parent) + "\n"


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

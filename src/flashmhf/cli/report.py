"""flashmhf report: the page of a training run or a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Json, emit, results_only


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
        from flashmhf.reports.comparison import markdown_table, write_report
        from flashmhf.reports.render import PAGE_FILE
        from flashmhf.reports.run import write_run_report

        file = Path(folder) / PAGE_FILE if output is None else Path(output)
        results = Path(folder) / RESULTS_FILE
        if results.is_file():
            comparison = read_comparison(results)
            write_report(comparison, file)
            summary, text = comparison.as_dict(), markdown_table(comparison)
        else:
            summary = asdict(write_run_report(Path(folder), file))
            text = ", ".join(
                f"{name.replace('_', ' ')} {value:,.6g}" for name, value in summary.items() if value is not None
            )
    emit({**summary, "report": str(file)}, f"{text}\nreport: {file}", json)

"""flashmhf report: the page of a training run."""

from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Json, emit, results_only


def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A training run's folder; it may still be under way.")],
    output: Annotated[str | None, typer.Option(help="The page's file. Default: report.html in DIR.")] = None,
    json: Json = False,
) -> None:
    """Draw a training run: losses, speed, memory, restarts, as one HTML page."""
    with results_only():
        from flashmhf.reports.run import write_run_report

        file = Path(folder) / "report.html" if output is None else Path(output)
        summary = write_run_report(Path(folder), file)
    text = ", ".join(f"{name.replace('_', ' ')} {value:,.6g}" for name, value in summary.items() if value is not None)
    emit({**summary, "report": str(file)}, f"{text}\nreport: {file}", json)

"""A training run as a page: losses by step, tokens and time, speed, memory, restarts, settings."""

import time
from dataclasses import asdict
from pathlib import Path

from flashmhf.reports.lines import Line
from flashmhf.reports.logged_run import LoggedRun, RunSummary, read_logged_run, trace
from flashmhf.reports.quantities import QUANTITIES, Captioned, Chart, by_step, losses_against, settled
from flashmhf.reports.render import write_page
from flashmhf.reports.run_settings import in_common
from flashmhf.reports.style import BLUE, COLOURS, INK
from flashmhf.reports.table import Table
from flashmhf.training.instability import recorded
from flashmhf.training.run_files import read_result
from flashmhf.training.run_log import RunLog


def write_run_report(folder: Path, file: Path) -> RunSummary:
    """Writes the page for the run in `folder`, finished or not.

    Raises:
        InputError: the folder holds no run, or one that has logged nothing yet.
    """
    run = read_logged_run(folder)
    result = read_result(folder)
    write_page(
        file,
        "run.html",
        title=f"{_short(run.config.model)} on {_short(run.config.data.source)}",
        summary=facts(run.summary),
        losses=_losses(run),
        others=_others(run),
        starts=_starts(run.log),
        warnings=[str(found) for found in recorded(run.log.rows)],
        data=[] if result is None else [line for line in (result.data_read, result.bad_data) if line],
        options=in_common({"": [run.settings]}),
    )
    return run.summary


def _short(name: str) -> str:
    """A preset, an id on the Hub, or the last two parts of a path."""
    return "/".join(Path(name).parts[-2:])


def _losses(run: LoggedRun) -> dict[str, list[Captioned]]:
    lines = []
    training, validation = (trace(run.log, name) for name in ("loss", "eval_loss"))
    if training is not None:
        lines.append(Line(name="training", traces=(training,), colour=_colour(run)))
    if validation is not None:
        lines.append(Line(name="validation", traces=(validation,), colour=INK, style="--", smooth=False))
    restarts = [float(start.step) for start in run.log.starts[1:]]
    note = "; faintly: not smoothed" + ("; dotted: a process started again" if restarts else "")
    chart = Chart(lines=lines, name="Loss", note=note)
    return losses_against([chart, *settled(chart)], restarts)


def _others(run: LoggedRun) -> list[Captioned]:
    found = []
    for quantity in QUANTITIES:
        values = trace(run.log, quantity.name, quantity.factor)
        if values is not None:
            line = Line(name="", traces=(values,), colour=_colour(run), smooth=False)
            found.append(by_step(quantity, [line]))
    return [one for one in found if one is not None]


def _colour(run: LoggedRun) -> str:
    return COLOURS.get(run.ffn_type or "", BLUE)


def _starts(log: RunLog) -> Table:
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.time)) + " UTC",
            str(start.step),
            "" if start.processes is None else str(start.processes),
            start.machine,
            start.torch,
        )
        for start in log.starts
    ]
    return Table(("started", "from step", "processes", "machine", "torch"), rows)


def facts(summary: RunSummary) -> list[tuple[str, str]]:
    """Names and values as people write them."""
    return [(_label(name), _shown(value)) for name, value in asdict(summary).items()]


def _label(name: str) -> str:
    """ "memory_mib" -> "memory (MiB)"."""
    for unit, written in (("_per_second", "/s"), ("_mib", " (MiB)"), ("_s", " (s)")):
        if name.endswith(unit):
            name = name.removesuffix(unit) + written
    return name.replace("_", " ").replace("train loss", "training loss")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.4g}"

"""Several training runs on one page: their losses in the same figures, and in which settings they differ."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmhf.errors import InputError
from flashmhf.reports.lines import Line
from flashmhf.reports.logged_run import LoggedRun, RunSummary, read_logged_run, trace
from flashmhf.reports.quantities import QUANTITIES, Captioned, Chart, by_step, losses_against, settled
from flashmhf.reports.render import write_page
from flashmhf.reports.run_settings import differences, in_common, without_seeds
from flashmhf.reports.style import COLOURS, LINE_STYLES, PALETTE
from flashmhf.reports.table import Table

COLUMNS = ("run", "steps", "tokens", "training loss", "validation loss", "tokens/s", "memory (MiB)", "time (s)")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but their seeds: one line."""

    name: str
    runs: tuple[LoggedRun, ...]


def write_runs_report(folders: Sequence[Path], file: Path) -> list[RunSummary]:
    """Writes the page; the summaries are in the order of the folders.

    Raises:
        InputError: a folder holds no run, or one that has logged nothing yet, or is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"DIR: expected each run once, got {', '.join(map(str, folders))}")
    runs = [read_logged_run(folder) for folder in folders]
    found, names = groups(runs), _names(runs)
    columns = {group.name: [run.settings for run in group.runs] for group in found}
    write_page(
        file,
        "runs.html",
        title=f"{len(runs)} training runs",
        summary=summary_table([names[run.folder] for run in runs], [run.summary for run in runs]),
        seeds=any(len(group.runs) > 1 for group in found),
        losses=_losses(found),
        others=_others(found),
        differences=differences(columns),
        common=in_common(columns),
    )
    return [run.summary for run in runs]


def groups(runs: Sequence[LoggedRun]) -> list[Group]:
    """Named by what the folders of their runs begin with."""
    members: list[list[LoggedRun]] = []
    for run in runs:
        same = (group for group in members if without_seeds(group[0].settings) == without_seeds(run.settings))
        found = next(same, None)
        if found is None:
            members.append([run])
        else:
            found.append(run)
    names = _names(runs)
    own = [[names[run.folder] for run in group] for group in members]
    short = [_shared(group) for group in own]
    return [
        Group(name=name if short.count(name) == 1 else group_names[0], runs=tuple(group))
        for name, group_names, group in zip(short, own, members, strict=True)
    ]


def _shared(names: Sequence[str]) -> str:
    """What names begin with, such as "swiglu" for "swiglu-seed0" and "swiglu-seed1"; otherwise the first."""
    if len(names) == 1:
        return names[0]
    same = next((at for at, ones in enumerate(zip(*names, strict=False)) if len(set(ones)) > 1), len(min(names)))
    return re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", names[0][:same]) or names[0]


def _names(runs: Sequence[LoggedRun]) -> dict[Path, str]:
    """A folder's own name if no other has it."""
    paths = [run.folder.resolve() for run in runs]
    shared = os.path.commonpath(paths)
    last = [path.name for path in paths]
    short = last if len(set(last)) == len(last) else [os.path.relpath(path, shared) for path in paths]
    return {run.folder: name for run, name in zip(runs, short, strict=True)}


def _styles(found: Sequence[Group]) -> list[tuple[str, Any]]:
    """A colour and a line style for each group: the layer's colour, or different ones if there is but one layer."""
    layers = [group.runs[0].ffn_type or "" for group in found]
    if len(set(layers)) > 1 and all(layer in COLOURS for layer in layers):
        places = [layers[:at].count(layer) for at, layer in enumerate(layers)]
        return [
            (COLOURS[layer], LINE_STYLES[place % len(LINE_STYLES)]) for layer, place in zip(layers, places, strict=True)
        ]
    number = len(PALETTE)
    return [(PALETTE[at % number], LINE_STYLES[at // number % len(LINE_STYLES)]) for at in range(len(found))]


def _lines(found: Sequence[Group], name: str, factor: float = 1.0, *, smooth: bool) -> list[Line]:
    lines = []
    for group, (colour, style) in zip(found, _styles(found), strict=True):
        traces = [one for run in group.runs if (one := trace(run.log, name, factor)) is not None]
        if traces:
            lines.append(Line(name=group.name, traces=tuple(traces), colour=colour, style=style, smooth=smooth))
    return lines


def _losses(found: Sequence[Group]) -> dict[str, list[Captioned]]:
    training = Chart(lines=_lines(found, "loss", smooth=True), name="Training loss", note=", smoothed")
    validation = Chart(lines=_lines(found, "eval_loss", smooth=False), name="Validation loss")
    return losses_against([training, *settled(training), validation])


def _others(found: Sequence[Group]) -> list[Captioned]:
    drawn = [by_step(one, _lines(found, one.name, one.factor, smooth=False)) for one in QUANTITIES]
    return [figure for figure in drawn if figure is not None]


def summary_table(names: Sequence[str], summaries: Sequence[RunSummary]) -> Table:
    """One row per run."""
    return Table(COLUMNS, [[name, *_numbers(summary)] for name, summary in zip(names, summaries, strict=True)])


def _numbers(summary: RunSummary) -> list[str]:
    losses, whole = "{:,.4f}", "{:,.0f}"
    found = (
        *((whole, summary.steps), (whole, summary.tokens), (losses, summary.train_loss)),
        *((losses, summary.validation_loss), (whole, summary.tokens_per_second), (whole, summary.memory_mib)),
        ("{:,.1f}", summary.elapsed_s),
    )
    return ["" if value is None else shown.format(value) for shown, value in found]

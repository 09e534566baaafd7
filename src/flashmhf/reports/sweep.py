"""A sweep as a table, sentences and a page: the optimum of each contender and how flat it is."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from flashmhf.files import atomic_write
from flashmhf.reports.render import PAGE_FILE, png, write_page
from flashmhf.reports.run_settings import command_settings
from flashmhf.reports.sweep_figure import losses_by_rate
from flashmhf.reports.table import TERMINAL_WIDTH, Table
from flashmhf.sweeping.commands import commands
from flashmhf.sweeping.optimum import RateRange
from flashmhf.sweeping.results import LOWER, CellResult, ContenderResult, TuningResult

PICTURE_FILE = "sweep.png"


def write_files(result: TuningResult, folder: Path) -> tuple[Path, Path]:
    """Writes report.html and sweep.png into `folder`; returns both files."""
    write_report(result, folder / PAGE_FILE, folder)
    atomic_write(folder / PICTURE_FILE, png(losses_by_rate(result)))
    return folder / PAGE_FILE, folder / PICTURE_FILE


def terminal_text(result: TuningResult, folder: Path) -> str:
    """The table, some sentences on each contender, and how to use what was found."""
    paragraphs = [effort(result), *map(sentence, result.contenders)]
    wrapped = [line for text in paragraphs for line in ("", *textwrap.wrap(text, TERMINAL_WIDTH))]
    table = best_table(result).fitting(TERMINAL_WIDTH, least=4)
    return "\n".join([table, *wrapped, "", *commands(result, folder)])


def write_report(result: TuningResult, file: Path, folder: Path) -> None:
    """Writes the page.

    Args:
        result: of the sweep.
        file: the page.
        folder: of the sweep.
    """
    settings = result.settings
    write_page(
        file,
        "sweep.html",
        title=f"Learning rate and warm-up: {', '.join(settings.variants)}",
        settings=settings,
        data=settings.data,
        best=best_table(result),
        effort=effort(result),
        sentences=[sentence(contender) for contender in result.contenders],
        pictures=_pictures(result),
        losses=[(contender.variant, loss_table(contender)) for contender in result.contenders],
        commands=commands(result, folder),
        setting_pairs=command_settings(settings),
    )


def _pictures(result: TuningResult) -> list[tuple[Figure, str]]:
    what = "Validation loss against learning rate"
    steps = result.settings.max_steps
    last = losses_by_rate(result, all_rungs=False), f"{what}, {steps:,} steps; bars: standard deviations over seeds"
    if len(result.settings.halving.cells) == 1:
        return [last]
    return [last, (losses_by_rate(result), f"{what}, all rungs")]


def best_table(result: TuningResult) -> Table:
    """One row for each contender: its best cell."""
    rows = [
        (
            contender.variant,
            short(contender.best.learning_rate),
            percent(contender.best.warmup),
            loss(contender.best),
            _ends(contender.flat),
            "" if contender.within_noise is None else _ends(contender.within_noise),
            contender.parameters,
        )
        for contender in result.contenders
    ]
    tolerance = result.contenders[0].flat.tolerance
    columns = (
        *("FFN", "learning rate", "warm-up", "validation loss"),
        *(f"within {tolerance:g}", "within noise", "parameters"),
    )
    return Table(columns, rows)


def loss_table(contender: ContenderResult) -> Table:
    """Of every rung: a row for each warm-up, a column for each learning rate."""
    rates = sorted({cell.learning_rate for rung in contender.rungs for cell in rung.cells})
    rows = []
    for rung in contender.rungs:
        for warmup in sorted({cell.warmup for cell in rung.cells}):
            found = {cell.learning_rate: cell for cell in rung.cells if cell.warmup == warmup}
            marks = {rate: " (best)" if cell == contender.best else "" for rate, cell in found.items()}
            cells = [loss(found[rate]) + marks[rate] if rate in found else "" for rate in rates]
            rows.append((f"{rung.steps:,} steps, warm-up {percent(warmup)}", *cells))
    return Table(("", *map(short, rates)), rows)


def effort(result: TuningResult) -> str:
    """What each contender got."""
    halving, seeds = result.settings.halving, len(result.settings.seeds)
    rungs = [f"{cells} cells x {steps:,} steps" for cells, steps in zip(halving.cells, halving.lengths, strict=True)]
    last = f" x {seeds} seeds" if seeds > 1 else ""
    return (
        f"Tuning: {result.runs_each} runs, {result.tokens_each:,} tokens each: {', then '.join(rungs)}{last} (rungs "
        "before the last have one seed)."
    )


def sentence(contender: ContenderResult) -> str:
    """The optimum, how flat it is, and whether the sweep can tell it from the next best and from the grid's edge."""
    best, seeds = contender.best, len(contender.best.validation_loss.values)
    parts = [
        f"{contender.variant}: {_cell(best)}, {loss(best)} nats/token over {seeds} {'seed' if seeds == 1 else 'seeds'}"
        f"{_flatness(contender)}."
    ]
    if best.failed_seeds:
        parts.append(f"Every cell has a seed that failed; here {', '.join(map(str, best.failed_seeds))}.")
    if best.unstable_seeds:
        noun = "seed" if len(best.unstable_seeds) == 1 else "seeds"
        parts.append(f"On the edge of divergence with {noun} {', '.join(map(str, best.unstable_seeds))}.")
    return " ".join([*parts, *_decision(contender), *_edges(contender)])


def _flatness(contender: ContenderResult) -> str:
    flat = contender.flat
    tried = {cell.learning_rate for cell in contender.rungs[-1].cells if cell.warmup == contender.best.warmup}
    if len(tried) == 1:
        return ""
    if flat.low == flat.high:
        return f"; the next rate that was tried loses more than {flat.tolerance:g}"
    return f"; from {_ends(flat)} it loses less than {flat.tolerance:g}"


def _decision(contender: ContenderResult) -> list[str]:
    best, other, noise = contender.best.validation_loss.mean, contender.runner_up, contender.noise
    if other is None or other.validation_loss.mean is None or best is None:
        return []
    if other.failed_seeds:
        return [f"The next best, {_cell(other)}, failed with {len(other.failed_seeds)} of its seeds."]
    if noise is None:
        return [f"One seed cannot tell it from the next best, {_cell(other)} ({loss(other)})."]
    apart = f"{other.validation_loss.mean - best:+.3f}; these seeds resolve {noise:.3f}"
    if contender.decided:
        return [f"The next best, {_cell(other)}, is worse ({apart})."]
    return [f"Not distinguishable from the next best, {_cell(other)} ({apart})."]


def _edges(contender: ContenderResult) -> list[str]:
    found = []
    if contender.rate_edge is not None:
        which, add = ("lowest", "lower") if contender.rate_edge == LOWER else ("highest", "higher")
        found.append(f"It is the {which} rate of the grid: add {add} ones, and the same command goes on.")
    if contender.warmup_edge is not None:
        which, add = ("shortest", "shorter") if contender.warmup_edge == LOWER else ("longest", "longer")
        found.append(f"Its warm-up is the {which} of the grid; {add} ones were not tried.")
    return found


def _ends(rates: RateRange) -> str:
    low, high = short(rates.low, 2), short(rates.high, 2)
    below, above = " or less" if rates.open_below else "", " or more" if rates.open_above else ""
    return f"{low}{below or above}" if low == high else f"{low}{below} to {high}{above}"


def _cell(cell: CellResult) -> str:
    return f"{short(cell.learning_rate)} with {percent(cell.warmup)} warm-up"


def loss(cell: CellResult) -> str:
    """Mean and standard deviation over seeds."""
    found = cell.validation_loss
    if found.mean is None:
        return "failed"
    deviation = "" if found.standard_deviation is None else f" ± {found.standard_deviation:.3f}"
    failed = f", {len(cell.failed_seeds)} failed" if cell.failed_seeds else ""
    return f"{found.mean:.3f}{deviation}{failed}"


def short(rate: float, digits: int = 6) -> str:
    """As people type it, such as 1.2e-3."""
    mantissa, exponent = f"{rate:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(share: float) -> str:
    """Of the steps."""
    return f"{100 * share:g} %"

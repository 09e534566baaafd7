"""The files of a comparison: a page with tables, curves and samples, the table alone, and the curves as a picture."""

from pathlib import Path

from flashmhf.comparison.results import ComparisonResult
from flashmhf.errors import InputError
from flashmhf.files import atomic_write
from flashmhf.reports.comparison_figures import (
    bars,
    differences,
    gate_maps,
    loss_against,
    loss_curves,
    sizes_vary,
)
from flashmhf.reports.comparison_tables import (
    ablation_table,
    cost_table,
    failed_runs,
    gate_table,
    loss_table,
    markdown_table,
    rate_table,
    unstable_runs,
)
from flashmhf.reports.quantities import Captioned
from flashmhf.reports.render import PAGE_FILE, png, write_page
from flashmhf.reports.run_settings import Settings, command_settings, in_common, run_settings
from flashmhf.reports.run_settings import differences as setting_differences
from flashmhf.reports.seed_bands import caption, seed_bands
from flashmhf.reports.verdicts import about_numbers, about_verdicts, verdict_lines
from flashmhf.training.config import RUN_FILE
from flashmhf.training.run_log import read_log

DEPTHS = {"same": "the same depth", "paper": "the paper's depths, 5 layers with several heads for 6 without"}
TABLE_FILE = "table.md"
PICTURE_FILE = "loss.png"
RUNS = "runs"  # folder of the runs in that of a comparison


def write_files(result: ComparisonResult, folder: Path) -> tuple[Path, Path]:
    """Writes report.html, table.md and loss.png into `folder`; returns the page's file and the picture's."""
    write_report(result, folder / PAGE_FILE, folder)
    atomic_write(folder / TABLE_FILE, markdown_table(result) + "\n")
    atomic_write(folder / PICTURE_FILE, png(seed_bands(result)))
    return folder / PAGE_FILE, folder / PICTURE_FILE


def write_report(result: ComparisonResult, file: Path, folder: Path) -> None:
    """Writes the page.

    Args:
        result: of the comparison.
        file: the page.
        folder: of the comparison; the settings of its runs are on the page as far as they are still there.

    Raises:
        InputError: no run has finished.
    """
    settings = result.settings
    tokens = [run.tokens for run in result.runs if run.tokens is not None]
    if not tokens or not result.variants:
        raise InputError("DIR: expected a comparison with at least one run that has finished, got none")
    of_runs = _run_settings(result, folder)
    write_page(
        file,
        "comparison.html",
        title=f"Feed-forward layers compared: {', '.join(settings.variants)}",
        settings=settings,
        data=settings.data,
        tokens=tokens[0],
        depth=DEPTHS[settings.depth],
        unigram=result.unigram_entropy_nats,
        losses=loss_table(result),
        costs=cost_table(result),
        verdicts=verdict_lines(result),
        notes=(about_numbers(result), about_verdicts()),
        warnings=[line for line in (failed_runs(result), unstable_runs(result)) if line],
        ablations=ablation_table(result),
        rates=rate_table(result),
        gates=gate_table(result),
        jobs=result.jobs,
        samples=result.samples,
        differences=setting_differences(of_runs),
        common=in_common(of_runs),
        comparison_settings=command_settings(settings),
        picture=seed_bands(result, titled=False),
        picture_caption=caption(result),
        loss_curves=loss_curves(result),
        **_figures(result),
    )


def _figures(result: ComparisonResult) -> dict[str, list[Captioned]]:
    first = result.settings.variants[0]
    words = f"Held-out loss minus that of {first}: a dot per seed, their mean, and the 95 % interval if there is one"
    summary = [
        (differences(result), words),
        (bars(result, "tokens_per_second"), "Tokens/s of training"),
        (bars(result, "peak_memory_mib"), "Peak memory of the training process, MiB"),
    ]
    sizes = [
        (loss_against(result, "parameters", "parameters"), "Validation loss against parameters, mean over seeds"),
        (
            loss_against(result, "forward_flops_per_token", "FLOPs/token, forward"),
            "Validation loss against FLOPs/token, mean over seeds",
        ),
    ]
    return {
        "summary_figures": [(figure, text) for figure, text in summary if figure is not None],
        "size_figures": sizes if sizes_vary(result) else [],
        "gate_figures": [(gate_maps(heads), f"Gates of {name}") for name, heads in result.gates.items() if heads],
    }


def _run_settings(result: ComparisonResult, folder: Path) -> dict[str, list[Settings]]:
    """Of the runs by variant."""
    found: dict[str, list[Settings]] = {}
    for run in result.runs:
        of_run = folder / RUNS / run.folder
        if (of_run / RUN_FILE).is_file():
            found.setdefault(run.variant, []).append(run_settings(of_run, read_log(of_run)))
    return found

"""The files of a comparison: a page with tables, curves and samples, the table alone, and the curves as a picture."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmhf.comparison.results import ComparisonResult
from flashmhf.errors import InputError
from flashmhf.files import atomic_write
from flashmhf.reports.comparison_tables import (
    ablation_table,
    failed_runs,
    gate_table,
    loss_table,
    markdown_table,
    rate_table,
    unstable_runs,
)
from flashmhf.reports.curves import bars, curves, gate_maps, loss_against
from flashmhf.reports.render import PAGE_FILE, png, write_page
from flashmhf.reports.seed_bands import caption, seed_bands
from flashmhf.reports.verdicts import about_numbers, about_verdicts, verdict_lines

DEPTHS = {"same": "the same depth", "paper": "the paper's depths, 5 layers with several heads for 6 without"}
TABLE_FILE = "table.md"
PICTURE_FILE = "loss.png"


def write_files(result: ComparisonResult, folder: Path) -> tuple[Path, Path]:
    """Writes report.html, table.md and loss.png into `folder`; returns the page's file and the picture's."""
    write_report(result, folder / PAGE_FILE)
    atomic_write(folder / TABLE_FILE, markdown_table(result) + "\n")
    atomic_write(folder / PICTURE_FILE, png(seed_bands(result)))
    return folder / PAGE_FILE, folder / PICTURE_FILE


def write_report(result: ComparisonResult, file: Path) -> None:
    """Writes the page."""
    settings = result.settings
    tokens = [run.tokens for run in result.runs if run.tokens is not None]
    if not tokens or not result.variants:
        raise InputError("DIR: expected a comparison with at least one run that has finished, got none")
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
        verdicts=verdict_lines(result),
        notes=(about_numbers(result), about_verdicts()),
        picture=seed_bands(result),
        picture_caption=caption(result),
        warnings=[line for line in (failed_runs(result), unstable_runs(result)) if line],
        ablations=ablation_table(result),
        rates=rate_table(result),
        gates=gate_table(result),
        jobs=result.jobs,
        samples=result.samples,
        setting_lines=asdict(settings).items(),
        **_figures(result),
    )


def _figures(result: ComparisonResult) -> dict[str, Any]:
    return {
        "loss_figures": [
            (curves(result, "curve", "step"), "Training loss by step, one line per run, averaged over neighbours"),
            (curves(result, "validation_curve", "step"), "Validation loss by step, one line per run"),
            (curves(result, "curve", "time"), "Training loss by time in training"),
            (curves(result, "validation_curve", "time"), "Validation loss by time in training"),
        ],
        "size_figures": [
            (loss_against(result, "parameters", "parameters"), "Validation loss against parameters, mean over seeds"),
            (
                loss_against(result, "forward_flops_per_token", "FLOPs/token, forward"),
                "Validation loss against FLOPs/token, mean over seeds",
            ),
        ],
        "speed_figures": [
            (bars(result, "tokens_per_second"), "Tokens/s of training"),
            (bars(result, "peak_memory_mib"), "Peak memory of the training process, MiB"),
        ],
        "gate_figures": [(gate_maps(heads), f"Gates of {name}") for name, heads in result.gates.items() if heads],
    }

"""A comparison as a table and a page: losses, curves by step and time, loss against size, speed, memory, samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmhf.comparison.results import ComparisonResult, Differences, GateUsage, Spread, SweepResult, VariantResult
from flashmhf.errors import InputError
from flashmhf.files import atomic_write
from flashmhf.reports.curves import bars, curves, gate_maps, loss_against
from flashmhf.reports.render import PAGE_FILE, write_page
from flashmhf.reports.table import Table

COLUMNS = (
    "FFN",
    "validation loss (nats/token)",
    "held-out documents",
    "to the first (95 %)",
    "bits/byte",
    "parameters",
    "MFLOP/token",
    "layers",
    "d_ff",
    "tokens/s",
    "peak memory (MiB)",
)
EFFECT_COLUMNS = ("ablation", "held-out documents, to flashmhf (95 %)", "verdict")
RATE_COLUMNS = ("FFN", "learning rate", "validation loss, first seed", "")
GATE_COLUMNS = ("FFN", "gate entropy by head", "evenness of the load by head")
DEPTHS = {"same": "the same depth", "paper": "the paper's depths, 5 layers with several heads for 6 without"}
TABLE_FILE = "table.md"


def write_files(result: ComparisonResult, folder: Path) -> Path:
    """Writes report.html and table.md into `folder`; returns the page's file."""
    write_report(result, folder / PAGE_FILE)
    atomic_write(folder / TABLE_FILE, markdown_table(result) + "\n")
    return folder / PAGE_FILE


def markdown_table(result: ComparisonResult) -> str:
    """One row per variant, the lowest validation loss first; what the numbers are; ablations; runs that failed."""
    ablations = _ablation_table(result)
    parts = [_loss_table(result).markdown(), _note(result), ablations and ablations.markdown(), _failed(result)]
    return "\n\n".join(part for part in parts if part)


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
        best=_ranked(result)[0].variant,
        unigram=result.unigram_entropy_nats,
        losses=_loss_table(result),
        note=_note(result),
        failed=_failed(result),
        ablations=_ablation_table(result),
        rates=_rate_table(result),
        gates=_gate_table(result),
        jobs=result.jobs,
        samples=result.samples,
        setting_lines=asdict(settings).items(),
        **_verdicts(result),
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


def _ranked(result: ComparisonResult) -> list[VariantResult]:
    """The lowest validation loss first; variants without any last."""

    def key(row: VariantResult) -> tuple[bool, float]:
        mean = row.validation_loss.mean
        return (mean is None, mean or 0.0)

    return sorted(result.variants, key=key)


def _loss_table(result: ComparisonResult) -> Table:
    return Table(
        COLUMNS,
        [
            (
                row.variant,
                _spread(row.validation_loss),
                _number(row.documents.nats_per_token),
                _difference(row.difference),
                _spread(row.bits_per_byte),
                row.parameters,
                f"{row.forward_flops_per_token / 1e6:,.1f}",
                row.layers,
                row.intermediate_size,
                _mean(row.tokens_per_second),
                _mean(row.peak_memory_mib),
            )
            for row in _ranked(result)
        ],
    )


def _failed(result: ComparisonResult) -> str:
    failed = [f"{run.variant} with seed {run.seed}" for run in result.runs if not run.finished]
    failed += [
        f"{row.variant} with seed {row.seed} at {row.learning_rate:g}"
        for row in result.sweep
        if row.validation_loss is None and not row.chosen
    ]
    return f"These runs failed and are in no mean: {', '.join(failed)}." if failed else ""


def _ablation_table(result: ComparisonResult) -> Table | None:
    several = len(result.settings.models) > 1
    rows = [
        (
            " ".join(row.ablation) + (f", {row.model}" if several else ""),
            _difference(row.effect),
            _verdict(row.effect, row.ffn_type),
        )
        for row in result.variants
        if row.ablation is not None
    ]
    return Table(EFFECT_COLUMNS, rows) if rows else None


def _rate_table(result: ComparisonResult) -> Table | None:
    if not result.sweep:
        return None

    def verdict(row: SweepResult) -> str:
        rates = sorted(other.learning_rate for other in result.sweep if other.variant == row.variant)
        edge = ", at the edge of those tried" if row.learning_rate in (rates[0], rates[-1]) else ""
        return f"chosen{edge}" if row.chosen else ""

    rows = [
        (row.variant, f"{row.learning_rate:g}", _number(row.validation_loss) or "failed", verdict(row))
        for row in result.sweep
    ]
    return Table(RATE_COLUMNS, rows)


def _gate_table(result: ComparisonResult) -> Table | None:
    """One row per layer."""
    rows = [
        (f"{name}, layer {layer}", *_ranges([head for head in heads if head.layer == layer]))
        for name, heads in result.gates.items()
        for layer in sorted({head.layer for head in heads})
    ]
    return Table(GATE_COLUMNS, rows) if rows else None


def _ranges(heads: list[GateUsage]) -> list[str]:
    measures = [head.entropy for head in heads], [head.load for head in heads]
    return [f"{min(values):.3f} to {max(values):.3f}" for values in measures]


def _verdicts(result: ComparisonResult) -> dict[str, Any]:
    """What the intervals decide."""
    first = result.settings.variants[0]
    verdicts = [
        (row.variant, f"{_verdict(row.difference, first)} ({_difference(row.difference)})")
        for row in result.variants
        if row.difference is not None
    ]
    heading = (
        f"On the held-out documents, compared with {first}:"
        if verdicts
        else f"No variant could be compared with {first}."
    )
    return {"differences_heading": heading, "verdicts": verdicts}


def _note(result: ComparisonResult) -> str:
    """What columns and intervals are."""
    documents = max((row.documents.number or 0 for row in result.variants), default=0)
    runs = max((row.difference.nats_per_token.runs for row in result.variants if row.difference), default=1)
    over = f" and Student's t over {runs} seeds" if runs > 1 else " and do not cover seeds, since there is only one"
    size = result.settings.document_bytes
    return (
        f"±: standard deviation over seeds. Held-out documents: nats/token on the first {size:,} bytes of each of "
        f"{documents}. Differences are paired by document and seed; their 95 % intervals are by "
        f"a bootstrap over documents{over}. If there were no differences, one interval in twenty would exclude 0."
    )


def _verdict(difference: Differences | None, baseline: str) -> str:
    interval = None if difference is None else difference.nats_per_token.interval
    if interval is None:
        return "not decided"
    if interval[0] <= 0 <= interval[1]:
        return f"not distinguishable from {baseline}"
    return f"{'worse' if interval[0] > 0 else 'better'} than {baseline}"


def _spread(measure: Spread) -> str:
    if measure.mean is None:
        return "failed"
    deviation = measure.standard_deviation
    return f"{measure.mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _difference(difference: Differences | None) -> str:
    if difference is None:
        return ""
    found = difference.nats_per_token
    ends = "" if found.interval is None else f" [{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]"
    return f"{found.mean:+.3f}{ends}"


def _mean(measure: Spread) -> str:
    return "" if measure.mean is None else f"{measure.mean:,.0f}"

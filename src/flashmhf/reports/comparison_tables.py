"""The tables of a comparison, and its result as text for a terminal."""

import textwrap

from flashmhf.comparison.results import ComparisonResult, GateUsage, Spread, SweepResult
from flashmhf.comparison.settings import ABLATED
from flashmhf.reports.table import TERMINAL_WIDTH, Table, in_markdown
from flashmhf.reports.verdicts import (
    about_numbers,
    about_verdicts,
    difference_cell,
    outcome,
    resolution_cell,
    verdict_lines,
)
from flashmhf.training.instability import ADVICE

RATE_COLUMNS = ("FFN", "learning rate", "validation loss", "")
GATE_COLUMNS = ("FFN", "gate entropy", "load evenness")


def markdown_table(result: ComparisonResult) -> str:
    """Losses and costs of each variant, what the numbers are, verdicts, failed and unstable runs, ablations."""
    ablations = ablation_table(result)
    verdicts = "\n".join(f"- {in_markdown(line)}" for line in verdict_lines(result))
    warnings = in_markdown(failed_runs(result)), in_markdown(unstable_runs(result))
    notes = about_numbers(result), verdicts, verdicts and about_verdicts(), *warnings
    tables = [loss_table(result).markdown(), cost_table(result).markdown()]
    parts = [*tables, *notes, ablations and ablations.markdown()]
    return "\n\n".join(part for part in parts if part)


def terminal_text(result: ComparisonResult) -> str:
    """A short table, the verdicts, and what each variant makes of a prompt."""
    rows = [
        (
            row.variant,
            _spread(row.documents.nats_per_token),
            difference_cell(row.difference),
            row.parameters,
            _mean(row.tokens_per_second),
        )
        for row in result.variants
    ]
    columns = "FFN", "held-out loss", _to_first(result), "parameters", "tokens/s"
    lines = [Table(columns, rows).fitting(TERMINAL_WIDTH, least=3)]
    for texts in (verdict_lines(result), [failed_runs(result)], [unstable_runs(result)], [about_numbers(result)]):
        paragraph = [line for text in texts for line in textwrap.wrap(text, TERMINAL_WIDTH)]
        lines += ["", *paragraph] if paragraph else []
    for variant, continuation in result.samples.continuations.items():
        lines += ["", f"--- {variant}, continuing a held-out document", result.samples.prompt + continuation]
    return "\n".join(lines)


def loss_table(result: ComparisonResult) -> Table:
    """The losses of each variant, in the order in which they were given."""
    columns = (
        *("FFN", "held-out loss", _to_first(result), "verdict", "resolution"),
        *("validation loss", "bits/byte"),
    )
    rows = [
        (
            row.variant,
            _spread(row.documents.nats_per_token),
            difference_cell(row.difference),
            outcome(row.difference),
            resolution_cell(row.difference),
            _spread(row.validation_loss),
            _spread(row.bits_per_byte),
        )
        for row in result.variants
    ]
    return Table(columns, rows)


def cost_table(result: ComparisonResult) -> Table:
    """Size, speed and memory of each variant."""
    columns = "FFN", "parameters", "MFLOP/token", "layers", "d_ff", "tokens/s", "memory (MiB)"
    rows = [
        (
            row.variant,
            row.parameters,
            f"{row.forward_flops_per_token / 1e6:,.1f}",
            row.layers,
            row.intermediate_size,
            _mean(row.tokens_per_second),
            _mean(row.peak_memory_mib),
        )
        for row in result.variants
    ]
    return Table(columns, rows)


def ablation_table(result: ComparisonResult) -> Table | None:
    """Each ablation's difference to the layer that it changes; None without ablations."""
    several = len(result.settings.models) > 1
    rows = [
        (
            " ".join(row.ablation) + (f", {row.model}" if several else ""),
            difference_cell(row.effect),
            outcome(row.effect),
            resolution_cell(row.effect),
        )
        for row in result.variants
        if row.ablation is not None
    ]
    return Table(("ablation", f"to {ABLATED} (95 %)", "verdict", "resolution"), rows) if rows else None


def failed_runs(result: ComparisonResult) -> str:
    """A sentence; empty if none failed."""
    failed = [f"{run.variant} with seed {run.seed}" for run in result.runs if not run.finished]
    failed += [
        f"{row.variant} with seed {row.seed} at {row.learning_rate:g}"
        for row in result.sweep
        if row.validation_loss is None and not row.chosen
    ]
    return f"These runs failed and are in no mean: {', '.join(failed)}." if failed else ""


def unstable_runs(result: ComparisonResult) -> str:
    """A sentence on the runs that were on the edge of divergence; empty if none was."""
    unstable = []
    for run in result.runs:
        if run.instabilities:
            signs = "; ".join(f"step {one.step}: {one.found}" for one in run.instabilities)
            unstable.append(f"{run.variant} with seed {run.seed} ({signs})")
    return f"These runs were on the edge of divergence; {ADVICE}: {', '.join(unstable)}." if unstable else ""


def rate_table(result: ComparisonResult) -> Table | None:
    """Learning rates that were tried; None if none were."""
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


def gate_table(result: ComparisonResult) -> Table | None:
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


def _to_first(result: ComparisonResult) -> str:
    return f"to {result.settings.variants[0]} (95 %)"


def _spread(measure: Spread) -> str:
    if measure.mean is None:
        return "failed"
    deviation = measure.standard_deviation
    return f"{measure.mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mean(measure: Spread) -> str:
    return "" if measure.mean is None else f"{measure.mean:,.0f}"

"""Markdown tables of recipe_runs.py's rows, for docs/parametrisation.md.

    python benchmarks/recipe_table.py [benchmarks/results/recipe_runs.jsonl]

In this order: the runs of each contender; the recipe; what changes are worth (`recipe_changes.py`); what rates of
single matrices are worth (`recipe_rates.py`); the difference of the two contenders, wherever both ran a seed with the
same steps, batch, optimizer, learning rates and schedule, each at its best setting there (the lowest mean of those
with the most seeds: more settings are an advantage); all settings with their seeds. In brackets: the number of seeds.
"+-" behind a loss is its standard deviation over seeds, behind a difference half of the 95 % interval; the resolution
is the standard deviation of the difference over seeds.
"""

import itertools
import statistics
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from flashmhf.benchmarking.measuring import Row
from flashmhf.reports.table import Table
from recipe_changes import (
    RECIPE,
    SWIGLU,
    Losses,
    changes_table,
    mean_text,
    paired_differences,
    rates,
    settings,
    with_interval,
)
from recipe_model import RecipeRun
from recipe_rates import RATES
from recipe_runs import RECORDED, read

REGIME = ("steps", "batch", "optimizer", "learning_rate", "muon_learning_rate", "warmup", "schedule", "qk_norm")
ONLY_FLASHMHF = (
    *("in_proj", "in_gain", "out_proj", "out_gain", "heads", "subnetworks", "gate", "q_norm", "output_norm"),
    *("score_scale", "gate_scale", "output_scale"),
)
DEFAULTS = asdict(RecipeRun())


def regime(run: RecipeRun) -> tuple:
    """What both contenders share."""
    return tuple(getattr(run, name) for name in REGIME)


def regime_text(run: RecipeRun) -> str:
    rates = f"AdamW {run.learning_rate:g}"
    if run.muon_learning_rate is not None:
        same = run.muon_learning_rate == run.learning_rate
        rates = f"Muon {run.muon_learning_rate:g}" + ("" if same else f", {rates}")
    norm = ", qk_norm" if run.qk_norm else ""
    return f"{run.steps} x {run.batch}, {rates}, {run.schedule}, {run.warmup:.0%} warm-up{norm}"


def setting_text(run: RecipeRun) -> str:
    """Everything but the regime that is not the default of RecipeRun."""
    hidden = {"variant", "seed", *REGIME, *(() if run.variant == "flashmhf" else ONLY_FLASHMHF)}
    changed = [(name, value) for name, value in asdict(run).items() if name not in hidden and value != DEFAULTS[name]]
    return ", ".join(f"{name} {value}" for name, value in changed) or "all defaults"


def seeds_text(losses: Losses) -> str:
    return ", ".join(f"{seed}: {loss:.3f}" for seed, loss in losses.items())


def effort_table(rows: list[Row]) -> Table:
    """Training runs of each contender: what was spent on tuning it."""
    counts = Counter(row["variant"] for row in rows)
    steps: Counter = Counter()
    for row in rows:
        steps[row["variant"]] += row["steps"] * row["batch"]
    lines = [[variant, counts[variant], steps[variant]] for variant in sorted(counts)]
    return Table(["contender", "runs", "sequences of 256 bytes"], lines)


def recipe_table(rows: list[Row]) -> Table:
    """The recipe of both contenders, with four heads of 64 or two of 128, wherever both ran at least two seeds.

    K and U (gate_proj and up_proj) have the rate of all matrices, in both or in FlashMHF alone, or half of it.
    """
    cells = settings(rows)
    every_rate = sorted({run.learning_rate for run in cells})
    lines = []
    for heads, of_scores, warmup, rate in itertools.product(
        (4, 2), ((1.0, 1.0), (0.5, 1.0), (0.5, 0.5)), (0.1, 0.02), every_rate
    ):
        pair = replace(SWIGLU, row_rate=of_scores[0]), replace(RECIPE, heads=heads, row_rate=of_scores[1])
        swiglu, flashmhf = (cells.get(replace(run, warmup=warmup, **rates(rate)), {}) for run in pair)
        differences = paired_differences(swiglu, flashmhf)
        if len(differences) > 1:
            text = "Muon {:g}, {} heads, {:.0%} warm-up, scores x {:g} and {:g}".format(rate, heads, warmup, *of_scores)
            texts = [mean_text(losses) for losses in (swiglu, flashmhf)]
            lines.append([text, *texts, with_interval(differences), f"{statistics.stdev(differences):.3f}"])
    return Table(["recipe", "SwiGLU", "FlashMHF", "FlashMHF - SwiGLU", "resolution"], lines)


def settings_table(rows: list[Row]) -> Table:
    cells = settings(rows)
    order = sorted(
        cells, key=lambda run: (tuple(map(str, regime(run))), run.variant, statistics.mean(cells[run].values()))
    )
    lines = [
        [
            f"{run.variant}: {setting_text(run)}",
            regime_text(run),
            mean_text(cells[run]),
            seeds_text(cells[run]),
        ]
        for run in order
    ]
    return Table(["setting", "steps x batch, rates", "nats/byte", "seeds"], lines)


def best(cells: dict[RecipeRun, Losses]) -> RecipeRun:
    """The setting with the lowest mean among those with the most seeds."""
    return min(cells, key=lambda run: (-len(cells[run]), statistics.mean(cells[run].values())))


def differences_table(rows: list[Row]) -> Table:
    """FlashMHF - SwiGLU. The resolution is the standard deviation of the paired difference over seeds."""
    cells = settings(rows)
    lines = []
    for shared in sorted({regime(run) for run in cells}, key=str):
        here = {run: losses for run, losses in cells.items() if regime(run) == shared}
        sides = [{run: here[run] for run in here if run.variant == variant} for variant in ("swiglu", "flashmhf")]
        if not all(sides):
            continue
        swiglu, flashmhf = map(best, sides)
        found = paired_differences(cells[swiglu], cells[flashmhf])
        if not found:
            continue
        counts = [sum(map(len, side.values())) for side in sides]
        resolution = f"{statistics.stdev(found):.3f}" if len(found) > 1 else "one seed: not decided"
        chosen = [f"{setting_text(run)}: {mean_text(cells[run])}" for run in (swiglu, flashmhf)]
        values = ", ".join(f"{difference:+.3f}" for difference in found)
        lines.append([regime_text(swiglu), *chosen, values, resolution, "{} / {}".format(*counts)])
    columns = ["steps x batch, rates", "SwiGLU", "FlashMHF", "difference per seed", "resolution", "runs of each"]
    return Table(columns, lines)


def main() -> None:
    rows = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED)
    for table in (
        effort_table(rows),
        recipe_table(rows),
        changes_table(rows),
        changes_table(rows, RATES),
        differences_table(rows),
        settings_table(rows),
    ):
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()

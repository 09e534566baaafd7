"""What one change of the recipe is worth: pairs of settings in recipe_runs.py's rows that differ in it, by seed."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashmhf.benchmarking.measuring import Row
from flashmhf.evaluation.bootstrap import student_t
from flashmhf.reports.table import Table
from recipe_model import RecipeRun
from recipe_runs import run_of

Losses = dict[int, float]  # of every seed
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A line of the table.

    Attributes:
        text: the change in words.
        swiglu, flashmhf: the setting before, with the values of the setting after; None: not run.
    """

    text: str
    swiglu: tuple[RecipeRun, Values] | None = None
    flashmhf: tuple[RecipeRun, Values] | None = None


MUON: Values = {"optimizer": "muon", "learning_rate": 4e-3, "muon_learning_rate": 4e-3, "schedule": "linear"}
SHORT: Values = {**MUON, "steps": 400, "batch": 4, "qk_norm": True}
ORTHOGONAL: Values = {"in_proj": "orthogonal", "in_gain": 1.0, "out_proj": "orthogonal"}
NO_SCALE: Values = {"score_scale": 1.0, "gate_scale": 1.0}
ADAMW_RATE: Values = {"optimizer": "adamw", "learning_rate": 1.4e-3, "muon_learning_rate": None}
FAN_IN: Values = {"attention": "fan_in", "residual_gain": 0.354}
SMALLER: Values = {"output_gain": 0.3, "out_gain": 0.3}
FASTER: Values = {"learning_rate": 1.4e-3}
SLOWER: Values = {"learning_rate": 3.5e-4}
ROWS: Values = {"rows": "orthogonal"}
SLOW_PROJECTIONS: Values = {"in_rate": 0.5, "out_rate": 0.5}
RATE_TEXT = "learning rate 0.004 -> {}"

SWIGLU = RecipeRun(variant="swiglu", output_gain=0.3, **SHORT)  # the recipe
LARGE = RecipeRun(output_gain=0.8, **ORTHOGONAL, **NO_SCALE, **SHORT)
RECIPE = replace(LARGE, **SMALLER)
TENTH = replace(RECIPE, out_gain=0.1)
TWO_HEADS = replace(RECIPE, heads=2)  # the tiny presets
DEEP = replace(SWIGLU, layers=8), replace(TWO_HEADS, layers=8)
RECIPE_ADAMW = [
    replace(run, optimizer="adamw", learning_rate=7e-4, muon_learning_rate=None) for run in (RECIPE, SWIGLU)
]
LARGE_ADAMW = replace(RECIPE_ADAMW[0], out_gain=0.707)
ADAMW = RecipeRun(output_gain=0.8, **ORTHOGONAL), RecipeRun(variant="swiglu", output_gain=0.3)
ADAMW_SHORT = [replace(run, **{**SHORT, **ADAMW_RATE}) for run in ADAMW]
ADAMW_FAN_IN = [replace(run, learning_rate=1e-3, schedule="linear", **FAN_IN) for run in ADAMW]
LONG = [replace(run, **MUON, qk_norm=True) for run in ADAMW]  # score_scale = gate_scale = 4
LONG_2, LONG_1 = (replace(LONG[0], score_scale=scale, gate_scale=scale) for scale in (2.0, 1.0))
UNTIED: Values = {"embedding_std": 0.3, "tied": False}
LONG_UNTIED = replace(LONG_1, **UNTIED), replace(LONG[1], **UNTIED, output_gain=0.8)


def rates(rate: float) -> Values:
    return {"learning_rate": rate, "muon_learning_rate": rate}


CHANGES = [
    Change(
        text="AdamW 7e-4, cosine to 0.1 -> Muon 4e-3, linear to 0",
        swiglu=(ADAMW[1], MUON),
        flashmhf=(ADAMW[0], MUON),
    ),
    Change(
        text="... and with qk_norm",
        swiglu=(replace(LONG[1], qk_norm=False), {"qk_norm": True}),
        flashmhf=(replace(LONG[0], qk_norm=False), {"qk_norm": True}),
    ),
    Change(
        text="qk_norm with AdamW 1e-3 (attention by fan-in)",
        swiglu=(ADAMW_FAN_IN[1], {"qk_norm": True}),
        flashmhf=(ADAMW_FAN_IN[0], {"qk_norm": True}),
    ),
    Change(text="score_scale, gate_scale 4 -> 2", flashmhf=(LONG[0], {"score_scale": 2.0, "gate_scale": 2.0})),
    Change(text="score_scale, gate_scale 2 -> 1", flashmhf=(LONG_2, NO_SCALE)),
    Change(
        text="score_scale, gate_scale 2 -> 1",
        flashmhf=(replace(LARGE, score_scale=2.0, gate_scale=2.0), NO_SCALE),
    ),
    Change(
        text="V's gain 0.8 -> 0.3, W_out's 0.707 -> 0.3",
        swiglu=(replace(SWIGLU, output_gain=0.8), {"output_gain": 0.3}),
        flashmhf=(LARGE, SMALLER),
    ),
    Change(
        text="V's gain 0.3 -> 0.1",
        swiglu=(SWIGLU, {"output_gain": 0.1}),
        flashmhf=(RECIPE, {"output_gain": 0.1}),
    ),
    Change(text="W_out's gain 0.3 -> 0.1", flashmhf=(RECIPE, {"out_gain": 0.1})),
    Change(text="W_out's gain 0.3 -> 0.707", flashmhf=(RECIPE, {"out_gain": 0.707})),
    Change(text="AdamW 7e-4: W_out's gain 0.3 -> 0.707", flashmhf=(RECIPE_ADAMW[0], {"out_gain": 0.707})),
    Change(text="AdamW 7e-4 -> Muon 4e-3", swiglu=(RECIPE_ADAMW[1], MUON), flashmhf=(RECIPE_ADAMW[0], MUON)),
    Change(text="... W_out's gain 0.707", flashmhf=(LARGE_ADAMW, MUON)),
    Change(text="AdamW 7e-4 -> 1.4e-3", swiglu=(RECIPE_ADAMW[1], FASTER), flashmhf=(LARGE_ADAMW, FASTER)),
    Change(text="AdamW 7e-4 -> 3.5e-4", swiglu=(RECIPE_ADAMW[1], SLOWER), flashmhf=(LARGE_ADAMW, SLOWER)),
    Change(text="AdamW 7e-4: W_out's gain 0.3 -> 0.707", flashmhf=(replace(ADAMW[0], **SMALLER), {"out_gain": 0.707})),
    Change(text="AdamW 7e-4: V's gain 0.8 -> 0.3", flashmhf=(ADAMW[0], {"output_gain": 0.3})),
    Change(
        text="o_proj and down_proj (W_out) begin at zero",
        swiglu=(SWIGLU, {"residual_gain": 0.0}),
        flashmhf=(RECIPE, {"residual_gain": 0.0, "out_gain": 0.707}),
    ),
    Change(
        text="... at learning rate 0.0028",
        swiglu=(replace(SWIGLU, **rates(2.8e-3)), {"residual_gain": 0.0}),
    ),
    Change(
        text="... with AdamW 1.4e-3",
        swiglu=(ADAMW_SHORT[1], {"residual_gain": 0.0}),
    ),
    Change(
        text="V's gain 0.8 -> 0.3, W_out's 0.707 -> 0.1, with AdamW 1.4e-3",
        flashmhf=(ADAMW_SHORT[0], {"output_gain": 0.3, "out_gain": 0.1}),
    ),
    Change(
        text="scores of RMS 0.64 -> 0.3",
        swiglu=(SWIGLU, {"score_rms": 0.3}),
        flashmhf=(RECIPE, {"score_rms": 0.3}),
    ),
    Change(
        text="W_in, W_out random (Xavier, 0.707) -> orthogonal",
        flashmhf=(replace(LARGE, in_proj="xavier", in_gain=0.707, out_proj="xavier"), ORTHOGONAL),
    ),
    Change(
        text="W_in alone random (Xavier, 0.707) -> orthogonal",
        flashmhf=(replace(TENTH, in_proj="xavier", in_gain=0.707), ORTHOGONAL),
    ),
    Change(text="without the per-head norm", flashmhf=(LONG_2, {"q_norm": False})),
    Change(text="without the per-head norm", flashmhf=(TENTH, {"q_norm": False})),
    Change(text="without the gate", flashmhf=(LONG_2, {"gate": None, "gate_scale": None})),
    Change(text="without the gate", flashmhf=(TENTH, {"gate": None, "gate_scale": None})),
    Change(text="without the per-head norm", flashmhf=(RECIPE, {"q_norm": False})),
    Change(text="without the gate", flashmhf=(RECIPE, {"gate": None, "gate_scale": None})),
    Change(text="2 heads: without the per-head norm", flashmhf=(TWO_HEADS, {"q_norm": False})),
    Change(text="2 heads: without the gate", flashmhf=(TWO_HEADS, {"gate": None, "gate_scale": None})),
    Change(text="gates 2 sigmoid, which do not sum to a constant", flashmhf=(RECIPE, {"gate": "free"})),
    Change(text="a norm of each head's output before W_out", flashmhf=(RECIPE, {"output_norm": True})),
    Change(text="K, U, V (SwiGLU's three matrices) orthogonal", swiglu=(SWIGLU, ROWS), flashmhf=(RECIPE, ROWS)),
    Change(text="3 sub-networks of 192 -> 12 of 48", flashmhf=(RECIPE, {"subnetworks": 12})),
    Change(text="... with output_scale 3", flashmhf=(RECIPE, {"subnetworks": 12, "output_scale": 3.0})),
    Change(text="2 heads: 3 sub-networks of 192 -> 12 of 48", flashmhf=(TWO_HEADS, {"subnetworks": 12})),
    Change(text="4 heads -> 2", flashmhf=(LARGE, {"heads": 2})),
    Change(text="4 heads -> 2", flashmhf=(RECIPE, {"heads": 2})),
    Change(text="2 heads -> 1", flashmhf=(TWO_HEADS, {"heads": 1})),
    Change(text="2 heads -> 8", flashmhf=(TWO_HEADS, {"heads": 8})),
    Change(text="Muon on all sub-networks of a head as one matrix", flashmhf=(RECIPE, {"blocks": "head"})),
    Change(text="Muon on SwiGLU's matrices in 4 x 4 blocks", swiglu=(SWIGLU, {"blocks": "cut"})),
    Change(
        text="embeddings of std 0.02, tied -> 0.3, untied (SwiGLU's gain 0.3 -> 0.8, too)",
        swiglu=(LONG[1], {**UNTIED, "output_gain": 0.8}),
        flashmhf=(LONG_1, UNTIED),
    ),
    Change(
        text="AdamW's rate of the embeddings 0.004 -> 0.001",
        swiglu=(SWIGLU, {"embedding_learning_rate": 1e-3}),
    ),
    Change(
        text="... of untied embeddings of std 0.3",
        swiglu=(LONG_UNTIED[1], {"embedding_learning_rate": 1e-3}),
        flashmhf=(LONG_UNTIED[0], {"embedding_learning_rate": 1e-3}),
    ),
    Change(
        text="... and of the gate",
        flashmhf=(replace(LONG_UNTIED[0], embedding_learning_rate=1e-3), {"gate_learning_rate": 1e-3}),
    ),
    Change(text="rate of W_in and W_out halved", flashmhf=(LARGE, SLOW_PROJECTIONS)),
    Change(text="rate of W_in and W_out halved", flashmhf=(TENTH, SLOW_PROJECTIONS)),
    Change(text="rate of K and U doubled", flashmhf=(LARGE, {"row_rate": 2.0})),
    Change(text="attention by fan-in, residual branches times 0.354", flashmhf=(LONG[0], FAN_IN)),
    Change(
        text="linear to 0 -> cosine to 0.1",
        swiglu=(SWIGLU, {"schedule": "cosine"}),
        flashmhf=(RECIPE, {"schedule": "cosine"}),
    ),
    Change(
        text="2 heads: warm-up 10 % -> 2 %", swiglu=(SWIGLU, {"warmup": 0.02}), flashmhf=(TWO_HEADS, {"warmup": 0.02})
    ),
    Change(text="2 heads: " + RATE_TEXT.format(0.0028), flashmhf=(TWO_HEADS, rates(2.8e-3))),
    Change(text=RATE_TEXT.format(0.0028), swiglu=(SWIGLU, rates(2.8e-3)), flashmhf=(RECIPE, rates(2.8e-3))),
    Change(text=RATE_TEXT.format(0.0056), swiglu=(SWIGLU, rates(5.6e-3)), flashmhf=(LARGE, rates(5.6e-3))),
    Change(text=RATE_TEXT.format(0.008), swiglu=(LONG[1], rates(8e-3)), flashmhf=(LONG[0], rates(8e-3))),
    Change(
        text="2 heads: weight decay 0.1 -> 0",
        swiglu=(SWIGLU, {"weight_decay": 0.0}),
        flashmhf=(TWO_HEADS, {"weight_decay": 0.0}),
    ),
    Change(
        text="2 heads: a SwiGLU beside it that fades out in half of the steps", flashmhf=(TWO_HEADS, {"guided": 0.5})
    ),
    *(
        Change(
            text=f"8 layers, 2 heads: branches times {text}",
            swiglu=(DEEP[0], {"branch_scale": scale}),
            flashmhf=(DEEP[1], {"branch_scale": scale}),
        )
        for text, scale in (("1 / sqrt(2)", 0.707), ("1 / 2 (CompleteP)", 0.5))
    ),
]
# One seed each, so that SwiGLU is tuned, too; what gained was run with five (`recipe_rates.py`).
SWIGLU_TUNING: dict[str, Values] = {
    "weight decay 0.1 -> 0.03": {"weight_decay": 0.03},
    "weight decay 0.1 -> 0.3": {"weight_decay": 0.3},
    "warm-up 10 % -> 5 %": {"warmup": 0.05},
    RATE_TEXT.format(0.002): rates(2e-3),
    "warm-up 2 %, learning rate 0.004 -> 0.0028": {"warmup": 0.02, **rates(2.8e-3)},
    "warm-up 2 %, learning rate 0.004 -> 0.0056": {"warmup": 0.02, **rates(5.6e-3)},
    "AdamW's rate 0.004 -> 0.002": {"learning_rate": 2e-3},
    "AdamW's rate 0.004 -> 0.008": {"learning_rate": 8e-3},
    "Muon's rate 0.004 -> 0.002": {"muon_learning_rate": 2e-3},
    "Muon's rate 0.004 -> 0.008": {"muon_learning_rate": 8e-3},
    "down_proj's gain 0.3 -> 0.2": {"output_gain": 0.2},
    "down_proj's gain 0.3 -> 0.5": {"output_gain": 0.5},
    "scores of RMS 0.64 -> 1": {"score_rms": 1.0},
    "o_proj and down_proj times 0.354": {"residual_gain": 0.354},
    "o_proj and down_proj times 0.5": {"residual_gain": 0.5},
    "attention by fan-in": {"attention": "fan_in"},
    "attention by fan-in, o_proj and down_proj times 0.354": {"attention": "fan_in", "residual_gain": 0.354},
    "embeddings of std 0.02 -> 0.1": {"embedding_std": 0.1},
}
CHANGES += [Change(text=text, swiglu=(SWIGLU, values)) for text, values in SWIGLU_TUNING.items()]


def settings(rows: Iterable[Row]) -> dict[RecipeRun, Losses]:
    """A setting is a run without its seed."""
    found: dict[RecipeRun, Losses] = {}
    for row in rows:
        run = run_of(row)
        found.setdefault(replace(run, seed=0), {})[run.seed] = row["validation_loss"]
    return {setting: dict(sorted(losses.items())) for setting, losses in found.items()}


def paired_differences(first: Losses, second: Losses) -> list[float]:
    """second - first, for the seeds of both."""
    return [second[seed] - loss for seed, loss in first.items() if seed in second]


def mean_text(losses: Losses) -> str:
    """Mean and standard deviation; one run has no deviation."""
    mean = f"{statistics.mean(losses.values()):.3f}"
    deviation = f" +- {statistics.stdev(losses.values()):.3f}" if len(losses) > 1 else ""
    return f"{mean}{deviation} ({len(losses)})"


def with_interval(differences: list[float]) -> str:
    """The mean; from two seeds on with half the width of the 95 % interval."""
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return f"{mean:+.3f} (1)"
    half = student_t(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return f"{mean:+.3f} +- {half:.3f} ({count})"


def effect(cells: Mapping[RecipeRun, Losses], pair: tuple[RecipeRun, Values] | None) -> str:
    """`before -> after: difference +- interval (seeds)`; empty if one of the two has not run."""
    if pair is None:
        return ""
    before, after = (cells.get(run, {}) for run in (pair[0], replace(pair[0], **pair[1])))
    shared = before.keys() & after.keys()
    if not shared:
        return ""
    means = [f"{statistics.fmean(losses[seed] for seed in sorted(shared)):.3f}" for losses in (before, after)]
    return f"{' -> '.join(means)}: {with_interval(paired_differences(before, after))}"


def changes_table(rows: list[Row], changes: Iterable[Change] = CHANGES) -> Table:
    cells = settings(rows)
    lines = []
    for change in changes:
        run = (change.flashmhf or change.swiglu or (RECIPE, {}))[0]
        values = [effect(cells, pair) for pair in (change.swiglu, change.flashmhf)]
        if any(values):
            lines.append([change.text, f"{run.steps} x {run.batch}", *values])
    return Table(["change", "steps x batch", "SwiGLU", "FlashMHF"], lines)

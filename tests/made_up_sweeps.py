"""Sweeps whose training runs are made up: a loss by learning rate, warm-up, steps and seed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmhf.comparison.plan import Run
from flashmhf.data.config import DataConfig
from flashmhf.sweeping import Sweep, TuningResult
from flashmhf.sweeping.plan import SweepPlan
from flashmhf.sweeping.summary import summarise
from flashmhf.training.config import TrainConfig
from flashmhf.training.run_files import write_result
from tiny import train_result

TOKENS_PER_STEP = 128


def sweep_settings(**changes: Any) -> Sweep:
    """Four rates and two warm-ups for two contenders; `rates` are those of both."""
    variants = changes.pop("variants", ("swiglu", "flashmhf"))
    rates = changes.pop("rates", (5e-4, 1e-3, 2e-3, 4e-3))
    values = {
        "models": ("flashmhf-tiny",),
        "train": TrainConfig(model="", data=DataConfig(source="books", context_length=64, validation_tokens=512)),
        "training_flags": ("--per-device-train-batch-size", "2", "--report-to", "none"),
        "seeds": (0, 1, 2),
        "learning_rates": dict.fromkeys(variants, rates),
        "warmups": (0.02, 0.1),
        "max_steps": 64,
    }
    return Sweep(variants=variants, **(values | changes))


def flag(run: Run, name: str) -> float:
    """The value of a flag that is given last."""
    return float(run.flags[len(run.flags) - run.flags[::-1].index(name)])


def made_up_loss(run: Run) -> float:
    """A parabola in log rate whose minimum falls with the steps; 10 % of warm-up are best; seeds differ a little."""
    steps, rate, warmup = (flag(run, name) for name in ("--max-steps", "--learning-rate", "--warmup-steps"))
    best = 2e-3 * (64 / steps) ** 0.5
    worse = 0.0 if run.variant.name == "flashmhf" else 0.1
    noise = 0.004 * math.sin(1000 * run.seed + 10 * math.log(rate))
    return 1.5 + worse + 0.05 * math.log(rate / best) ** 2 + 0.1 * abs(warmup - 0.1) + 8 / steps + noise


def finish(run: Run, loss: float) -> None:
    """Leaves what a training run with this loss leaves."""
    steps = int(flag(run, "--max-steps"))
    write_result(train_result(run.folder, validation_loss=loss, steps=steps, tokens=TOKENS_PER_STEP * steps))
    (run.folder / "run.json").write_text(json.dumps({"version": 1}))


def tuning_result(folder: Path, loss: Callable[[Run], float | None] = made_up_loss, **changes: Any) -> TuningResult:
    """What a sweep in `folder` finds; a run without a loss fails."""
    plan = SweepPlan(sweep_settings(**changes), folder)
    for rung in range(len(plan.settings.halving.cells)):
        for run in plan.runs(rung):
            found = loss(run)
            if found is not None:
                finish(run, found)
    return summarise(plan)

"""How many steps the learning rate rises, where nobody says it: right for 300 and for 300,000 steps.

A tenth of the run, at most 2,000 steps. Adam's first updates are too large until its second moment is an average of
many gradients: 1 / (1 - beta2) = 20 steps with our beta2 of 0.95; Ma and Yarats (arXiv 1910.04209) recommend a warm-up
over 2 / (1 - beta2). It also gives the weights time to reach regions of lower curvature, where they tolerate the full
rate (Kalra and Barkeshli, arXiv 2406.09405). A share of the run alone gives a short run too few steps (2 % of 350 are
7), and a long one more than it needs: 2,000 are a hundred times the memory of the second moment.
"""

import math
from typing import Any

from flashmhf.errors import InputError

SHARE = 0.1  # of the steps of the run
MOST = 2000  # steps
WITHOUT = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that have no warm-up


def default_warmup(steps: int) -> int:
    """Steps of warm-up in a run of `steps`; 0 in a run of one step, which would not learn otherwise."""
    return min(max(1, round(SHARE * steps)), MOST, steps - 1)


def steps_of_share(share: float, steps: int) -> int:
    """As `TrainingArguments.get_warmup_steps` counts them."""
    return math.ceil(share * steps)


def warms_up(arguments: Any) -> bool:
    """Whether the schedule has a warm-up."""
    return arguments.lr_scheduler_type.value not in WITHOUT


def warmup_steps(arguments: Any, steps: int) -> int:
    """Steps of warm-up in a run of `steps`.

    Args:
        arguments: TrainingArguments, whose `warmup_steps` is None unless somebody has chosen it.
        steps: of the run.
    """
    if not warms_up(arguments):
        return 0
    given = arguments.warmup_steps
    if given is None:
        return default_warmup(steps)
    return int(given) if given >= 1 else steps_of_share(given, steps)


def check_warmup(arguments: Any, steps: int) -> None:
    """Raises InputError if the learning rate would rise until the end of the run."""
    warmup = warmup_steps(arguments, steps)
    if 0 < steps <= warmup:
        share = "" if arguments.warmup_steps >= 1 else f" ({arguments.warmup_steps:g} of them)"
        raise InputError(f"warmup-steps: expected fewer than the {steps} steps of the run, got {warmup}{share}")

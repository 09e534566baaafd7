"""How many steps a run of a sweep has: given, or what a budget of tokens allows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flashmhf.errors import InputError
from flashmhf.sweeping.halving import Halving
from flashmhf.training.arguments import parse_arguments

SOME_WARMUP = ("--warmup-steps", "0.5")


def count_steps(halving: Halving, max_steps: int | None, budget: int | None, tokens_per_step: int) -> int:
    """The steps of a run in the last rung.

    Args:
        halving: of a contender; its steps do not matter.
        max_steps: as given.
        budget: tokens that one contender's runs may read.
        tokens_per_step: see `count_tokens`.

    Raises:
        InputError: neither is given, or the budget is too small.
    """
    if max_steps is None and budget is None:
        raise InputError("max-steps: expected the steps of a full run, or --budget, got neither")
    if max_steps is None:
        assert budget is not None
        return _steps_within(budget, halving, tokens_per_step)
    if budget is not None:
        _check_budget(budget, replace(halving, steps=max_steps), tokens_per_step)
    return max_steps


def count_tokens(flags: Sequence[str], output_dir: str, context_length: int) -> int:
    """Of a step, in the one process of a run.

    Raises:
        InputError: the schedule has no warm-up.
    """
    arguments: Any = parse_arguments([*flags, *SOME_WARMUP], output_dir)
    return int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * context_length)


def _steps_within(budget: int, halving: Halving, tokens_per_step: int) -> int:
    """The steps of the last rung's runs with which one contender's runs read at most `budget` tokens.

    Raises:
        InputError: not even the shortest runs fit.
    """
    shortest = replace(halving, steps=halving.least_steps).total_steps * tokens_per_step
    if budget < shortest:
        raise InputError(
            f"budget: expected at least {shortest:,} tokens for each contender's {_described(halving)} of up to "
            f"{halving.least_steps} steps of {tokens_per_step:,} tokens, got {budget:,}"
        )
    low, high = halving.least_steps, budget // tokens_per_step + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = replace(halving, steps=middle).total_steps * tokens_per_step <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def _check_budget(budget: int, halving: Halving, tokens_per_step: int) -> None:
    """Raises InputError if one contender's runs read more tokens than `budget`."""
    required = halving.total_steps * tokens_per_step
    if required > budget:
        raise InputError(
            f"budget: expected at least {required:,} tokens for each contender's {_described(halving)} of up to "
            f"{halving.steps:,} steps of {tokens_per_step:,} tokens, got {budget:,}"
        )


def _described(halving: Halving) -> str:
    cells = halving.rates * halving.warmups
    seeds = f"{halving.seeds} seed" + ("s" if halving.seeds > 1 else "")
    return f"{sum(halving.runs)} runs ({cells} cells, {seeds} for the last {halving.cells[-1]})"

"""Command lines that use what a sweep found."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from flashmhf.comparison.settings import Comparison
from flashmhf.sweeping.results import ContenderResult, TuningResult
from flashmhf.training.config import TrainConfig


def commands(result: TuningResult, folder: Path) -> tuple[str, ...]:
    """One `flashmhf train` for each contender, and one `flashmhf compare` if all have the same best warm-up.

    Args:
        result: of the sweep.
        folder: of the sweep, which has the contenders' configurations.
    """
    lines = [_train(result, contender, folder) for contender in result.contenders]
    warmups = {contender.best.warmup for contender in result.contenders}
    if len(result.contenders) > 1 and len(warmups) == 1:
        lines.append(_compare(result, warmups.pop()))
    return tuple(map(shlex.join, lines))


def _train(result: TuningResult, contender: ContenderResult, folder: Path) -> list[str]:
    model = folder / "configs" / f"{contender.variant}.json"
    best = contender.best
    return [
        *("flashmhf", "train", "--model", str(model), "--output-dir", f"tuned-{contender.variant}"),
        *("--learning-rate", repr(best.learning_rate), *_schedule(result, best.warmup)),
        *_options(result.settings),
    ]


def _compare(result: TuningResult, warmup: float) -> list[str]:
    settings = result.settings
    rates = ",".join(f"{contender.ffn_type}={contender.best.learning_rate!r}" for contender in result.contenders)
    return [
        *("flashmhf", "compare", "--variants", ",".join(settings.variants), "--model", settings.models[0]),
        *("--output-dir", "tuned-comparison", "--seeds", ",".join(map(str, settings.seeds))),
        *("--learning-rate", rates, *_schedule(result, warmup)),
        *("--match", settings.match, "--depth", settings.depth),
        *_options(settings),
    ]


def _schedule(result: TuningResult, warmup: float) -> tuple[str, ...]:
    return "--warmup-steps", repr(warmup), "--max-steps", str(result.settings.max_steps)


def _options(settings: Comparison) -> Iterator[str]:
    """Those of the sweep that are not defaults, without the model, and its flags."""
    defaults = TrainConfig(model=settings.train.model).options()
    for name, value in settings.train.options().items():
        if value != defaults[name]:
            yield f"--{name.replace('_', '-')}"
            if value is not True:
                yield str(value)
    yield from settings.training_flags

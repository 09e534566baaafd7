"""Which runs a comparison consists of: learning rates first, then seeds."""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmhf.comparison.matching import match
from flashmhf.comparison.settings import ABLATED, Comparison, Variant
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.training.config import TrainConfig
from flashmhf.training.run_files import TrainResult, read_result, was_begun


@dataclass(frozen=True, kw_only=True)
class MatchedVariant:
    """A variant on one backbone, matched to its size."""

    name: str
    variant: Variant
    model: str
    config: FlashMHFConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: a variant, a seed and a learning rate, or None for that of the flags.

    Its process is `flashmhf train`, with `options` in a file and `flags` on the command line.
    """

    variant: MatchedVariant
    seed: int
    learning_rate: float | None
    label: str
    folder: Path
    config: TrainConfig
    flags: tuple[str, ...] = ()

    @property
    def result(self) -> TrainResult | None:
        """None of a run that has not finished."""
        return read_result(self.folder)

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def log(self) -> Path:
        """Standard error of its process; removed when the run has finished."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def config_file(self) -> Path:
        """What the process is started with, see `options`."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def options(self) -> dict[str, Any]:
        """The options of `flashmhf train` in `config_file`."""
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {**self.config.options(), "seed": self.seed, "logging_steps": 1, **rate}

    @property
    def command(self) -> tuple[str, ...]:
        """Trains with this Python; resumes a run that was begun."""
        resume = ("--resume",) if was_begun(self.folder) else ()
        files = ("--config", str(self.config_file), "--output-dir", str(self.folder))
        return (sys.executable, "-m", "flashmhf", "train", *files, *self.flags, *resume)


class Plan:
    """The runs of a comparison in its folder."""

    def __init__(self, settings: Comparison, output_dir: Path) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self._bases = settings.bases()
        names = [model_name(model) for model in self._bases]
        if len(set(names)) < len(names):
            raise InputError(f"model: expected names that differ, got {', '.join(self._bases)}")

    @cached_property
    def variants(self) -> list[MatchedVariant]:
        """All variants on every backbone."""
        several = len(self._bases) > 1
        return [
            MatchedVariant(
                name=f"{model_name(model)}-{variant.name}" if several else variant.name,
                variant=variant,
                model=model,
                config=match(
                    base,
                    variant,
                    by=self.settings.match,
                    depth=self.settings.depth,
                    context_length=self.settings.data.context_length,
                ),
            )
            for model, base in self._bases.items()
            for variant in self.settings.all_variants()
        ]

    def config_file(self, variant: MatchedVariant) -> Path:
        return self.output_dir / "configs" / f"{variant.name}.json"

    def sweep(self) -> list[Run]:
        """Each learning rate of the variants that have several, with the first seed."""
        return [
            self._run(variant, self.settings.seeds[0], rate)
            for variant in self.variants
            if variant.variant.ablation is None and len(self._rates(variant)) > 1
            for rate in self._rates(variant)
        ]

    def final(self) -> list[Run]:
        """Every variant with every seed, at its best learning rate; call it when the sweep has finished.

        The variants come before the ablations, since they matter more. Their order alternates from seed to seed, so
        that of two processes neither has all the slow ones.
        """
        plain = [variant for variant in self.variants if variant.variant.ablation is None]
        ablated = [variant for variant in self.variants if variant.variant.ablation is not None]
        best_rates = {variant.name: self._best_rate(variant) for variant in self.variants}
        return [
            self._run(variant, seed, best_rates[variant.name])
            for variants in (plain, ablated)
            for turn, seed in enumerate(self.settings.seeds)
            for variant in (variants if turn % 2 == 0 else variants[::-1])
        ]

    def _rates(self, variant: MatchedVariant) -> tuple[float, ...]:
        return self.settings.learning_rates.get(variant.variant.ffn_type, ())

    def _best_rate(self, variant: MatchedVariant) -> float | None:
        """An ablation takes that of the layer it changes; if no run of a sweep finished, the first is taken."""
        rates = self._rates(variant)
        if len(rates) < 2:
            return rates[0] if rates else None
        layer = ABLATED if variant.variant.ablation else variant.variant.ffn_type
        losses = [
            (result.validation_loss, run.learning_rate)
            for run in self.sweep()
            if (run.variant.model, run.variant.variant.ffn_type) == (variant.model, layer)
            and (result := run.result) is not None
            and result.validation_loss is not None
            and math.isfinite(result.validation_loss)
        ]
        return min(losses)[1] if losses else rates[0]

    def _run(self, variant: MatchedVariant, seed: int, rate: float | None) -> Run:
        swept = len(self._rates(variant)) > 1
        name = f"{variant.name}-lr{rate!r}-seed{seed}" if swept else f"{variant.name}-seed{seed}"
        return Run(
            variant=variant,
            seed=seed,
            learning_rate=rate,
            label=f"{variant.name}, seed {seed}" + (f", learning rate {rate:g}" if swept else ""),
            folder=self.output_dir / "runs" / name,
            config=replace(self.settings.train, model=str(self.config_file(variant))),
            flags=self.settings.training_flags,
        )


def model_name(model: str) -> str:
    """Of a preset, file or folder: what variants on several backbones are named after."""
    return Path(model).name.removesuffix(".json")

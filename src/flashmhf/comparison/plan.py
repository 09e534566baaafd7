"""Which runs a comparison is made of: learning rates first, then seeds."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmhf.comparison.launcher import Trial
from flashmhf.comparison.matching import match
from flashmhf.comparison.settings import ABLATED, Comparison, Contender
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.training.config import TrainConfig
from flashmhf.training.run_files import read_result


@dataclass(frozen=True)
class Entry:
    """One contender on one backbone."""

    model: str
    contender: Contender
    name: str
    config: FlashMHFConfig


@dataclass(frozen=True)
class Run:
    """An entry trained with one seed and one learning rate, or None for that of the flags."""

    entry: Entry
    seed: int
    learning_rate: float | None
    trial: Trial

    @property
    def validation_loss(self) -> float | None:
        """None of a run that has not finished."""
        result = read_result(self.trial.folder)
        return None if result is None else result.validation_loss


class Plan:
    """The runs of a comparison in its folder."""

    def __init__(self, settings: Comparison, output_dir: Path) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self._bases = settings.bases()
        names = [_name(model) for model in self._bases]
        if len(set(names)) < len(names):
            raise InputError(f"model: expected names that differ, got {', '.join(self._bases)}")

    @cached_property
    def entries(self) -> list[Entry]:
        """Contenders on every backbone, each matched to the backbone's size."""
        several = len(self._bases) > 1
        return [
            Entry(
                model,
                contender,
                f"{_name(model)}-{contender.name}" if several else contender.name,
                match(
                    base,
                    contender,
                    by=self.settings.match,
                    depth=self.settings.depth,
                    context_length=self.settings.data.context_length,
                ),
            )
            for model, base in self._bases.items()
            for contender in self.settings.contenders()
        ]

    def config_file(self, entry: Entry) -> Path:
        return self.output_dir / "configs" / f"{entry.name}.json"

    def sweep(self) -> list[Run]:
        """Every learning rate of a variant that has several, with the first seed."""
        return [
            self._run(entry, self.settings.seeds[0], rate)
            for entry in self.entries
            if entry.contender.ablation is None and len(self._rates(entry)) > 1
            for rate in self._rates(entry)
        ]

    def final(self) -> list[Run]:
        """Every entry with every seed, at its best learning rate; to be asked for when the sweep is over.

        All variants come before the first ablation, so that what matters most is there first.
        """
        variants = [entry for entry in self.entries if entry.contender.ablation is None]
        ablations = [entry for entry in self.entries if entry.contender.ablation is not None]
        return [
            self._run(entry, seed, self._best_rate(entry))
            for entries in (variants, ablations)
            for seed in self.settings.seeds
            for entry in entries
        ]

    def _rates(self, entry: Entry) -> tuple[float, ...]:
        return self.settings.learning_rates.get(entry.contender.ffn_type, ())

    def _best_rate(self, entry: Entry) -> float | None:
        """An ablation takes that of the variant it changes; where no run of a sweep ended well, the first."""
        rates = self._rates(entry)
        if len(rates) < 2:
            return rates[0] if rates else None
        swept = [run for run in self.sweep() if (run.entry.model, run.entry.contender.ffn_type) == _swept_as(entry)]
        found = [(run.validation_loss, run.learning_rate) for run in swept]
        losses = [(loss, rate) for loss, rate in found if loss is not None and math.isfinite(loss)]
        return min(losses)[1] if losses else rates[0]

    def _run(self, entry: Entry, seed: int, rate: float | None) -> Run:
        swept = len(self._rates(entry)) > 1
        name = f"{entry.name}-lr{rate!r}-seed{seed}" if swept else f"{entry.name}-seed{seed}"
        folder = self.output_dir / "runs" / name
        config = TrainConfig(model=str(self.config_file(entry)), data=self.settings.data)
        flags: dict[str, Any] = {"seed": seed, "logging_steps": 1}
        if rate is not None:
            flags["learning_rate"] = rate
        label = f"{entry.name}, seed {seed}" + (f", learning rate {rate:g}" if swept else "")
        return Run(entry, seed, rate, Trial(label, folder, {**config.options(), **flags}, self.settings.training_flags))


def _name(model: str) -> str:
    return Path(model).name.removesuffix(".json")


def _swept_as(entry: Entry) -> tuple[str, str]:
    return entry.model, ABLATED if entry.contender.ablation else entry.contender.ffn_type

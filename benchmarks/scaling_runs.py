"""The runs of a scaling fit: read from rows of a GPU or from folders of `flashmhf compare`, and paired by seed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmhf.comparison.plan import model_name
from flashmhf.comparison.results import RESULTS_FILE, read_comparison
from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost
from flashmhf.models.loading import load_config
from gpu_rows import read_lines

CONTENDERS = ("swiglu", "flashmhf")  # differences are of the second to the first
MIN_SIZES = 2
MAX_SPREAD = 0.05  # of tokens per parameter


@dataclass(frozen=True, kw_only=True)
class Run:
    """The final loss of one training run.

    Attributes:
        source: where it was read.
        size: name of the model.
        parameters: without embeddings.
        loss: validation, nats/token.
    """

    source: str
    size: str
    ffn_type: str
    seed: int
    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Size:
    """All runs of one size.

    Attributes:
        parameters: without embeddings, mean over contenders.
        losses: (seeds, contenders).
    """

    name: str
    parameters: float
    losses: np.ndarray

    @property
    def seeds(self) -> int:
        return len(self.losses)


def paired(runs: Iterable[Run]) -> list[Size]:
    """The sizes, the smallest first.

    Raises:
        InputError: fewer than two sizes or seeds, an unpaired run, a run that is there twice, two models of the same
            name, or unequal tokens per parameter.
    """
    by_size: dict[str, dict[int, dict[str, Run]]] = {}
    kept = [run for run in runs if run.ffn_type in CONTENDERS]
    _check_names(kept)
    for run in kept:
        by_size.setdefault(run.size, {}).setdefault(run.seed, {})[run.ffn_type] = run
    if len(by_size) < MIN_SIZES:
        raise InputError(f"sizes: expected at least two, got {', '.join(by_size) or 'none'}")
    for size, seeds in by_size.items():
        complete = sum(len(pair) == len(CONTENDERS) for pair in seeds.values())
        if complete < len(seeds) or complete < 2:
            raise InputError(f"seeds: expected at least two at {size}, each of both contenders, got {complete}")
    ratios = [run.tokens / run.parameters for run in kept]
    if max(ratios) > (1 + MAX_SPREAD) * min(ratios):
        given = f"{min(ratios):.3g} to {max(ratios):.3g}"
        raise InputError(f"tokens per parameter: expected equal ones (to {MAX_SPREAD:.0%}), got {given}")
    sizes = []
    for size, seeds in by_size.items():
        pairs = [[pair[name] for name in CONTENDERS] for _, pair in sorted(seeds.items())]
        parameters = float(np.mean([run.parameters for pair in pairs for run in pair]))
        losses = np.array([[run.loss for run in pair] for pair in pairs])
        sizes.append(Size(name=size, parameters=parameters, losses=losses))
    return sorted(sizes, key=lambda one: one.parameters)


def _check_names(runs: list[Run]) -> None:
    """A size is known by its model's name alone: refuses two models, or two lengths of training, of the same name."""
    first: dict[tuple[str, str], Run] = {}
    seen: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        other = first.setdefault((run.size, run.ffn_type), run)
        if (other.parameters, other.tokens) != (run.parameters, run.tokens):
            given = " and ".join(
                f"{one.parameters:,} parameters and {one.tokens:,} tokens in {one.source}" for one in (other, run)
            )
            raise InputError(f"size {run.size}: expected one model and one number of tokens per name, got {given}")
        same = seen.setdefault((run.size, run.ffn_type, run.seed), run)
        if same is not run:
            raise InputError(
                f"size {run.size}: expected each run once, got {run.ffn_type} with seed {run.seed} in {same.source} "
                f"and in {run.source}"
            )


def read_runs(source: Path) -> list[Run]:
    """The finished runs of a file of rows, or of a comparison's folder, without ablations."""
    if source.is_file():
        rows = [row for row in read_lines(source)[0] if row.get("final") and "parameters_without_embeddings" in row]
        return [
            Run(
                source=str(source),
                size=row["size"],
                ffn_type=row["ffn_type"],
                seed=row["seed"],
                parameters=row["parameters_without_embeddings"],
                tokens=row["tokens"],
                loss=row["validation_nats_per_token"],
            )
            for row in rows
        ]
    result = read_comparison(source / RESULTS_FILE)
    configs = {
        variant.variant: load_config(str(source / "configs" / f"{variant.variant}.json"))
        for variant in result.variants
        if variant.ablation is None
    }
    parameters = {name: model_cost(config).parameters_without_embeddings for name, config in configs.items()}
    return [
        Run(
            source=str(source),
            size=model_name(run.model),
            ffn_type=run.ffn_type,
            seed=run.seed,
            parameters=parameters[run.variant],
            tokens=run.tokens,
            loss=run.validation_loss,
        )
        for run in result.runs
        if run.variant in parameters and run.validation_loss is not None and run.tokens is not None
    ]

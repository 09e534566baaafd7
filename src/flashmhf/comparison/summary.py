"""From the runs of a comparison and their scores to its result: means, spreads, paired differences, verdicts."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from flashmhf.comparison.evaluate import HeldOut, Score
from flashmhf.comparison.plan import MatchedVariant, Plan, Run
from flashmhf.comparison.results import (
    FAILED,
    FINISHED,
    ComparisonResult,
    Curve,
    Differences,
    DocumentsResult,
    RunResult,
    Samples,
    Spread,
    SweepResult,
    VariantResult,
)
from flashmhf.comparison.settings import ABLATED, Variant
from flashmhf.comparison.verdict import MIN_SEEDS, judge
from flashmhf.estimates.cost import model_cost
from flashmhf.evaluation import Evaluation
from flashmhf.evaluation.differences import BITS_PER_BYTE, NATS_PER_TOKEN, paired_difference
from flashmhf.training.instability import recorded
from flashmhf.training.run_log import read_log

SPREADS = ("validation_loss", "bits_per_byte", "tokens_per_second", "peak_memory_mib", "elapsed_s")
OF_RESULT = ("steps", "tokens", "parameters", "train_loss", "validation_loss", "bits_per_byte", "skipped_steps")
BySeed = dict[int, Evaluation]


def summarise(
    plan: Plan, runs: Sequence[Run], scores: Mapping[Path, Score], held_out: HeldOut, *, jobs: int, unigram: float
) -> ComparisonResult:
    """The result of a comparison.

    Args:
        plan: of the comparison.
        runs: its final runs.
        scores: by folder, of those that finished.
        held_out: what they were scored on.
        jobs: runs that shared the machine.
        unigram: see `unigram_entropy`.
    """
    evaluations: dict[str, BySeed] = {}
    for run in runs:
        score = scores.get(run.folder)
        if score is not None and score.evaluation is not None:
            evaluations.setdefault(run.variant.name, {})[run.seed] = score.evaluation
    results = tuple(run_result(run) for run in runs)
    observed = {
        run.variant.name: score
        for run in runs
        if (score := scores.get(run.folder)) is not None and score.continuation is not None
    }
    return ComparisonResult(
        settings=plan.settings,
        jobs=jobs,
        unigram_entropy_nats=unigram,
        sweep=tuple(_sweep_result(run, run in runs) for run in plan.sweep()),
        variants=tuple(_variant_result(plan, variant, results, evaluations) for variant in plan.variants),
        gates={name: score.gates for name, score in observed.items()},
        runs=results,
        samples=Samples(
            prompt=held_out.prompt, continuations={name: score.continuation or "" for name, score in observed.items()}
        ),
    )


def run_result(run: Run) -> RunResult:
    """A run as its folder describes it. Speed, memory and time are from the log, which covers all of its processes."""
    rows = read_log(run.folder).rows
    about: dict[str, Any] = {
        "variant": run.variant.name,
        "ffn_type": run.variant.variant.ffn_type,
        "model": run.variant.model,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "folder": run.folder.name,
        "curve": _curve(rows, "loss"),
        "validation_curve": _curve(rows, "eval_loss"),
        "instabilities": recorded(rows),
    }
    result = run.result
    if result is None:
        return RunResult(status=FAILED, **about)
    speeds, memory = ([row[name] for row in rows if name in row] for name in ("tokens_per_second", "memory_mib"))
    return RunResult(
        status=FINISHED,
        **about,
        **{name: getattr(result, name) for name in OF_RESULT},
        tokens_per_second=statistics.median(speeds) if speeds else None,
        peak_memory_mib=max(memory, default=None),
        elapsed_s=rows[-1]["elapsed_s"] if rows else None,
    )


def unigram_entropy(tokens: Dataset) -> float:
    """Nats/token of the best model without context, which every variant must beat.

    Args:
        tokens: documents with the column "input_ids".
    """
    counts = np.zeros(0, dtype=np.int64)
    for batch in tokens.with_format("arrow").iter(1000):
        found = np.bincount(batch["input_ids"].combine_chunks().flatten().to_numpy())
        counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
        counts[: len(found)] += found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _curve(rows: Sequence[dict[str, Any]], name: str) -> Curve:
    points = [(row["step"], row[name], row["elapsed_s"]) for row in rows if row.get(name) is not None]
    steps, losses, elapsed_s = zip(*points, strict=True) if points else ((), (), ())
    return Curve(steps=steps, losses=losses, elapsed_s=elapsed_s)


def _sweep_result(run: Run, chosen: bool) -> SweepResult:
    assert run.learning_rate is not None
    result = run.result
    return SweepResult(
        variant=run.variant.name,
        seed=run.seed,
        learning_rate=run.learning_rate,
        validation_loss=None if result is None else result.validation_loss,
        chosen=chosen,
    )


def _variant_result(
    plan: Plan, variant: MatchedVariant, results: Iterable[RunResult], evaluations: Mapping[str, BySeed]
) -> VariantResult:
    runs = [result for result in results if result.variant == variant.name]
    cost = model_cost(variant.config, plan.settings.data.context_length)
    first, ablated = (
        next((other.name for other in plan.variants if (other.model, other.variant) == (variant.model, layer)), "")
        for layer in (Variant(plan.settings.variants[0]), Variant(ABLATED))
    )
    return VariantResult(
        variant=variant.name,
        ffn_type=variant.variant.ffn_type,
        model=variant.model,
        ablation=variant.variant.ablation,
        parameters=cost.parameters,
        forward_flops_per_token=cost.forward_flops_per_token,
        layers=variant.config.num_hidden_layers,
        intermediate_size=variant.config.intermediate_size,
        learning_rate=runs[0].learning_rate,
        failed_seeds=tuple(run.seed for run in runs if not run.finished),
        **{name: Spread.of([getattr(run, name) for run in runs]) for name in SPREADS},
        documents=_documents(evaluations.get(variant.name, {})),
        difference=differences_between(evaluations, variant.name, first),
        effect=differences_between(evaluations, variant.name, ablated) if variant.variant.ablation else None,
    )


def _documents(evaluations: BySeed) -> DocumentsResult:
    return DocumentsResult(
        nats_per_token=Spread.of(evaluation.nats_per_token for evaluation in evaluations.values()),
        number=next((evaluation.documents for evaluation in evaluations.values()), None),
    )


def differences_between(evaluations: Mapping[str, BySeed], name: str, baseline: str) -> Differences | None:
    """With the verdict; None for a variant and itself, and without a seed that both have."""
    these, those = evaluations.get(name, {}), evaluations.get(baseline, {})
    seeds = sorted(these.keys() & those.keys())
    if not seeds or name == baseline:
        return None
    pairs = [these[seed] for seed in seeds], [those[seed] for seed in seeds]
    nats, bits = (paired_difference(*pairs, measure=measure) for measure in (NATS_PER_TOKEN, BITS_PER_BYTE))
    verdict = judge(nats)
    if verdict.seeds < MIN_SEEDS:
        nats, bits = (replace(difference, interval=None) for difference in (nats, bits))
    return Differences(baseline=baseline, nats_per_token=nats, bits_per_byte=bits, verdict=verdict)

"""The trained models of a comparison on its held-out documents: losses, paired differences, gates."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.comparison.plan import Run
from flashmhf.comparison.settings import Comparison
from flashmhf.data.splits import truncate_documents
from flashmhf.errors import RunError
from flashmhf.evaluation import Evaluation, evaluate
from flashmhf.evaluation.differences import paired_difference
from flashmhf.evaluation.inspection import inspect
from flashmhf.files import read_json, write_json
from flashmhf.layers import FlashMHF
from flashmhf.models.loading import load_model

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
MEASURES = ("nats_per_token", "bits_per_byte")


def evaluate_runs(
    settings: Comparison,
    runs: Sequence[Run],
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[str], None],
) -> dict[str, dict[int, Evaluation]]:
    """By entry and seed, each finished run's loss on truncated held-out documents; kept in its folder.

    A run whose loss is not finite there has none.
    """
    documents = truncate_documents(documents, settings.document_bytes)
    found: dict[str, dict[int, Evaluation]] = {}
    for run in runs:
        if not run.trial.finished:
            continue
        file = run.trial.folder / EVALUATION_FILE
        if not file.exists():
            progress(f"evaluating {run.trial.label}")
            try:
                result = evaluate(trained_model(run), tokenizer, documents, context_length=settings.data.context_length)
            except RunError as error:
                logger.warning("%s: %s", run.trial.label, error)
                continue
            write_json(file, result.as_dict())
        found.setdefault(run.entry.name, {})[run.seed] = Evaluation.from_dict(read_json(file))
    return found


def trained_model(run: Run) -> PreTrainedModel:
    """On the first GPU, or the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return cast(Any, load_model(str(run.trial.folder))).to(device)


def differences(
    evaluations: dict[str, dict[int, Evaluation]], baseline: str, other: str
) -> dict[str, dict[str, Any]] | None:
    """By measure, entry `other` less entry `baseline` with an interval over documents and seeds, paired by both.

    None of an entry with itself, and where no seed ended well in both.
    """
    first, second = evaluations.get(baseline, {}), evaluations.get(other, {})
    seeds = sorted(first.keys() & second.keys())
    if not seeds or baseline == other:
        return None
    pairs = [second[seed] for seed in seeds], [first[seed] for seed in seeds]
    return {measure: paired_difference(*pairs, measure=measure).as_dict() for measure in MEASURES}


def gate_usage(run: Run, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each head's gate entropy and evenness of load, layer by layer; empty for layers without a gate."""
    model = trained_model(run)
    if not any(isinstance(module, FlashMHF) for module in model.modules()):
        return []
    heads = inspect(model, tokenizer, documents)
    return [
        {"layer": head.layer, "head": head.head, "entropy": head.gate_entropy, "load": head.load_entropy}
        for head in heads
        if head.gate_entropy is not None
    ]

"""What the runs of a comparison say together: means, spreads, paired differences, samples."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flashmhf.comparison.evaluate import differences, evaluate_runs, gate_usage, trained_model
from flashmhf.comparison.plan import Entry, Run
from flashmhf.comparison.settings import ABLATED, Comparison, Contender
from flashmhf.data.corpus import load_corpus
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.estimates.cost import model_cost
from flashmhf.evaluation import Evaluation
from flashmhf.evaluation.generation import generate
from flashmhf.training.run_files import read_result
from flashmhf.training.run_log import read_log

PROMPT_TOKENS = 48
SAMPLE_TOKENS = 160
MARGIN_TOKENS = 8  # for a prompt that is encoded otherwise than it was cut, and the separator before it
MEASURES = ("validation_loss", "bits_per_byte", "tokens_per_second", "peak_memory_mib", "elapsed_s")


def collect(
    settings: Comparison, sweep: Sequence[Run], runs: Sequence[Run], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that tables and report show, as plain values.

    "variants" has a row for each entry; what died is in "runs" with "status" "failed" and in no mean. "documents" in a
    row is the loss on truncated the held-out documents, "difference" what it is above that of the first
    variant on the same backbone, and "effect" what an ablation's is above that of the layer it changes.
    """
    entries = list({run.entry.name: run.entry for run in runs}.values())
    described = [_describe(run) for run in runs]
    data = settings.data
    documents = load_corpus(data.source, text_column=data.text_column, bad_data=data.bad_data).validation
    tokenizer = load_tokenizer(data.tokenizer)
    evaluations = evaluate_runs(settings, runs, documents, tokenizer, progress)
    evaluated = [run for run in runs if run.seed in evaluations.get(run.entry.name, {})]
    first = {entry.model: entry.name for entry in entries if entry.contender == Contender(settings.variants[0])}
    whole = {entry.model: entry.name for entry in entries if entry.contender == Contender(ABLATED)}
    return {
        "settings": asdict(settings),
        "unigram_entropy_nats": _unigram_entropy(documents, tokenizer),
        "sweep": [
            {
                "variant": run.entry.name,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "validation_loss": run.validation_loss,
                "chosen": run in runs,
            }
            for run in sweep
        ],
        "variants": [
            {
                **_summarise(settings, entry, [row for row in described if row["variant"] == entry.name]),
                "documents": _documents(evaluations.get(entry.name, {})),
                "difference": differences(evaluations, first[entry.model], entry.name),
                "effect": differences(evaluations, whole[entry.model], entry.name)
                if entry.contender.ablation
                else None,
            }
            for entry in entries
        ],
        "gates": {run.entry.name: gate_usage(run, documents, tokenizer) for run in _first_runs(runs)},
        "runs": described,
        "samples": _samples(evaluated, documents[0]["text"], tokenizer, settings.data.context_length),
    }


def _describe(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": run.entry.name,
        "ffn_type": run.entry.contender.ffn_type,
        "model": run.entry.model,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "folder": run.trial.folder.name,
        "status": "finished" if run.trial.finished else "failed",
    }
    rows = read_log(run.trial.folder).rows
    row["curve"] = [[line["step"], line["loss"], line["elapsed_s"]] for line in rows if "loss" in line]
    row["validation_curve"] = [
        [line["step"], line["eval_loss"], line["elapsed_s"]] for line in rows if "eval_loss" in line
    ]
    result = read_result(run.trial.folder)
    if result is None:
        return row
    # from the log, since a resumed run's result knows its last process alone
    speeds, memory = ([line[name] for line in rows if name in line] for name in ("tokens_per_second", "memory_mib"))
    row["tokens_per_second"] = statistics.median(speeds) if speeds else None
    row["peak_memory_mib"] = max(memory, default=None)
    row["elapsed_s"] = rows[-1]["elapsed_s"] if rows else None
    return {**asdict(result), **row}


def _summarise(settings: Comparison, entry: Entry, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finished = [run for run in runs if run["status"] == "finished"]
    cost = model_cost(entry.config, settings.data.context_length)
    summary: dict[str, Any] = {
        "variant": entry.name,
        "ffn_type": entry.contender.ffn_type,
        "model": entry.model,
        "ablation": entry.contender.ablation,
        "parameters": cost.parameters,
        "forward_flops_per_token": cost.forward_flops_per_token,
        "layers": entry.config.num_hidden_layers,
        "intermediate_size": entry.config.intermediate_size,
        "learning_rate": runs[0]["learning_rate"],
        "failed_seeds": [run["seed"] for run in runs if run["status"] == "failed"],
    }
    for measure in MEASURES:
        values = [run[measure] for run in finished if run[measure] is not None]
        summary[measure] = {
            "mean": statistics.fmean(values) if values else None,
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
        }
    return summary


def _documents(evaluations: dict[int, Evaluation]) -> dict[str, Any]:
    losses = [evaluation.nats_per_token for evaluation in evaluations.values()]
    return {
        "nats_per_token": statistics.fmean(losses) if losses else None,
        "values": losses,
        "number": next((evaluation.documents for evaluation in evaluations.values()), None),
    }


def _first_runs(runs: Sequence[Run]) -> list[Run]:
    """Of each entry, the first run that finished."""
    return list({run.entry.name: run for run in reversed(runs) if run.trial.finished}.values())[::-1]


def _unigram_entropy(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats/token of the best model without context: what any of the variants must beat."""
    tokens = tokenize(documents, tokenizer)
    counts = np.bincount(np.concatenate([np.asarray(ids) for ids in tokens["input_ids"]]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _samples(runs: Sequence[Run], text: str, tokenizer: PreTrainedTokenizerBase, context_length: int) -> dict[str, Any]:
    """The same prompt, the beginning of `text`, continued by each entry's first run."""
    room = min(PROMPT_TOKENS + SAMPLE_TOKENS, max(context_length - MARGIN_TOKENS, 2))
    given = min(PROMPT_TOKENS, max(room // 3, 1))
    prompt_ids = tokenizer(text[: 16 * PROMPT_TOKENS], add_special_tokens=False)["input_ids"]
    prompt = str(tokenizer.decode(prompt_ids[:given]))
    continuations = {
        run.entry.name: generate(trained_model(run), tokenizer, prompt, max_new_tokens=room - given)
        for run in _first_runs(runs)
    }
    return {"prompt": prompt, "continuations": continuations}

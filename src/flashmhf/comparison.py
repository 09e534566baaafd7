"""Feed-forward layers against each other: same trunk, matched parameters, same data order, same seeds."""

import json
import logging
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmhf.accounting import count_parameters
from flashmhf.data import load_corpus, tokenize
from flashmhf.data.mixing import parse_sources
from flashmhf.errors import InputError
from flashmhf.generation import generate
from flashmhf.models import FlashMHFConfig
from flashmhf.models.configuration import FFN_TYPES
from flashmhf.models.loading import load_config, load_model, read_json
from flashmhf.report import markdown_table, write_report
from flashmhf.tokenization import load_tokenizer
from flashmhf.training import write_json

logger = logging.getLogger(__name__)

SETTINGS_FILE = "compare.json"
RESULT_FILE = "result.json"
WIDTH_MULTIPLE = 8
PROMPT_TOKENS = 48
SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        variants: values of `ffn_type`.
        model: a preset, file or folder whose configuration gives the trunk and the number of parameters to match.
        data, tokenizer, context_length, text_column, validation_tokens: see `flashmhf.training.Run`.
        seeds: each variant is trained once a seed; a seed fixes the initial weights and the order of the data.
        learning_rates: a variant's own, or None for that of training_flags.
        training_flags: further flags of `flashmhf train`, the same for every run.
    """

    variants: tuple[str, ...]
    model: str
    data: str
    tokenizer: str
    seeds: tuple[int, ...]
    context_length: int
    learning_rates: dict[str, float]
    training_flags: tuple[str, ...]
    text_column: str = "text"
    validation_tokens: int = 2**17

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in FFN_TYPES:
                raise InputError(f"variants: expected some of {', '.join(FFN_TYPES)}, got {name!r}")
        if parse_sources(self.data) != [(1.0, self.data)]:
            raise InputError(f"data: expected one SOURCE without a weight, got {self.data!r}")
        for name in self.learning_rates:
            if name not in self.variants:
                raise InputError(
                    f"learning-rate: expected one of the variants {', '.join(self.variants)}, got {name!r}"
                )
        for option, values in (("variants", self.variants), ("seeds", self.seeds)):
            if not values:
                raise InputError(f"{option}: expected at least one, got none")
            if len(set(values)) < len(values):
                raise InputError(f"{option}: expected each once, got {', '.join(map(str, values))}")


def compare(settings: Comparison, output_dir: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Trains every variant with every seed and writes table.md, results.json and report.html into `output_dir`.

    Each run is a process and a folder of its own, `runs/VARIANT-seedN`, with a model that `flashmhf eval` and
    `generate` can read. Called again with the same settings, finished runs are kept and an unfinished one goes on.

    Args:
        settings: what to compare.
        output_dir: new, empty, or holding the same comparison.
        progress: called with one line at the start of each run.

    Raises:
        InputError: the settings do not fit, or the folder holds something else.
        TrainingFailedError: a training run ended with an error.
    """
    base = load_config(settings.model)
    if not isinstance(base, FlashMHFConfig):
        raise InputError(f"model: expected a flashmhf configuration, got one of type {base.model_type!r}")
    _claim(output_dir, settings)
    configs = {variant: match_parameters(base, variant) for variant in settings.variants}
    for variant, config in configs.items():
        write_json(output_dir / "configs" / f"{variant}.json", config.to_dict())
    total = len(settings.seeds) * len(configs)
    runs: list[dict[str, Any]] = []
    for seed in settings.seeds:
        for variant in configs:
            progress(f"run {len(runs) + 1} of {total}: {variant}, seed {seed}")
            runs.append(_run(settings, variant, seed, output_dir))
    results = {
        "settings": asdict(settings),
        "unigram_entropy_nats": _unigram_entropy(settings),
        "variants": [_summarise(variant, [run for run in runs if run["variant"] == variant]) for variant in configs],
        "runs": runs,
        "samples": _samples(settings, output_dir),
    }
    write_json(output_dir / "results.json", results)
    (output_dir / "table.md").write_text(markdown_table(results) + "\n")
    write_report(results, output_dir / "report.html")
    return results


def match_parameters(base: FlashMHFConfig, variant: str) -> FlashMHFConfig:
    """`base` with another feed-forward layer, whose width brings the number of parameters closest to that of `base`."""
    if variant == base.ffn_type:
        return base
    target = count_parameters(base)
    subnetworks = base.num_subnetworks if variant in ("flashmhf", "dense_moe") else 1
    step = WIDTH_MULTIPLE * subnetworks
    at_one, at_two = (count_parameters(_with_ffn(base, variant, subnetworks, step * n)) for n in (1, 2))
    steps = max(1, round(1 + (target - at_one) / (at_two - at_one)))
    return _with_ffn(base, variant, subnetworks, step * steps)


class TrainingFailedError(RuntimeError):
    """A training run ended with an error; what it printed says why."""


def _with_ffn(base: FlashMHFConfig, variant: str, subnetworks: int, width: int) -> FlashMHFConfig:
    values = {
        **base.to_dict(),
        "ffn_type": variant,
        "num_subnetworks": subnetworks,
        "intermediate_size": width,
        "score_scale": None,  # these belong to the layer that is replaced
        "gate_scale": None,
        "output_scale": None,
    }
    return FlashMHFConfig(**{name: value for name, value in values.items() if name != "model_type"})


def _claim(output_dir: Path, settings: Comparison) -> None:
    content = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output-dir: expected a folder, got the file {output_dir}")
    mine = json.loads(json.dumps(asdict(settings)))
    if content and SETTINGS_FILE not in content:
        raise InputError(f"output-dir: expected a new or empty folder, got {output_dir} with {', '.join(content[:3])}")
    if content:
        earlier = read_json(output_dir / SETTINGS_FILE)
        for name, value in mine.items():
            if earlier.get(name) != value:
                raise InputError(
                    f"output-dir: {output_dir} holds a comparison with {name} {earlier.get(name)!r}; got {value!r}"
                )
    write_json(output_dir / SETTINGS_FILE, mine)


def _run(settings: Comparison, variant: str, seed: int, output_dir: Path) -> dict[str, Any]:
    folder = output_dir / "runs" / f"{variant}-seed{seed}"
    result_file = folder / RESULT_FILE
    if not result_file.exists():
        command = _command(settings, variant, seed, output_dir, folder)
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if finished.returncode != 0:
            if finished.returncode in (130, 143):
                raise KeyboardInterrupt
            raise TrainingFailedError(
                f"training {variant} with seed {seed} failed with exit code {finished.returncode}"
            )
        write_json(result_file, json.loads(finished.stdout))
    result = read_json(result_file)
    state = read_json(folder / "trainer_state.json")
    config = read_json(folder / "config.json")
    return {
        **result,
        "variant": variant,
        "seed": seed,
        "intermediate_size": config["intermediate_size"],
        "curve": [[row["step"], row["loss"]] for row in state["log_history"] if "loss" in row],
        "validation_curve": [[row["step"], row["eval_loss"]] for row in state["log_history"] if "eval_loss" in row],
    }


def _command(settings: Comparison, variant: str, seed: int, output_dir: Path, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "flashmhf", "train", "--json"]
    command += ["--model", str(output_dir / "configs" / f"{variant}.json"), "--data", settings.data]
    command += ["--tokenizer", settings.tokenizer, "--text-column", settings.text_column]
    command += ["--context-length", str(settings.context_length), "--output-dir", str(folder)]
    command += ["--validation-tokens", str(settings.validation_tokens), "--seed", str(seed)]
    if variant in settings.learning_rates:
        command += ["--learning-rate", str(settings.learning_rates[variant])]
    if (folder / "run.json").exists():
        command.append("--resume")
    return [*command, *settings.training_flags]


def _summarise(variant: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"variant": variant, "parameters": runs[0]["parameters"]}
    summary["intermediate_size"] = runs[0]["intermediate_size"]
    for measure in ("validation_loss", "bits_per_byte", "tokens_per_second", "peak_memory_mib", "elapsed_s"):
        values = [run[measure] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[measure] = {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": values}
    return summary


def _unigram_entropy(settings: Comparison) -> float:
    """Nats a token of the best model without context: what any of the variants must beat."""
    corpus = load_corpus(settings.data, text_column=settings.text_column)
    tokens = tokenize(corpus.validation, load_tokenizer(settings.tokenizer))
    counts = np.bincount(np.concatenate([np.asarray(ids) for ids in tokens["input_ids"]]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _samples(settings: Comparison, output_dir: Path) -> dict[str, Any]:
    """The same prompt, the beginning of the first validation document, continued by each variant's first run."""
    tokenizer = load_tokenizer(settings.tokenizer)
    text = load_corpus(settings.data, text_column=settings.text_column).validation[0]["text"]
    prompt_ids = tokenizer(text[: 16 * PROMPT_TOKENS], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    prompt = str(tokenizer.decode(prompt_ids))
    room = settings.context_length - PROMPT_TOKENS - 8
    continuations = {}
    for variant in settings.variants:
        model = load_model(str(output_dir / "runs" / f"{variant}-seed{settings.seeds[0]}"))
        new_tokens = min(SAMPLE_TOKENS, max(room, math.ceil(PROMPT_TOKENS / 2)))
        continuations[variant] = generate(model, tokenizer, prompt, max_new_tokens=new_tokens)
    return {"prompt": prompt, "continuations": continuations}

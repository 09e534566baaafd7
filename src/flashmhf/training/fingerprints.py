"""What a run was given, by content rather than by path, and how a resumed run differs from the one before."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from flashmhf.data.mixing import TrainingData
from flashmhf.data.tokenizer import fit_vocabulary, tokenizer_key
from flashmhf.models.loading import load_config
from flashmhf.serialization import as_plain
from flashmhf.training.config import TrainConfig

# Arguments whose new values a checkpoint would override without a word, since the optimizer's state holds the old ones.
OF_OPTIMIZER = (
    "optim",
    "lr_scheduler_type",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
# Those that hold from the checkpoint on.
MAY_CHANGE = (
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
)
# Of configurations: where they come from, and how the same numbers are computed or returned.
IGNORED = ("transformers_version", "_name_or_path", "architectures", "dtype", "backend", "recompute_q", "use_cache")
SAMPLES, SAMPLE_BYTES = 64, 2**14  # of a file of weights


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Of a run's inputs.

    Attributes:
        data: the weight and the hash of each source.
        tokenizer: a hash of what determines the ids of a text.
        config: the model's configuration, every value.
        weights: a hash of the weights that the run starts from; None for new ones.
        seed: of new weights and dropout.
        data_seed: of the order of the data.
        sequences_per_step: over all processes.
        arguments: others of transformers.TrainingArguments.
    """

    data: tuple[tuple[float, str], ...]
    tokenizer: str
    config: dict[str, Any]
    weights: str | None
    seed: int
    data_seed: int
    sequences_per_step: int
    arguments: dict[str, Any]


def fingerprints(
    config: TrainConfig, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase, data: TrainingData
) -> Fingerprints:
    """Of a run that is about to start or to be resumed."""
    processes = arguments.world_size // config.tensor_parallel
    values = as_plain(arguments.to_dict(), default=str)
    return Fingerprints(
        data=tuple(zip(data.weights, data.fingerprints, strict=True)),
        tokenizer=tokenizer_key(tokenizer),
        config=config_values(config.model, tokenizer),
        weights=weights_key(Path(config.model)) if Path(config.model).is_dir() else None,
        seed=arguments.seed,
        data_seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        sequences_per_step=arguments.train_batch_size * arguments.gradient_accumulation_steps * processes,
        arguments={name: values[name] for name in (*OF_OPTIMIZER, *MAY_CHANGE)},
    )


def config_values(model: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The configuration of a preset, a file or a folder; new models get the tokenizer's vocabulary."""
    config = load_config(model)
    if not Path(model).is_dir():
        fit_vocabulary(config, tokenizer)
    return {name: value for name, value in as_plain(config.to_dict(), default=str).items() if name not in IGNORED}


def weights_key(folder: Path) -> str:
    """A hash of the size, the beginning and samples of each file of weights; reads 1 MiB of each."""
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            total.update(f"{file.name} {size} ".encode())
            for sample in range(SAMPLES):
                opened.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                total.update(opened.read(SAMPLE_BYTES))
    return total.hexdigest()


def refused_difference(earlier: Fingerprints, now: Fingerprints) -> str | None:
    """The first difference with which a run would not be the same one, as "expected ..., got ...", or None."""
    if earlier.data != now.data:
        return f"expected the data of the earlier run, {_short(earlier)}, got other text, {_short(now)}"
    if earlier.tokenizer != now.tokenizer:
        return f"expected the tokenizer of the earlier run, {earlier.tokenizer[:8]}, got {now.tokenizer[:8]}"
    for name, before, after in changes(earlier.config, now.config):
        return f"expected the model of the earlier run, with {name} {before!r}, got {after!r}"
    if earlier.weights != now.weights:
        return "expected a model with the weights that the earlier run started from, got others"
    for name in ("seed", "data_seed", "sequences_per_step"):
        before, after = getattr(earlier, name), getattr(now, name)
        if before != after:
            return f"expected the {name} of the earlier run, {before}, got {after}"
    for name, before, after in changes(earlier.arguments, now.arguments):
        if name in OF_OPTIMIZER:
            return f"expected the {name} of the earlier run, {before!r}, got {after!r}"
    return None


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, earlier value, value now) of what differs; another version of a library may have other names."""
    for name in sorted(earlier.keys() & now.keys()):
        if earlier[name] != now[name]:
            yield name, earlier[name], now[name]


def _short(prints: Fingerprints) -> str:
    return ", ".join(f"{weight:g}*{key[:8]}" for weight, key in prints.data)

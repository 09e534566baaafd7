"""The settings of runs, as their folders hold them: of each run, and in what several differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmhf.comparison.settings import Comparison
from flashmhf.reports.table import Table, cell
from flashmhf.training.fingerprints import Fingerprints
from flashmhf.training.run_files import read_fingerprints, read_run
from flashmhf.training.run_log import RunLog

Settings = dict[str, Any]  # a label and its value
SEEDS = ("seed", "data seed")
# What a reader looks for first: arguments of a run by their labels.
ARGUMENTS = {
    "learning rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "schedule arguments": "lr_scheduler_kwargs",
    "warm-up steps": "warmup_steps",
    "weight decay": "weight_decay",
    "maximum steps": "max_steps",
    "epochs": "num_train_epochs",
    "gradient clipping": "max_grad_norm",
}
MODEL = (
    "ffn_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_ffn_heads",
    "num_subnetworks", "gate_type", "q_norm", "qk_norm", "vocab_size", "tie_word_embeddings", "init",
)  # fmt: skip
MAX_COLUMNS = 5  # groups of runs side by side
HASH_CHARACTERS = 8  # shown of a hash, enough to see a difference


def run_settings(folder: Path, log: RunLog) -> Settings:
    """Everything that is known about how a run was trained; the most important first.

    Raises:
        InputError: a file of the run is damaged; names it.
    """
    config, prints = read_run(folder), read_fingerprints(folder)
    options = config.options()
    settings: Settings = {name: options.pop(name) for name in ("model", "data", "tokenizer", "optimizer")}
    if prints is not None:
        settings |= _of_arguments(prints, config.data.context_length)
    settings |= {_label(name): value for name, value in options.items()}
    if log.starts:
        last = log.starts[-1]
        settings |= {"machine": last.machine, "processes": last.processes, "torch": last.torch}
    return settings | ({} if prints is None else _of_model(prints))


def command_settings(settings: Comparison) -> list[tuple[str, str]]:
    """What `compare` or `sweep` was given."""
    values = asdict(settings)
    train = values.pop("train")
    data = train.pop("data")
    del train["model"]  # which differs
    values["training_flags"] = " ".join(settings.training_flags)
    return in_common({"": [{_label(name): value for name, value in {**values, **train, **data}.items()}]})


def ffn_type(folder: Path) -> str | None:
    """The feed-forward layer of the run's model; None of a run by a version that did not record it."""
    prints = read_fingerprints(folder)
    found = None if prints is None else prints.config.get("ffn_type")
    return found if isinstance(found, str) else None


def without_seeds(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name not in SEEDS}


def differences(columns: Mapping[str, Sequence[Settings]]) -> Table | None:
    """A row for each setting that differs, a column for each group of runs; None if none differs.

    With many groups, a row for each of them.
    """
    rows = []
    for name in _names(columns):
        cells = {group: _values(name, runs) for group, runs in columns.items()}
        if len(set(cells.values())) > 1:
            rows.append((name, *cells.values()))
    if not rows:
        return None
    head: tuple[str, ...] = ("setting", *columns)
    if len(columns) > max(MAX_COLUMNS, len(rows)):
        head, *rows = zip(head, *rows, strict=True)
    return Table(head, rows, marked=frozenset(range(len(rows))))


def in_common(columns: Mapping[str, Sequence[Settings]]) -> list[tuple[str, str]]:
    """The other settings."""
    pairs = []
    for name in _names(columns):
        cells = {_values(name, runs) for runs in columns.values()}
        if len(cells) == 1 and (value := cells.pop()):
            pairs.append((name, value))
    return pairs


def _names(columns: Mapping[str, Sequence[Settings]]) -> list[str]:
    return list(dict.fromkeys(name for runs in columns.values() for settings in runs for name in settings))


def _values(name: str, runs: Sequence[Settings]) -> str:
    """The values of the runs of a group, each once."""
    return ", ".join(dict.fromkeys(_shown(settings.get(name)) for settings in runs))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return cell(value)


def _of_arguments(prints: Fingerprints, context_length: int) -> Settings:
    arguments = dict(prints.arguments)
    found: Settings = {label: arguments.pop(name, None) for label, name in ARGUMENTS.items()}
    if isinstance(found["maximum steps"], int) and found["maximum steps"] > 0:
        del found["epochs"]  # which do not count then
    else:
        del found["maximum steps"]
    batch = prints.sequences_per_step
    found |= {"batch (sequences)": batch, "batch (tokens)": batch * context_length}
    found |= {"seed": prints.seed, "data seed": prints.data_seed}
    found |= {_label(name): value for name, value in arguments.items()}
    return found | {"data hash": ", ".join(content[:HASH_CHARACTERS] for _, content in prints.data)}


def _of_model(prints: Fingerprints) -> Settings:
    return {_label(name): prints.config[name] for name in MODEL if prints.config.get(name) is not None}


def _label(name: str) -> str:
    return name.replace("_", " ")

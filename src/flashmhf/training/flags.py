"""The flags of transformers.TrainingArguments, read from its source: importing transformers takes seconds.

So a misspelt flag is refused at once, and `flashmhf train --help` can list all of them.
"""

import ast
import functools
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashmhf.errors import InputError
from flashmhf.names import did_you_mean
from flashmhf.training.config import ADAMW, MUON
from flashmhf.training.defaults import DEFAULTS, LEARNING_RATES, MIN_LR_RATE, SAVE_STEPS
from flashmhf.training.warmup import MOST, SHARE

# What other programs call these flags.
ELSEWHERE = {
    "lr": "learning-rate",
    "wd": "weight-decay",
    "steps": "max-steps",
    "iters": "max-steps",
    "max-iters": "max-steps",
    "epochs": "num-train-epochs",
    "num-epochs": "num-train-epochs",
    "batch-size": "per-device-train-batch-size",
    "micro-batch-size": "per-device-train-batch-size",
    "grad-accum": "gradient-accumulation-steps",
    "grad-clip": "max-grad-norm",
    "warmup": "warmup-steps",
    "warmup-ratio": "warmup-steps",
    "scheduler": "lr-scheduler-type",
    "lr-scheduler": "lr-scheduler-type",
    "block-size": "context-length",
    "seq-len": "context-length",
    "seq-length": "context-length",
    "max-seq-length": "context-length",
    "dataset": "data",
    "dtype": "bf16",
    "out-dir": "output-dir",
    "output": "output-dir",
    "wandb": "report-to",
}
# Defaults that depend on other values or on the machine, in words.
IN_WORDS = {
    "learning_rate": f"{LEARNING_RATES[MUON]:g}; with --optimizer adamw {LEARNING_RATES[ADAMW]:g}",
    "lr_scheduler_kwargs": f'{{"min_lr_rate": {MIN_LR_RATE:g}}}',
    "warmup_steps": f"{SHARE:.0%} of the steps, at most {MOST:,}",
    "save_strategy": "steps",
    "save_steps": str(SAVE_STEPS),
    "bf16": "where the device computes in it",
    "use_cpu": "without an accelerator",
    "dataloader_pin_memory": "with a GPU",
    "optim": "adamw_torch_fused",
}


@functools.cache
def transformers_defaults() -> dict[str, str]:
    """The fields of TrainingArguments and their defaults as source text; empty without transformers."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    (fields,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {
        field.target.id: _default(field.value)
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def shown_defaults() -> dict[str, str]:
    """The default of each flag of TrainingArguments in `flashmhf train`, in words where it depends on others."""
    own = {name: _words(value) for name, value in DEFAULTS.items()}
    shown = {name: _words(ast.literal_eval(text)) for name, text in transformers_defaults().items() if _literal(text)}
    return {name: (shown | own | IN_WORDS).get(name, "") for name in transformers_defaults() if name != "output_dir"}


def check_known(flags: Iterable[str], options: Iterable[str] = ()) -> None:
    """Raises InputError for the first flag that nobody reads, with what may have been meant.

    Args:
        flags: of a command line, with their values; `--max-steps` and `--max_steps` are the same.
        options: the command's own, such as "context_length".
    """
    known = {name.replace("_", "-") for name in (*transformers_defaults(), *options)}
    if not transformers_defaults():
        return  # transformers is not installed, which is said later
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("_", "-")
        if flag.startswith("--") and name not in known and name.removeprefix("no-") not in known:
            raise InputError(unknown_flag(flag, known))


def unknown_flag(flag: str, known: Iterable[str]) -> str:
    """The message for a flag that is none of those known."""
    names = {f"--{name.replace('_', '-')}" for name in known}
    given = flag.partition("=")[0].replace("_", "-")
    elsewhere = f"--{ELSEWHERE.get(given.removeprefix('--'), '')}"
    meant = f"; did you mean {elsewhere}?" if elsewhere in names else did_you_mean(given, names)
    return f"flags: expected those of flashmhf train or transformers.TrainingArguments, got {flag!r}{meant}"


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        value = given.get("default")
    return "" if value is None else ast.unparse(value)


def _literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _words(value: Any) -> str:
    """As it is written on a command line; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

"""The README.md of a trained model: what it is, how to load it, how it was trained, what it achieved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, SchedulerType, TrainingArguments

from flashmhf import __version__
from flashmhf.files import atomic_write
from flashmhf.printable import one_line
from flashmhf.training.config import TrainConfig
from flashmhf.training.run_files import TrainResult

FILE = "README.md"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A language model with {parameters:,} parameters and {ffn_type} feed-forward layers, pretrained with FlashMHF {version}.

## Load

```python
import flashmhf  # tells transformers about the model: pip install 'flashmhf[models]'
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
```

`flashmhf generate DIR --prompt TEXT` continues a text, `flashmhf eval DIR` scores it on held-out data, where DIR is the
model's folder.

## Result

{result}

Losses are in nats/token; the validation data was held out from training.

## Training

{training}
"""


def write_card(config: TrainConfig, arguments: TrainingArguments, model: PreTrainedConfig, result: TrainResult) -> None:
    """Writes README.md into the run's folder."""
    folder, ffn_type = Path(result.output_dir), getattr(model, "ffn_type", model.model_type)
    text = CARD.format(
        name=one_line(folder.absolute().name),
        parameters=result.parameters,
        ffn_type=ffn_type,
        tags="\n".join(f"- {tag}" for tag in dict.fromkeys(("flashmhf", ffn_type))),
        version=__version__,
        where=arguments.hub_model_id or "DIR",
        result=_table(_result(result)),
        training=_table(_training(config, arguments, result)),
    )
    atomic_write(folder / FILE, text.encode())


def _result(result: TrainResult) -> dict[str, Any]:
    return {
        "validation loss": f"{result.validation_loss:.4f}",
        "bits/byte": f"{result.bits_per_byte:.4f}",
        "training loss, last logged": "" if result.train_loss is None else f"{result.train_loss:.4f}",
    }


def _training(config: TrainConfig, arguments: Any, result: TrainResult) -> dict[str, Any]:
    half = "bfloat16 autocast" if arguments.bf16 else "float16 autocast" if arguments.fp16 else "float32"
    return {
        "started from": config.model,
        "data": config.data.source,
        "tokenizer": config.data.tokenizer,
        "context length": f"{config.data.context_length:,}",
        "steps": f"{result.steps:,}",
        "tokens": f"{result.tokens:,}",
        "tokens per step": f"{result.tokens // max(result.steps, 1):,}",
        "optimizer": config.optimizer,
        "learning rate": f"{arguments.learning_rate:g}",
        "schedule": SchedulerType(arguments.lr_scheduler_type).value,
        "steps of warm-up": f"{arguments.warmup_steps:g}",
        "weight decay": f"{arguments.weight_decay:g}",
        "precision": half,
        "seed": arguments.seed,
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {one_line(str(value)).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(["| | |", "| --- | --- |", *lines])

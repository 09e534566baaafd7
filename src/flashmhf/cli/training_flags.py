"""The flags of transformers.TrainingArguments in the help of the commands that take them."""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand

COMMON = {
    "max_steps": "Optimizer steps; -1: as many as --num-train-epochs takes.",
    "num_train_epochs": "Passes over the data.",
    "per_device_train_batch_size": "Sequences per device and forward pass.",
    "gradient_accumulation_steps": "Forward passes per step.",
    "learning_rate": "The highest of the schedule.",
    "lr_scheduler_type": "Schedule of the learning rate.",
    "lr_scheduler_kwargs": "Its options, as JSON.",
    "warmup_steps": "Steps, or a share of them below 1.",
    "weight_decay": "Of matrices.",
    "adam_beta2": "Decay of the second moment.",
    "max_grad_norm": "The gradient is clipped to this norm.",
    "bf16": "Autocast to bfloat16.",
    "gradient_checkpointing": "Less memory, more computation.",
    "torch_compile": "Compile the model.",
    "seed": "Of initial weights and the order of the data.",
    "dataloader_num_workers": "Processes that prepare batches.",
    "logging_steps": "Steps between two lines of the log.",
    "eval_steps": "Steps between two validations.",
    "save_steps": "Steps between two checkpoints.",
    "save_total_limit": "Checkpoints to keep.",
    "report_to": "Trackers: tensorboard, wandb, mlflow, trackio, none.",
    "run_name": "In the tracker.",
    "push_to_hub": "Upload the finished model.",
    "hub_model_id": "Where to, owner/name.",
    "disable_tqdm": "No progress bar.",
}


class TrainingCommand(TyperCommand):
    """A command that takes the flags of TrainingArguments, and lists them with this package's defaults in its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_flags({parameter.name for parameter in self.params})


def _print_flags(own: Iterable[str | None]) -> None:
    """Two panels, the common ones with their meaning; without those that the command has as options of its own."""
    from rich.console import Console

    from flashmhf.training.flags import shown_defaults

    defaults = {name: default for name, default in shown_defaults().items() if name not in own}
    if not defaults:
        return
    common = [(name, COMMON[name], defaults[name]) for name in COMMON if name in defaults]
    others = [(name, default) for name, default in defaults.items() if name not in COMMON]
    console = Console()
    console.print(_panel("Training: flags of transformers.TrainingArguments", common))
    console.print(_panel("Its other flags and their defaults here", others))


def _panel(title: str, rows: Iterable[tuple[str, ...]]) -> Any:
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, expand=True)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, *cells in rows:
        text = Text(" ".join(cells[:-1]))
        if cells[-1]:
            text.append(f"{' ' if text else ''}[default: {cells[-1]}]", style="dim")
        table.add_row(f"--{name.replace('_', '-')}", text)
    return Panel(table, title=title, title_align="left", border_style="dim", box=box.ROUNDED)

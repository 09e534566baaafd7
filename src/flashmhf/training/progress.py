"""What a person sees of a run: one short line per log entry and, on a terminal, a bar below the lines."""

import logging
import math
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainingArguments

from flashmhf.console import has_bars, progress

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)

PARTS = {
    "loss": "loss {:.4f}",
    "eval_loss": "validation loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "model_flops_utilisation": "MFU {:.1%}",
    "memory_mib": "{:,.0f} MiB",
    "data_wait_share": "data wait {:.0%}",
}
SHOWN_FROM = {"data_wait_share": 0.05}  # less is no news
TRAINING, VALIDATING = "training", "validating"


class ProgressLines(TrainerCallback):
    """Logs "step 120/300: loss 2.3451, 1,762 tokens/s, 829 MiB" for each entry of the Trainer's log.

    The final weights are validated again, if the last step was: the same line is not logged twice.
    """

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        text = _text(logs or {})
        if not state.is_world_process_zero or not text or (state.global_step, text) == self._last:
            return
        self._last = state.global_step, text
        logger.info("step %d/%d: %s", state.global_step, state.max_steps, text)


class ProgressBar(TrainerCallback):
    """A bar of the steps, and one of the batches of a validation while it lasts; leaving the context ends them.

    Args:
        arguments: no bar with --disable-tqdm, nor in another process than the first.
    """

    def __init__(self, arguments: TrainingArguments) -> None:
        self._shown = has_bars() and not arguments.disable_tqdm and arguments.process_index == 0
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._validated = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._show(TRAINING, state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._show(TRAINING, state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if self._bars is not None and logs and "loss" in logs:
            speed = {name: logs[name] for name in ("loss", "tokens_per_second") if name in logs}
            self._bars.update(self._tasks[TRAINING], note=_text(speed))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs: Any) -> None:
        self._validated += 1
        self._show(VALIDATING, self._validated, len(eval_dataloader))

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        self._validated = 0
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(VALIDATING))

    def _show(self, title: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bars is None:
            self._bars = progress()
            self._bars.start()
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total, note="")
        self._bars.update(self._tasks[title], completed=done, total=total)


def _text(logs: dict[str, Any]) -> str:
    return ", ".join(
        text.format(logs[name])
        for name, text in PARTS.items()
        if logs.get(name) is not None and not logs[name] < SHOWN_FROM.get(name, -math.inf)
    )

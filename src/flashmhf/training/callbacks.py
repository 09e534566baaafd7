"""Callbacks of the Trainer: short progress lines, and a checkpoint when a signal asks the run to stop."""

import logging
import signal
import sys
from typing import Any, Self

import torch
from transformers import ProgressCallback, TrainerCallback

logger = logging.getLogger(__name__)

PROGRESS = {
    "loss": "loss {:.4g}",
    "eval_loss": "validation loss {:.4g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tflops_per_second": "{:.3g} TFLOP/s",
    "model_flops_utilisation": "MFU {:.1%}",
    "memory_mib": "{:,.0f} MiB",
    "data_wait_share": "data wait {:.1%}",
}


class ProgressLines(ProgressCallback):
    """The Trainer's progress bar with one short line per log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        parts = [text.format(logs[name]) for name, text in PROGRESS.items() if name in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}", file=sys.stderr)


class StopOnSignal(TrainerCallback):
    """Within its context, SIGINT and SIGTERM end training after the current step, with a checkpoint."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None  # that ended training: the same in all processes
        self._received = 0  # another may arrive at any time, even while the processes agree on one
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def on_step_end(self, args, state, control, **kwargs: Any):
        number = self._received
        if args.world_size > 1:  # signals reach processes at different steps, and all must save after the same one
            received = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            number = int(received)
        self.signal = number or None
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        self._restore()
        logger.warning("%s: saving a checkpoint after this step", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

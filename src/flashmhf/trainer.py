"""What the Trainer lacks: the speed of training steps alone, short progress lines, an orderly stop, peak memory."""

import logging
import resource
import signal
import statistics
import sys
import time
from typing import Any, cast

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from flashmhf.bad_steps import GuardedTrainer
from flashmhf.learning_rates import learning_rate_factors, scale_learning_rates

logger = logging.getLogger(__name__)


class SpeedTrainer(GuardedTrainer):
    """Logs the speed of the training steps alone, without validation and saving.

    Args:
        base_width: scales learning rates by fan-in, see `flashmhf.learning_rates`.
    """

    def __init__(self, *args: Any, base_width: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._base_width = base_width
        self._step_seconds = 0.0
        self._tokens_logged = 0

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **options)
        if new and self._base_width is not None:
            scale_learning_rates(optimizer, learning_rate_factors(cast(nn.Module, self.model), self._base_width))
        return optimizer

    def training_step(self, *args: Any, **options: Any):
        started = time.perf_counter()
        loss = super().training_step(*args, **options)
        self._step_seconds += time.perf_counter() - started
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        tokens = self.state.num_input_tokens_seen
        if "loss" in logs and self._step_seconds > 0 and tokens > self._tokens_logged:
            logs["tokens_per_second"] = (tokens - self._tokens_logged) / self._step_seconds
            self._step_seconds, self._tokens_logged = 0.0, tokens
        super().log(logs)


class Progress(ProgressCallback):
    """The Trainer's progress bar with one short line a log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        names = {"loss": "loss", "eval_loss": "validation loss", "tokens_per_second": "tokens/s"}
        parts = [f"{label} {logs[name]:,.4g}" for name, label in names.items() if name in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}", file=sys.stderr)


class StopOnSignal(TrainerCallback):
    """Within its context SIGINT and SIGTERM end training after the step under way, with a checkpoint."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # signals reach processes at different steps, and all must save after the same one
            number = torch.tensor(self.signal or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signal = int(number) or None
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _receive(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()
        logger.warning("%s: saving a checkpoint after this step", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def median_speed(trainer: Trainer) -> float | None:
    speeds = [row["tokens_per_second"] for row in trainer.state.log_history if "tokens_per_second" in row]
    return statistics.median(speeds) if speeds else None


def peak_memory_mib() -> float:
    """The most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

"""What the Trainer lacks: the speed of training alone, short progress lines, an orderly stop, peak memory."""

import contextlib
import logging
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from flashmhf.ops.roofline import peak_tflops
from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates
from flashmhf.training.non_finite_steps import GuardedTrainer

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


class SpeedTrainer(GuardedTrainer):
    """Logs how fast training is, and what it waits for, with every loss.

    "tokens_per_second" (of all processes together), "tflops_per_second" (of one process), "model_flops_utilisation"
    (on GPUs of known throughput), "data_wait_share" (of the time) and "memory_mib" (the most so far). The time is that
    of training alone, without validation and saving.

    Args:
        flops_per_token: of a training step, as `estimates.cost.model_cost` counts them.
        base_width: scales learning rates by fan-in, see `flashmhf.training.learning_rates`.
    """

    def __init__(self, *args: Any, flops_per_token: float, base_width: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._base_width = base_width
        self.flops_per_token = flops_per_token
        self._clock = _Clock()
        self._tokens_logged = 0

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **options)
        if new and self._base_width is not None:
            scale_learning_rates(optimizer, learning_rate_factors(cast(nn.Module, self.model), self._base_width))
        return optimizer

    def get_batch_samples(self, *args: Any, **options: Any):
        if not self._clock.running:
            self._clock.start()
            self._tokens_logged = self.state.num_input_tokens_seen  # of the run before it was resumed
        with self._clock.waiting():
            return super().get_batch_samples(*args, **options)

    def evaluate(self, *args: Any, **options: Any):
        with self._clock.paused():
            return super().evaluate(*args, **options)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        with self._clock.paused():
            super()._save_checkpoint(*args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        tokens = self.state.num_input_tokens_seen
        if "loss" in logs and tokens > self._tokens_logged:
            seconds, waited = self._clock.lap()
            logs |= self._speed(tokens - self._tokens_logged, seconds)
            logs["data_wait_share"] = waited / seconds
            logs["memory_mib"] = peak_memory_mib()
            self._tokens_logged = tokens
        super().log(logs)

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        speed = {"tokens_per_second": tokens / seconds}
        speed["tflops_per_second"] = speed["tokens_per_second"] * self.flops_per_token / self.args.world_size / 1e12
        peak = peak_tflops(self.args.device, half=self.args.bf16 or self.args.fp16)
        if peak is not None:
            speed["model_flops_utilisation"] = speed["tflops_per_second"] / peak
        return speed


class _Clock:
    """Seconds since the last lap, without pauses, and those of them spent waiting."""

    def __init__(self) -> None:
        self.running = False
        self._started_s = self._paused_s = self._waited_s = 0.0

    def start(self) -> None:
        self.running = True
        self._started_s, self._paused_s, self._waited_s = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    def lap(self) -> tuple[float, float]:
        """(seconds, of these waited), and begins again."""
        lap = time.perf_counter() - self._started_s - self._paused_s, self._waited_s
        self.start()
        return lap


class Progress(ProgressCallback):
    """The Trainer's progress bar with one short line a log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        parts = [shown.format(logs[name]) for name, shown in PROGRESS.items() if name in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}", file=sys.stderr)


class StopOnSignal(TrainerCallback):
    """Within its context SIGINT and SIGTERM end training after the step under way, with a checkpoint."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None  # that ended training: the same in all processes
        self._received = 0  # another may come at any moment, while the processes agree, too
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def on_step_end(self, args, state, control, **kwargs):
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


def median_speed(trainer: Trainer) -> float | None:
    speeds = [row["tokens_per_second"] for row in trainer.state.log_history if "tokens_per_second" in row]
    return statistics.median(speeds) if speeds else None


def peak_memory_mib() -> float:
    """The most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

"""How fast training is, what it waits for, and how much memory it takes."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from flashmhf.ops.roofline import peak_tflops


class ThroughputMeter:
    """Times training without validation and saving, and turns each stretch between two log entries into values for it.

    Args:
        arguments: give the device, the precision and the number of processes.
        flops_per_token: of a training step.
    """

    def __init__(self, arguments: TrainingArguments, flops_per_token: float) -> None:
        self._arguments = arguments
        self._flops_per_token = flops_per_token
        self._clock = Clock()
        self._tokens = 0

    def start(self, tokens: int) -> None:
        """Before every step; the first call starts the clock. `tokens`: read by earlier processes of the run."""
        if not self._clock.running:
            self._clock.start()
            self._tokens = tokens

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around waiting for data."""
        return self._clock.waiting()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Around everything that is not training."""
        return self._clock.paused()

    def lap(self, tokens: int) -> dict[str, float]:
        """Values since the last lap; none if no token was read since.

        "tokens_per_second" (all processes together), "tflops_per_second" (one process), "model_flops_utilisation" (on
        GPUs of known peak throughput), "data_wait_share" (of the time) and "memory_mib" (the peak so far).

        Args:
            tokens: read so far.
        """
        if tokens <= self._tokens:
            return {}
        seconds, waited = self._clock.lap()
        values = self._speed((tokens - self._tokens) / seconds)
        self._tokens = tokens
        return {**values, "data_wait_share": waited / seconds, "memory_mib": peak_memory_mib()}

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        arguments = self._arguments
        tflops = tokens_per_second * self._flops_per_token / arguments.world_size / 1e12
        speed = {"tokens_per_second": tokens_per_second, "tflops_per_second": tflops}
        peak = peak_tflops(arguments.device, half=arguments.bf16 or arguments.fp16)
        if peak is not None:
            speed["model_flops_utilisation"] = tflops / peak
        return speed


class Clock:
    """Seconds since the last lap, without pauses, and how many of them were spent waiting."""

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
        """(seconds, seconds spent waiting); restarts."""
        lap = time.perf_counter() - self._started_s - self._paused_s, self._waited_s
        self.start()
        return lap


def speed(prefix: str, seconds: float, *, samples: int, steps: int) -> dict[str, float]:
    """The Trainer's entries on the speed of training or evaluation, which it computes from the wall clock."""
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(samples / seconds, 3),
        f"{prefix}_steps_per_second": round(steps / seconds, 3),
    }


def median_tokens_per_second(history: Sequence[dict[str, Any]]) -> float | None:
    """Of the entries of a Trainer's log."""
    speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    return statistics.median(speeds) if speeds else None


def peak_memory_mib() -> float:
    """Peak memory so far: allocated on the GPU if there is one, otherwise resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

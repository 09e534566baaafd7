"""The device and the sizes of benchmarks/gpu.py: real ones, or toys for a dry run on the CPU."""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flashmhf.benchmarking import Row, Shape
from flashmhf.ops.backends import backends
from flashmhf.ops.problem import Problem

SHAPES = {"370m": Shape(1024, 8, 7, 384), "1.3b": Shape(2048, 16, 15, 384)}
TOY = Shape(64, 2, 2, 24)
REPEATS = 20
UNFUSED = ("blockwise", "reference")

Case = tuple[str, Callable[[], list[Row]]]  # a name, unique in its section, and what measures it


class OutOfTimeError(Exception):
    """Raised in a case that the time limit cuts short; the case is left for the next run."""


class Bench:
    """What every section asks for: device, shapes, random inputs, and how much time is left."""

    def __init__(self, dry_run: bool, time_limit_s: float) -> None:
        self._deadline = time.monotonic() + time_limit_s
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16  # where one is enough
        self.repeats = 1 if dry_run else REPEATS
        self.shapes = {"toy": TOY} if dry_run else SHAPES

    def remaining_s(self) -> float:
        return self._deadline - time.monotonic()

    def backends(self, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[str]:
        """The fused backends that run such a problem here; the blockwise one in their place in a dry run."""
        if self.dry_run:
            return ["blockwise"]
        problem = Problem(65536, H, H_kv, E, F, D, dtype, self.device, has_gate=True)
        reasons = backends(problem)
        return [name for name, reason in reasons.items() if reason is None and name not in UNFUSED]

    def randn(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.float32).to(dtype)

    def inputs(self, T: int, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, u, v, gate and the output's gradient."""
        weights = [self.randn(H_kv, E, F, D, dtype=dtype) / D**0.5 for _ in range(3)]
        gate = torch.rand(T, H, E, device=self.device)
        return [self.randn(T, H, D, dtype=dtype), *weights, gate, self.randn(T, H, D, dtype=dtype)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_device(parser: argparse.ArgumentParser, dry_run: bool) -> None:
    """One line instead of CUDA's own complaint."""
    if not dry_run and not torch.cuda.is_available():
        parser.error("expected a CUDA or ROCm GPU, found none; --dry-run builds every case on the CPU")

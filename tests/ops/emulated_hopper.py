"""Runs the backend `hopper` on the CPU: every launch of its kernels goes through the Gluon emulator."""

import dataclasses
import itertools

import gluon_values
import torch
from gluon_emulator import emulate
from gluon_values import Value
from triton.experimental.gluon._runtime import GluonJITFunction

from flashmhf.ops import backends
from flashmhf.ops.hopper import tiles
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton.launch import Launch

SEEDS = itertools.count()
TANH_ERROR = 2**-11  # what NVIDIA documents for tanh.approx.f32, relative


def tanh(x: Value) -> Value:
    """As wrong as the hardware may be, at random."""
    return Value(torch.tanh(x.data) * (1 + TANH_ERROR * (2 * torch.rand_like(x.data) - 1)), x.layout)


def add_to_memory(ptrs, values: Value) -> None:
    gluon_values.atomic_add(ptrs, values)


HOOKS = {"tanh": tanh, "add_to_memory": add_to_memory}


REAL_START = Launch.start


def start(launch: Launch) -> None:
    """Each run is another interleaving; the portable kernels run as they always do."""
    if isinstance(launch.kernel, GluonJITFunction):
        options = {"num_warps": launch.num_warps, "seed": next(SEEDS), "hooks": HOOKS}
        emulate(launch.kernel, launch.grid, launch.arguments, **options)
    else:
        REAL_START(launch)


def emulate_hopper(monkeypatch) -> None:
    """Lets the backend take CPU tensors; its conditions on dtype and head dim stay."""

    def why_not(problem: Problem | None) -> str | None:
        if problem is not None and problem.dtype not in (torch.bfloat16, torch.float16):
            return "not for the kernels"
        if problem is not None and (problem.D % tiles.HEAD_DIM_MULTIPLE != 0 or tiles.BLOCK_DS[-1] < problem.D):
            return "not for the kernels"
        return None

    monkeypatch.setattr(Launch, "start", start)
    (real,) = (row for row in backends.BACKENDS if row.name == "hopper")
    emulated = dataclasses.replace(real, why_not=why_not)
    table = tuple(emulated if row.name == "hopper" else row for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", table)

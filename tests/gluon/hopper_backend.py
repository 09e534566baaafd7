"""Runs the backend `hopper` on the CPU: its kernels are launched in the emulator."""

import dataclasses
import itertools

import torch
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results
from triton.experimental.gluon._runtime import GluonJITFunction

from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper import tiles
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton.launch import Launch
from gluon.emulator import EmulationError, emulate, tma_reduce_add
from gluon.mutants import mutated
from gluon.values import Value

SEEDS = itertools.count()
TANH_ERROR = 2**-11  # what NVIDIA documents for tanh.approx.f32, relative


def tanh(x: Value) -> Value:
    """With a random error up to the hardware's documented one."""
    return Value(torch.tanh(x.data) * (1 + TANH_ERROR * (2 * torch.rand_like(x.data) - 1)), x.layout)


SHAPES = [
    Shape((1,), 1, 1, 1, 1, 64),
    Shape((200,), 4, 2, 2, 100, 64),
    Shape((3, 50), 2, 1, 3, 40, 96),
    Shape((130,), 1, 1, 2, 384, 128),
    Shape((260,), 2, 2, 1, 65, 24),
]
DTYPES = (torch.bfloat16, torch.float16)
HOOKS = {"tanh": tanh, "tma_reduce_add": tma_reduce_add}
REAL_START = Launch.start


def start(launch: Launch) -> None:
    """Each launch is another interleaving; portable kernels run in Triton's interpreter."""
    if isinstance(launch.kernel, GluonJITFunction):
        options = {"num_warps": launch.num_warps, "seed": next(SEEDS), "hooks": HOOKS}
        emulate(launch.kernel, launch.grid, launch.arguments, **options)
    else:
        REAL_START(launch)


def emulate_hopper(monkeypatch) -> None:
    """Makes the backend accept CPU tensors; its conditions on dtype and head dim remain."""

    def unsupported_reason(problem: Problem | None) -> str | None:
        if problem is not None and problem.dtype not in (torch.bfloat16, torch.float16):
            return "not for the kernels"
        if problem is not None and (problem.D % tiles.HEAD_DIM_MULTIPLE != 0 or tiles.BLOCK_DS[-1] < problem.D):
            return "not for the kernels"
        return None

    monkeypatch.setattr(Launch, "start", start)
    (real,) = (row for row in backends.BACKENDS if row.name == "hopper")
    emulated = dataclasses.replace(real, unsupported_reason=unsupported_reason)
    table = tuple(emulated if row.name == "hopper" else row for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", table)


def results(inputs: list) -> list:
    *arguments, dout = inputs
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend="hopper")
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]


def within_budget(inputs: list) -> None:
    for name, mine, eager, exact in zip(
        NAMES, results(inputs), eager_results(inputs), exact_results(inputs), strict=False
    ):
        assert_within_budget(name, mine, eager, exact, precision=inputs[0].dtype)


def caught(kernel, launch: Launch, change: tuple[str, str]) -> bool:
    """Whether the emulator reports an error, in one of a few interleavings, after a change of the kernel."""
    broken = mutated(kernel, *change)
    for seed in range(8):
        try:
            emulate(broken, launch.grid, launch.arguments, num_warps=launch.num_warps, seed=seed, hooks=HOOKS)
        except EmulationError:
            return True
    return False

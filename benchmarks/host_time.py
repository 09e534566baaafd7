"""Host time of a FlashMHF layer beside an eager SwiGLU's: Python and dispatch alone, measured without a GPU.

python benchmarks/host_time.py [--output benchmarks/results/host_time.json] [--repeats 200]

Both layers run eagerly on one CPU token of width 64, where the three products of a SwiGLU cost no more than their
dispatch. The backends `triton` and `hopper` believe in a GPU: Triton compiles the real kernels for sm_90a and launches
them through its own Python, down to the launcher written in C, which alone is a function that does nothing. What a
launch costs below that (about a cudaLaunchKernel) is in neither layer's time, except for the arithmetic of the one
token, which is in both. One token stands for many: what the kernels do differently for few tokens is switched off, but
in the row `decode`.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flashmhf.benchmarking import Row
from flashmhf.benchmarking.measuring import PASSES
from flashmhf.benchmarking.provenance import provenance, table
from flashmhf.layers import FlashMHF
from flashmhf.layers.baselines import SwiGLU
from flashmhf.ops import backends
from flashmhf.ops.triton import forward as triton_forward
from flashmhf.ops.triton import tiles
from flashmhf.writing import write_json

WIDTH = 64
DTYPE = torch.bfloat16
CALLS = 10  # between two looks at the clock: few, so that other processes leave some of them alone
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "scaled, q_norm": {"init": "scaled", "q_norm": True},
}


class _Launcher:
    """In place of the launcher in C: takes what it would take."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads at most


class _Driver:
    """What Triton asks of an H100."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def imaginary_gpu(few_tokens: bool) -> Iterator[None]:
    """CPU tensors pass for tensors on a Hopper GPU with Triton's kernels."""

    def no_reason(problem: Any) -> None:
        return None

    table = tuple(dataclasses.replace(row, why_not=no_reason) for row in backends.BACKENDS)
    driver.set_active(_Driver())  # for good: Triton cannot go back to having none
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backends, "BACKENDS", table))
        if not few_tokens:
            patches.enter_context(mock.patch.object(tiles, "SPLIT_TOKENS", 0))
            patches.enter_context(mock.patch.object(triton_forward, "FEW_TOKENS", 0))
        yield


def timed_pass(layer: nn.Module, measured_pass: str) -> Callable[[], Any]:
    """One call of a layer; a training step's backward accumulates into gradients that are there."""
    x = torch.randn(1, WIDTH, dtype=DTYPE, requires_grad=True)
    dout = torch.randn(1, WIDTH, dtype=DTYPE)

    def forward() -> Tensor:
        return layer(x)

    def forward_backward() -> None:
        torch.autograd.backward(layer(x), dout)

    def decode() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return {"forward": forward, "forward+backward": forward_backward, "decode": decode}[measured_pass]


def microseconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least over the repeats of the mean of CALLS calls, the variants in turn: other processes only add to it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5 * CALLS):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            times[name].append((time.thread_time() - start) / CALLS * 1e6)
    return {name: min(values) for name, values in times.items()}


def measure(repeats: int) -> list[Row]:
    """A row for every pass, backend and layer, each with SwiGLU's time of the same minute."""
    rows: list[Row] = []
    for measured_pass in (*PASSES, "decode"):
        with imaginary_gpu(few_tokens=measured_pass == "decode"):
            layers: dict[str, nn.Module] = {"swiglu": SwiGLU(WIDTH, WIDTH, dtype=DTYPE)}
            for backend in ("triton", "hopper"):
                for name, options in LAYERS.items():
                    layer = FlashMHF(WIDTH, 1, 2, WIDTH // 2, backend=backend, dtype=DTYPE, **options)
                    layers[f"{backend}: {name}"] = layer
            times = microseconds({name: timed_pass(layer, measured_pass) for name, layer in layers.items()}, repeats)
        rows += [
            {"measured_pass": measured_pass, "layer": name, "host_us": us, "ratio": us / times["swiglu"]}
            for name, us in times.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.repeats)
    print(table(rows))
    if arguments.output is not None:
        facts = provenance(torch.device("cpu"))
        write_json(arguments.output, {"kind": "host time", **facts, "dtype": str(DTYPE), "width": WIDTH, "rows": rows})


if __name__ == "__main__":
    main()

"""Host time of a FlashMHF layer and an eager SwiGLU: Python and dispatch only, measured without a GPU.

python benchmarks/host_time.py [--output benchmarks/results/host_time.csv] [--repeats 200] [--device cuda]

Both layers run eagerly on one CPU token of width 64, where the three products of a SwiGLU cost little more than their
dispatch. The backends `triton` and `hopper` see a fake GPU, for which Triton compiles the real kernels (sm_90a).
`ratio` is measured with a no-op in place of Triton's launch, `ratio_to_c` with Triton's own Python down to its launcher
in C. The cost of a launch below that (about a cudaLaunchKernel) is in neither layer's time, whereas the arithmetic of
the one token is in both. One token represents many: the special cases for few tokens are disabled, except in the rows
`decode`; and the buffer of dQ, which the CPU rounds, has 16 tokens instead of a tile of 128. Both layers have the same
number of parameters.

--device cuda measures the same on a GPU, with real launches of both layers.
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
from triton.compiler import CompiledKernel
from triton.runtime import driver

from flashmhf.benchmarking.measuring import PASSES, Row, dtype_name
from flashmhf.benchmarking.provenance import provenance
from flashmhf.files import atomic_write
from flashmhf.layers import FlashMHF
from flashmhf.layers.baselines import SwiGLU
from flashmhf.ops import backends, call_cache
from flashmhf.ops.hopper import backward
from flashmhf.ops.triton import forward as triton_forward
from flashmhf.ops.triton import tiles
from flashmhf.reports.table import Table

WIDTH = 64
DTYPE = torch.bfloat16
CALLS = 10  # per timing: few, so that some timings are undisturbed by other processes
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "scaled, q_norm": {"init": "scaled", "q_norm": True},
}


class _Launcher:
    """In place of the launcher in C, with its interface."""

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
    """Answers Triton's queries like an H100."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _no_launch(*arguments: Any, stream: int) -> None:
    pass


def _with_small_tile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with 16 tokens in its last argument, the tile."""

    def run(*arguments: Any) -> Tensor:
        return function(*arguments[:-1], arguments[-1]._replace(block_t=16))

    return run


@contextlib.contextmanager
def fake_gpu(few_tokens: bool, launches: bool = True) -> Iterator[None]:
    """CPU tensors count as tensors on a Hopper GPU; `launches`: repeated launches run Triton's launcher."""

    def no_reason(problem: Any) -> None:
        return None

    table = tuple(dataclasses.replace(row, unsupported_reason=no_reason) for row in backends.BACKENDS)
    driver.set_active(_Driver())  # permanently: Triton cannot unset its driver
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backends, "BACKENDS", table))
        for name in ("allocate_dq_accum", "convert_dq"):
            patches.enter_context(mock.patch.object(backward, name, _with_small_tile(getattr(backward, name))))
        if not few_tokens:
            patches.enter_context(few_tokens_as_many())
        if not launches:
            patches.enter_context(mock.patch.object(CompiledKernel, "__getitem__", return_value=_no_launch))
        call_cache.clear()
        yield
    call_cache.clear()


@contextlib.contextmanager
def few_tokens_as_many() -> Iterator[None]:
    """Few tokens are neither stacked by heads nor split by rows."""
    with mock.patch.object(tiles, "SPLIT_MAX_TOKENS", 0), mock.patch.object(triton_forward, "DECODE_MAX_TOKENS", 0):
        call_cache.clear()
        yield
    call_cache.clear()


def timed_pass(layer: nn.Module, measured_pass: str, device: str = "cpu") -> Callable[[], Any]:
    """One call of a layer; the backward accumulates into existing gradients, as in training."""
    x = torch.randn(1, WIDTH, dtype=DTYPE, device=device, requires_grad=True)
    dout = torch.randn_like(x)

    def forward() -> Tensor:
        return layer(x)

    def forward_backward() -> None:
        torch.autograd.backward(layer(x), dout)

    def decode() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return {"forward": forward, "forward+backward": forward_backward, "decode": decode}[measured_pass]


def microseconds(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Minimum over repeats of the mean of CALLS calls, variants in turn: other processes can only add time."""
    clock, wait = (time.thread_time, lambda: None) if device == "cpu" else (time.perf_counter, torch.cuda.synchronize)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(5 * CALLS):
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            wait()
            start = clock()
            for _ in range(CALLS):
                function()
            times[name].append((clock() - start) / CALLS * 1e6)
    return {name: min(values) for name, values in times.items()}


def layers(device: str) -> dict[str, nn.Module]:
    """By name, SwiGLU first."""
    found: dict[str, nn.Module] = {"swiglu": SwiGLU(WIDTH, WIDTH, dtype=DTYPE, device=device)}
    for backend in ("triton", "hopper"):
        for name, options in LAYERS.items():
            layer = FlashMHF(WIDTH, 1, 2, WIDTH // 2, backend=backend, dtype=DTYPE, device=device, **options)
            found[f"{backend}: {name}"] = layer
    return found


def times_of(measured_pass: str, repeats: int, device: str, launches: bool) -> dict[str, float]:
    """Microseconds of each layer."""
    few_tokens = measured_pass == "decode"
    if device == "cpu":
        environment: Any = fake_gpu(few_tokens, launches)
    else:
        environment = contextlib.nullcontext() if few_tokens else few_tokens_as_many()
    with environment:
        timed = {name: timed_pass(layer, measured_pass, device) for name, layer in layers(device).items()}
        return microseconds(timed, repeats, device)


def measure(repeats: int, device: str) -> list[Row]:
    """One row per pass, backend and layer, with ratios to SwiGLU's time of the same minute."""
    rows: list[Row] = []
    for measured_pass in (*PASSES, "decode"):
        to_c = times_of(measured_pass, repeats, device, launches=True)
        ours = times_of(measured_pass, repeats, device, launches=False) if device == "cpu" else {}
        for name, us in to_c.items():
            row: Row = {"measured_pass": measured_pass, "layer": name}
            if ours:
                row |= {"host_us": ours[name], "ratio": ours[name] / ours["swiglu"]}
            rows.append(row | {"host_us_to_c": us, "ratio_to_c": us / to_c["swiglu"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.repeats, arguments.device)
    print(Table.of(rows).markdown())
    if arguments.output is not None:
        common = {"dtype": dtype_name(DTYPE), "width": WIDTH, **vars(provenance(torch.device(arguments.device)))}
        atomic_write(arguments.output, Table.of([row | common for row in rows]).csv())


if __name__ == "__main__":
    main()

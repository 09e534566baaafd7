"""Host time of a FlashMHF layer beside an eager SwiGLU's: Python and dispatch alone, measured without a GPU.

python benchmarks/host_time.py [--output benchmarks/results/host_time.json] [--repeats 200] [--device cuda]

Both layers run eagerly on one CPU token of width 64, where the three products of a SwiGLU cost little more than their
dispatch. The backends `triton` and `hopper` believe in a GPU: Triton compiles the real kernels for sm_90a. `ratio` is
with a function that does nothing in the place of Triton's launch, `ratio_to_c` with Triton's own Python down to its
launcher written in C. What a launch costs below that (about a cudaLaunchKernel) is in neither layer's time, but for the
arithmetic of the one token, which is in both. One token stands for many: what the kernels do differently for few tokens
is switched off, except in the rows `decode`, and of dQ, which the CPU itself rounds, 16 tokens are kept and not a tile
of 128. Parameters have as many elements in the one layer as in the other.

With --device cuda the same on a GPU, where both layers' real launches count, and one token is as good as many, too.
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

from flashmhf.benchmarking import Row
from flashmhf.benchmarking.measuring import PASSES
from flashmhf.benchmarking.provenance import provenance, table
from flashmhf.files import write_json
from flashmhf.layers import FlashMHF
from flashmhf.layers.baselines import SwiGLU
from flashmhf.ops import backends, call_cache
from flashmhf.ops.hopper import backward
from flashmhf.ops.triton import forward as triton_forward
from flashmhf.ops.triton import tiles

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


def _no_launch(*arguments: Any, stream: int) -> None:
    pass


def _of_few_tokens(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which takes a tile last, with one of 16 tokens."""

    def run(*arguments: Any) -> Tensor:
        return function(*arguments[:-1], arguments[-1]._replace(block_t=16))

    return run


@contextlib.contextmanager
def imaginary_gpu(few_tokens: bool, launches: bool = True) -> Iterator[None]:
    """CPU tensors pass for tensors on a Hopper GPU with Triton's kernels; repeated launches may be left out."""

    def no_reason(problem: Any) -> None:
        return None

    table = tuple(dataclasses.replace(row, unsupported_reason=no_reason) for row in backends.BACKENDS)
    driver.set_active(_Driver())  # for good: Triton cannot go back to having none
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backends, "BACKENDS", table))
        for name in ("allocate_dq_accum", "convert_dq"):
            patches.enter_context(mock.patch.object(backward, name, _of_few_tokens(getattr(backward, name))))
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
    """One call of a layer; a training step's backward accumulates into gradients that are there."""
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
    """The least over the repeats of the mean of CALLS calls, the variants in turn: other processes only add to it."""
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
        surroundings: Any = imaginary_gpu(few_tokens, launches)
    else:
        surroundings = contextlib.nullcontext() if few_tokens else few_tokens_as_many()
    with surroundings:
        timed = {name: timed_pass(layer, measured_pass, device) for name, layer in layers(device).items()}
        return microseconds(timed, repeats, device)


def measure(repeats: int, device: str) -> list[Row]:
    """A row for every pass, backend and layer, each with SwiGLU's time of the same minute."""
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
    print(table(rows))
    if arguments.output is not None:
        facts = provenance(torch.device(arguments.device))
        write_json(arguments.output, {"kind": "host time", **facts, "dtype": str(DTYPE), "width": WIDTH, "rows": rows})


if __name__ == "__main__":
    main()

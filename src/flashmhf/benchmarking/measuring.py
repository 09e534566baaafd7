"""The stopwatch, the allocator's peak, CUDA graphs, and the yardsticks that a device's own speed gives."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.profiler import ProfilerActivity, profile

Row = dict[str, Any]
PASSES = ("forward", "forward+backward")
LEAST_REPEATS = 3  # fewer say nothing of how far apart they are


@dataclass(frozen=True)
class Times:
    """What a row says of the timed calls of one variant."""

    median_ms: float
    lower_quartile_ms: float | None  # None for fewer than LEAST_REPEATS
    upper_quartile_ms: float | None
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        """Summarises the calls; with three of them the quartiles are the least and the most."""
        lower = upper = None
        if len(milliseconds) >= LEAST_REPEATS:
            lower, _, upper = statistics.quantiles(milliseconds, n=4)
        return cls(statistics.median(milliseconds), lower, upper, len(milliseconds))


def timed_call(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor, measured_pass: str
) -> Callable[[], Any]:
    """What is timed: one of PASSES of a function or module."""
    if measured_pass == "forward":

        def run() -> Any:
            with torch.no_grad():
                return function(*inputs)

    else:
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        leaves = [*inputs, *parameters]

        def run() -> Any:
            edge = get_gradient_edge(function(*inputs))  # as in a model, nobody holds the output during the backward
            return torch.autograd.grad(edge, leaves, dout)

    return run


def interleaved_times(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    before_each: Callable[[], Any] | None = None,
    warm_up: bool = True,
) -> dict[str, Times]:
    """Median and quartiles of each call, timed in turn.

    Args:
        warm_up: make each call once before; not needed where each has run already.
        before_each: runs before every timed call and is not timed. A large copy empties the caches and gives the host
            time to queue a short call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            if before_each is not None:
                before_each()
            times[name].append(_elapsed_ms(call, device))
    return {name: Times.of(values) for name, values in times.items()}


def _elapsed_ms(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that the allocator held during `call` above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def gradient_bytes(function: Callable[..., Tensor]) -> int:
    """Of all parameters."""
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return sum(parameter.nbytes for parameter in parameters)


@torch.no_grad()
def graphed(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """The call as the replay of a CUDA graph, so that launches cost nothing, and the tensor that a replay writes.

    On other devices the call itself, and what it returned once.
    """
    if device.type != "cuda":
        return torch.no_grad()(call), call()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def copy_call(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A copy too large for any cache, and the bytes that it reads and writes: the yardstick of bandwidth."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    return functools.partial(torch.empty_like(source).copy_, source), 2 * source.nbytes


def matmul_call(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A large square product of random matrices, and its FLOPs: the yardstick of throughput."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.matmul, a, b), 2 * size**3

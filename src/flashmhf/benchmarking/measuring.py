"""The stopwatch, the allocator's peak, CUDA graphs, and the device's own copy bandwidth and matmul throughput."""

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
MIN_REPEATS = 3  # for quartiles
MIN_BUSY_MS, MAX_BUSY_MS = 0.2, 200.0  # how long the device spins while the host queues a call
CYCLES_PER_MS = 2e6  # of the GPU's clock, until it is measured
MAX_HOST_SHARE = 0.01  # of a time that counts as the device's only


@dataclass(frozen=True)
class Times:
    """The timed calls of one variant, as rows have them.

    On a GPU the median and the quartiles are the device's time, from the first kernel of a call to the last. Python
    takes `host_ms` to queue the call, so back-to-back calls take the larger of the two. `device_only` is False if the
    host's time could not be kept out, as in calls that wait for their own results.
    """

    median_ms: float
    lower_quartile_ms: float | None  # None for fewer than MIN_REPEATS
    upper_quartile_ms: float | None
    repeats: int
    host_ms: float | None = None  # None on a CPU, whose time is the host's
    device_only: bool | None = None

    @classmethod
    def of(cls, milliseconds: list[float], host_ms: float | None = None, device_only: bool | None = None) -> "Times":
        """Summarises the calls; with three of them the quartiles are the minimum and the maximum."""
        lower = upper = None
        if len(milliseconds) >= MIN_REPEATS:
            lower, _, upper = statistics.quantiles(milliseconds, n=4)
        return cls(statistics.median(milliseconds), lower, upper, len(milliseconds), host_ms, device_only)


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
            edge = get_gradient_edge(function(*inputs))  # as in a model, nothing holds the output during the backward
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
        before_each: runs before every timed call, untimed. A large copy flushes the caches.
        warm_up: make each call once before; not needed if each has run already.
    """
    stopwatch = _GpuStopwatch if device.type == "cuda" else _CpuStopwatch
    stopwatches = {name: stopwatch(call, device) for name, call in calls.items()}
    if warm_up:
        for call in calls.values():
            call()
    for _ in range(repeats):
        for watch in stopwatches.values():
            watch.take(before_each)
    return {name: watch.times() for name, watch in stopwatches.items()}


class _CpuStopwatch:
    """Times one call repeatedly."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call = call
        self._taken_ms: list[float] = []

    def take(self, before: Callable[[], Any] | None) -> None:
        if before is not None:
            before()
        started = time.perf_counter()
        self._call()
        self._taken_ms.append((time.perf_counter() - started) * 1e3)

    def times(self) -> Times:
        return Times.of(self._taken_ms)


class _GpuStopwatch:
    """Times one call repeatedly, on the device and on the host.

    Two events around a call that the GPU finishes faster than Python queues it measure Python. So a spinning kernel
    before the first event keeps the GPU busy until the call is queued completely: the event must still be pending then.
    If it is not, the call is repeated behind a longer spin.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call, self._device = call, device
        self._taken_ms: list[float] = []
        self._host_ms: list[float] = []
        self._device_only = True
        self._cycles_per_ms = CYCLES_PER_MS
        self._busy_ms = MIN_BUSY_MS
        self._attempts = 2  # a one-time delay may spoil the first

    def take(self, before: Callable[[], Any] | None) -> None:
        while True:
            elapsed_ms, host_ms, queued = self._measure(before)
            wanted_ms = max(2 * host_ms, MIN_BUSY_MS)
            excluded = queued or host_ms <= MAX_HOST_SHARE * elapsed_ms
            if not excluded:
                wanted_ms = max(wanted_ms, 2 * self._busy_ms)
            too_long = wanted_ms > MAX_BUSY_MS  # the call synchronizes, or fills the launch queue
            if excluded or self._busy_ms == 0 or (too_long and self._busy_ms <= MAX_HOST_SHARE * elapsed_ms):
                break
            self._attempts -= too_long
            self._busy_ms = 0 if too_long else wanted_ms
        self._taken_ms.append(elapsed_ms)
        self._host_ms.append(host_ms)
        self._device_only &= excluded
        self._busy_ms = 0 if self._attempts <= 0 else MIN_BUSY_MS if too_long else wanted_ms

    def times(self) -> Times:
        return Times.of(self._taken_ms, statistics.median(self._host_ms), self._device_only)

    def _measure(self, before: Callable[[], Any] | None) -> tuple[float, float, bool]:
        """Milliseconds on the device and on the host, and whether the call was queued before it started."""
        idle, start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        if before is not None:
            before()
        idle.record()
        cycles = int(self._busy_ms * self._cycles_per_ms)
        if cycles:
            torch.cuda._sleep(cycles)
        start.record()
        started = time.perf_counter()
        self._call()
        host_ms = (time.perf_counter() - started) * 1e3
        stop.record()
        queued = not start.query()
        torch.cuda.synchronize(self._device)
        if cycles:
            self._cycles_per_ms = cycles / idle.elapsed_time(start)
        return start.elapsed_time(stop), host_ms, queued


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The peak of allocated memory during `call`, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def gradient_bytes(function: Callable[..., Tensor]) -> int:
    """Bytes of the gradients of all parameters."""
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return sum(parameter.nbytes for parameter in parameters)


@torch.no_grad()
def graphed(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """The call as the replay of a CUDA graph, which hides launch overhead, and the tensor that a replay writes.

    On other devices the call itself, and a result of it.
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
    """A copy too large for any cache, and the bytes it reads and writes: the device's bandwidth."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    return functools.partial(torch.empty_like(source).copy_, source), 2 * source.nbytes


def matmul_call(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A large square product of random matrices, and its FLOPs: the device's throughput."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.matmul, a, b), 2 * size**3


def dtype_name(dtype: torch.dtype) -> str:
    """As rows have it: without "torch."."""
    return str(dtype).removeprefix("torch.")

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
MIN_REPEATS = 3  # fewer say nothing of how far apart they are
MIN_BUSY_MS, MAX_BUSY_MS = 0.2, 200.0  # how long the device is kept busy while the host queues a call
CYCLES_PER_MS = 2e6  # of the GPU's clock, until it is measured
SLIGHT = 0.01  # share of a time that may be the host's


@dataclass(frozen=True)
class Times:
    """What a row says of the timed calls of one variant.

    On a GPU the median and the quartiles are the device's time, from the first kernel of a call to the last. Python
    takes `host_ms` to queue the call, so that a caller who launches one after another sees the larger of the two.
    `device_alone` is False where the host's time could not be kept out: of calls that wait for their own results.
    """

    median_ms: float
    lower_quartile_ms: float | None  # None for fewer than MIN_REPEATS
    upper_quartile_ms: float | None
    repeats: int
    host_ms: float | None = None  # None on a CPU, whose time is the host's
    device_alone: bool | None = None

    @classmethod
    def of(cls, milliseconds: list[float], host_ms: float | None = None, device_alone: bool | None = None) -> "Times":
        """Summarises the calls; with three of them the quartiles are the least and the most."""
        lower = upper = None
        if len(milliseconds) >= MIN_REPEATS:
            lower, _, upper = statistics.quantiles(milliseconds, n=4)
        return cls(statistics.median(milliseconds), lower, upper, len(milliseconds), host_ms, device_alone)


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
        before_each: runs before every timed call and is not timed. A large copy empties the caches.
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
    """Times one call again and again."""

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
    """Times one call again and again, on the device and on the host.

    Two events around a call that the GPU finishes faster than Python queues it measure Python. So a kernel that spins
    comes before the first event and keeps the GPU busy until the whole call is queued: the event must not have happened
    by then. If it has, the call is made once more, behind a longer wait.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call, self._device = call, device
        self._taken_ms: list[float] = []
        self._host_ms: list[float] = []
        self._device_alone = True
        self._cycles_per_ms = CYCLES_PER_MS
        self._busy_ms = MIN_BUSY_MS
        self._chances = 2  # the second, should something that happens once have slowed the first

    def take(self, before: Callable[[], Any] | None) -> None:
        while True:
            elapsed_ms, host_ms, queued = self._measure(before)
            wanted_ms = max(2 * host_ms, MIN_BUSY_MS)
            alone = queued or host_ms <= SLIGHT * elapsed_ms
            if not alone:
                wanted_ms = max(wanted_ms, 2 * self._busy_ms)
            hopeless = wanted_ms > MAX_BUSY_MS  # the call waits for the device, or fills its queue
            if alone or self._busy_ms == 0 or (hopeless and self._busy_ms <= SLIGHT * elapsed_ms):
                break
            self._chances -= hopeless
            self._busy_ms = 0 if hopeless else wanted_ms
        self._taken_ms.append(elapsed_ms)
        self._host_ms.append(host_ms)
        self._device_alone &= alone
        self._busy_ms = 0 if self._chances <= 0 else MIN_BUSY_MS if hopeless else wanted_ms

    def times(self) -> Times:
        return Times.of(self._taken_ms, statistics.median(self._host_ms), self._device_alone)

    def _measure(self, before: Callable[[], Any] | None) -> tuple[float, float, bool]:
        """Milliseconds on the device and on the host, and whether the whole call was queued before its first kernel."""
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

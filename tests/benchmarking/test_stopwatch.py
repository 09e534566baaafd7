"""The stopwatch on a simulated GPU: a host that queues kernels, and a device that runs them in order."""

import json
from types import SimpleNamespace

import pytest
import torch

from flashmhf.benchmarking import measuring
from flashmhf.benchmarking.measuring import Times, interleaved_times

CUDA = torch.device("cuda")


class SimulatedGpu:
    """Times in milliseconds. `cycles_per_ms` is the actual rate of the spinning kernel."""

    def __init__(self, cycles_per_ms: float = 1.7e6) -> None:
        self.host_ms = self.device_ms = 0.0
        self.cycles_per_ms = cycles_per_ms
        self.calls = 0

    def launch(self, milliseconds: float) -> None:
        self.device_ms = max(self.host_ms, self.device_ms) + milliseconds

    def synchronize(self, device: object = None) -> None:
        self.host_ms = max(self.host_ms, self.device_ms)

    def call(self, host_ms: float, device_ms: float, kernels: int = 1, waits: bool = False):
        """A call of several kernels; one that waits reads a result after each."""

        def run() -> None:
            self.calls += 1
            for _ in range(kernels):
                self.host_ms += host_ms / kernels
                self.launch(device_ms / kernels)
                if waits:
                    self.synchronize()

        return run


class Event:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.launch(0.0)
        self.at_ms = self.gpu.device_ms

    def query(self) -> bool:
        return self.at_ms <= self.gpu.host_ms

    def elapsed_time(self, stop: "Event") -> float:
        return stop.at_ms - self.at_ms


@pytest.fixture
def simulate(monkeypatch):
    def start(**options: float) -> SimulatedGpu:
        gpu = SimulatedGpu(**options)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(gpu))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / gpu.cycles_per_ms))
        monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: gpu.host_ms / 1e3))
        return gpu

    return start


def timed(gpu: SimulatedGpu, **options) -> Times:
    """Three repeats of one call."""
    return interleaved_times({"call": gpu.call(**options)}, CUDA, 3)["call"]


@pytest.mark.parametrize("kernels", [1, 5])
@pytest.mark.parametrize("cycles_per_ms", [0.2e6, 1.7e6, 1e8])
@pytest.mark.parametrize("host_ms", [0.02, 0.15, 60.0])
def test_a_short_call_is_timed_on_the_device_and_on_the_host(simulate, host_ms, cycles_per_ms, kernels):
    """However slow the host is, and whatever a cycle of the spinning kernel takes."""
    gpu = simulate(cycles_per_ms=cycles_per_ms)
    times = timed(gpu, host_ms=host_ms, device_ms=0.025, kernels=kernels)
    assert times.median_ms == pytest.approx(0.025)
    assert times.host_ms == pytest.approx(host_ms)
    assert times.device_only


def test_what_runs_before_a_call_is_not_timed(simulate):
    gpu = simulate()
    before = gpu.call(host_ms=0.01, device_ms=3.0)
    times = interleaved_times({"call": gpu.call(host_ms=0.15, device_ms=0.025)}, CUDA, 3, before_each=before)["call"]
    assert times.median_ms == pytest.approx(0.025)


def test_a_long_call_is_not_repeated_to_exclude_a_percent_of_host_time(simulate):
    gpu = simulate()
    times = interleaved_times({"call": gpu.call(host_ms=5.0, device_ms=1000.0)}, CUDA, 3, warm_up=False)["call"]
    assert gpu.calls == 3
    assert 1000.0 <= times.median_ms <= 1005.0
    assert times.device_only


@pytest.mark.parametrize("device_ms", [0.1, 20.0, 4000.0])
def test_a_call_that_waits_for_its_results_is_timed_as_it_is(simulate, device_ms):
    """As in generation, which reads every token: the host's time cannot be separated from the device's."""
    gpu = simulate()
    times = timed(gpu, host_ms=1.0, device_ms=device_ms, kernels=10, waits=True)
    assert times.median_ms == pytest.approx(1.0 + device_ms, rel=measuring.MAX_HOST_SHARE)
    assert times.host_ms == pytest.approx(1.0 + device_ms, rel=measuring.MAX_HOST_SHARE)
    assert times.device_only is False
    assert gpu.calls == 4 if device_ms > 1000 else gpu.calls < 20


def test_after_one_slow_call_the_others_are_not_preceded_by_long_spins(simulate):
    gpu = simulate()
    slow, quick = gpu.call(host_ms=90.0, device_ms=0.025), gpu.call(host_ms=0.15, device_ms=0.025)
    calls = iter([slow] * 2)
    interleaved_times({"call": lambda: next(calls, quick)()}, CUDA, 20)
    assert gpu.host_ms < 500


def test_one_very_slow_call_leaves_the_other_times_right(simulate):
    gpu = simulate()
    slow, quick = gpu.call(host_ms=150.0, device_ms=0.025), gpu.call(host_ms=5.0, device_ms=0.025)
    calls = iter([quick, quick, quick, slow])
    times = interleaved_times({"call": lambda: next(calls, quick)()}, CUDA, 5)["call"]
    assert times.median_ms == pytest.approx(0.025)
    assert times.device_only is False


def test_on_a_cpu_there_is_one_time():
    times = interleaved_times({"call": lambda: None}, torch.device("cpu"), 3)["call"]
    assert (times.host_ms, times.device_only) == (None, None)
    assert json.loads(json.dumps(vars(times)))["host_ms"] is None

"""Throughput counts waiting for data and the optimizer, but neither validation nor the tokens of earlier processes."""

from types import SimpleNamespace

import pytest
import torch

from flashmhf.training import throughput


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_time_counts_waiting_but_not_pauses(now):
    clock = throughput.Clock()
    clock.start()
    with clock.waiting():
        now[0] += 1
    now[0] += 3
    with clock.paused():
        now[0] += 50
    assert clock.lap() == (4.0, 1.0)
    now[0] += 2
    assert clock.lap() == (2.0, 0.0)


def test_a_lap_is_of_its_own_tokens_and_seconds(now):
    arguments = SimpleNamespace(world_size=2, device=torch.device("cpu"), bf16=False, fp16=False)
    meter = throughput.ThroughputMeter(arguments, flops_per_token=1e9)
    meter.start(1000)  # read before the run was resumed
    with meter.waiting():
        now[0] += 1
    now[0] += 3
    with meter.paused():
        now[0] += 50
    meter.start(1200)
    values = meter.lap(1400)
    assert (values["tokens_per_second"], values["tflops_per_second"], values["data_wait_share"]) == (100, 0.05, 0.25)
    assert meter.lap(1400) == {}
    now[0] += 2
    assert meter.lap(1500)["tokens_per_second"] == 50

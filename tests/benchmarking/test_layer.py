"""Rows of the operator and of layers."""

import pytest
import torch

from flashmhf.benchmarking.layer import bench_layer, bench_op
from flashmhf.benchmarking.variants import NaiveMHF
from flashmhf.benchmarking.workloads import LayerShape

CPU = torch.device("cpu")
SMALL = LayerShape(hidden_size=48, num_heads=2, num_subnetworks=2, subnetwork_size=32)


def test_the_first_variant_is_the_baseline_of_ratios():
    for bench, variants in ((bench_layer, ("swiglu", "naive", "flashmhf")), (bench_op, ("reference", "blockwise"))):
        rows = bench(SMALL, 20, torch.float32, CPU, 1, variants)
        assert [row["variant"] for row in rows] == [*variants, *variants]
        assert [row["ratio"] for row in rows if row["variant"] == variants[0]] == [1.0, 1.0]
        assert all(row["peak_mib"] > 0 and row["median_ms"] > 0 for row in rows)


def test_a_variant_out_of_memory_does_not_stop_the_others(monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError("tried\nto allocate")

    monkeypatch.setattr(NaiveMHF, "forward", fail)
    rows = bench_layer(SMALL, 20, torch.float32, CPU, 1, ("naive", "swiglu"), passes=("forward",))
    assert rows[0]["failed"] == "OutOfMemoryError: tried to allocate"
    assert rows[1]["median_ms"] > 0
    assert rows[1]["ratio"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_memory_is_a_quarter_of_swiglus_and_a_tenth_of_the_naive_layers(dtype):
    rows = bench_layer(LayerShape(), 4096, dtype, CPU, 1, ("swiglu", "naive", "flashmhf"), passes=("forward+backward",))
    peak = {row["variant"]: row["peak_mib"] for row in rows}
    assert peak["flashmhf"] <= peak["swiglu"] / 4
    assert peak["flashmhf"] <= peak["naive"] / 10

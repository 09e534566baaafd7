"""Rows of a few tokens through layers."""

import pytest
import torch

from flashmhf.benchmarking.decode import bench_decode
from flashmhf.benchmarking.variants import build_layers
from flashmhf.benchmarking.workloads import LayerShape

CPU = torch.device("cpu")
SMALL = LayerShape(hidden_size=48, num_heads=2, num_subnetworks=2, subnetwork_size=32)


def test_decode_reports_the_rate_of_reading_the_weights():
    rows = bench_decode(SMALL, 2, torch.float32, CPU, 3, ("swiglu", "flashmhf"))
    for row in rows:
        (layer,) = build_layers(SMALL, (row["variant"],), torch.float32, CPU).values()
        weights = sum(parameter.nbytes for parameter in layer.parameters())
        assert row["weights_gb_s"] == pytest.approx(weights / row["median_ms"] / 1e6)
        assert row["ratio_to_copy"] == pytest.approx(row["weights_gb_s"] / row["copy_gb_s"])

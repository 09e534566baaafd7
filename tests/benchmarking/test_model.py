"""Rows of models that train and generate."""

import pytest
import torch

from flashmhf.benchmarking.model import bench_generation, bench_training
from flashmhf.benchmarking.workloads import ModelWorkload
from flashmhf.ops import flops  # noqa: F401  (registers the operator's formula)

CPU = torch.device("cpu")


def test_models_train_and_generate():
    training = ModelWorkload(batch_size=2, context_length=16)
    for row in bench_training(training, torch.bfloat16, CPU, 1):
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["median_ms"])
        assert row["mfu_of_matmul"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
        assert row["peak_mib"] > 12 * 3e6 / 2**20  # at least parameters and two moments
    for cache in ("dynamic", "static"):
        workload = ModelWorkload(batch_size=2, context_length=8, new_tokens=4)
        for row in bench_generation(workload, torch.float32, CPU, 1, cache=cache):
            assert row["tokens_per_s"] == pytest.approx(8e3 / row["median_ms"])

"""Benchmark rows and results for the tests of `benchmarking` and `reports`."""

from dataclasses import replace

import torch

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import provenance
from flashmhf.benchmarking.results import BenchmarkResult
from flashmhf.benchmarking.workloads import LayerShape

SHAPE = LayerShape(hidden_size=48, num_heads=2, num_subnetworks=2, subnetwork_size=32)
FAILED = {"median_ms": None, "failed": "Out, of 'x'"}


def row(variant: str = "flashmhf", median_ms: float = 10.0, spread: float = 0.05, **changes) -> Row:
    times = {
        "median_ms": median_ms,
        "lower_quartile_ms": median_ms * (1 - spread),
        "upper_quartile_ms": median_ms * (1 + spread),
        "repeats": 7,
    }
    case = {"variant": variant, "tokens": 64, "dtype": "float32", "measured_pass": "forward"}
    return {**case, **times, "ratio": 1.0, "peak_mib": 3.5, **changes}


def result(*rows: Row, shape: LayerShape = SHAPE, **origin) -> BenchmarkResult:
    """Of kind "layer"; `origin` overrides fields of its provenance."""
    where = replace(provenance(torch.device("cpu")), **origin)
    return BenchmarkResult(kind="layer", provenance=where, workload=shape, rows=rows)

"""What the benchmark compares and counts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashmhf.benchmarking import NaiveMHF, Shape, bench_layer, bench_op, peak_bytes
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.ops import flops  # noqa: F401  (registers the operator's formula)

CPU = torch.device("cpu")
SMALL = Shape(hidden_size=48, num_heads=2, num_subnetworks=2, subnetwork_size=32)


def test_naive_layer_is_the_same_function():
    layer = FlashMHF(32, 4, 3, 20, init="scaled")
    x = torch.randn(7, 32)
    torch.testing.assert_close(NaiveMHF(layer)(x), layer(x))


def test_swiglu_has_equal_flops():
    shape = Shape()
    counted = {}
    for name, layer in {
        "flashmhf": FlashMHF(
            shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, gate=None
        ),
        "swiglu": SwiGLU(shape.hidden_size, shape.swiglu_size),
    }.items():
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(8, shape.hidden_size))
        counted[name] = counter.get_total_flops()
    assert counted["flashmhf"] == counted["swiglu"]


def test_peak_counts_what_is_alive_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.float64)
        del first
        second, third = torch.empty(2000, dtype=torch.float64), torch.empty(500, dtype=torch.float64)
        return second, third

    assert peak_bytes(call, CPU) == 2500 * 8


def test_first_variant_is_what_ratios_refer_to():
    for bench, variants in ((bench_layer, ("swiglu", "naive", "flashmhf")), (bench_op, ("reference", "blockwise"))):
        rows = bench(SMALL, 20, torch.float32, CPU, 1, variants)
        assert [row.variant for row in rows] == [*variants, *variants]
        assert [row.ratio for row in rows if row.variant == variants[0]] == [1.0, 1.0]
        assert all(row.peak_mib > 0 and row.median_ms > 0 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_memory_against_swiglu_and_naive(dtype):
    rows = bench_layer(Shape(), 4096, dtype, CPU, 1, ("swiglu", "naive", "flashmhf"))
    peak = {row.variant: row.peak_mib for row in rows if row.measured_pass == "forward+backward"}
    assert peak["flashmhf"] <= peak["swiglu"] / 4
    assert peak["flashmhf"] <= peak["naive"] / 10


@pytest.mark.slow
def test_every_case_of_the_gpu_script_builds(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/gpu.py"
    command = [sys.executable, str(script), "--dry-run", "--output", str(tmp_path / "gpu")]
    subprocess.run(command, check=True, capture_output=True)
    assert "results within the error budget" in (tmp_path / "gpu.md").read_text()

"""What the benchmarks compare and count."""

from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashmhf.benchmarking.decode import bench_decode
from flashmhf.benchmarking.layer import bench_layer, bench_op
from flashmhf.benchmarking.measuring import peak_bytes
from flashmhf.benchmarking.model import bench_generation, bench_training
from flashmhf.benchmarking.variants import LAYERS, Checkpointed, Chunked, NaiveMHF, build_layers
from flashmhf.benchmarking.workloads import LayerShape, ModelWorkload
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.ops import flops  # noqa: F401  (registers the operator's formula)

CPU = torch.device("cpu")
SMALL = LayerShape(hidden_size=48, num_heads=2, num_subnetworks=2, subnetwork_size=32)


def chunks_of(elements: int):
    def build(layer: FlashMHF) -> Chunked:
        chunked = Chunked(layer, mib=1)
        chunked.elements = elements
        return chunked

    return build


@pytest.mark.parametrize(
    "variant",
    [NaiveMHF, Checkpointed, chunks_of(1), chunks_of(200), chunks_of(1000), chunks_of(10**6)],
    ids=["naive", "checkpointed", "chunks of a token", "of some tokens", "of two heads", "of everything"],
)
def test_variants_are_the_same_function_with_the_same_gradients(variant):
    layer = FlashMHF(32, 4, 3, 20, init="scaled", dtype=torch.float64)
    x, dy = (torch.randn(7, 32, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    results = []
    for module in (layer, variant(layer)):
        out = module(x)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], dy)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the naive gate is float32


def test_every_layer_runs_on_a_cpu():
    elsewhere = ("swiglu-liger", "swiglu-compiled", "flashmhf-compiled", "flashmhf-hopper", "flashmhf-triton")
    names = tuple(name for name in LAYERS if name not in elsewhere)
    for layer in build_layers(SMALL, names, torch.float32, CPU).values():
        assert layer(torch.randn(5, 48)).shape == (5, 48)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_missing_package_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="variants: expected the package liger-kernel"):
        bench_layer(SMALL, 4, torch.float32, CPU, 1, ("swiglu", "swiglu-liger"))


def test_swiglu_and_flashmhf_have_equal_flops():
    shape = LayerShape()
    counted = {}
    for name, layer in {
        "flashmhf": FlashMHF(
            shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, gate_type=None
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


def test_decode_reports_the_rate_of_reading_the_weights():
    rows = bench_decode(SMALL, 2, torch.float32, CPU, 3, ("swiglu", "flashmhf"))
    for row in rows:
        (layer,) = build_layers(SMALL, (row["variant"],), torch.float32, CPU).values()
        weights = sum(parameter.nbytes for parameter in layer.parameters())
        assert row["weights_gb_s"] == pytest.approx(weights / row["median_ms"] / 1e6)
        assert row["ratio_to_copy"] == pytest.approx(row["weights_gb_s"] / row["copy_gb_s"])


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

"""The variants are the same function with the same gradients, and cost the same FLOPs."""

from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashmhf.benchmarking.layer import bench_layer
from flashmhf.benchmarking.variants import LAYERS, Checkpointed, Chunked, NaiveMHF, build_layers
from flashmhf.benchmarking.workloads import LayerShape
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

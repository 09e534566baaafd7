"""Sizes with the parameters of a SwiGLU."""

import pytest
import torch

from flashmhf import FlashMHF
from flashmhf.layers import MHFFN, DenseMoE, SwiGLU
from flashmhf.layers.sizes import default_num_heads

WIDTHS = [(64, 200), (256, 704), (768, 2048), (896, 4864), (960, 2560), (2048, 8192), (4096, 11008), (8192, 28672)]


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def like(hidden_size: int, intermediate_size: int, **options) -> FlashMHF:
    return FlashMHF.like_swiglu(hidden_size, intermediate_size, device="meta", **options)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), WIDTHS)
@pytest.mark.parametrize("options", [{}, {"num_heads": 4}, {"projections": False}, {"gate_type": None}], ids=str)
def test_parameters_are_those_of_the_swiglu(hidden_size, intermediate_size, options):
    layer = like(hidden_size, intermediate_size, **options)
    swiglu = SwiGLU(hidden_size, intermediate_size, device="meta")
    assert parameters(layer) == pytest.approx(parameters(swiglu), rel=0.02 if hidden_size > 64 else 0.03)
    assert hidden_size > 768 or layer.subnetwork_size % 8 == 0
    if hidden_size >= 2048 and not options:
        assert (layer.head_dim, layer.subnetwork_size % 64) == (128, 0)
        assert 2 <= layer.subnetwork_size / layer.head_dim <= 4


def test_shared_parameters_leave_room_for_more_rows():
    layer, swiglu = like(768, 2048, num_kv_heads=2), SwiGLU(768, 2048, device="meta")
    assert parameters(layer) == pytest.approx(parameters(swiglu), rel=0.02)
    assert layer.k.shape[0] == 2 * layer.num_subnetworks


def test_given_sizes_stay():
    layer = like(768, 2048, num_heads=12, num_subnetworks=3)
    assert (layer.num_heads, layer.num_subnetworks, layer.subnetwork_size) == (12, 3, 512)
    assert like(768, 2048, subnetwork_size=192).num_subnetworks == 8
    layer = like(768, 2048, num_subnetworks=2, subnetwork_size=100)
    assert (layer.num_subnetworks, layer.subnetwork_size) == (2, 100)


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(768, 6), (960, 8), (576, 6), (64, 1), (100, 1), (97, 1), (131, 131)]
)
def test_heads_have_at_most_128_elements(hidden_size, heads):
    assert default_num_heads(hidden_size) == heads


@pytest.mark.parametrize("kind", [MHFFN, DenseMoE])
def test_only_flashmhf_has_these_sizes(kind):
    with pytest.raises(TypeError, match=f"like_swiglu: expected FlashMHF, got {kind.__name__}"):
        kind.like_swiglu(768, 2048)


def test_the_recommended_options_are_defaults():
    layer = like(64, 200)
    assert (layer.init, layer.q_norm is not None, layer.gate_type) == ("scaled", True, "sigmoid")
    layer = like(64, 200, init="reference", q_norm=False, gate_type="softmax", dtype=torch.float64)
    assert (layer.init, layer.q_norm, layer.gate_type, layer.k.dtype) == ("reference", None, "softmax", torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "hidden_size: expected"),
        ((8, 0), "intermediate_size: expected"),
        ((768, 512), r"intermediate_size: expected more than 2/3 of hidden_size 768.*got 512"),
        ((768, 2048, "num_heads", 5), "hidden_size: expected a multiple of num_heads 5, got 768"),
        ((768, 2048, "num_heads", 0), "num_heads: expected"),
        ((768, 2048, "num_kv_heads", 0), "num_kv_heads: expected"),
        ((768, 2048, "subnetwork_size", -1), "subnetwork_size: expected"),
    ],
)
def test_invalid_arguments(arguments, message):
    (hidden_size, intermediate_size), rest = arguments[:2], arguments[2:]
    with pytest.raises(ValueError, match=message):
        like(hidden_size, intermediate_size, **dict([rest] if rest else []))

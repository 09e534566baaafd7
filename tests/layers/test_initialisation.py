"""How layers with init="scaled" start, and the identities that docs/parametrisation.md derives."""

import math

import pytest
import torch
import torch.nn.functional as nnf

from flashmhf import FlashMHF
from flashmhf.layers import PKV, SwiGLU, initialisation
from flashmhf.layers.initialisation import init_orthogonal

PROJECTED = {
    "FlashMHF": lambda **o: FlashMHF(64, 4, 3, 40, q_norm=True, init="scaled", **o),
    "grouped": lambda **o: FlashMHF(64, 4, 3, 40, num_kv_heads=2, init="scaled", **o),
    "PKV": lambda **o: PKV(64, 4, 40, init="scaled", **o),
}


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("shape", [(48, 48), (40, 16), (16, 40), (3, 40, 16), (2, 3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_matrices_of_every_shape_and_dtype(shape, dtype):
    weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    init_orthogonal(weight, std=0.3)
    assert rms(weight) == pytest.approx(0.3, rel=0.01)
    matrices = weight.detach().double().view(-1, *shape[-2:])
    if shape[-2] > shape[-1]:
        matrices = matrices.mT
    products = matrices @ matrices.mT
    size = 0.09 * max(shape[-2:])
    expected = size * torch.eye(products.shape[-1], dtype=torch.float64).expand_as(products)
    torch.testing.assert_close(products, expected, rtol=0, atol=size * 16 * torch.finfo(dtype).eps)
    assert len(matrices) == 1 or not torch.equal(matrices[0], matrices[1])
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_orthogonal_initialisation_repeats_with_the_seed_and_keeps_loaded_tensors():
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        init_orthogonal(weight, std=1.0)
        drawn.append(weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    weight._is_hf_initialized = True  # transformers' mark on what it has loaded
    init_orthogonal(weight, std=1.0)
    assert torch.equal(weight, drawn[2])


@pytest.mark.parametrize("make", PROJECTED.values(), ids=PROJECTED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_projections_start_orthogonal(make, dtype):
    layer = make(dtype=dtype)
    for projection, gain in (
        (layer.in_proj, initialisation.SCALED_IN_GAIN),
        (layer.out_proj, initialisation.SCALED_OUT_GAIN),
    ):
        weight = projection.weight.double()
        torch.testing.assert_close(
            weight @ weight.T, gain**2 * torch.eye(64, dtype=torch.float64), rtol=0, atol=16 * torch.finfo(dtype).eps
        )
    assert make(device="meta", dtype=dtype).in_proj.weight.is_meta


def participation(singular_values: torch.Tensor) -> float:
    """The share of directions that carry the energy: 1 if all singular values are equal, 1 / n if one is not zero."""
    energy = singular_values.square()
    return (energy.sum().square() / (len(energy) * energy.square().sum())).item()


def test_chain_of_random_matrices_loses_directions_and_an_orthogonal_one_does_not():
    """Participation 1 / (1 + sum of columns / rows) over the chain's random matrices; orthogonal ones add nothing."""
    torch.manual_seed(0)
    d, H, rows = 256, 4, 576
    D = d // H
    k = torch.block_diag(*torch.randn(H, rows, D, dtype=torch.float64))
    w_in = torch.randn(d, d, dtype=torch.float64)
    assert participation(torch.linalg.svdvals(k @ w_in)) == pytest.approx(1 / (1 + 1 + D / rows), rel=0.05)
    swiglu = torch.randn(748, d, dtype=torch.float64)
    assert participation(torch.linalg.svdvals(swiglu)) == pytest.approx(1 / (1 + d / 748), rel=0.05)
    init_orthogonal(w_in, std=1.0 / math.sqrt(d))
    chain = torch.linalg.svdvals(k @ w_in)
    torch.testing.assert_close(chain, torch.linalg.svdvals(k))  # the spectrum of K alone
    assert participation(chain) == pytest.approx(1 / (1 + D / rows), rel=0.05)
    init_orthogonal(k_blocks := torch.empty(H, rows, D, dtype=torch.float64), std=1.0)
    assert participation(torch.linalg.svdvals(torch.block_diag(*k_blocks) @ w_in)) == pytest.approx(1.0)


def test_output_starts_at_the_derived_size_for_every_layer():
    """SCALED_OUT_GAIN x SCALED_OUTPUT_GAIN x RMS of SiLU(M) N, for any H, E and F; without W_out in a SwiGLU."""
    torch.manual_seed(0)
    x = nnf.normalize(torch.randn(512, 256), dim=-1) * 16
    m, n = initialisation.SCALED_SCORE_RMS * torch.randn(2, 10**6)
    expected = initialisation.SCALED_OUTPUT_GAIN * rms(nnf.silu(m) * n)
    assert rms(SwiGLU(256, 748, init="scaled")(x)) == pytest.approx(expected, rel=0.1)
    for H, E, F in ((1, 3, 192), (4, 3, 192), (16, 12, 48)):
        layer = FlashMHF(256, H, E, F, q_norm=True, init="scaled")
        size = initialisation.SCALED_OUT_GAIN * expected
        assert rms(layer(x)) == pytest.approx(size, rel=0.12), (H, E, F)


def test_without_a_gate_sub_networks_are_only_a_reshape():
    """The effect of E is the gate's alone."""
    torch.manual_seed(0)
    one = FlashMHF(64, 4, 1, 96, gate_type=None, init="scaled", dtype=torch.float64)
    many = FlashMHF(64, 4, 6, 16, gate_type=None, init="scaled", dtype=torch.float64)
    many.load_state_dict({n: p.view(dict(many.named_parameters())[n].shape) for n, p in one.state_dict().items()})
    x = torch.randn(7, 64, dtype=torch.float64)
    torch.testing.assert_close(many(x), one(x))

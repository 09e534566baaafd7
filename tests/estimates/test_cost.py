"""Parameters, FLOPs and saved bytes, against counts by hand."""

import pytest
import torch

from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost, operator_cost, saved_bytes_per_token
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.models import FlashMHFConfig


def test_parameters_and_flops_by_hand():
    V, L, d, layers, H, E, F = 1000, 64, 128, 3, 2, 3, 40
    config = FlashMHFConfig(
        vocab_size=V,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_ffn_heads=H,
        intermediate_size=E * F,
        num_subnetworks=E,
        max_position_embeddings=L,
    )
    report = model_cost(config)
    ffn = 2 * d * d + 3 * d * E * F + d * E
    assert report.parameters == 2 * V * d + layers * (4 * d * d + 2 * d + ffn) + d
    assert report.parameters_without_embeddings == layers * (4 * d * d + 2 * d + ffn) + d
    assert report.parameters_per_ffn == ffn
    attention = 2 * 2 * L * d  # Q K^T and P V, counted without the mask
    forward = layers * (2 * (4 * d * d + ffn) + attention) + 2 * V * d
    assert report.forward_flops_per_token == pytest.approx(forward, rel=0.01)
    assert report.training_flops_per_token == 3 * report.forward_flops_per_token


def test_saved_bytes_per_token_by_hand():
    d, H, E, F = 64, 4, 3, 40
    flash = FlashMHF(d, H, E, F)
    assert saved_bytes_per_token(flash, d) == 4 * 3 * d  # x, q and out
    assert saved_bytes_per_token(FlashMHF(d, H, E, F, gate_type=None, q_norm=True), d) == 4 * 3 * d
    swiglu = SwiGLU(d, 100)
    assert saved_bytes_per_token(swiglu, d) == 4 * (d + 4 * 100)  # x, both projections, SiLU and the product
    assert saved_bytes_per_token(flash.to(torch.bfloat16), d) == 2 * 3 * d


def test_operator_flops_of_presets_by_hand():
    work = operator_cost(FlashMHFConfig.from_preset("flashmhf-1.3b"), 1000, "h200")
    assert work.forward.gflop == pytest.approx(3 * 2 * 1000 * 2048 * 15 * 384 / 1e9)
    assert work.backward.gflop == pytest.approx(work.forward.gflop * 11 / 3)
    naive = operator_cost(FlashMHFConfig.from_preset("mhffn-tiny"), 1000, "a100")
    assert naive.forward.gflop == pytest.approx(3 * 2 * 1000 * 256 * 576 / 1e9)
    with pytest.raises(InputError, match=r"gpu: expected one of a100, .*, got 'tpu'"):
        operator_cost(FlashMHFConfig.from_preset("flashmhf-1.3b"), 1000, "tpu")

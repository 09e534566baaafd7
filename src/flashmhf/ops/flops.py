"""FLOP formulas of the operators for torch.utils.flop_counter.FlopCounterMode; importing this module registers them.

A separate module because the counter imports triton wherever it is installed. `flashmhf.models` imports it.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from flashmhf.ops import flash_mhf, gated_mhf  # noqa: F401  (registers the operators)


@register_flop_formula(torch.ops.flashmhf.flash_mhf)
def _forward_flops(q_shape, k_shape, *args, **kwargs) -> int:
    """Three products of T x D x (E F) per head, as PyTorch's FlopCounterMode counts them."""
    return 3 * _product_flops(q_shape, k_shape)


@register_flop_formula(torch.ops.flashmhf.flash_mhf_backward)
def _backward_flops(dout_shape, q_shape, k_shape, *args, **kwargs) -> int:
    """Eight products on every backend: recomputation and the products of a second kernel are overhead, not work."""
    return 8 * _product_flops(q_shape, k_shape)


@register_flop_formula(torch.ops.flashmhf.gated_mhf)
def _gated_forward_flops(q_shape, k_shape, u_shape, v_shape, gate_weight_shape, *args, **kwargs) -> int:
    return 3 * _product_flops(q_shape, k_shape, gate_weight_shape) + _gate_flops(q_shape, gate_weight_shape)


@register_flop_formula(torch.ops.flashmhf.gated_mhf_backward)
def _gated_backward_flops(dout_shape, q_shape, k_shape, u_shape, v_shape, gate_weight_shape, *args, **kwargs) -> int:
    return 8 * _product_flops(q_shape, k_shape, gate_weight_shape) + 2 * _gate_flops(q_shape, gate_weight_shape)


def _gate_flops(q_shape, gate_weight_shape) -> int:
    return 0 if gate_weight_shape is None else 2 * q_shape.numel() * gate_weight_shape[-1]


def _product_flops(q_shape, k_shape, gate_weight_shape=None) -> int:
    """k (H_kv, E, F, D), or (H_kv E, F, D) with a gate."""
    E = k_shape[-3] if len(k_shape) == 4 else gate_weight_shape[-1]
    return 2 * q_shape.numel() * E * k_shape[-2]

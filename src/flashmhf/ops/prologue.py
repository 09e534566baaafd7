"""From the projected Q to the operator's inputs: the per-head RMSNorm and the gate, in float32, on any device.

Only Q is saved. The backward pass recomputes from it, block by block, and never holds a float32 copy of all of Q.
This is the PyTorch implementation; `ops/triton/prologue.py` implements the same two functions as kernels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmhf.ops.slices import slices

CPU_BLOCK_ELEMENTS = 2**18  # float32 elements of Q at a time
ACCELERATOR_BLOCK_ELEMENTS = 2**24
MIN_GATE_SUM = 1e-20

GATES = ("sigmoid", "softmax")


class Prologue(NamedTuple):
    """Its options, as in `gated_mhf`."""

    gate_type: str
    gate_total: float
    norm_eps: float


def forward(
    q: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None, prologue: Prologue
) -> tuple[Tensor, Tensor | None]:
    """Norm, then gate.

    Args:
        q: (..., H, D).
        gate_weight: (H, D, E), or None for no gate.
        norm_weight: (H, D), or None for no norm; q itself is then the first result.
        prologue: gate_type "sigmoid": sigmoid(logits) divided by their sum (at least 1e-20), or "softmax".

    Returns:
        q normed (..., H, D) in q's dtype, and the gate (..., H, E) in float32 (float64 for float64) or None.
    """
    dtype = _compute_dtype(q)
    normed = q if norm_weight is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    gate = gate_weight_HDE = None
    if gate_weight is not None:
        gate = torch.empty((*q.shape[:-1], gate_weight.shape[-1]), dtype=dtype, device=q.device)
        gate_weight_HDE = gate_weight.to(dtype)
    q_THD, normed_THD, gate_THE = tokens_of(q), tokens_of(normed), None if gate is None else tokens_of(gate)
    for block in _blocks(q_THD):
        if norm_weight is not None:
            x = q_THD[block].to(dtype)
            normed_THD[block] = x * _inverse_rms(x, prologue.norm_eps) * norm_weight
        if gate_THE is not None:
            logits = torch.einsum("thd,hde->the", normed_THD[block].to(dtype), gate_weight_HDE)
            gate_THE[block] = _gate(logits, prologue)
    return normed, gate


def backward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    dnormed: Tensor,
    dgate: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients for q, gate_weight and norm_weight. May overwrite `dnormed` with the first."""
    dgate_weight, dnorm_weight = (
        None if weight is None else torch.zeros(weight.shape, dtype=_compute_dtype(q), device=q.device)
        for weight in (gate_weight, norm_weight)
    )
    q_THD, dq_THD, dgate_THE = tokens_of(q), tokens_of(dnormed), None if dgate is None else tokens_of(dgate)
    for block in _blocks(q_THD):
        dgate_block = None if dgate_THE is None else dgate_THE[block]
        dq_THD[block], *dweights = block_backward(
            q_THD[block], gate_weight, norm_weight, prologue, dq_THD[block], dgate_block
        )
        for total, dweight in zip((dgate_weight, dnorm_weight), dweights, strict=True):
            if total is not None and dweight is not None:
                total += dweight
    return dq_THD.view(q.shape), _cast_like(dgate_weight, gate_weight), _cast_like(dnorm_weight, norm_weight)


def block_backward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    dnormed: Tensor,
    dgate: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`backward` of one block of q (T, H, D), in float32 (float64 for float64); itself differentiable."""
    dtype = _compute_dtype(q)
    x, dx = q.to(dtype), dnormed.to(dtype)
    unit = normed = x
    dgate_weight = dnorm_weight = None
    if norm_weight is not None:
        inverse_rms = _inverse_rms(x, prologue.norm_eps)
        unit = x * inverse_rms
        normed = (unit * norm_weight).to(q.dtype).to(dtype)
    if gate_weight is not None and dgate is not None:
        gate_weight = gate_weight.to(dtype)
        logits = torch.einsum("thd,hde->the", normed, gate_weight)
        dlogits = _logit_gradient(logits, dgate, prologue)
        dgate_weight = torch.einsum("thd,the->hde", normed, dlogits)
        dx = dx + torch.einsum("the,hde->thd", dlogits, gate_weight)
    if norm_weight is not None:
        dnorm_weight = (dx * unit).sum(0)
        dx = dx * norm_weight
        dx = (dx - unit * (dx * unit).mean(-1, keepdim=True)) * inverse_rms
    return dx, dgate_weight, dnorm_weight


def _cast_like(grad: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return None if grad is None or weight is None else grad.to(weight.dtype)


def _gate(logits: Tensor, prologue: Prologue) -> Tensor:
    if prologue.gate_type == "softmax":
        return logits.softmax(-1) * prologue.gate_total
    scores = logits.sigmoid()
    return scores * (prologue.gate_total / scores.sum(-1, keepdim=True).clamp_min(MIN_GATE_SUM))


def _logit_gradient(logits: Tensor, dgate: Tensor, prologue: Prologue) -> Tensor:
    dshare = dgate * prologue.gate_total
    if prologue.gate_type == "softmax":
        share = logits.softmax(-1)
        return share * (dshare - (dshare * share).sum(-1, keepdim=True))
    scores = logits.sigmoid()
    total = scores.sum(-1, keepdim=True)
    share = scores / total.clamp_min(MIN_GATE_SUM)
    # The sum has no gradient where it is clamped.
    through_sum = torch.where(total > MIN_GATE_SUM, (dshare * share).sum(-1, keepdim=True), 0.0)
    return (dshare - through_sum) * share * (1 - scores)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def tokens_of(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(0, *x.shape[-2:])


def _blocks(x_THD: Tensor) -> Iterator[slice]:
    T, H, D = x_THD.shape
    budget = CPU_BLOCK_ELEMENTS if x_THD.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    return slices(T, max(budget // (H * D), 1))

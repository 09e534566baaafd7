"""What stands between the projected Q and the operator: the per-head RMSNorm and the gate, both in float32.

Neither stores a float32 copy of Q or an intermediate of its own: the backward pass recomputes from Q, block by block.
Under torch.compile one block covers all tokens, and the compiler fuses.
"""

import torch
from torch import Tensor

from flashmhf.ops.autocast import without_autocast
from flashmhf.ops.slices import slices

BLOCK_ELEMENTS = 2**18  # float32 elements of Q at a time
MIN_GATE_SUM = 1e-20

GATES = ("sigmoid", "softmax")


def head_norm(q: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head of q (..., H, D) with that head's weight (H, D); returns q's dtype."""
    with without_autocast(q.device.type):
        return _HeadNorm.apply(q, weight, eps)


def head_gate(q: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The gate of every token and head over the E sub-networks.

    Args:
        q: (..., H, D).
        weight: (H, D, E).
        kind: "sigmoid": sigmoid(logits) divided by its sum (at least 1e-20); "softmax": softmax(logits).

    Returns:
        (..., H, E) in float32 (float64 for float64 inputs), summing to one over E.
    """
    if kind not in GATES:
        raise ValueError(f"kind: expected one of {', '.join(GATES)}, got {kind!r}")
    with without_autocast(q.device.type):
        return _HeadGate.apply(q, weight, kind)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(q, weight)
        ctx.eps = eps
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q_THD, out_THD = _tokens(q), _tokens(out)
        for block in _blocks(q_THD):
            x = q_THD[block].to(_compute_dtype(q))
            out_THD[block] = (x * _inverse_rms(x, eps) * weight).to(q.dtype)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, weight = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dweight = torch.zeros(weight.shape, dtype=_compute_dtype(q), device=q.device)
        q_THD, dq_THD, dout_THD = _tokens(q), _tokens(dq), _tokens(dout)
        for block in _blocks(q_THD):
            x = q_THD[block].to(_compute_dtype(q))
            inverse_rms = _inverse_rms(x, ctx.eps)
            unit = x * inverse_rms
            dunit = dout_THD[block].to(_compute_dtype(q))
            dweight = dweight + (dunit * unit).sum(0)
            dunit = dunit * weight
            dq_THD[block] = ((dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * inverse_rms).to(q.dtype)
        return dq, dweight.to(weight.dtype), None


class _HeadGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, weight: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(q, weight)
        ctx.kind = kind
        out = torch.empty((*q.shape[:-1], weight.shape[-1]), dtype=_compute_dtype(q), device=q.device)
        q_THD, out_THE = _tokens(q), _tokens(out)
        weight_HDE = weight.to(_compute_dtype(q))
        for block in _blocks(q_THD):
            logits = torch.einsum("thd,hde->the", q_THD[block].to(_compute_dtype(q)), weight_HDE)
            out_THE[block] = logits.softmax(-1) if kind == "softmax" else _share(logits.sigmoid())
        return out

    @staticmethod
    def backward(ctx, dgate: Tensor):
        q, weight = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        weight_HDE = weight.to(_compute_dtype(q))
        dweight = torch.zeros(weight.shape, dtype=_compute_dtype(q), device=q.device)
        q_THD, dq_THD, dgate_THE = _tokens(q), _tokens(dq), _tokens(dgate)
        for block in _blocks(q_THD):
            x = q_THD[block].to(_compute_dtype(q))
            logits = torch.einsum("thd,hde->the", x, weight_HDE)
            dlogits = _logit_gradient(logits, dgate_THE[block], ctx.kind)
            dweight = dweight + torch.einsum("thd,the->hde", x, dlogits)
            dq_THD[block] = torch.einsum("the,hde->thd", dlogits, weight_HDE).to(q.dtype)
        return dq, dweight.to(weight.dtype), None


def _logit_gradient(logits: Tensor, dgate: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        gate = logits.softmax(-1)
        return gate * (dgate - (dgate * gate).sum(-1, keepdim=True))
    scores = logits.sigmoid()
    total = scores.sum(-1, keepdim=True)
    gate = _share(scores)
    # Where the sum is clamped it is a constant.
    through_sum = torch.where(total > MIN_GATE_SUM, (dgate * gate).sum(-1, keepdim=True), 0.0)
    return (dgate - through_sum) / total.clamp_min(MIN_GATE_SUM) * scores * (1 - scores)


def _share(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(MIN_GATE_SUM)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(0, *x.shape[-2:])


def _blocks(x_THD: Tensor):
    T, H, D = x_THD.shape
    return slices(T, max(T if torch.compiler.is_compiling() else BLOCK_ELEMENTS // (H * D), 1))

"""The specification: FlashMHF's formula as in the paper, naive, in any dtype.

    S_h = sum_e R_h[:, e] * ((SiLU(Q_h K_he^T) * (Q_h U_he^T)) V_he)        R is the gate

It materialises every activation (T x H x E x F elements, several times) and is the oracle of the tests: in float64 the
exact result, in lower precision the eager PyTorch whose error bounds that of the other backends.
Source: arXiv 2512.06989, section 3.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from flashmhf.ops.prologue import Prologue, block_backward, tokens_of
from flashmhf.ops.prologue import backward as prologue_backward
from flashmhf.ops.prologue import forward as prologue_forward

__all__ = [
    "backward",
    "forward",
    "gated_backward",
    "gated_forward",
    "head_gate",
    "head_norm",
    "prologue_backward",
    "prologue_forward",
]


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    k_HEFD, u_HEFD, v_HEFD = (_per_head(weight, q.shape[-2]) for weight in (k, u, v))
    m = torch.einsum("...hd,hefd->...hef", q, k_HEFD)
    n = torch.einsum("...hd,hefd->...hef", q, u_HEFD)
    p = nnf.silu(m) * n
    if gate is not None:
        p = (p * gate[..., None]).to(q.dtype)
    return torch.einsum("...hef,hefd->...hd", p, v_HEFD)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so. Itself differentiable, for second derivatives."""
    H, H_kv = q.shape[-2], k.shape[0]
    k_HEFD, u_HEFD, v_HEFD = (_per_head(weight, H) for weight in (k, u, v))
    m = torch.einsum("...hd,hefd->...hef", q, k_HEFD)
    n = torch.einsum("...hd,hefd->...hef", q, u_HEFD)
    da = torch.einsum("...hd,hefd->...hef", dout, v_HEFD)
    sigmoid = torch.sigmoid(m)
    silu = m * sigmoid
    p = silu * n
    dgate = None
    if gate is not None:
        dgate = (da * p).sum(-1).to(gate.dtype) if needs[4] else None
        p = (p * gate[..., None]).to(q.dtype)
        da = (da * gate[..., None]).to(q.dtype)
    dm = da * n * (sigmoid + silu * (1 - sigmoid))
    dn = da * silu
    dq = dk = du = dv = None
    if needs[0]:
        dq = torch.einsum("...hef,hefd->...hd", dm, k_HEFD) + torch.einsum("...hef,hefd->...hd", dn, u_HEFD)
    if needs[1]:
        dk = _sum_groups(torch.einsum("...hef,...hd->hefd", dm, q), H_kv)
    if needs[2]:
        du = _sum_groups(torch.einsum("...hef,...hd->hefd", dn, q), H_kv)
    if needs[3]:
        dv = _sum_groups(torch.einsum("...hef,...hd->hefd", p, dout), H_kv)
    return dq, dk, du, dv, dgate


def gated_forward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
) -> Tensor:
    """`forward` of the normed q, with the gate computed from it; see `gated_mhf`."""
    normed, gate = _normed_and_gate(q, gate_weight, norm_weight, prologue)
    return forward(normed, k, u, v, gate)


def gated_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    needs: tuple[bool, ...],
    prologue: Prologue,
) -> tuple[Tensor | None, ...]:
    """Gradients for the tensors of `gated_forward`, None where `needs` says so. Itself differentiable."""
    normed, gate = _normed_and_gate(q, gate_weight, norm_weight, prologue)
    needs_prologue = needs[0] or needs[4] or needs[5]
    op_needs = (needs_prologue, *needs[1:4], needs_prologue and gate is not None)
    dnormed, dk, du, dv, dgate = backward(dout, normed, k, u, v, gate, op_needs)
    grads = [None, dk, du, dv, None, None]
    if dnormed is not None:
        dgate_THE = None if dgate is None else tokens_of(dgate)
        blocks = block_backward(tokens_of(q), gate_weight, norm_weight, prologue, tokens_of(dnormed), dgate_THE)
        for i, x, grad in zip((0, 4, 5), (q, gate_weight, norm_weight), blocks, strict=True):
            if needs[i] and x is not None and grad is not None:
                grads[i] = grad.reshape(x.shape).to(x.dtype)
    return tuple(grads)


def _normed_and_gate(
    q: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None, prologue: Prologue
) -> tuple[Tensor, Tensor | None]:
    """Both computed in at least float32; the first rounded to q's dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if norm_weight is not None:
        q = head_norm(q.to(dtype), norm_weight, prologue.norm_eps).to(q.dtype)
    if gate_weight is None:
        return q, None
    return q, prologue.gate_total * head_gate(q.to(dtype), gate_weight.to(dtype), prologue.gate_type)


def head_norm(q: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head of q (..., H, D) with that head's weight (H, D)."""
    return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps) * weight


def head_gate(q: Tensor, weight: Tensor, gate_type: str) -> Tensor:
    """q (..., H, D), weight (H, D, E) -> gate (..., H, E) that sums to one over E; "sigmoid" or "softmax"."""
    logits = torch.einsum("...hd,hde->...he", q, weight)
    if gate_type == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def _per_head(weight: Tensor, H: int) -> Tensor:
    groups = H // weight.shape[0]
    return weight if groups == 1 else weight.repeat_interleave(groups, dim=0)


def _sum_groups(grad_HEFD: Tensor, H_kv: int) -> Tensor:
    return grad_HEFD.unflatten(0, (H_kv, -1)).sum(1)

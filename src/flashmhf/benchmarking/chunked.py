"""FlashMHF as fast as PyTorch can do it on a GPU without custom kernels: the strongest baseline.

One (heads, tokens) chunk at a time: batched products over all rows of its heads, wide enough for cuBLAS, with one
fused element-wise pass between them (Inductor's, on a GPU). Only Q and the gate are saved; the backward recomputes each
chunk's activations, so it has 8 products. Heads are the outer loop: a head's weight gradients are then accumulated once
per chunk of its own tokens instead of once per chunk of all heads.

The blockwise backend also splits parameter rows, which bounds memory for any width and suits a CPU's caches, but makes
more and smaller launches; a chunk here has a head's full width.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor


class ChunkedMHF(torch.autograd.Function):
    """Autograd of `chunked_mhf`."""

    @staticmethod
    def forward(ctx, q_HTD, k_HRD, u_HRD, v_HRD, gate_HTE, elements: int) -> Tensor:
        ctx.save_for_backward(q_HTD, k_HRD, u_HRD, v_HRD, gate_HTE)
        ctx.elements = elements
        out_HTD = torch.empty_like(q_HTD)
        for at in _chunks(q_HTD, k_HRD, elements):
            q, gate, (k, u, v) = q_HTD[at], gate_HTE[at], (w[at[0]] for w in (k_HRD, u_HRD, v_HRD))
            p = _fused(_activate, q.device.type)(q @ k.mT, q @ u.mT, gate)
            out_HTD[at] = p @ v
        return out_HTD

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout_HTD,) = grads
        q_HTD, k_HRD, u_HRD, v_HRD, gate_HTE = ctx.saved_tensors
        dq_HTD, dgate_HTE = torch.empty_like(q_HTD), torch.empty_like(gate_HTE)
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in (k_HRD, u_HRD, v_HRD)]
        for at in _chunks(q_HTD, k_HRD, ctx.elements):
            q, dout, gate = q_HTD[at], dout_HTD[at], gate_HTE[at]
            k, u, v = (w[at[0]] for w in (k_HRD, u_HRD, v_HRD))
            p, dm, dn, dgate_HTE[at] = _fused(_differentiate, q.device.type)(q @ k.mT, q @ u.mT, dout @ v.mT, gate)
            dq_HTD[at] = torch.baddbmm(dm @ k, dn, u)
            for total, left, right in zip(sums, (dm, dn, p), (q, q, dout), strict=True):
                total[at[0]] += left.mT @ right
        dk_HRD, du_HRD, dv_HRD = (total.to(k_HRD.dtype) for total in sums)
        return dq_HTD, dk_HRD, du_HRD, dv_HRD, dgate_HTE, None


def chunked_mhf(q_HTD: Tensor, k_HRD: Tensor, u_HRD: Tensor, v_HRD: Tensor, gate_HTE: Tensor, elements: int) -> Tensor:
    """`flash_mhf` with heads first and E x F = R; at most `elements` of M at a time, but at least one token."""
    return ChunkedMHF.apply(q_HTD, k_HRD, u_HRD, v_HRD, gate_HTE, elements)  # type: ignore[no-any-return]


def _chunks(q_HTD: Tensor, k_HRD: Tensor, elements: int) -> Iterator[tuple[slice, slice]]:
    """Several heads with all their tokens if they fit, else some tokens of one head."""
    (H, T, _), R = q_HTD.shape, k_HRD.shape[1]
    tokens = max(min(T, elements // R), 1)
    heads = max(min(H, elements // (R * tokens)), 1)
    for head in range(0, H, heads):
        for token in range(0, T, tokens):
            yield slice(head, head + heads), slice(token, token + tokens)


def _activate(m: Tensor, n: Tensor, gate: Tensor) -> Tensor:
    p = (nnf.silu(m.float()) * n).unflatten(-1, (gate.shape[-1], -1)) * gate.unsqueeze(-1)
    return p.flatten(-2).to(m.dtype)


def _differentiate(m: Tensor, n: Tensor, da: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, dM, dN and the gate's gradient, from M, N and dA of one chunk."""
    m, n, da = (x.float().unflatten(-1, (gate.shape[-1], -1)) for x in (m, n, da))
    r = gate.unsqueeze(-1)
    sigmoid = m.sigmoid()
    silu = m * sigmoid
    dgate = (da * silu * n).sum(-1)
    results = (silu * n * r, da * n * r * (sigmoid + silu * (1 - sigmoid)), da * silu * r)
    p, dm, dn = (x.flatten(-2).to(gate.dtype) for x in results)
    return p, dm, dn, dgate.to(gate.dtype)


@functools.cache
def _fused(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """One pass over memory instead of one per operation; eager on a CPU, where Inductor needs a C++ compiler."""
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function

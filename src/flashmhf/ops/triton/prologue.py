"""The prologue's kernels: per-head RMSNorm and gate from the projected Q, and their backward.

Each reads Q once. The backward kernel takes dQ and dgate from the operator and overwrites dQ with the gradient of the
projected Q; the weights' gradients are summed over tokens in registers, then over programs in fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmhf.ops.prologue import MIN_GATE_SUM, Prologue
from flashmhf.ops.triton.common import DO_NOT_SPECIALIZE, load_tile, token_offsets
from flashmhf.ops.triton.launch import Launch, Tokens, block_d, token_arguments

NUM_WARPS = 8
NUM_STAGES = 1
BACKWARD_PROGRAMS = 512  # of the backward kernel, approximately, over all heads


@triton.jit
def logits_of(q, w):
    """q @ w with exact products: on matrix units where both have the same 16-bit dtype, otherwise in float32."""
    if q.dtype == w.dtype:
        return tl.dot(q, w, input_precision="ieee")
    return tl.dot(q.to(tl.float32), w.to(tl.float32), input_precision="ieee")


@triton.jit
def gate_of(logits, mask_e, SOFTMAX: tl.constexpr, MIN_SUM: tl.constexpr):
    """Scores and their clamped sum; the normalised gate is their quotient."""
    if SOFTMAX:
        logits = tl.where(mask_e[None, :], logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    else:
        scores = tl.where(mask_e[None, :], tl.sigmoid(logits), 0.0)
    return scores, tl.maximum(tl.sum(scores, axis=1), MIN_SUM)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def prologue_forward_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    normed_ptr, stride_normedb, stride_normedl, stride_normedh, stride_normedx,
    gate_ptr, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
    gate_weight_ptr, norm_weight_ptr, total, eps,
    T, L, E,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    FLAT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, SOFTMAX: tl.constexpr, MIN_SUM: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_T tokens of one head."""
    EVEN_D: tl.constexpr = D == BLOCK_D
    tiles_t = tl.cdiv(T, BLOCK_T)
    head = (tl.program_id(0) // tiles_t).to(tl.int64)
    offs_t = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_d = offs_d < D
    mask_e = offs_e < E

    rows_q = token_offsets(offs_t, L, stride_qb, stride_ql, FLAT) + head * stride_qh
    q = load_tile(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_qx, mask_t, mask_d, False, EVEN_D)
    if HAS_NORM:
        x = q.to(tl.float32)
        weight = tl.load(norm_weight_ptr + head * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        q = (x * inverse_rms[:, None] * weight[None, :]).to(q.dtype)
        rows_normed = token_offsets(offs_t, L, stride_normedb, stride_normedl, FLAT) + head * stride_normedh
        tl.store(
            normed_ptr + rows_normed[:, None] + offs_d[None, :] * stride_normedx,
            q,
            mask=mask_t[:, None] & mask_d[None, :],
        )
    if HAS_GATE:
        offs_w = (head * D + offs_d[:, None]) * E + offs_e[None, :]
        w = tl.load(gate_weight_ptr + offs_w, mask=mask_d[:, None] & mask_e[None, :], other=0.0)
        logits = logits_of(q, w)
        scores, score_sum = gate_of(logits, mask_e, SOFTMAX, MIN_SUM)
        rows_gate = token_offsets(offs_t, L, stride_gateb, stride_gatel, FLAT) + head * stride_gateh
        tl.store(
            gate_ptr + rows_gate[:, None] + offs_e[None, :] * stride_gatex,
            scores * (total / score_sum)[:, None],
            mask=mask_t[:, None] & mask_e[None, :],
        )


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def prologue_backward_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    dq_ptr, stride_dqb, stride_dql, stride_dqh, stride_dqx,
    dgate_ptr, stride_dgateb, stride_dgatel, stride_dgateh, stride_dgatex,
    gate_weight_ptr, norm_weight_ptr, dgate_weight_ptr, dnorm_weight_ptr, total, eps,
    T, L, E, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    FLAT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, SOFTMAX: tl.constexpr, MIN_SUM: tl.constexpr,
):  # fmt: skip
    """One program loops over every num_programs(1)-th token tile of one head and accumulates weight gradients."""
    EVEN_D: tl.constexpr = D == BLOCK_D
    head = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    mask_d = offs_d < D
    mask_e = offs_e < E
    offs_w = (head * D + offs_d[:, None]) * E + offs_e[None, :]
    mask_w = mask_d[:, None] & mask_e[None, :]
    if HAS_GATE:
        w = tl.load(gate_weight_ptr + offs_w, mask=mask_w, other=0.0)
        dw = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_weight_ptr + head * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK_D,), tl.float32)

    for tile in tl.range(tl.program_id(1), tl.cdiv(T, BLOCK_T), tl.num_programs(1)):
        offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        rows_q = token_offsets(offs_t, L, stride_qb, stride_ql, FLAT) + head * stride_qh
        q = load_tile(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_qx, mask_t, mask_d, False, EVEN_D)
        rows_dq = token_offsets(offs_t, L, stride_dqb, stride_dql, FLAT) + head * stride_dqh
        dq_ptrs = dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dqx
        dx = load_tile(dq_ptrs, mask_t, mask_d, False, EVEN_D).to(tl.float32)
        normed = q
        if HAS_NORM:
            x = q.to(tl.float32)
            inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
            unit = x * inverse_rms[:, None]
            normed = (unit * weight[None, :]).to(q.dtype)
        if HAS_GATE:
            logits = logits_of(normed, w)
            scores, score_sum = gate_of(logits, mask_e, SOFTMAX, MIN_SUM)
            share = scores / score_sum[:, None]
            rows_gate = token_offsets(offs_t, L, stride_dgateb, stride_dgatel, FLAT) + head * stride_dgateh
            dshare = total * tl.load(
                dgate_ptr + rows_gate[:, None] + offs_e[None, :] * stride_dgatex,
                mask=mask_t[:, None] & mask_e[None, :],
                other=0.0,
            ).to(tl.float32)
            through_sum = tl.sum(dshare * share, axis=1)
            if SOFTMAX:
                dlogits = share * (dshare - through_sum[:, None])
            else:
                through_sum = tl.where(score_sum > MIN_SUM, through_sum, 0.0)  # no gradient where it is clamped
                dlogits = (dshare - through_sum[:, None]) * share * (1.0 - scores)
            # Rounded to the inputs' dtype for the matrix units, like the operator's gradients.
            low = dlogits.to(q.dtype)
            dw = tl.dot(tl.trans(normed), low, dw, input_precision="ieee")
            dx = tl.dot(low, tl.trans(w.to(q.dtype)), dx, input_precision="ieee")
        if HAS_NORM:
            dweight += tl.sum(dx * unit, axis=0)
            dx *= weight[None, :]
            dx = (dx - unit * (tl.sum(dx * unit, axis=1) / D)[:, None]) * inverse_rms[:, None]
        tl.store(dq_ptrs, dx.to(dq_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])

    program = tl.program_id(1).to(tl.int64) * H
    if HAS_GATE:
        tl.store(dgate_weight_ptr + program * D * E + offs_w, dw, mask=mask_w)
    if HAS_NORM:
        tl.store(dnorm_weight_ptr + (program + head) * D + offs_d, dweight, mask=mask_d)


def plan_prologue_forward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    normed: Tensor | None,
    gate: Tensor | None,
) -> Launch:
    """The launch that writes the normed q and the gate, either of which may be None."""
    tokens = Tokens.of(q, normed, gate)
    q_view, normed_view, gate_view = tokens.tensors
    arguments = {
        **token_arguments("q", q_view),
        **token_arguments("normed", normed_view),
        **token_arguments("gate", gate_view),
        **_common_arguments(tokens, q, gate_weight, norm_weight, prologue),
    }
    grid = (triton.cdiv(tokens.T, arguments["BLOCK_T"]) * q.shape[-2],)
    return Launch(prologue_forward_kernel, grid, arguments, NUM_WARPS, NUM_STAGES)


def plan_prologue_backward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    dq: Tensor,
    dgate: Tensor | None,
    dgate_weights: Tensor | None,
    dnorm_weights: Tensor | None,
) -> Launch:
    """The launch that turns dq into the gradient of the projected q; partial weight gradients (programs, H, D[, E])."""
    H = q.shape[-2]
    tokens = Tokens.of(q, dq, dgate)
    q_view, dq_view, dgate_view = tokens.tensors
    arguments = {
        **token_arguments("q", q_view),
        **token_arguments("dq", dq_view),
        **token_arguments("dgate", dgate_view),
        **_common_arguments(tokens, q, gate_weight, norm_weight, prologue),
        "dgate_weight_ptr": dgate_weights, "dnorm_weight_ptr": dnorm_weights, "H": H,
    }  # fmt: skip
    return Launch(
        prologue_backward_kernel, (H, programs_per_head(tokens.T, H, q.shape[-1])), arguments, NUM_WARPS, NUM_STAGES
    )


def programs_per_head(T: int, H: int, D: int) -> int:
    """Programs among which the backward kernel divides one head's tokens."""
    return max(1, min(triton.cdiv(T, block_t(D)), triton.cdiv(BACKWARD_PROGRAMS, H)))


def block_t(D: int) -> int:
    """Tokens per tile: as many as fit the registers."""
    return 32 if D <= 128 else 16


def prologue_forward(
    q: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None, prologue: Prologue
) -> tuple[Tensor, Tensor | None]:
    """See `flashmhf.ops.prologue.forward`."""
    normed = gate = None
    if norm_weight is not None:
        normed = torch.empty_like(q, memory_format=torch.contiguous_format)
    if gate_weight is not None:
        gate = q.new_empty((*q.shape[:-1], gate_weight.shape[-1]), dtype=torch.float32)
    if q.numel() > 0 and (normed is not None or gate is not None):
        plan_prologue_forward(q, gate_weight, norm_weight, prologue, normed, gate).run()
    return q if normed is None else normed, gate


def prologue_backward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    dnormed: Tensor,
    dgate: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `flashmhf.ops.prologue.backward`; dq overwrites `dnormed`."""
    if gate_weight is None and norm_weight is None:
        return dnormed, None, None
    has_tokens = q.numel() > 0
    H, D = q.shape[-2:]
    programs = programs_per_head(q.shape[:-2].numel(), H, D)
    allocate = q.new_empty if has_tokens else q.new_zeros
    dgate_weights, dnorm_weights = (
        None if weight is None else allocate((programs, *weight.shape), dtype=torch.float32)
        for weight in (gate_weight, norm_weight)
    )
    if has_tokens:
        plan_prologue_backward(
            q, gate_weight, norm_weight, prologue, dnormed, dgate, dgate_weights, dnorm_weights
        ).run()
    return (
        dnormed,
        None if dgate_weights is None or gate_weight is None else dgate_weights.sum(0).to(gate_weight.dtype),
        None if dnorm_weights is None or norm_weight is None else dnorm_weights.sum(0).to(norm_weight.dtype),
    )


def _common_arguments(
    tokens: Tokens, q: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None, prologue: Prologue
) -> dict[str, Any]:
    D = q.shape[-1]
    E = 1 if gate_weight is None else gate_weight.shape[-1]
    return {
        "gate_weight_ptr": None if gate_weight is None else gate_weight.contiguous(),
        "norm_weight_ptr": None if norm_weight is None else norm_weight.contiguous(),
        "total": prologue.gate_total, "eps": prologue.norm_eps, "T": tokens.T, "L": tokens.L, "E": E,
        "D": D, "BLOCK_D": block_d(D), "BLOCK_T": block_t(D), "BLOCK_E": max(16, triton.next_power_of_2(E)),
        "FLAT": tokens.flat, "HAS_GATE": gate_weight is not None, "HAS_NORM": norm_weight is not None,
        "SOFTMAX": prologue.gate_type == "softmax", "MIN_SUM": MIN_GATE_SUM,
    }  # fmt: skip

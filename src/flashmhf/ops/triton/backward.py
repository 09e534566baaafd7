"""The backward: one kernel for dQ and dgate, another for dK, dU and dV; both recompute M and N.

With R the gate, A = SiLU(M) * N and dA = dO V^T:

    dR = rowsum(dA * A)     dN = R dA SiLU(M)     dM = R dA N SiLU'(M)
    dQ = dM K + dN U        dK = dM^T Q           dU = dN^T Q           dV = (R A)^T dO

Two kernels compute eleven products without atomics: the same inputs give the same bits. The fused kernel computes
eight and accumulates dQ and dgate atomically in float32, in an order that varies from run to run. `tiles.fused_tile`
decides where it is used; never under `torch.use_deterministic_algorithms(True)`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmhf.ops.tensors import Gradients, Inputs
from flashmhf.ops.triton.backward_dkuv import backward_dkuv_kernel, backward_fused_kernel
from flashmhf.ops.triton.common import DO_NOT_SPECIALIZE, load_tile, load_tokens, silu_and_slope_of, token_offsets
from flashmhf.ops.triton.launch import Launch, Tokens, size_arguments, token_arguments, weight_arguments
from flashmhf.ops.triton.tiles import Tile, fused_tile, tile_for


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_dq_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    dout_ptr, stride_doutb, stride_doutl, stride_douth, stride_doutx,
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    gate_ptr, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
    dq_ptr, stride_dqb, stride_dql, stride_dqh, stride_dqx,
    dgate_ptr, stride_dgateb, stride_dgatel, stride_dgateh, stride_dgatex,
    T, L, E, F, GROUP,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr, EVEN_F: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    FAST_TANH: tl.constexpr, NEEDS_DQ: tl.constexpr, NEEDS_DGATE: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_T tokens of one head and loops over the parameter rows, like the forward."""
    EVEN_D: tl.constexpr = D == BLOCK_D
    tiles_t = tl.cdiv(T, BLOCK_T)
    head = (tl.program_id(0) // tiles_t).to(tl.int64)
    kv_head = head // GROUP
    offs_t = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask_d = offs_d < D

    rows_gate = token_offsets(offs_t, L, stride_gateb, stride_gatel, FLAT) + head * stride_gateh
    rows_dgate = token_offsets(offs_t, L, stride_dgateb, stride_dgatel, FLAT) + head * stride_dgateh
    q = load_tokens(q_ptr, offs_t, offs_d, mask_t, head, L, stride_qb, stride_ql, stride_qh, stride_qx, D, FLAT)
    dout = load_tokens(
        dout_ptr, offs_t, offs_d, mask_t, head, L, stride_doutb, stride_doutl, stride_douth, stride_doutx, D, FLAT
    )
    offs_w = offs_f[:, None] * stride_wf + offs_d[None, :] * stride_wd
    dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dgate = tl.zeros((BLOCK_T,), tl.float32)

    tiles_f = tl.cdiv(F, BLOCK_F)
    for tile in tl.range(0, E * tiles_f):
        e = tile // tiles_f
        f = (tile % tiles_f) * BLOCK_F
        first_row = kv_head * stride_wh + e.to(tl.int64) * stride_we + f.to(tl.int64) * stride_wf
        mask_f = f + offs_f < F
        k = load_tile(k_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        u = load_tile(u_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        v = load_tile(v_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        m = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        n = tl.dot(q, tl.trans(u), input_precision=PRECISION)
        da = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        silu, slope = silu_and_slope_of(m, FAST_TANH)
        if NEEDS_DGATE:
            dgate += tl.sum(da * silu * n, axis=1)
            last = f + BLOCK_F >= F  # of sub-network e
            dgate_ptrs = dgate_ptr + rows_dgate + e * stride_dgatex
            tl.store(dgate_ptrs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_t & last)
            dgate = tl.where(last, 0.0, dgate)
        if NEEDS_DQ:
            if HAS_GATE:
                gate = tl.load(gate_ptr + rows_gate + e * stride_gatex, mask=mask_t, other=0.0).to(tl.float32)
                da *= gate[:, None]
            dm = da * n * slope
            dn = da * silu
            dq = tl.dot(dm.to(k.dtype), k, dq, input_precision=PRECISION)
            dq = tl.dot(dn.to(u.dtype), u, dq, input_precision=PRECISION)

    if NEEDS_DQ:
        rows_dq = token_offsets(offs_t, L, stride_dqb, stride_dql, FLAT) + head * stride_dqh
        tl.store(
            dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dqx,
            dq.to(dq_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_d[None, :],
        )


def plan_backward_dq(dout: Tensor, inputs: Inputs, grads: Gradients, tile: Tile | None = None) -> Launch:
    """The launch that writes dq and dgate, either of which may be None."""
    q, k, u, v, gate = inputs
    H, D = q.shape[-2:]
    tokens = Tokens.of(q, dout, gate, grads.dq, grads.dgate)
    q_view, dout_view, gate_view, dq_view, dgate_view = tokens.tensors
    if tile is None:
        tile = tile_for("backward_dq", q.device, q.dtype, D, tokens.T)
    arguments = {
        **token_arguments("q", q_view),
        **token_arguments("dout", dout_view),
        **weight_arguments(k, u, v),
        **token_arguments("gate", gate_view),
        **token_arguments("dq", dq_view),
        **token_arguments("dgate", dgate_view),
        **size_arguments(tokens, q, k, gate, tile),
        "NEEDS_DQ": grads.dq is not None, "NEEDS_DGATE": grads.dgate is not None,
    }  # fmt: skip
    grid = (triton.cdiv(tokens.T, tile.block_t) * H,)
    return Launch(backward_dq_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def plan_backward_dkuv(dout: Tensor, inputs: Inputs, grads: Gradients, tile: Tile | None = None) -> Launch:
    """The launch that writes dk, du and dv, each contiguous or None."""
    tokens = Tokens.of(inputs.q, dout, inputs.gate)
    if tile is None:
        tile = tile_for("backward_dkuv", inputs.q.device, inputs.q.dtype, inputs.q.shape[-1], tokens.T)
    arguments = _dkuv_arguments(tokens, inputs, grads, tile)
    arguments |= {f"NEEDS_D{name}": grad is not None for name, grad in zip("KUV", grads.of_weights, strict=True)}
    return Launch(backward_dkuv_kernel, _dkuv_grid(inputs.k, tile), arguments, tile.num_warps, tile.num_stages)


def plan_backward_fused(dout: Tensor, inputs: Inputs, grads: Gradients, tile: Tile) -> Launch:
    """The launch that writes dk, du and dv and accumulates into float32 dq and, unless that is None, dgate."""
    assert grads.dq is not None
    assert all(x is not None for x in grads.of_weights)
    tokens = Tokens.of(inputs.q, dout, inputs.gate, grads.dq, grads.dgate)
    *_, dq_view, dgate_view = tokens.tensors
    arguments = _dkuv_arguments(tokens, inputs, grads, tile)
    arguments |= token_arguments("dq", dq_view) | token_arguments("dgate", dgate_view)
    arguments["ACCUM_DGATE"] = dgate_view is not None
    return Launch(backward_fused_kernel, _dkuv_grid(inputs.k, tile), arguments, tile.num_warps, tile.num_stages)


def _dkuv_arguments(tokens: Tokens, inputs: Inputs, grads: Gradients, tile: Tile) -> dict[str, Any]:
    """What both kernels of backward_dkuv.py take; `tokens` begins with q, dout and the gate."""
    q, k, u, v, gate = inputs
    q_view, dout_view, gate_view, *_ = tokens.tensors
    return {
        **token_arguments("q", q_view),
        **token_arguments("dout", dout_view),
        **weight_arguments(k, u, v),
        **token_arguments("gate", gate_view),
        "dk_ptr": grads.dk, "du_ptr": grads.du, "dv_ptr": grads.dv,
        **size_arguments(tokens, q, k, gate, tile), "TOKENS_FIRST": tile.tokens_first,
    }  # fmt: skip


def _dkuv_grid(k: Tensor, tile: Tile) -> tuple[int]:
    H_kv, E, F, _ = k.shape
    return (H_kv * E * triton.cdiv(F, tile.block_f),)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    inputs = Inputs(q, k, u, v, gate)
    grads = Gradients.empty(inputs, needs)
    dq, dk, du, dv, dgate = grads
    if q.numel() == 0:
        return dq, *(None if x is None else x.zero_() for x in grads.of_weights), dgate
    all_but_gate = all(x is not None for x in grads[:4])
    if all_but_gate and (tile := fused_tile(q.device, q.dtype, q.shape[-1])):
        dq_accum, dgate_accum = (
            None if x is None else torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (dq, dgate)
        )
        plan_backward_fused(dout, inputs, Gradients(dq_accum, dk, du, dv, dgate_accum), tile).run()
        return _convert(dq_accum, dq), dk, du, dv, _convert(dgate_accum, dgate)
    if dq is not None or dgate is not None:
        plan_backward_dq(dout, inputs, grads).run()
    if any(x is not None for x in grads.of_weights):
        plan_backward_dkuv(dout, inputs, grads).run()
    return grads


def _convert(accum: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if accum is None or grad is None else grad.copy_(accum)

"""The backward: a kernel for dQ and the gate's gradient, another for dK, dU and dV; both recompute M and N.

With A = SiLU(M) * N and dA = dO V^T:  dR_e = rowsum(dA * A), dN = R dA SiLU(M), dM = R dA N SiLU'(M),
dQ = dM K + dN U, dK = dM^T Q, dU = dN^T Q, dV = (R A)^T dO. No atomics: the same inputs give the same bits.

That is eleven products. One pass does all of it in eight: it adds to dQ and to the gate's gradient in float32 buffers,
atomically, so that sums are rounded in another order each time. `tiles.fused_tile` says where that is worth it;
`torch.use_deterministic_algorithms(True)` rules it out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    FAST_TANH: tl.constexpr, NEEDS_Q: tl.constexpr, NEEDS_GATE: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_T tokens of one head and walks over the parameter rows, as the forward does."""
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
    dr = tl.zeros((BLOCK_T,), tl.float32)

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
        if NEEDS_GATE:
            dr += tl.sum(da * silu * n, axis=1)
            last = f + BLOCK_F >= F
            tl.store(dgate_ptr + rows_dgate + e * stride_dgatex, dr.to(dgate_ptr.dtype.element_ty), mask=mask_t & last)
            dr = tl.where(last, 0.0, dr)
        if NEEDS_Q:
            if HAS_GATE:
                r = tl.load(gate_ptr + rows_gate + e * stride_gatex, mask=mask_t, other=0.0).to(tl.float32)
                da *= r[:, None]
            dm = da * n * slope
            dn = da * silu
            dq = tl.dot(dm.to(k.dtype), k, dq, input_precision=PRECISION)
            dq = tl.dot(dn.to(u.dtype), u, dq, input_precision=PRECISION)

    if NEEDS_Q:
        rows_dq = token_offsets(offs_t, L, stride_dqb, stride_dql, FLAT) + head * stride_dqh
        tl.store(
            dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dqx,
            dq.to(dq_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_d[None, :],
        )


def plan_backward_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    dq: Tensor | None,
    dgate: Tensor | None,
    tile: Tile | None = None,
) -> Launch:
    """The launch that writes dq and dgate, of which one may be None."""
    H, D = q.shape[-2:]
    tokens = Tokens.of(q, dout, gate, dq, dgate)
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
        "NEEDS_Q": dq is not None, "NEEDS_GATE": dgate is not None,
    }  # fmt: skip
    grid = (triton.cdiv(tokens.T, tile.block_t) * H,)
    return Launch(backward_dq_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def plan_backward_dkuv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    dk: Tensor | None,
    du: Tensor | None,
    dv: Tensor | None,
    tile: Tile | None = None,
    dq_accum: Tensor | None = None,
    added_dgate: Tensor | None = None,
) -> Launch:
    """The launch that writes dk, du and dv, each contiguous or None.

    With dq_accum it is the fused kernel's, which wants all three and adds to float32 dq_accum and, unless that is
    None, added_dgate.
    """
    H_kv, E, F, D = k.shape
    tokens = Tokens.of(q, dout, gate, dq_accum, added_dgate)
    q_view, dout_view, gate_view, dq_view, dgate_view = tokens.tensors
    if tile is None:
        tile = tile_for("backward_dkuv", q.device, q.dtype, D, tokens.T)
    arguments = {
        **token_arguments("q", q_view),
        **token_arguments("dout", dout_view),
        **weight_arguments(k, u, v),
        **token_arguments("gate", gate_view),
        "dk_ptr": dk, "du_ptr": du, "dv_ptr": dv,
        **size_arguments(tokens, q, k, gate, tile), "TOKENS_FIRST": tile.tokens_first,
    }  # fmt: skip
    grid = (H_kv * E * triton.cdiv(F, tile.block_f),)
    if dq_accum is None:
        arguments |= {"NEEDS_K": dk is not None, "NEEDS_U": du is not None, "NEEDS_V": dv is not None}
        return Launch(backward_dkuv_kernel, grid, arguments, tile.num_warps, tile.num_stages)
    assert all(x is not None for x in (dk, du, dv))
    arguments |= token_arguments("dq", dq_view) | token_arguments("dgate", dgate_view)
    arguments["ADDS_GATE"] = dgate_view is not None
    return Launch(backward_fused_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    dq, dk, du, dv, dgate = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if x is not None and need else None
        for x, need in zip((q, k, u, v, gate), needs, strict=True)
    )
    if q.numel() == 0:
        return dq, *(None if x is None else x.zero_() for x in (dk, du, dv)), dgate
    of_tokens = dq is not None or dgate is not None
    of_weights = dk is not None or du is not None or dv is not None
    all_but_gate = all(x is not None for x in (dq, dk, du, dv))
    if all_but_gate and (tile := fused_tile(q.device, q.dtype, q.shape[-1])):
        dq_accum, added_dgate = (
            None if x is None else torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (dq, dgate)
        )
        plan_backward_dkuv(dout, q, k, u, v, gate, dk, du, dv, tile, dq_accum, added_dgate).run()
        return _rounded(dq_accum, dq), dk, du, dv, _rounded(added_dgate, dgate)
    if of_tokens:
        plan_backward_dq(dout, q, k, u, v, gate, dq, dgate).run()
    if of_weights:
        plan_backward_dkuv(dout, q, k, u, v, gate, dk, du, dv).run()
    return dq, dk, du, dv, dgate


def _rounded(total: Tensor | None, result: Tensor | None) -> Tensor | None:
    return None if total is None or result is None else result.copy_(total)

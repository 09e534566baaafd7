"""The forward kernel: one program owns BLOCK_T tokens of one head and loops over the E x F parameter rows.

O is accumulated in registers; M = Q K^T and N = Q U^T exist for one tile of BLOCK_F rows at a time. Programs are
ordered head by head, so that one head's K, U and V stay in the L2 cache while its token tiles are processed.

With few tokens there are few programs, and the time goes into reading the weights. The heads that share parameters are
then packed into the token dimension (like FlashAttention's PackGQA) and the rows are split over programs (like its
split-KV); a second kernel adds their float32 partial sums in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmhf.ops.triton.common import DO_NOT_SPECIALIZE, load_tile, packed_rows, silu_of, token_offsets
from flashmhf.ops.triton.launch import Launch, Tokens, size_arguments, token_arguments, weight_arguments
from flashmhf.ops.triton.tiles import DECODE_MAX_TOKENS, Tile, target_programs, tile_for


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def forward_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    gate_ptr, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
    out_ptr, stride_outs, stride_outb, stride_outl, stride_outh, stride_outx,
    T, L, E, F, GROUP, tiles_per_split,
    PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr, EVEN_F: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    FAST_TANH: tl.constexpr,
):  # fmt: skip
    EVEN_D: tl.constexpr = D == BLOCK_D
    tiles_t = tl.cdiv(T * PACK, BLOCK_T)
    first_head = (tl.program_id(0) // tiles_t).to(tl.int64) * PACK
    kv_head = first_head // GROUP
    rows = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_t, offs_h = packed_rows(rows, T, PACK)
    head = first_head + offs_h
    offs_f = tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = rows < T * PACK
    mask_d = offs_d < D

    rows_q = token_offsets(offs_t, L, stride_qb, stride_ql, FLAT) + head * stride_qh
    q = load_tile(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_qx, mask_t, mask_d, False, EVEN_D)
    rows_gate = token_offsets(offs_t, L, stride_gateb, stride_gatel, FLAT) + head * stride_gateh
    offs_w = offs_f[:, None] * stride_wf + offs_d[None, :] * stride_wd
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)

    tiles_f = tl.cdiv(F, BLOCK_F)
    first_tile = tl.program_id(1) * tiles_per_split
    for tile in tl.range(first_tile, min(first_tile + tiles_per_split, E * tiles_f)):
        e = tile // tiles_f
        f = (tile % tiles_f) * BLOCK_F
        first_row = kv_head * stride_wh + e.to(tl.int64) * stride_we + f.to(tl.int64) * stride_wf
        mask_f = f + offs_f < F
        k = load_tile(k_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        u = load_tile(u_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        m = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        n = tl.dot(q, tl.trans(u), input_precision=PRECISION)
        p = silu_of(m, FAST_TANH) * n
        if HAS_GATE:
            gate = tl.load(gate_ptr + rows_gate + e * stride_gatex, mask=mask_t, other=0.0).to(tl.float32)
            p *= gate[:, None]
        v = load_tile(v_ptr + first_row + offs_w, mask_f, mask_d, EVEN_F, EVEN_D)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)

    rows_out = token_offsets(offs_t, L, stride_outb, stride_outl, FLAT) + head * stride_outh
    out_ptr += tl.program_id(1).to(tl.int64) * stride_outs
    tl.store(
        out_ptr + rows_out[:, None] + offs_d[None, :] * stride_outx,
        out.to(out_ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_d[None, :],
    )


@triton.jit(do_not_specialize=["size", "splits"])
def combine_kernel(partial_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """Adds the (splits, size) partial sums in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in tl.range(0, splits):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += size
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def plan_forward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
    splits: int = 1,
) -> Launch:
    """The launch that writes `flash_mhf(q, k, u, v, gate)` to out.

    out has q's shape; with more than one split it holds float32 partial sums, (splits, *q.shape), contiguous.
    """
    (H_kv, E, F, D), H = k.shape, q.shape[-2]
    stride_split = 0
    if splits > 1:
        stride_split = out.stride(0)
        out = out[0]
    tokens = Tokens.of(q, gate, out)
    q_view, gate_view, out_view = tokens.tensors
    if tile is None:
        tile = tile_for("forward", q.device, q.dtype, D, tokens.T)
    arguments = {
        **token_arguments("q", q_view),
        **weight_arguments(k, u, v),
        **token_arguments("gate", gate_view),
        **token_arguments("out", out_view), "stride_outs": stride_split,
        **size_arguments(tokens, q, k, gate, tile),
        "PACK": packed_heads(tokens.T, H, H_kv),
        "tiles_per_split": triton.cdiv(E * triton.cdiv(F, tile.block_f), splits),
    }  # fmt: skip
    grid = (num_token_tiles(tokens.T, H, H_kv, tile), splits)
    return Launch(forward_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def plan_combine(partial: Tensor, out: Tensor) -> Launch:
    """The launch that sums partial (splits, *out.shape) into out, both contiguous."""
    arguments = {"partial_ptr": partial, "out_ptr": out, "size": out.numel(), "splits": len(partial), "BLOCK": 512}
    return Launch(combine_kernel, (triton.cdiv(out.numel(), 512),), arguments, 4, 1)


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tile = tile_for("forward", q.device, q.dtype, q.shape[-1], q.shape[:-2].numel())
    splits = num_splits(q, k, tile)
    if splits == 1:
        plan_forward(q, k, u, v, gate, out, tile).run()
        return out
    partial = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
    plan_forward(q, k, u, v, gate, partial, tile, splits).run()
    plan_combine(partial, out).run()
    return out


def packed_heads(T: int, H: int, H_kv: int) -> int:
    """How many heads are packed into one program's token dimension: with few tokens all that share parameters."""
    return H // H_kv if T <= DECODE_MAX_TOKENS else 1


def num_token_tiles(T: int, H: int, H_kv: int, tile: Tile) -> int:
    """Token tiles of all heads."""
    pack = packed_heads(T, H, H_kv)
    return H // pack * triton.cdiv(T * pack, tile.block_t)


def num_splits(q: Tensor, k: Tensor, tile: Tile) -> int:
    """Over how many programs the rows of one head and token tile are split; every split has rows."""
    (H_kv, E, F, D), H = k.shape, q.shape[-2]
    T = q.shape[:-2].numel()
    row_tiles = E * triton.cdiv(F, tile.block_f)
    splits = min(row_tiles, target_programs(q.device, q.dtype, D, T) // num_token_tiles(T, H, H_kv, tile))
    return triton.cdiv(row_tiles, triton.cdiv(row_tiles, max(splits, 1)))

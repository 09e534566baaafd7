"""The Hopper forward. A work tile is 2 x BLOCK_T tokens of one head, one warpgroup each, and all its E x F rows.

A producer warp loads Q and the tiles of K, U and V by TMA. Each of two consumer warpgroups computes, for every row
tile i,

    S = Q [K U]^T              one wgmma for both: M and N end up in the same thread
    P = SiLU(M) * N * gate     in registers, in the layout of the next product's operand
    O += P V                   accumulated in registers

and issues S of tile i + 1 before O += P V of tile i, so that the tensor cores are busy during the activation of tile
i + 1. With PINGPONG the warpgroups alternate in issuing products, as in FlashAttention-3: the products of one overlap
the activation of the other. Otherwise they are synchronised only through the pipelines. docs/kernels.md shows the
schedule.

A program processes one work tile, or, if PERSISTENT, every n-th with n programs. The pipelines then continue across
work tiles, Q's buffer is reused as soon as Q has been read, and the output is stored from a buffer of its own while the
next work tile is being processed.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from flashmhf.ops.hopper.launch import flat, gate_arguments, num_sms, token_descriptor, weight_descriptor
from flashmhf.ops.hopper.primitives import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    allocate_barriers,
    as_matrix,
    mma_add,
    mma_nt,
    release,
    slice_columns,
    split_columns,
    tanh,
    tma_load,
    tma_load_pair,
    wait_empty,
    wait_full,
)
from flashmhf.ops.hopper.tiles import ForwardTile, forward_tile, head_dim_parts
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def work_tile(n, T, BLOCK_T: gl.constexpr):
    """Head and first token of the program's n-th work tile; head by head, so that K, U and V stay in the L2 cache."""
    tile = gl.program_id(0) + n * gl.num_programs(0)
    tiles_t = gl.cdiv(T, 2 * BLOCK_T)
    return tile // tiles_t, (tile % tiles_t) * (2 * BLOCK_T)


@gluon.jit
def next_tile(e, f, tiles_f):
    """The row tile after tile f of sub-network e. Counted: a division would delay every product."""
    f += 1
    return gl.where(f < tiles_f, e, e + 1), gl.where(f < tiles_f, f, 0)


@gluon.jit
def produce(
    q_desc, k_desc, u_desc, v_desc, s_qs, s_ku, s_v, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
    work_tiles, T, E, GROUP, tiles_f, tiles,
):  # fmt: skip
    """The producer warp: fills the pipelines of [K U] and of V across work tiles, and loads each work tile's Q."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    for n in range(work_tiles):
        head, first_t = work_tile(n, T, BLOCK_T)
        e = (head // GROUP) * E
        f = 0
        for i in range(n * tiles, (n + 1) * tiles):
            rows = [e, f * BLOCK_F, 0]
            wait_empty(ku_empty, i, STAGES)
            tma_load_pair(k_desc, u_desc, rows, ku_full.index(i % STAGES), s_ku.index(i % STAGES))
            if i == n * tiles:  # after K and U, which do not have to wait until the previous Q has been read
                for warpgroup in gl.static_range(2):
                    first = [first_t + warpgroup * BLOCK_T, head, 0]
                    mbarrier.wait(q_empty.index(warpgroup), (n & 1) ^ 1)
                    tma_load(q_desc, first, q_full.index(warpgroup), s_qs.index(warpgroup))
            wait_empty(v_empty, i, STAGES)
            tma_load(v_desc, rows, v_full.index(i % STAGES), s_v.index(i % STAGES))
            e, f = next_tile(e, f, tiles_f)


@gluon.jit
def activate(scores, gate, m_layout: gl.constexpr, lhs_layout: gl.constexpr, dtype: gl.constexpr):
    """P = SiLU(M) * N * gate from S = [M N], as the left operand of P V; SiLU(2h) = h + h tanh(h)."""
    m, n = split_columns(scores, m_layout)
    h = 0.5 * m
    p = (h + h * tanh(h)) * n * gate[:, None]
    return gl.convert_layout(p.to(dtype), lhs_layout)


@gluon.jit
def load_gate(gate_ptr, rows, e, stride_gatel, stride_gatee, T, HAS_GATE: gl.constexpr):
    """Sub-network e's gate per token, in float32."""
    if HAS_GATE:
        ptrs = gate_ptr + rows.to(gl.int64) * stride_gatel + e * stride_gatee
        gate = gl.load(ptrs, mask=rows < T, other=0.0).to(gl.float32)
    else:
        gate = gl.full_like(rows, 1.0, dtype=gl.float32)
    return gate


@gluon.jit
def pingpong_wait(pingpong, i, WARPGROUP: gl.constexpr):
    """Waits until the other warpgroup has issued its products; warpgroup 0 goes first in every tile i."""
    mbarrier.wait(pingpong.index(WARPGROUP), (i & 1) ^ 1 ^ WARPGROUP)


@gluon.jit
def pingpong_arrive(pingpong, WARPGROUP: gl.constexpr):
    """Lets the other warpgroup issue its products, which queue behind this one's."""
    mbarrier.arrive(pingpong.index(1 - WARPGROUP), count=1)


@gluon.jit
def mainloop(
    WARPGROUP: gl.constexpr, D_LOW: gl.constexpr, D_HIGH: gl.constexpr, HAS_GATE: gl.constexpr, PINGPONG: gl.constexpr,
    q, q_high, s_ku, s_v, pingpong, ku_full, ku_empty, v_full, v_empty,
    gate_ptr, stride_gatel, stride_gatee, rows, T, first, tiles_f, tiles,
):  # fmt: skip
    """O of one work tile, its last product still in flight; `first` is the pipelines' item of its first row tile."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = rows.shape[0]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    dtype: gl.constexpr = s_ku.dtype
    mn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    m_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    lhs_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)

    scores_like = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, mn_layout)
    out = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, out_layout))
    wait_full(ku_full, first, STAGES)
    if PINGPONG:
        pingpong_wait(pingpong, first, WARPGROUP)
    scores = mma_nt(q, q_high, as_matrix(s_ku.index(first % STAGES)), scores_like, D_LOW, D_HIGH)
    if PINGPONG:
        pingpong_arrive(pingpong, WARPGROUP)
    gate = load_gate(gate_ptr, rows, 0, stride_gatel, stride_gatee, T, HAS_GATE)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
    release(ku_empty, first, STAGES)
    p = activate(scores, gate, m_layout, lhs_layout, dtype)
    wait_full(v_full, first, STAGES)
    e = 0
    f = 0
    for i in range(first + 1, first + tiles):
        e, f = next_tile(e, f, tiles_f)
        gate = load_gate(gate_ptr, rows, e, stride_gatel, stride_gatee, T, HAS_GATE)
        wait_full(ku_full, i, STAGES)
        if PINGPONG:
            pingpong_wait(pingpong, i, WARPGROUP)
        scores = mma_nt(q, q_high, as_matrix(s_ku.index(i % STAGES)), scores_like, D_LOW, D_HIGH)
        out = mma_add(p, as_matrix(s_v.index((i - 1) % STAGES)), out)
        if PINGPONG:
            pingpong_arrive(pingpong, WARPGROUP)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        release(ku_empty, i, STAGES)
        p = activate(scores, gate, m_layout, lhs_layout, dtype)
        wait_full(v_full, i, STAGES)  # a loop, past which ptxas does not move the activation: all of it overlaps P V
        out = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[out]))
        release(v_empty, i - 1, STAGES)
    return mma_add(p, as_matrix(s_v.index((first + tiles - 1) % STAGES)), out)


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr, out_desc,
    s_qs, s_outs, s_ku, s_v, pingpong, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
    gate_ptr, stride_gatel, stride_gateh, stride_gatee, work_tiles, T, tiles_f, tiles,
):  # fmt: skip
    """A consumer warpgroup: O of its BLOCK_T tokens of every work tile."""
    BLOCK_T: gl.constexpr = s_qs.shape[1]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    STAGES: gl.constexpr = s_ku.shape[0]
    mn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    m_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    lhs_layout: gl.constexpr = gl.DotOperandLayout(0, mn_layout, 2) if Q_IN_REGISTERS else None
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, m_layout))
    s_q = as_matrix(s_qs.index(WARPGROUP))
    for n in range(work_tiles):
        head, first_t = work_tile(n, T, BLOCK_T)
        first_t += WARPGROUP * BLOCK_T
        mbarrier.wait(q_full.index(WARPGROUP), n & 1)
        q = slice_columns(s_q, 0, D_LOW, lhs_layout)
        q_high = slice_columns(s_q, D_LOW, D_HIGH, lhs_layout) if D_HIGH > 0 else q
        if PERSISTENT and Q_IN_REGISTERS:
            fence_async_shared()  # orders these reads before the TMA load of the next Q
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        out = mainloop(
            WARPGROUP, D_LOW, D_HIGH, HAS_GATE, PINGPONG,
            q, q_high, s_ku, s_v, pingpong, ku_full, ku_empty, v_full, v_empty,
            gate_ptr + head.to(gl.int64) * stride_gateh, stride_gatel, stride_gatee, first_t + offs_t, T,
            n * tiles, tiles_f, tiles,
        )  # fmt: skip
        if PERSISTENT and not Q_IN_REGISTERS:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
        if PERSISTENT:
            release(v_empty, (n + 1) * tiles - 1, STAGES)
            tma.store_wait(pendings=0)  # of the previous work tile
        as_matrix(s_outs.index(WARPGROUP)).store(out.to(s_qs.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_t, head, 0], s_outs.index(WARPGROUP))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "stride_gatel"])
def forward_kernel(
    q_desc, k_desc, u_desc, v_desc, out_desc, gate_ptr, stride_gatel, stride_gateh, stride_gatee,
    T, H, E, F, GROUP, D_LOW: gl.constexpr, D_HIGH: gl.constexpr, STAGES: gl.constexpr, HAS_GATE: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """q (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> out (T, H, D)."""
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    BLOCK_D: gl.constexpr = k_desc.block_shape[2]
    s_qs = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_T, 1, BLOCK_D], q_desc.layout)
    s_ku = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 2, BLOCK_F, BLOCK_D], k_desc.layout)
    s_v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_F, BLOCK_D], v_desc.layout)
    # Without PERSISTENT the output reuses Q's buffer: Q has been read by then, and no other Q follows.
    s_outs = gl.allocate_shared_memory(q_desc.dtype, s_qs.shape, out_desc.layout) if PERSISTENT else s_qs
    q_full = allocate_barriers(2, 1)
    q_empty = allocate_barriers(2, 1)
    ku_full = allocate_barriers(STAGES, 1)
    ku_empty = allocate_barriers(STAGES, 2)
    v_full = allocate_barriers(STAGES, 1)
    v_empty = allocate_barriers(STAGES, 2)
    pingpong = allocate_barriers(2, 1)
    fence_async_shared()

    # Without PERSISTENT the grid has one program per work tile.
    work_tiles = gl.cdiv(gl.cdiv(T, 2 * BLOCK_T) * H - gl.program_id(0), gl.num_programs(0)) if PERSISTENT else 1
    tiles_f = gl.cdiv(F, BLOCK_F)
    consumer_arguments = (  # without constexprs, which an assignment would turn into run-time values
        out_desc, s_qs, s_outs, s_ku, s_v, pingpong, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
        gate_ptr, stride_gatel, stride_gateh, stride_gatee, work_tiles, T, tiles_f, E * tiles_f,
    )  # fmt: skip
    producer_arguments = (
        q_desc, k_desc, u_desc, v_desc, s_qs, s_ku, s_v, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
        work_tiles, T, E, GROUP, tiles_f, E * tiles_f,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, D_LOW, D_HIGH, HAS_GATE, Q_IN_REGISTERS, PINGPONG, PERSISTENT) + consumer_arguments),  # noqa: RUF005 - Gluon does not support *
            (consume, (1, D_LOW, D_HIGH, HAS_GATE, Q_IN_REGISTERS, PINGPONG, PERSISTENT) + consumer_arguments),  # noqa: RUF005
            (produce, producer_arguments),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def plan_forward(
    q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, out: Tensor, tile: ForwardTile | None = None
) -> Launch:
    """The launch that writes `flash_mhf(q, k, u, v, gate)` to out; q and out are (T, H, D), gate (T, H, E)."""
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or forward_tile(D)
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "out_desc": token_descriptor(out, tile.block_t),
        **gate_arguments(gate, q),
        **dict(zip(("D_LOW", "D_HIGH"), head_dim_parts(D), strict=True)),
        "T": T, "H": H, "E": E, "F": F, "GROUP": H // H_kv, "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "Q_IN_REGISTERS": tile.q_in_registers, "PINGPONG": tile.pingpong, "PERSISTENT": tile.persistent,
    }  # fmt: skip
    work_tiles = H * -(-T // (2 * tile.block_t))
    programs = min(work_tiles, num_sms(q.device)) if tile.persistent else work_tiles
    return Launch(forward_kernel, (programs,), arguments, num_warps=4, num_stages=1)


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() > 0:
        plan_forward(flat(q), k, u, v, None if gate is None else flat(gate), flat(out)).run()
    return out

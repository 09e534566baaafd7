"""The fused Hopper backward: one program owns BLOCK_F rows of one sub-network and loops over the tokens.

K, U and V stay in shared memory, dK, dU and dV are accumulated in registers, and a producer warp loads the tiles of Q
and dO. With R the gate, A = SiLU(M) * N and dA = dO V^T, two warpgroups, each with half of a tile's tokens, compute for
every token tile i

    S = Q [K U]^T,  dA = dO V^T
    P = R A,  dN = R dA SiLU(M),  dM = R dA N SiLU'(M),  and dR = rowsum(dA * A), atomically added to memory
    dQ = dM K + dN U                         dM and dN from registers; dQ is added to float32 memory (dq_accum.py)
    dV += P^T dO,  [dK; dU] += [dM dN]^T Q   P, dM and dN from shared memory: both products read the whole tile

Eight products. dV and [dK; dU] of tile i are issued after S and dA of tile i + 1 and overlap its activation. The tokens
may be split over several programs, whose float32 partial sums are added in fixed order (splits.py). The order of the
additions to dQ and dgate varies, so only dK, dU and dV are the same bits for the same inputs.
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

from flashmhf.ops.hopper.dq_accum import accumulate_dq, allocate_dq_accum, convert_dq, dq_accum_argument
from flashmhf.ops.hopper.launch import flat, flat_inputs, token_descriptor, weight_descriptor
from flashmhf.ops.hopper.primitives import (
    PRODUCER_REGISTERS,
    activation_backward,
    allocate_barriers,
    as_matrix,
    join_columns,
    mma_add,
    mma_nt,
    opaque_zero,
    release,
    slice_columns,
    tma_load,
    tma_load_pair,
    wait_empty,
    wait_full,
)
from flashmhf.ops.hopper.splits import num_row_tiles, num_splits, num_token_tiles
from flashmhf.ops.hopper.tiles import BackwardTile, backward_tile, head_dim_parts
from flashmhf.ops.tensors import Gradients, Inputs
from flashmhf.ops.triton.forward import plan_combine
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def next_tile(t, head, T, first_head, end_head, BLOCK_T: gl.constexpr):
    """The tile after (first token t, head), cycling through the tokens of all heads."""
    t += BLOCK_T
    head = gl.where(t < T, head, head + 1)
    return gl.where(t < T, t, 0), gl.where(head < end_head, head, first_head)


@gluon.jit
def produce(
    q_desc, dout_desc, s_q, s_dout, q_full, dout_full, empty, t, head, T, first_head, end_head, tiles
):  # fmt: skip
    """The producer warp: fills the pipelines of Q and dO, whose stages are released together."""
    STAGES: gl.constexpr = s_q.shape[0]
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    for i in range(tiles):
        stage = i % STAGES
        wait_empty(empty, i, STAGES)
        tma_load(q_desc, [t, head, 0], q_full.index(stage), s_q.index(stage))
        tma_load(dout_desc, [t, head, 0], dout_full.index(stage), s_dout.index(stage))
        t, head = next_tile(t, head, T, first_head, end_head, BLOCK_T)


@gluon.jit
def issue_scores(
    s_ku, s_v, s_q, s_dout, q_full, dout_full, i, mn_layout: gl.constexpr, m_layout: gl.constexpr,
    D_LOW: gl.constexpr, D_HIGH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Issues S = Q [K U]^T and dA = dO V^T of tile i."""
    BLOCK_T: gl.constexpr = s_q.shape[1]
    BLOCK_F: gl.constexpr = s_v.shape[2]
    wait_full(q_full, i, STAGES)
    scores_like = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, mn_layout)
    q = as_matrix(s_q.index(i % STAGES))
    q_low = slice_columns(q, 0, D_LOW, None)
    q_high = slice_columns(q, D_LOW, D_HIGH, None) if D_HIGH > 0 else q
    scores = mma_nt(q_low, q_high, as_matrix(s_ku.index(opaque_zero(i))), scores_like, D_LOW, D_HIGH)
    wait_full(dout_full, i, STAGES)
    da_like = gl.zeros([BLOCK_T, BLOCK_F], gl.float32, m_layout)
    dout = as_matrix(s_dout.index(i % STAGES))
    dout_low = slice_columns(dout, 0, D_LOW, None)
    dout_high = slice_columns(dout, D_LOW, D_HIGH, None) if D_HIGH > 0 else dout
    da = mma_nt(dout_low, dout_high, as_matrix(s_v.index(opaque_zero(i))), da_like, D_LOW, D_HIGH)
    return scores, da


@gluon.jit
def issue_dkuv(s_p, s_dmn, s_q, s_dout, dv, dku, i, STAGES: gl.constexpr):
    """Issues dV += P^T dO and [dK; dU] += [dM dN]^T Q of tile i."""
    dv = mma_add(s_p.index(opaque_zero(i)).permute((1, 0)), as_matrix(s_dout.index(i % STAGES)), dv)
    dku = mma_add(s_dmn.index(opaque_zero(i)).permute((1, 0)), as_matrix(s_q.index(i % STAGES)), dku)
    return dv, dku


@gluon.jit
def store_p_dmn(p, dm, dn, s_p, s_dmn, i, mn_layout: gl.constexpr):
    """Stores P and [dM dN] to shared memory, for the products of both warpgroups."""
    s_p.index(opaque_zero(i)).store(p)
    s_dmn.index(opaque_zero(i)).store(join_columns(dm, dn, mn_layout))
    fence_async_shared()


@gluon.jit
def row_tile(F, BLOCK_F: gl.constexpr):
    """The program's sub-network, numbered over all parameter heads, and its first row."""
    tiles_f = gl.cdiv(F, BLOCK_F)
    return gl.program_id(0) // tiles_f, (gl.program_id(0) % tiles_f) * BLOCK_F


@gluon.jit
def store_dkuv(dk_ptr, du_ptr, dv_ptr, dku, dv, F, D, stride_split, dku_layout: gl.constexpr, dv_layout: gl.constexpr):
    """Epilogue: stores the program's rows of dK, dU and dV, all (splits, H_kv, E, F, D) and contiguous."""
    BLOCK_F: gl.constexpr = dv.shape[0]
    BLOCK_D: gl.constexpr = dv.shape[1]
    sub_network, first_f = row_tile(F, BLOCK_F)
    first = gl.program_id(1).to(gl.int64) * stride_split + (sub_network.to(gl.int64) * F + first_f) * D
    rows = gl.arange(0, BLOCK_F, layout=gl.SliceLayout(1, dv_layout))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, dv_layout))
    mask = (rows < F - first_f)[:, None] & (columns < D)[None, :]
    gl.store(dv_ptr + first + (rows[:, None] * D + columns[None, :]), dv, mask=mask)
    rows = gl.arange(0, 2 * BLOCK_F, layout=gl.SliceLayout(1, dku_layout))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, dku_layout))
    mask_d = (columns < D)[None, :]
    mask = (rows < min(F - first_f, BLOCK_F))[:, None] & mask_d
    gl.store(dk_ptr + first + (rows[:, None] * D + columns[None, :]), dku, mask=mask)
    rows -= BLOCK_F
    mask = ((rows >= 0) & (rows < F - first_f))[:, None] & mask_d
    gl.store(du_ptr + first + (rows[:, None] * D + columns[None, :]), dku, mask=mask)


@gluon.jit
def consume(
    D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, ACCUM_DQ: gl.constexpr, ACCUM_DGATE: gl.constexpr,
    FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr,
    s_ku, s_v, s_q, s_dout, q_full, dout_full, empty, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
    t, head, first_head, end_head, tiles, e, T, H, E, F, D, stride_split,
):  # fmt: skip
    """The two consumer warpgroups: dK, dU and dV of the program's rows, and its contributions to dQ and dgate."""
    STAGES: gl.constexpr = s_q.shape[0]
    BLOCK_T: gl.constexpr = s_q.shape[1]
    BLOCK_F: gl.constexpr = s_v.shape[2]
    BLOCK_D: gl.constexpr = s_v.shape[3]
    dtype: gl.constexpr = s_q.dtype
    mn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * BLOCK_F, 16])
    m_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_F, 16])
    dku_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_F], dtype)
    dmn_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, 2 * BLOCK_F], dtype)
    s_p = gl.allocate_shared_memory(dtype, [1, BLOCK_T, BLOCK_F], p_layout)
    s_dmn = gl.allocate_shared_memory(dtype, [1, BLOCK_T, 2 * BLOCK_F], dmn_layout)
    s_dq = s_ku
    if ACCUM_DQ and BY_TMA:
        s_dq = gl.allocate_shared_memory(gl.float32, [1, BLOCK_T, 1, BLOCK_D], dq_accum.layout)
    zeros = gl.zeros([BLOCK_T, BLOCK_F], dtype, m_layout)
    store_p_dmn(zeros, zeros, zeros, s_p, s_dmn, 0, mn_layout)
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, m_layout))
    dv = warpgroup_mma_init(gl.zeros([BLOCK_F, BLOCK_D], gl.float32, dv_layout))
    dku = warpgroup_mma_init(gl.zeros([2 * BLOCK_F, BLOCK_D], gl.float32, dku_layout))
    for i in range(tiles):
        gate_offs = ((t + offs_t).to(gl.int64) * H + head) * E + e
        mask_t = offs_t < T - t
        if HAS_GATE:
            gate = gl.load(gate_ptr + gate_offs, mask=mask_t, other=0.0).to(gl.float32)
        else:
            gate = gl.full_like(offs_t, 1.0, dtype=gl.float32)
        scores, da = issue_scores(
            s_ku, s_v, s_q, s_dout, q_full, dout_full, i, mn_layout, m_layout, D_LOW, D_HIGH, STAGES
        )
        prev = max(i - 1, 0)  # in the first iteration the tile itself, with P, dM and dN all zero
        dv, dku = issue_dkuv(s_p, s_dmn, s_q, s_dout, dv, dku, prev, STAGES)
        scores, da = warpgroup_mma_wait(num_outstanding=2, deps=[scores, da])
        p, dm, dn, dgate = activation_backward(scores, da, gate, m_layout, dtype)
        if ACCUM_DGATE:
            # Recomputed rather than kept in registers across the products.
            gate_offs = ((t + opaque_zero(i) + offs_t).to(gl.int64) * H + head) * E + e
            gl.atomic_add(dgate_ptr + gate_offs, dgate, mask=mask_t, sem="relaxed")
        dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])
        dv = warpgroup_mma_init(dv)
        dku = warpgroup_mma_init(dku)
        release(empty, prev, STAGES, i > 0)  # synchronises the warpgroups: P, dM and dN have been read by both
        store_p_dmn(p, dm, dn, s_p, s_dmn, i, mn_layout)
        if ACCUM_DQ:
            accumulate_dq(dm, dn, s_ku, s_dq, dq_accum, i, t, head, H, dku_layout, FRAGMENTS, BY_TMA)
        t, head = next_tile(t, head, T, first_head, end_head, BLOCK_T)
    dv, dku = issue_dkuv(s_p, s_dmn, s_q, s_dout, dv, dku, tiles - 1, STAGES)
    dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])
    if ACCUM_DQ and BY_TMA:
        tma.store_wait(pendings=0)
    out_dtype: gl.constexpr = dk_ptr.dtype.element_ty  # float32 for partial sums
    store_dkuv(dk_ptr, du_ptr, dv_ptr, dku.to(out_dtype), dv.to(out_dtype), F, D, stride_split, dku_layout, dv_layout)


@gluon.jit(do_not_specialize=["T", "tiles_per_split"])
def backward_kernel(
    q_desc, dout_desc, k_desc, u_desc, v_desc, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
    T, H, E, F, D, GROUP, tiles_per_split, stride_split, D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
    STAGES: gl.constexpr, HAS_GATE: gl.constexpr,
    ACCUM_DQ: gl.constexpr, ACCUM_DGATE: gl.constexpr, FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr,
):  # fmt: skip
    """q, dout (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> dk, du, dv (splits, H_kv, E, F, D).

    Accumulates into dq_accum and dgate.
    """
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    BLOCK_D: gl.constexpr = k_desc.block_shape[2]
    s_ku = gl.allocate_shared_memory(q_desc.dtype, [1, 2, BLOCK_F, BLOCK_D], k_desc.layout)
    s_v = gl.allocate_shared_memory(q_desc.dtype, [1, 1, BLOCK_F, BLOCK_D], v_desc.layout)
    s_q = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_T, 1, BLOCK_D], q_desc.layout)
    s_dout = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_T, 1, BLOCK_D], dout_desc.layout)
    weights_full = allocate_barriers(2, 1)
    q_full = allocate_barriers(STAGES, 1)
    dout_full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 1)
    fence_async_shared()

    sub_network, first_f = row_tile(F, BLOCK_F)
    tma_load_pair(k_desc, u_desc, [sub_network, first_f, 0], weights_full.index(0), s_ku.index(0))
    tma_load(v_desc, [sub_network, first_f, 0], weights_full.index(1), s_v.index(0))
    mbarrier.wait(weights_full.index(0), 0)
    mbarrier.wait(weights_full.index(1), 0)
    first_head = (sub_network // E) * GROUP
    tiles_t = gl.cdiv(T, BLOCK_T)
    first_tile = gl.program_id(1) * tiles_per_split
    tiles = min(tiles_per_split, tiles_t * GROUP - first_tile)
    first_tile += gl.program_id(0) % tiles_t  # programs start at different tiles to spread the atomic additions to dQ
    t = (first_tile % tiles_t) * BLOCK_T
    head = first_head + first_tile // tiles_t % GROUP
    consumer_arguments = (  # without constexprs, which an assignment would turn into run-time values
        s_ku, s_v, s_q, s_dout, q_full, dout_full, empty, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
        t, head, first_head, first_head + GROUP, tiles, sub_network % E, T, H, E, F, D, stride_split,
    )  # fmt: skip
    producer_arguments = (
        q_desc, dout_desc, s_q, s_dout, q_full, dout_full, empty,
        t, head, T, first_head, first_head + GROUP, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (D_LOW, D_HIGH, HAS_GATE, ACCUM_DQ, ACCUM_DGATE, FRAGMENTS, BY_TMA) + consumer_arguments),  # noqa: RUF005 - Gluon does not support *
            (produce, producer_arguments),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def plan_backward(
    dout: Tensor, inputs: Inputs, grads: Gradients, tile: BackwardTile | None = None, splits: int = 1
) -> Launch:
    """The launch that writes dk, du and dv and accumulates into dq (of `allocate_dq_accum`) and dgate (T, H, E).

    With more than one split, dk, du and dv hold float32 partial sums, (splits, H_kv, E, F, D).
    """
    q, k, u, v, gate = inputs
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or backward_tile(D)
    assert tile is not None
    tiles_per_split = -(-num_token_tiles(q, k, tile) // splits)
    assert (splits - 1) * tiles_per_split < num_token_tiles(q, k, tile), "a split without tiles"
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t), "dout_desc": token_descriptor(dout, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "gate_ptr": q if gate is None else gate.contiguous(),
        "dgate_ptr": q if grads.dgate is None else grads.dgate,
        "dq_accum": q if grads.dq is None else dq_accum_argument(grads.dq, tile),
        "dk_ptr": grads.dk, "du_ptr": grads.du, "dv_ptr": grads.dv,
        **dict(zip(("D_LOW", "D_HIGH"), head_dim_parts(D), strict=True)),
        "T": T, "H": H, "E": E, "F": F, "D": D, "GROUP": H // H_kv,
        "tiles_per_split": tiles_per_split, "stride_split": k.numel(),
        "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "ACCUM_DQ": grads.dq is not None, "ACCUM_DGATE": grads.dgate is not None,
        "FRAGMENTS": tile.dq == "fragments", "BY_TMA": tile.dq == "tma",
    }  # fmt: skip
    return Launch(backward_kernel, (num_row_tiles(k, tile), splits), arguments, num_warps=8, num_stages=1)


def plan_backward_split(dout: Tensor, inputs: Inputs, grads: Gradients, tile: BackwardTile) -> list[Launch]:
    """Like `plan_backward`, with the tokens split as tile and sizes require; further launches add the partial sums."""
    weights, splits = [x for x in grads.of_weights if x is not None], num_splits(inputs.q, inputs.k, tile)
    assert len(weights) == 3
    if splits == 1:
        return [plan_backward(dout, inputs, grads, tile)]
    dk, du, dv = partial = [x.new_empty((splits, *x.shape), dtype=torch.float32) for x in weights]
    launch = plan_backward(dout, inputs, Gradients(grads.dq, dk, du, dv, grads.dgate), tile, splits)
    return [launch, *map(plan_combine, partial, weights)]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    inputs = flat_inputs(Inputs(q, k, u, v, gate))
    dk, du, dv = weights = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, u, v)]
    tile = backward_tile(q.shape[-1])
    assert tile is not None
    dq = allocate_dq_accum(inputs.q, tile) if needs[0] else None
    dgate = torch.zeros(gate.shape, dtype=torch.float32, device=q.device) if gate is not None and needs[4] else None
    if q.numel() > 0:
        grads = Gradients(dq, dk, du, dv, None if dgate is None else flat(dgate))
        for launch in plan_backward_split(flat(dout), inputs, grads, tile):
            launch.run()
    else:
        for gradient in weights:
            gradient.zero_()
    if dq is not None:
        dq = convert_dq(dq, inputs.q, tile).view(q.shape)
    if dgate is not None and gate is not None:
        dgate = dgate.to(gate.dtype)
    return dq, *(gradient if need else None for gradient, need in zip(weights, needs[1:4], strict=True)), dgate

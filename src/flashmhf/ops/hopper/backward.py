"""The Hopper backward in one pass: one program owns BLOCK_F rows of one sub-network and walks over all tokens.

K, U and V stay in shared memory and dK, dU and dV in registers, while a producer warp feeds tiles of Q and dO. With
A = SiLU(M) * N and dA = dO V^T, two warpgroups, each with half of the tile's tokens, do for every tile i

    multiply    S = Q [K U]^T,  dA = dO V^T
    activate    P = R A,  dN = R dA SiLU(M),  dM = R dA N SiLU'(M),  and dR = rowsum(dA * A), added to memory
    multiply    dQ = dM K + dN U                        operands from registers; added to memory in float32
    multiply    dV += P^T dO,  [dK; dU] += [dM dN]^T Q  operands from shared memory: both need the whole tile

Eight products. The tokens may be split over several programs, whose float32 sums are added in fixed order (splits.py).
The last three of tile i are issued behind S and dA of tile i + 1 and run while that is activated.
Additions to memory come in any order, so the same inputs give the same bits of dK, dU and dV alone.
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

from flashmhf.ops.hopper.dq_accum import add_dq, dq_argument, dq_buffer, rounded_dq
from flashmhf.ops.hopper.launch import flat, token_descriptor, weight_descriptor
from flashmhf.ops.hopper.primitives import (
    PRODUCER_REGISTERS,
    allocate_barriers,
    columns,
    differentiate,
    load,
    load_pair,
    matrix,
    multiply_add,
    multiply_rows,
    release,
    side_by_side,
    wait_empty,
    wait_full,
    zero,
)
from flashmhf.ops.hopper.splits import row_tiles, splits_for, token_tiles
from flashmhf.ops.hopper.tiles import BackwardTile, backward_tile, low_and_high
from flashmhf.ops.triton.forward import plan_combine
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def next_tile(t, head, T, first_head, end_head, BLOCK_T: gl.constexpr):
    """The tile after (first token t, head), round and round through the tokens of all heads."""
    t += BLOCK_T
    head = gl.where(t < T, head, head + 1)
    return gl.where(t < T, t, 0), gl.where(head < end_head, head, first_head)


@gluon.jit
def produce_tokens(
    q_desc, dout_desc, s_q, s_dout, q_full, dout_full, empty, t, head, T, first_head, end_head, tiles
):  # fmt: skip
    """Keeps the rings of Q and dO full; both are released together."""
    STAGES: gl.constexpr = s_q.shape[0]
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    for i in range(tiles):
        stage = i % STAGES
        wait_empty(empty, i, STAGES)
        load(q_desc, [t, head, 0], q_full.index(stage), s_q.index(stage))
        load(dout_desc, [t, head, 0], dout_full.index(stage), s_dout.index(stage))
        t, head = next_tile(t, head, T, first_head, end_head, BLOCK_T)


@gluon.jit
def issue_scores(
    s_ku, s_v, s_q, s_dout, q_full, dout_full, i, pair: gl.constexpr, score: gl.constexpr,
    LOW: gl.constexpr, HIGH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Issues S = Q [K U]^T and dA = dO V^T of tile i."""
    BLOCK_T: gl.constexpr = s_q.shape[1]
    BLOCK_F: gl.constexpr = s_v.shape[2]
    wait_full(q_full, i, STAGES)
    no_scores = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, pair)
    q = matrix(s_q.index(i % STAGES))
    q_high = columns(q, LOW, HIGH, None) if HIGH > 0 else q
    scores = multiply_rows(columns(q, 0, LOW, None), q_high, matrix(s_ku.index(zero(i))), no_scores, LOW, HIGH)
    wait_full(dout_full, i, STAGES)
    no_da = gl.zeros([BLOCK_T, BLOCK_F], gl.float32, score)
    dout = matrix(s_dout.index(i % STAGES))
    dout_high = columns(dout, LOW, HIGH, None) if HIGH > 0 else dout
    da = multiply_rows(columns(dout, 0, LOW, None), dout_high, matrix(s_v.index(zero(i))), no_da, LOW, HIGH)
    return scores, da


@gluon.jit
def issue_weights(s_p, s_dmn, s_q, s_dout, dv, dku, i, STAGES: gl.constexpr):
    """Issues dV += P^T dO and [dK; dU] += [dM dN]^T Q of tile i."""
    dv = multiply_add(s_p.index(zero(i)).permute((1, 0)), matrix(s_dout.index(i % STAGES)), dv)
    dku = multiply_add(s_dmn.index(zero(i)).permute((1, 0)), matrix(s_q.index(i % STAGES)), dku)
    return dv, dku


@gluon.jit
def share(p, dm, dn, s_p, s_dmn, i, pair: gl.constexpr):
    """Gives P and [dM dN] to both warpgroups' products."""
    s_p.index(zero(i)).store(p)
    s_dmn.index(zero(i)).store(side_by_side(dm, dn, pair))
    fence_async_shared()


@gluon.jit
def own_rows(F, BLOCK_F: gl.constexpr):
    """The program's sub-network, counted over all parameter heads, and the first of its rows."""
    tiles_f = gl.cdiv(F, BLOCK_F)
    return gl.program_id(0) // tiles_f, (gl.program_id(0) % tiles_f) * BLOCK_F


@gluon.jit
def store_weights(dk_ptr, du_ptr, dv_ptr, dku, dv, F, D, stride_split, whole: gl.constexpr, split: gl.constexpr):
    """Writes the program's rows of dK, dU and dV, all (splits, H_kv, E, F, D) and contiguous."""
    BLOCK_F: gl.constexpr = dv.shape[0]
    BLOCK_D: gl.constexpr = dv.shape[1]
    sub_network, first_f = own_rows(F, BLOCK_F)
    first = gl.program_id(1).to(gl.int64) * stride_split + (sub_network.to(gl.int64) * F + first_f) * D
    rows = gl.arange(0, BLOCK_F, layout=gl.SliceLayout(1, split))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, split))
    mask = (rows < F - first_f)[:, None] & (columns < D)[None, :]
    gl.store(dv_ptr + first + (rows[:, None] * D + columns[None, :]), dv, mask=mask)
    rows = gl.arange(0, 2 * BLOCK_F, layout=gl.SliceLayout(1, whole))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, whole))
    mask_d = (columns < D)[None, :]
    mask = (rows < min(F - first_f, BLOCK_F))[:, None] & mask_d
    gl.store(dk_ptr + first + (rows[:, None] * D + columns[None, :]), dku, mask=mask)
    rows -= BLOCK_F
    mask = ((rows >= 0) & (rows < F - first_f))[:, None] & mask_d
    gl.store(du_ptr + first + (rows[:, None] * D + columns[None, :]), dku, mask=mask)


@gluon.jit
def consume(
    LOW: gl.constexpr, HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, ADDS_Q: gl.constexpr, ADDS_GATE: gl.constexpr,
    FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr,
    s_ku, s_v, s_q, s_dout, q_full, dout_full, empty, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
    t, head, first_head, end_head, tiles, e, T, H, E, F, D, stride_split,
):  # fmt: skip
    """Two warpgroups: dK, dU and dV of the program's rows, and its share of dQ and dR."""
    STAGES: gl.constexpr = s_q.shape[0]
    BLOCK_T: gl.constexpr = s_q.shape[1]
    BLOCK_F: gl.constexpr = s_v.shape[2]
    BLOCK_D: gl.constexpr = s_v.shape[3]
    dtype: gl.constexpr = s_q.dtype
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * BLOCK_F, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_F, 16])
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    split: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_F], dtype)
    dmn_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, 2 * BLOCK_F], dtype)
    s_p = gl.allocate_shared_memory(dtype, [1, BLOCK_T, BLOCK_F], p_layout)
    s_dmn = gl.allocate_shared_memory(dtype, [1, BLOCK_T, 2 * BLOCK_F], dmn_layout)
    s_dq = s_ku
    if ADDS_Q and BY_TMA:
        s_dq = gl.allocate_shared_memory(gl.float32, [1, BLOCK_T, 1, BLOCK_D], dq_accum.layout)
    nothing = gl.zeros([BLOCK_T, BLOCK_F], dtype, score)
    share(nothing, nothing, nothing, s_p, s_dmn, 0, pair)
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, score))
    dv = warpgroup_mma_init(gl.zeros([BLOCK_F, BLOCK_D], gl.float32, split))
    dku = warpgroup_mma_init(gl.zeros([2 * BLOCK_F, BLOCK_D], gl.float32, whole))
    for i in range(tiles):
        share_of = ((t + offs_t).to(gl.int64) * H + head) * E + e
        mask_t = offs_t < T - t
        if HAS_GATE:
            r = gl.load(gate_ptr + share_of, mask=mask_t, other=0.0).to(gl.float32)
        else:
            r = gl.full_like(offs_t, 1.0, dtype=gl.float32)
        scores, da = issue_scores(s_ku, s_v, s_q, s_dout, q_full, dout_full, i, pair, score, LOW, HIGH, STAGES)
        before = max(i - 1, 0)  # before the first tile comes that tile itself, with P, dM and dN all zero
        dv, dku = issue_weights(s_p, s_dmn, s_q, s_dout, dv, dku, before, STAGES)
        scores, da = warpgroup_mma_wait(num_outstanding=2, deps=[scores, da])
        p, dm, dn, dr = differentiate(scores, da, r, score, dtype)
        if ADDS_GATE:
            share_of = ((t + zero(i) + offs_t).to(gl.int64) * H + head) * E + e  # again, or registers keep the first
            gl.atomic_add(dgate_ptr + share_of, dr, mask=mask_t, sem="relaxed")
        dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])
        dv = warpgroup_mma_init(dv)
        dku = warpgroup_mma_init(dku)
        release(empty, before, STAGES, i > 0)  # synchronises the warpgroups, so P, dM and dN have been read
        share(p, dm, dn, s_p, s_dmn, i, pair)
        if ADDS_Q:
            add_dq(dm, dn, s_ku, s_dq, dq_accum, i, t, head, H, whole, FRAGMENTS, BY_TMA)
        t, head = next_tile(t, head, T, first_head, end_head, BLOCK_T)
    dv, dku = issue_weights(s_p, s_dmn, s_q, s_dout, dv, dku, tiles - 1, STAGES)
    dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])
    if ADDS_Q and BY_TMA:
        tma.store_wait(pendings=0)
    result: gl.constexpr = dk_ptr.dtype.element_ty  # float32 where it is one of several splits
    store_weights(dk_ptr, du_ptr, dv_ptr, dku.to(result), dv.to(result), F, D, stride_split, whole, split)


@gluon.jit(do_not_specialize=["T", "tiles_per_split"])
def backward_kernel(
    q_desc, dout_desc, k_desc, u_desc, v_desc, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
    T, H, E, F, D, GROUP, tiles_per_split, stride_split, LOW: gl.constexpr, HIGH: gl.constexpr,
    STAGES: gl.constexpr, HAS_GATE: gl.constexpr,
    ADDS_Q: gl.constexpr, ADDS_GATE: gl.constexpr, FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr,
):  # fmt: skip
    """q, dout (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> dk, du, dv (splits, H_kv, E, F, D).

    dq and dgate are added to.
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

    sub_network, first_f = own_rows(F, BLOCK_F)
    load_pair(k_desc, u_desc, [sub_network, first_f, 0], weights_full.index(0), s_ku.index(0))
    load(v_desc, [sub_network, first_f, 0], weights_full.index(1), s_v.index(0))
    mbarrier.wait(weights_full.index(0), 0)
    mbarrier.wait(weights_full.index(1), 0)
    first_head = (sub_network // E) * GROUP
    tiles_t = gl.cdiv(T, BLOCK_T)
    first_tile = gl.program_id(1) * tiles_per_split
    tiles = min(tiles_per_split, tiles_t * GROUP - first_tile)
    first_tile += gl.program_id(0) % tiles_t  # programs start at different tiles, lest all add to one dQ at once
    t = (first_tile % tiles_t) * BLOCK_T
    head = first_head + first_tile // tiles_t % GROUP
    consumer_arguments = (  # no constexpr among them: an assignment makes a run-time value of it
        s_ku, s_v, s_q, s_dout, q_full, dout_full, empty, gate_ptr, dgate_ptr, dq_accum, dk_ptr, du_ptr, dv_ptr,
        t, head, first_head, first_head + GROUP, tiles, sub_network % E, T, H, E, F, D, stride_split,
    )  # fmt: skip
    producer_arguments = (
        q_desc, dout_desc, s_q, s_dout, q_full, dout_full, empty,
        t, head, T, first_head, first_head + GROUP, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (LOW, HIGH, HAS_GATE, ADDS_Q, ADDS_GATE, FRAGMENTS, BY_TMA) + consumer_arguments),  # noqa: RUF005 - Gluon knows no star
            (produce_tokens, producer_arguments),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def plan_backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None,
    dk: Tensor, du: Tensor, dv: Tensor, dq_accum: Tensor | None, added_dgate: Tensor | None,
    tile: BackwardTile | None = None, splits: int = 1,
) -> Launch:  # fmt: skip
    """The launch that writes dk, du and dv and adds to dq (of `dq_buffer`) and dgate (T, H, E).

    With more than one split dk, du and dv are (splits, H_kv, E, F, D) in float32 and get partial sums.
    """
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or backward_tile(D)
    assert tile is not None
    tiles_per_split = -(-token_tiles(q, k, tile) // splits)
    assert (splits - 1) * tiles_per_split < token_tiles(q, k, tile), "a split without tiles"
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t), "dout_desc": token_descriptor(dout, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "gate_ptr": q if gate is None else gate.contiguous(),
        "dgate_ptr": q if added_dgate is None else added_dgate,
        "dq_accum": q if dq_accum is None else dq_argument(dq_accum, tile),
        "dk_ptr": dk, "du_ptr": du, "dv_ptr": dv,
        **dict(zip(("LOW", "HIGH"), low_and_high(D), strict=True)),
        "T": T, "H": H, "E": E, "F": F, "D": D, "GROUP": H // H_kv,
        "tiles_per_split": tiles_per_split, "stride_split": k.numel(),
        "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "ADDS_Q": dq_accum is not None, "ADDS_GATE": added_dgate is not None,
        "FRAGMENTS": tile.dq == "fragments", "BY_TMA": tile.dq == "tma",
    }  # fmt: skip
    return Launch(backward_kernel, (row_tiles(k, tile), splits), arguments, num_warps=8, num_stages=1)


def plan_backward_split(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None,
    dk: Tensor, du: Tensor, dv: Tensor, dq_accum: Tensor | None, added_dgate: Tensor | None, tile: BackwardTile,
) -> list[Launch]:  # fmt: skip
    """As `plan_backward`, in as many splits as the tile and the sizes want; further launches add their sums."""
    weights, splits = (dk, du, dv), splits_for(q, k, tile)
    if splits == 1:
        return [plan_backward(dout, q, k, u, v, gate, *weights, dq_accum, added_dgate, tile)]
    sums = [x.new_empty((splits, *x.shape), dtype=torch.float32) for x in weights]
    launch = plan_backward(dout, q, k, u, v, gate, sums[0], sums[1], sums[2], dq_accum, added_dgate, tile, splits)
    return [launch, *map(plan_combine, sums, weights)]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    dk, du, dv = weights = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, u, v)]
    tile = backward_tile(q.shape[-1])
    assert tile is not None
    q_THD, dout_THD, gate_THE = flat(q), flat(dout), None if gate is None else flat(gate)
    dq = dq_buffer(q_THD, tile) if needs[0] else None
    dgate = torch.zeros(gate.shape, dtype=torch.float32, device=q.device) if gate is not None and needs[4] else None
    if q.numel() > 0:
        dgate_THE = None if dgate is None else flat(dgate)
        for launch in plan_backward_split(dout_THD, q_THD, k, u, v, gate_THE, dk, du, dv, dq, dgate_THE, tile):
            launch.run()
    else:
        for gradient in weights:
            gradient.zero_()
    if dq is not None:
        dq = rounded_dq(dq, q_THD, tile).view(q.shape)
    if dgate is not None and gate is not None:
        dgate = dgate.to(gate.dtype)
    return dq, *(gradient if need else None for gradient, need in zip(weights, needs[1:4], strict=True)), dgate

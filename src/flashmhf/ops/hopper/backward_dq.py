"""dQ and dR on their own: one program owns 2 x BLOCK_T tokens of one head, a warpgroup each, and walks over the rows.

Nothing is added to memory, so the same inputs give the same bits; with the fused kernel for dK, dU and dV alone that
makes a deterministic backward of eleven products. A producer warp feeds K, U and V. With A = SiLU(M) * N, each of two
consumer warpgroups does for every tile i

    multiply    S = Q [K U]^T,  dA = dO V^T
    activate    dN = R dA SiLU(M),  dM = R dA N SiLU'(M),  dR += rowsum(dA * A), written at the sub-network's last tile
    multiply    dQ += dM K + dN U         operands from registers; dQ stays in registers

and issues S and dA of tile i + 1 before dQ of tile i, so that the tensor cores work while it activates tile i + 1.
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

from flashmhf.ops.hopper.launch import flat, gate_arguments, token_descriptor, weight_descriptor
from flashmhf.ops.hopper.primitives import (
    CONSUMER_REGISTERS,
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
    wait_empty,
    wait_full,
)
from flashmhf.ops.hopper.tiles import DqTile, dq_tile, low_and_high
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def next_rows(e, f, F, BLOCK_F: gl.constexpr):
    """The tile after (sub-network e, first row f)."""
    f += BLOCK_F
    return gl.where(f < F, e, e + 1), gl.where(f < F, f, 0)


@gluon.jit
def produce_rows(
    k_desc, u_desc, v_desc, s_ku, s_v, ku_full, v_full, empty, first_e, F, tiles
):  # fmt: skip
    """Keeps the rings of K with U and of V full; both are released together."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    e, f = first_e, gl.to_tensor(0)
    for i in range(tiles):
        stage = i % STAGES
        wait_empty(empty, i, STAGES)
        load_pair(k_desc, u_desc, [e, f, 0], ku_full.index(stage), s_ku.index(stage))
        load(v_desc, [e, f, 0], v_full.index(stage), s_v.index(stage))
        e, f = next_rows(e, f, F, BLOCK_F)


@gluon.jit
def issue_scores(
    s_q, s_dout, s_ku, s_v, ku_full, v_full, i, pair: gl.constexpr, score: gl.constexpr,
    LOW: gl.constexpr, HIGH: gl.constexpr,
):  # fmt: skip
    """Issues S = Q [K U]^T and dA = dO V^T of tile i."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = s_q.shape[0]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    q_high = columns(s_q, LOW, HIGH, None) if HIGH > 0 else s_q
    dout_high = columns(s_dout, LOW, HIGH, None) if HIGH > 0 else s_dout
    wait_full(ku_full, i, STAGES)
    no_scores = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, pair)
    s_pair = matrix(s_ku.index(i % STAGES))
    scores = multiply_rows(columns(s_q, 0, LOW, None), q_high, s_pair, no_scores, LOW, HIGH)
    wait_full(v_full, i, STAGES)
    no_da = gl.zeros([BLOCK_T, BLOCK_F], gl.float32, score)
    da = multiply_rows(columns(s_dout, 0, LOW, None), dout_high, matrix(s_v.index(i % STAGES)), no_da, LOW, HIGH)
    return scores, da


@gluon.jit
def issue_dq(dm, dn, s_ku, dq, i, operand: gl.constexpr):
    """Issues dQ += dM K + dN U of tile i."""
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    s_pair = matrix(s_ku.index(i % s_ku.shape[0]))
    dq = multiply_add(gl.convert_layout(dm, operand), s_pair.slice(0, BLOCK_F), dq)
    return multiply_add(gl.convert_layout(dn, operand), s_pair.slice(BLOCK_F, BLOCK_F), dq)


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, NEEDS_GATE: gl.constexpr, NEEDS_Q: gl.constexpr, dq_desc,
    s_qs, s_douts, s_ku, s_v, q_full, ku_full, v_full, empty,
    gate_ptr, stride_gatel, stride_gatee, dgate_ptr, first_t, head, T, H, E, F, tiles,
):  # fmt: skip
    """One warpgroup: dQ and dR of its BLOCK_T tokens."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = s_qs.shape[1]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    dtype: gl.constexpr = s_qs.dtype
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)

    first_t += WARPGROUP * BLOCK_T
    rows = first_t + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, score))
    mask = rows < T
    gate_ptrs = gate_ptr + rows.to(gl.int64) * stride_gatel
    dgate_ptrs = dgate_ptr + (rows.to(gl.int64) * H + head) * E
    s_q = matrix(s_qs.index(WARPGROUP))
    s_dout = matrix(s_douts.index(WARPGROUP))
    dq = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, result))
    dm = gl.zeros([BLOCK_T, BLOCK_F], dtype, score)
    dn = dm
    dr = gl.zeros([BLOCK_T], gl.float32, gl.SliceLayout(1, score))
    e, f = gl.to_tensor(0), gl.to_tensor(0)
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    for i in range(tiles):
        if HAS_GATE:
            r = gl.load(gate_ptrs + e.to(gl.int64) * stride_gatee, mask=mask, other=0.0).to(gl.float32)
        else:
            r = gl.full_like(rows, 1.0, dtype=gl.float32)
        scores, da = issue_scores(s_q, s_dout, s_ku, s_v, ku_full, v_full, i, pair, score, LOW, HIGH)
        before = max(i - 1, 0)  # before the first tile comes that tile itself, with dM and dN all zero
        if NEEDS_Q:
            dq = issue_dq(dm, dn, s_ku, dq, before, operand)
        scores, da = warpgroup_mma_wait(num_outstanding=2 if NEEDS_Q else 0, deps=[scores, da])
        _, dm, dn, dr_of_tile = differentiate(scores, da, r, score, dtype)
        if NEEDS_Q:
            dq = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dq]))
        release(empty, before, STAGES, i > 0)
        if NEEDS_GATE:
            dr += dr_of_tile
            last = f + BLOCK_F >= F
            gl.store(dgate_ptrs + e, dr.to(dgate_ptr.dtype.element_ty), mask=mask & last)
            dr = gl.where(last, 0.0, dr)
        e, f = next_rows(e, f, F, BLOCK_F)
    if NEEDS_Q:
        dq = issue_dq(dm, dn, s_ku, dq, tiles - 1, operand)
        dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
        s_q.store(dq.to(dtype))  # Q has been read
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [first_t, head, 0], s_qs.index(WARPGROUP))
        tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "stride_gatel"])
def backward_dq_kernel(
    q_desc, dout_desc, k_desc, u_desc, v_desc, dq_desc, gate_ptr, stride_gatel, stride_gateh, stride_gatee, dgate_ptr,
    T, H, E, F, GROUP, LOW: gl.constexpr, HIGH: gl.constexpr,
    STAGES: gl.constexpr, HAS_GATE: gl.constexpr, NEEDS_GATE: gl.constexpr, NEEDS_Q: gl.constexpr,
):  # fmt: skip
    """q, dout (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> dq (T, H, D), dgate (T, H, E)."""
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    BLOCK_D: gl.constexpr = k_desc.block_shape[2]
    s_qs = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_T, 1, BLOCK_D], q_desc.layout)
    s_douts = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_T, 1, BLOCK_D], dout_desc.layout)
    s_ku = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 2, BLOCK_F, BLOCK_D], k_desc.layout)
    s_v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_F, BLOCK_D], v_desc.layout)
    q_full = allocate_barriers(2, 2)
    ku_full = allocate_barriers(STAGES, 1)
    v_full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 2)
    fence_async_shared()

    tiles_t = gl.cdiv(T, 2 * BLOCK_T)
    head = gl.program_id(0) // tiles_t
    first_t = (gl.program_id(0) % tiles_t) * (2 * BLOCK_T)
    for warpgroup in gl.static_range(2):
        tokens = [first_t + warpgroup * BLOCK_T, head, 0]
        load(q_desc, tokens, q_full.index(warpgroup), s_qs.index(warpgroup))
        load(dout_desc, tokens, q_full.index(warpgroup), s_douts.index(warpgroup))
    tiles = E * gl.cdiv(F, BLOCK_F)
    if HAS_GATE:
        gate_ptr += head.to(gl.int64) * stride_gateh
    consumer_arguments = (  # no constexpr among them: an assignment makes a run-time value of it
        dq_desc, s_qs, s_douts, s_ku, s_v, q_full, ku_full, v_full, empty,
        gate_ptr, stride_gatel, stride_gatee, dgate_ptr, first_t, head, T, H, E, F, tiles,
    )  # fmt: skip
    producer_arguments = (
        k_desc, u_desc, v_desc, s_ku, s_v, ku_full, v_full, empty, (head // GROUP) * E, F, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, LOW, HIGH, HAS_GATE, NEEDS_GATE, NEEDS_Q) + consumer_arguments),  # noqa: RUF005 - Gluon knows no star
            (consume, (1, LOW, HIGH, HAS_GATE, NEEDS_GATE, NEEDS_Q) + consumer_arguments),  # noqa: RUF005
            (produce_rows, producer_arguments),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def plan_backward_dq(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None,
    dq: Tensor | None, dgate: Tensor | None, tile: DqTile | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes dq (T, H, D) and dgate (T, H, E), both contiguous, of which one may be None."""
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or dq_tile(D)
    assert tile is not None
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t), "dout_desc": token_descriptor(dout, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "dq_desc": token_descriptor(q if dq is None else dq, tile.block_t),
        **gate_arguments(gate, q), "dgate_ptr": q if dgate is None else dgate,
        **dict(zip(("LOW", "HIGH"), low_and_high(D), strict=True)),
        "T": T, "H": H, "E": E, "F": F, "GROUP": H // H_kv, "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "NEEDS_GATE": dgate is not None, "NEEDS_Q": dq is not None,
    }  # fmt: skip
    return Launch(backward_dq_kernel, (H * -(-T // (2 * tile.block_t)),), arguments, num_warps=4, num_stages=1)


def backward_dq(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for q and gate, None where `needs` (of q, k, u, v and gate) says so."""
    dq, dgate = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if x is not None and need else None
        for x, need in ((q, needs[0]), (gate, needs[4]))
    )
    if q.numel() > 0 and (dq is not None or dgate is not None):
        gate_THE, dq_THD, dgate_THE = (None if x is None else flat(x) for x in (gate, dq, dgate))
        plan_backward_dq(flat(dout), flat(q), k, u, v, gate_THE, dq_THD, dgate_THE).run()
    return dq, dgate

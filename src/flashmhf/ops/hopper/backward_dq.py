"""The Hopper kernel for dQ and dgate only: one program owns 2 x BLOCK_T tokens of one head, one warpgroup each.

It accumulates nothing in memory, so the same inputs give the same bits; together with the fused kernel for dK, dU and
dV this is the deterministic backward, with eleven products. A producer warp loads the tiles of K, U and V. With R the
gate and A = SiLU(M) * N, each of two consumer warpgroups computes, for every row tile i,

    S = Q [K U]^T,  dA = dO V^T
    dN = R dA SiLU(M),  dM = R dA N SiLU'(M),  dR += rowsum(dA * A), stored at the last tile of a sub-network
    dQ += dM K + dN U                          dM and dN from registers; accumulated in registers

and issues S and dA of tile i + 1 before dQ of tile i, so that the tensor cores are busy during the activation of tile
i + 1.
"""

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

from flashmhf.ops.hopper.launch import (
    flat,
    flat_gradients,
    flat_inputs,
    gate_arguments,
    token_descriptor,
    weight_descriptor,
)
from flashmhf.ops.hopper.primitives import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    activation_backward,
    allocate_barriers,
    as_matrix,
    mma_add,
    mma_nt,
    release,
    slice_columns,
    tma_load,
    tma_load_pair,
    wait_empty,
    wait_full,
)
from flashmhf.ops.hopper.tiles import DqTile, dq_tile, head_dim_parts
from flashmhf.ops.tensors import Gradients, Inputs
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def next_rows(e, f, F, BLOCK_F: gl.constexpr):
    """The row tile after (sub-network e, first row f)."""
    f += BLOCK_F
    return gl.where(f < F, e, e + 1), gl.where(f < F, f, 0)


@gluon.jit
def produce(
    k_desc, u_desc, v_desc, s_ku, s_v, ku_full, v_full, empty, first_e, F, tiles
):  # fmt: skip
    """The producer warp: fills the pipelines of [K U] and of V, whose stages are released together."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    e, f = first_e, gl.to_tensor(0)
    for i in range(tiles):
        stage = i % STAGES
        wait_empty(empty, i, STAGES)
        tma_load_pair(k_desc, u_desc, [e, f, 0], ku_full.index(stage), s_ku.index(stage))
        tma_load(v_desc, [e, f, 0], v_full.index(stage), s_v.index(stage))
        e, f = next_rows(e, f, F, BLOCK_F)


@gluon.jit
def issue_scores(
    s_q, s_dout, s_ku, s_v, ku_full, v_full, i, mn_layout: gl.constexpr, m_layout: gl.constexpr,
    D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
):  # fmt: skip
    """Issues S = Q [K U]^T and dA = dO V^T of tile i."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = s_q.shape[0]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    q_low, dout_low = slice_columns(s_q, 0, D_LOW, None), slice_columns(s_dout, 0, D_LOW, None)
    q_high = slice_columns(s_q, D_LOW, D_HIGH, None) if D_HIGH > 0 else s_q
    dout_high = slice_columns(s_dout, D_LOW, D_HIGH, None) if D_HIGH > 0 else s_dout
    wait_full(ku_full, i, STAGES)
    scores_like = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, mn_layout)
    scores = mma_nt(q_low, q_high, as_matrix(s_ku.index(i % STAGES)), scores_like, D_LOW, D_HIGH)
    wait_full(v_full, i, STAGES)
    da_like = gl.zeros([BLOCK_T, BLOCK_F], gl.float32, m_layout)
    da = mma_nt(dout_low, dout_high, as_matrix(s_v.index(i % STAGES)), da_like, D_LOW, D_HIGH)
    return scores, da


@gluon.jit
def issue_dq(dm, dn, s_ku, dq, i, lhs_layout: gl.constexpr):
    """Issues dQ += dM K + dN U of tile i."""
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    s_pair = as_matrix(s_ku.index(i % s_ku.shape[0]))
    dq = mma_add(gl.convert_layout(dm, lhs_layout), s_pair.slice(0, BLOCK_F), dq)
    return mma_add(gl.convert_layout(dn, lhs_layout), s_pair.slice(BLOCK_F, BLOCK_F), dq)


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, NEEDS_DGATE: gl.constexpr, NEEDS_DQ: gl.constexpr, dq_desc,
    s_qs, s_douts, s_ku, s_v, q_full, ku_full, v_full, empty,
    gate_ptr, stride_gatel, stride_gatee, dgate_ptr, first_t, head, T, H, E, F, tiles,
):  # fmt: skip
    """A consumer warpgroup: dQ and dgate of its BLOCK_T tokens."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = s_qs.shape[1]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    dtype: gl.constexpr = s_qs.dtype
    mn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    m_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    lhs_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)

    first_t += WARPGROUP * BLOCK_T
    rows = first_t + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, m_layout))
    mask = rows < T
    gate_ptrs = gate_ptr + rows.to(gl.int64) * stride_gatel
    dgate_ptrs = dgate_ptr + (rows.to(gl.int64) * H + head) * E
    s_q = as_matrix(s_qs.index(WARPGROUP))
    s_dout = as_matrix(s_douts.index(WARPGROUP))
    dq = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, dq_layout))
    dm = gl.zeros([BLOCK_T, BLOCK_F], dtype, m_layout)
    dn = dm
    dgate = gl.zeros([BLOCK_T], gl.float32, gl.SliceLayout(1, m_layout))
    e, f = gl.to_tensor(0), gl.to_tensor(0)
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    for i in range(tiles):
        if HAS_GATE:
            gate = gl.load(gate_ptrs + e.to(gl.int64) * stride_gatee, mask=mask, other=0.0).to(gl.float32)
        else:
            gate = gl.full_like(rows, 1.0, dtype=gl.float32)
        scores, da = issue_scores(s_q, s_dout, s_ku, s_v, ku_full, v_full, i, mn_layout, m_layout, D_LOW, D_HIGH)
        prev = max(i - 1, 0)  # in the first iteration the tile itself, with dM and dN all zero
        if NEEDS_DQ:
            dq = issue_dq(dm, dn, s_ku, dq, prev, lhs_layout)
        scores, da = warpgroup_mma_wait(num_outstanding=2 if NEEDS_DQ else 0, deps=[scores, da])
        _, dm, dn, dgate_tile = activation_backward(scores, da, gate, m_layout, dtype)
        if NEEDS_DQ:
            dq = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dq]))
        release(empty, prev, STAGES, i > 0)
        if NEEDS_DGATE:
            dgate += dgate_tile
            last = f + BLOCK_F >= F
            gl.store(dgate_ptrs + e, dgate.to(dgate_ptr.dtype.element_ty), mask=mask & last)
            dgate = gl.where(last, 0.0, dgate)
        e, f = next_rows(e, f, F, BLOCK_F)
    if NEEDS_DQ:
        dq = issue_dq(dm, dn, s_ku, dq, tiles - 1, lhs_layout)
        dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
        s_q.store(dq.to(dtype))  # Q has been read
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [first_t, head, 0], s_qs.index(WARPGROUP))
        tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "stride_gatel"])
def backward_dq_kernel(
    q_desc, dout_desc, k_desc, u_desc, v_desc, dq_desc, gate_ptr, stride_gatel, stride_gateh, stride_gatee, dgate_ptr,
    T, H, E, F, GROUP, D_LOW: gl.constexpr, D_HIGH: gl.constexpr,
    STAGES: gl.constexpr, HAS_GATE: gl.constexpr, NEEDS_DGATE: gl.constexpr, NEEDS_DQ: gl.constexpr,
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
        tma_load(q_desc, tokens, q_full.index(warpgroup), s_qs.index(warpgroup))
        tma_load(dout_desc, tokens, q_full.index(warpgroup), s_douts.index(warpgroup))
    tiles = E * gl.cdiv(F, BLOCK_F)
    if HAS_GATE:
        gate_ptr += head.to(gl.int64) * stride_gateh
    consumer_arguments = (  # without constexprs, which an assignment would turn into run-time values
        dq_desc, s_qs, s_douts, s_ku, s_v, q_full, ku_full, v_full, empty,
        gate_ptr, stride_gatel, stride_gatee, dgate_ptr, first_t, head, T, H, E, F, tiles,
    )  # fmt: skip
    producer_arguments = (
        k_desc, u_desc, v_desc, s_ku, s_v, ku_full, v_full, empty, (head // GROUP) * E, F, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, D_LOW, D_HIGH, HAS_GATE, NEEDS_DGATE, NEEDS_DQ) + consumer_arguments),  # noqa: RUF005 - Gluon does not support *
            (consume, (1, D_LOW, D_HIGH, HAS_GATE, NEEDS_DGATE, NEEDS_DQ) + consumer_arguments),  # noqa: RUF005
            (produce, producer_arguments),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def plan_backward_dq(dout: Tensor, inputs: Inputs, grads: Gradients, tile: DqTile | None = None) -> Launch:
    """The launch that writes dq (T, H, D) and dgate (T, H, E), both contiguous, either of which may be None."""
    q, k, u, v, gate = inputs
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or dq_tile(D)
    assert tile is not None
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t), "dout_desc": token_descriptor(dout, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "dq_desc": token_descriptor(q if grads.dq is None else grads.dq, tile.block_t),
        **gate_arguments(gate, q), "dgate_ptr": q if grads.dgate is None else grads.dgate,
        **dict(zip(("D_LOW", "D_HIGH"), head_dim_parts(D), strict=True)),
        "T": T, "H": H, "E": E, "F": F, "GROUP": H // H_kv, "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "NEEDS_DGATE": grads.dgate is not None, "NEEDS_DQ": grads.dq is not None,
    }  # fmt: skip
    return Launch(backward_dq_kernel, (H * -(-T // (2 * tile.block_t)),), arguments, num_warps=4, num_stages=1)


def backward_dq(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for q and gate, None where `needs` (of q, k, u, v and gate) says so."""
    inputs = Inputs(q, k, u, v, gate)
    grads = Gradients.empty(inputs, (needs[0], False, False, False, needs[4]))
    if q.numel() > 0 and (grads.dq is not None or grads.dgate is not None):
        plan_backward_dq(flat(dout), flat_inputs(inputs), flat_gradients(grads)).run()
    return grads.dq, grads.dgate

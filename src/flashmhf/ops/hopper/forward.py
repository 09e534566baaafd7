"""The Hopper forward: one program owns 2 x BLOCK_T tokens of one head, a warpgroup each, and walks over the E x F rows.

A producer warp feeds K, U and V tiles by TMA. Each of two consumer warpgroups, for every tile i,

    multiplies   S = Q [K U]^T            one wgmma for both: M and N come to lie in the same thread
    activates    P = SiLU(M) * N * r      in registers, in the layout of the next product's operand
    multiplies   O += P V                 O stays in registers

and issues S of tile i + 1 before O += P V of tile i, so that the tensor cores work while it activates tile i + 1. The
two warpgroups share nothing but the rings. docs/kernels.md draws who waits for whom.
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
from flashmhf.ops.hopper.tiles import ForwardTile, forward_tile, low_and_high
from flashmhf.ops.hopper.vocabulary import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    allocate_barriers,
    columns,
    halves,
    load,
    load_pair,
    matrix,
    multiply_add,
    multiply_rows,
    release,
    tanh,
    wait_empty,
    wait_full,
)
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def produce_weights(
    k_desc, u_desc, v_desc, s_ku, s_v, ku_full, ku_empty, v_full, v_empty, first_e, tiles_f, tiles
):  # fmt: skip
    """Keeps the rings of K with U and of V full."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    for i in range(tiles):
        stage = i % STAGES
        rows = [first_e + i // tiles_f, (i % tiles_f) * BLOCK_F, 0]
        wait_empty(ku_empty, i, STAGES)
        load_pair(k_desc, u_desc, rows, ku_full.index(stage), s_ku.index(stage))
        wait_empty(v_empty, i, STAGES)
        load(v_desc, rows, v_full.index(stage), s_v.index(stage))


@gluon.jit
def activate(scores, r, layout: gl.constexpr, operand: gl.constexpr, dtype: gl.constexpr):
    """SiLU(M) * N * r of scores [M N], as the left operand of the next product; SiLU(2h) = h + h tanh(h)."""
    m, n = halves(scores, layout)
    h = 0.5 * m
    p = (h + h * tanh(h)) * n * r[:, None]
    return gl.convert_layout(p.to(dtype), operand)


@gluon.jit
def load_gate(gate_ptr, rows, e, stride_gatel, stride_gatee, T, HAS_GATE: gl.constexpr):
    """Sub-network e's share for each row, in float32."""
    if HAS_GATE:
        ptrs = gate_ptr + rows.to(gl.int64) * stride_gatel + e * stride_gatee
        r = gl.load(ptrs, mask=rows < T, other=0.0).to(gl.float32)
    else:
        r = gl.full_like(rows, 1.0, dtype=gl.float32)
    return r


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, out_desc,
    s_qs, s_ku, s_v, q_full, ku_full, ku_empty, v_full, v_empty,
    gate_ptr, stride_gatel, stride_gatee, first_t, head, T, tiles_f, tiles,
):  # fmt: skip
    """One warpgroup: the output of its BLOCK_T tokens."""
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
    zero = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, pair)
    out = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, result))
    s_q = matrix(s_qs.index(WARPGROUP))
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    place: gl.constexpr = gl.DotOperandLayout(0, pair, 2) if Q_IN_REGISTERS else None
    q = columns(s_q, 0, LOW, place)
    q_high = columns(s_q, LOW, HIGH, place) if HIGH > 0 else q

    wait_full(ku_full, 0, STAGES)
    scores = multiply_rows(q, q_high, matrix(s_ku.index(0)), zero, LOW, HIGH)
    r = load_gate(gate_ptr, rows, 0, stride_gatel, stride_gatee, T, HAS_GATE)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
    release(ku_empty, 0, STAGES)
    p = activate(scores, r, score, operand, dtype)
    for i in range(1, tiles):
        r = load_gate(gate_ptr, rows, i // tiles_f, stride_gatel, stride_gatee, T, HAS_GATE)
        wait_full(ku_full, i, STAGES)
        scores = multiply_rows(q, q_high, matrix(s_ku.index(i % STAGES)), zero, LOW, HIGH)
        wait_full(v_full, i - 1, STAGES)
        out = multiply_add(p, matrix(s_v.index((i - 1) % STAGES)), out)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        release(ku_empty, i, STAGES)
        p = activate(scores, r, score, operand, dtype)
        out = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[out]))
        release(v_empty, i - 1, STAGES)
    wait_full(v_full, tiles - 1, STAGES)
    out = multiply_add(p, matrix(s_v.index((tiles - 1) % STAGES)), out)
    out = warpgroup_mma_wait(num_outstanding=0, deps=[out])

    s_q.store(out.to(dtype))  # Q has been read
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [first_t, head, 0], s_qs.index(WARPGROUP))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "stride_gatel"])
def forward_kernel(
    q_desc, k_desc, u_desc, v_desc, out_desc, gate_ptr, stride_gatel, stride_gateh, stride_gatee,
    T, E, F, GROUP, LOW: gl.constexpr, HIGH: gl.constexpr,
    STAGES: gl.constexpr, HAS_GATE: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """q (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> out (T, H, D)."""
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    BLOCK_D: gl.constexpr = k_desc.block_shape[2]
    s_qs = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_T, 1, BLOCK_D], q_desc.layout)
    s_ku = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 2, BLOCK_F, BLOCK_D], k_desc.layout)
    s_v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_F, BLOCK_D], v_desc.layout)
    q_full = allocate_barriers(2, 1)
    ku_full = allocate_barriers(STAGES, 1)
    ku_empty = allocate_barriers(STAGES, 2)
    v_full = allocate_barriers(STAGES, 1)
    v_empty = allocate_barriers(STAGES, 2)
    fence_async_shared()

    tiles_t = gl.cdiv(T, 2 * BLOCK_T)
    head = gl.program_id(0) // tiles_t
    first_t = (gl.program_id(0) % tiles_t) * (2 * BLOCK_T)
    for warpgroup in gl.static_range(2):
        load(q_desc, [first_t + warpgroup * BLOCK_T, head, 0], q_full.index(warpgroup), s_qs.index(warpgroup))
    tiles_f = gl.cdiv(F, BLOCK_F)
    tiles = E * tiles_f
    if HAS_GATE:
        gate_ptr += head.to(gl.int64) * stride_gateh
    consumer_arguments = (  # no constexpr among them: an assignment makes a run-time value of it
        out_desc, s_qs, s_ku, s_v, q_full, ku_full, ku_empty, v_full, v_empty,
        gate_ptr, stride_gatel, stride_gatee, first_t, head, T, tiles_f, tiles,
    )  # fmt: skip
    producer_arguments = (
        k_desc, u_desc, v_desc, s_ku, s_v, ku_full, ku_empty, v_full, v_empty,
        (head // GROUP) * E, tiles_f, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, LOW, HIGH, HAS_GATE, Q_IN_REGISTERS) + consumer_arguments),  # noqa: RUF005 - Gluon knows no star
            (consume, (1, LOW, HIGH, HAS_GATE, Q_IN_REGISTERS) + consumer_arguments),  # noqa: RUF005
            (produce_weights, producer_arguments),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def plan_forward(
    q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, out: Tensor, tile: ForwardTile | None = None
) -> Launch:
    """The launch that writes `flash_mhf(q, k, u, v, gate)` into out: q and out (T, H, D), gate (T, H, E)."""
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    tile = tile or forward_tile(D)
    arguments = {
        "q_desc": token_descriptor(q, tile.block_t),
        **{f"{name}_desc": weight_descriptor(x, tile.block_f) for name, x in (("k", k), ("u", u), ("v", v))},
        "out_desc": token_descriptor(out, tile.block_t),
        **gate_arguments(gate, q),
        **dict(zip(("LOW", "HIGH"), low_and_high(D), strict=True)),
        "T": T, "E": E, "F": F, "GROUP": H // H_kv, "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "Q_IN_REGISTERS": tile.q_in_registers,
    }  # fmt: skip
    return Launch(forward_kernel, (H * -(-T // (2 * tile.block_t)),), arguments, num_warps=4, num_stages=1)


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() > 0:
        plan_forward(flat(q), k, u, v, None if gate is None else flat(gate), flat(out)).run()
    return out

"""The Hopper forward: a work item is 2 x BLOCK_T tokens of one head, a warpgroup each, and all E x F rows of the head.

A producer warp feeds Q and K, U and V tiles by TMA. Each of two consumer warpgroups, for every tile i,

    multiplies   S = Q [K U]^T            one wgmma for both: M and N come to lie in the same thread
    activates    P = SiLU(M) * N * r      in registers, in the layout of the next product's operand
    multiplies   O += P V                 O stays in registers

and issues S of tile i + 1 before O += P V of tile i, so that the tensor cores work while it activates tile i + 1. With
TURNS the warpgroups issue their products in turn, as in FlashAttention-3: while one activates, the other's products
run. Without, they share nothing but the rings. docs/kernels.md draws who waits for whom.

A program does one work item; if PERSISTENT, every n-th of n programs. The rings then run on from one item to the next,
Q's place is free as soon as Q has been read, and the output leaves from a place of its own while the next item is in
work.
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

from flashmhf.ops.hopper.launch import flat, gate_arguments, processors, token_descriptor, weight_descriptor
from flashmhf.ops.hopper.primitives import (
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
from flashmhf.ops.hopper.tiles import ForwardTile, forward_tile, low_and_high
from flashmhf.ops.triton.launch import Launch


@gluon.jit
def work_item(n, T, BLOCK_T: gl.constexpr):
    """Head and first token of the program's work item n: head by head, so that its K, U and V stay in the L2 cache."""
    item = gl.program_id(0) + n * gl.num_programs(0)
    tiles_t = gl.cdiv(T, 2 * BLOCK_T)
    return item // tiles_t, (item % tiles_t) * (2 * BLOCK_T)


@gluon.jit
def next_tile(e, f, tiles_f):
    """The tile after tile f of sub-network e; counted, as a division would stand before every product."""
    f += 1
    return gl.where(f < tiles_f, e, e + 1), gl.where(f < tiles_f, f, 0)


@gluon.jit
def produce(
    q_desc, k_desc, u_desc, v_desc, s_qs, s_ku, s_v, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
    items, T, E, GROUP, tiles_f, tiles,
):  # fmt: skip
    """Keeps the rings of K with U and of V full, from one work item on to the next, and brings each item's Q."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    for n in range(items):
        head, first_t = work_item(n, T, BLOCK_T)
        e = (head // GROUP) * E
        f = 0
        for i in range(n * tiles, (n + 1) * tiles):
            rows = [e, f * BLOCK_F, 0]
            wait_empty(ku_empty, i, STAGES)
            load_pair(k_desc, u_desc, rows, ku_full.index(i % STAGES), s_ku.index(i % STAGES))
            if i == n * tiles:  # behind K and U, which need not wait until the Q before has been read
                for warpgroup in gl.static_range(2):
                    first = [first_t + warpgroup * BLOCK_T, head, 0]
                    mbarrier.wait(q_empty.index(warpgroup), (n & 1) ^ 1)
                    load(q_desc, first, q_full.index(warpgroup), s_qs.index(warpgroup))
            wait_empty(v_empty, i, STAGES)
            load(v_desc, rows, v_full.index(i % STAGES), s_v.index(i % STAGES))
            e, f = next_tile(e, f, tiles_f)


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
def wait_turn(turns, i, WARPGROUP: gl.constexpr):
    """Until the other warpgroup has issued its products, those before mine; warpgroup 0 begins every tile i."""
    mbarrier.wait(turns.index(WARPGROUP), (i & 1) ^ 1 ^ WARPGROUP)


@gluon.jit
def pass_turn(turns, WARPGROUP: gl.constexpr):
    """The other warpgroup may issue its products; they queue behind this one's."""
    mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)


@gluon.jit
def sum_rows(
    WARPGROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr, HAS_GATE: gl.constexpr, TURNS: gl.constexpr,
    q, q_high, s_ku, s_v, turns, ku_full, ku_empty, v_full, v_empty,
    gate_ptr, stride_gatel, stride_gatee, rows, T, first, tiles_f, tiles,
):  # fmt: skip
    """The sum over one work item's tiles, still in flight; the first of them is the program's tile `first`."""
    STAGES: gl.constexpr = s_ku.shape[0]
    BLOCK_T: gl.constexpr = rows.shape[0]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    dtype: gl.constexpr = s_ku.dtype
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)

    zero = gl.zeros([BLOCK_T, 2 * BLOCK_F], gl.float32, pair)
    out = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, result))
    wait_full(ku_full, first, STAGES)
    if TURNS:
        wait_turn(turns, first, WARPGROUP)
    scores = multiply_rows(q, q_high, matrix(s_ku.index(first % STAGES)), zero, LOW, HIGH)
    if TURNS:
        pass_turn(turns, WARPGROUP)
    r = load_gate(gate_ptr, rows, 0, stride_gatel, stride_gatee, T, HAS_GATE)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
    release(ku_empty, first, STAGES)
    p = activate(scores, r, score, operand, dtype)
    wait_full(v_full, first, STAGES)
    e = 0
    f = 0
    for i in range(first + 1, first + tiles):
        e, f = next_tile(e, f, tiles_f)
        r = load_gate(gate_ptr, rows, e, stride_gatel, stride_gatee, T, HAS_GATE)
        wait_full(ku_full, i, STAGES)
        if TURNS:
            wait_turn(turns, i, WARPGROUP)
        scores = multiply_rows(q, q_high, matrix(s_ku.index(i % STAGES)), zero, LOW, HIGH)
        out = multiply_add(p, matrix(s_v.index((i - 1) % STAGES)), out)
        if TURNS:
            pass_turn(turns, WARPGROUP)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        release(ku_empty, i, STAGES)
        p = activate(scores, r, score, operand, dtype)
        wait_full(v_full, i, STAGES)  # a loop, behind which ptxas moves no activation: all of it runs beside P V
        out = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[out]))
        release(v_empty, i - 1, STAGES)
    return multiply_add(p, matrix(s_v.index((first + tiles - 1) % STAGES)), out)


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr,
    HAS_GATE: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, TURNS: gl.constexpr, PERSISTENT: gl.constexpr, out_desc,
    s_qs, s_outs, s_ku, s_v, turns, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
    gate_ptr, stride_gatel, stride_gateh, stride_gatee, items, T, tiles_f, tiles,
):  # fmt: skip
    """One warpgroup: the output of its BLOCK_T tokens of every work item."""
    BLOCK_T: gl.constexpr = s_qs.shape[1]
    BLOCK_F: gl.constexpr = s_ku.shape[2]
    STAGES: gl.constexpr = s_ku.shape[0]
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_F, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, pair, 2) if Q_IN_REGISTERS else None
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, score))
    s_q = matrix(s_qs.index(WARPGROUP))
    for n in range(items):
        head, first_t = work_item(n, T, BLOCK_T)
        first_t += WARPGROUP * BLOCK_T
        mbarrier.wait(q_full.index(WARPGROUP), n & 1)
        q = columns(s_q, 0, LOW, operand)
        q_high = columns(s_q, LOW, HIGH, operand) if HIGH > 0 else q
        if PERSISTENT and Q_IN_REGISTERS:
            fence_async_shared()  # between these reads and the next item's load
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        out = sum_rows(
            WARPGROUP, LOW, HIGH, HAS_GATE, TURNS, q, q_high, s_ku, s_v, turns, ku_full, ku_empty, v_full, v_empty,
            gate_ptr + head.to(gl.int64) * stride_gateh, stride_gatel, stride_gatee, first_t + offs_t, T,
            n * tiles, tiles_f, tiles,
        )  # fmt: skip
        if PERSISTENT and not Q_IN_REGISTERS:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
        if PERSISTENT:
            release(v_empty, (n + 1) * tiles - 1, STAGES)
            tma.store_wait(pendings=0)  # of the item before
        matrix(s_outs.index(WARPGROUP)).store(out.to(s_qs.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_t, head, 0], s_outs.index(WARPGROUP))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "stride_gatel"])
def forward_kernel(
    q_desc, k_desc, u_desc, v_desc, out_desc, gate_ptr, stride_gatel, stride_gateh, stride_gatee,
    T, H, E, F, GROUP, LOW: gl.constexpr, HIGH: gl.constexpr, STAGES: gl.constexpr, HAS_GATE: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, TURNS: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """q (T, H, D), k, u, v (H_kv E, F, D), gate (T, H, E) -> out (T, H, D)."""
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[1]
    BLOCK_D: gl.constexpr = k_desc.block_shape[2]
    s_qs = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_T, 1, BLOCK_D], q_desc.layout)
    s_ku = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 2, BLOCK_F, BLOCK_D], k_desc.layout)
    s_v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_F, BLOCK_D], v_desc.layout)
    # Without PERSISTENT the output leaves from Q's place: Q has been read by then, and no other follows.
    s_outs = gl.allocate_shared_memory(q_desc.dtype, s_qs.shape, out_desc.layout) if PERSISTENT else s_qs
    q_full = allocate_barriers(2, 1)
    q_empty = allocate_barriers(2, 1)
    ku_full = allocate_barriers(STAGES, 1)
    ku_empty = allocate_barriers(STAGES, 2)
    v_full = allocate_barriers(STAGES, 1)
    v_empty = allocate_barriers(STAGES, 2)
    turns = allocate_barriers(2, 1)
    fence_async_shared()

    # The program's work items; without PERSISTENT the grid has a program for each.
    items = gl.cdiv(gl.cdiv(T, 2 * BLOCK_T) * H - gl.program_id(0), gl.num_programs(0)) if PERSISTENT else 1
    tiles_f = gl.cdiv(F, BLOCK_F)
    consumer_arguments = (  # no constexpr among them: an assignment makes a run-time value of it
        out_desc, s_qs, s_outs, s_ku, s_v, turns, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
        gate_ptr, stride_gatel, stride_gateh, stride_gatee, items, T, tiles_f, E * tiles_f,
    )  # fmt: skip
    producer_arguments = (
        q_desc, k_desc, u_desc, v_desc, s_qs, s_ku, s_v, q_full, q_empty, ku_full, ku_empty, v_full, v_empty,
        items, T, E, GROUP, tiles_f, E * tiles_f,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, LOW, HIGH, HAS_GATE, Q_IN_REGISTERS, TURNS, PERSISTENT) + consumer_arguments),  # noqa: RUF005 - Gluon knows no star
            (consume, (1, LOW, HIGH, HAS_GATE, Q_IN_REGISTERS, TURNS, PERSISTENT) + consumer_arguments),  # noqa: RUF005
            (produce, producer_arguments),
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
        "T": T, "H": H, "E": E, "F": F, "GROUP": H // H_kv, "STAGES": tile.stages, "HAS_GATE": gate is not None,
        "Q_IN_REGISTERS": tile.q_in_registers, "TURNS": tile.turns, "PERSISTENT": tile.persistent,
    }  # fmt: skip
    items = H * -(-T // (2 * tile.block_t))
    programs = min(items, processors(q.device)) if tile.persistent else items
    return Launch(forward_kernel, (programs,), arguments, num_warps=4, num_stages=1)


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() > 0:
        plan_forward(flat(q), k, u, v, None if gate is None else flat(gate), flat(out)).run()
    return out

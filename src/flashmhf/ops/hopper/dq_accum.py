"""The float32 accumulator of dQ in global memory, to which the programs of the fused backward add, and its conversion.

Its layout is one of two. By "rows" it is (tokens, H, BLOCK_D): a thread adds pairs of neighbours, and the 32 pairs of a
warp lie in eight rows, 32 bytes in each. By "fragments" it is (tiles, H, BLOCK_T / 16, BLOCK_D / 8, 8, 4, 2, 2):
16 tokens x 8 columns are contiguous, in the order of a warp's accumulator fragment (token, pair of columns; token + 0
or 8, neighbour). All four values of a thread are then neighbours, and a warp's reduction covers 512 contiguous bytes:
half as many reductions, and no cache line is touched twice. `convert_dq` undoes the permutation.

Alternatively TMA adds a whole tile, by rows, from shared memory ("tma"). No thread issues reductions, but the tile goes
through shared memory, 32 KiB at head dim 64; at head dim 128 there is no room for its 64 KiB.
"""

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmhf.ops.hopper.launch import token_descriptor
from flashmhf.ops.hopper.primitives import as_matrix, mma, mma_add, opaque_zero, split_columns
from flashmhf.ops.hopper.tiles import BackwardTile, block_d


@gluon.jit
def red_add_v2(ptrs, values):
    """Atomically adds pairs of neighbours to float32 memory, in no particular order among programs."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;",
        "=r,=r,l,l,f,f",
        [ptrs.to(gl.int64, bitcast=True), values],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def red_add_v4(ptrs, values):
    """Atomically adds groups of a thread's four values to four neighbours in float32 memory."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [ptrs.to(gl.int64, bitcast=True), values],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def red_add_columns(ptrs, values, FRAGMENTS: gl.constexpr):
    """Adds values to memory eight columns at a time, so that the addresses are a few registers and constant offsets.

    ptrs (rows, 8) point at the first eight columns.
    """
    COLUMNS: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS // 2, 16])
    if COLUMNS > 8:
        left, right = split_columns(values, layout)
        red_add_columns(ptrs, left, FRAGMENTS)
        red_add_columns(ptrs + COLUMNS // 2 * (16 if FRAGMENTS else 1), right, FRAGMENTS)
    elif FRAGMENTS:
        red_add_v4(ptrs, values)
    else:
        red_add_v2(ptrs, values)


@gluon.jit
def red_add_tile(dq_ptr, dq, i, t, head, H, FRAGMENTS: gl.constexpr):
    """Adds dq (BLOCK_T, BLOCK_D) of item i: the tokens of one head from t on."""
    BLOCK_T: gl.constexpr = dq.shape[0]
    BLOCK_D: gl.constexpr = dq.shape[1]
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 16])
    rows = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, narrow))
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, narrow))
    if FRAGMENTS:  # the address of a thread's first value (upper eight rows, even column); its other three follow
        rows = rows // 16 * (16 * BLOCK_D) + rows % 8 * 16
        columns *= 2
        head *= BLOCK_T
    else:
        rows *= H * BLOCK_D
    rows += opaque_zero(i)  # keeps 64-bit addresses from being held in registers across tiles
    red_add_columns(dq_ptr + (t.to(gl.int64) * H + head) * BLOCK_D + (rows[:, None] + columns[None, :]), dq, FRAGMENTS)


@builtin
def tma_reduce_add(desc, coord, source, _semantic=None):
    """Issues a TMA reduction that adds a tile of shared memory to global memory; not exposed by Gluon 3.6 and 3.7."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle)


@gluon.jit
def tma_add_tile(dq_desc, s_dq, dq, i, t, head):
    """Like `red_add_tile`, through s_dq (1, BLOCK_T, 1, BLOCK_D)."""
    tma.store_wait(pendings=0)  # the previous tile has been read from shared memory
    s_tile = s_dq.index(opaque_zero(i))
    as_matrix(s_tile).store(dq)
    fence_async_shared()
    tma_reduce_add(dq_desc, [t, head, 0], s_tile)


@gluon.jit
def accumulate_dq(
    dm, dn, s_ku, s_dq, dq_accum, i, t, head, H, dku_layout: gl.constexpr, FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr
):  # fmt: skip
    """Computes dQ = dM K + dN U of tile i and adds it to the accumulator."""
    BLOCK_T: gl.constexpr = dm.shape[0]
    BLOCK_F: gl.constexpr = dm.shape[1]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    lhs_layout: gl.constexpr = gl.DotOperandLayout(0, dku_layout, 2)
    s_k = as_matrix(s_ku.index(opaque_zero(i))).slice(0, BLOCK_F)
    s_u = as_matrix(s_ku.index(opaque_zero(i))).slice(BLOCK_F, BLOCK_F)
    dq = mma(gl.convert_layout(dm, lhs_layout), s_k, gl.zeros([BLOCK_T, BLOCK_D], gl.float32, dku_layout))
    dq = mma_add(gl.convert_layout(dn, lhs_layout), s_u, dq)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
    if BY_TMA:
        tma_add_tile(dq_accum, s_dq, dq, i, t, head)
    else:
        red_add_tile(dq_accum, dq, i, t, head, H, FRAGMENTS)


def allocate_dq_accum(q: Tensor, tile: BackwardTile) -> Tensor:
    """The zeroed accumulator for q (T, H, D), padded to whole tiles, in the layout that tile.dq selects."""
    T, H, D = q.shape
    tiles, BLOCK_D = -(-T // tile.block_t), block_d(D)
    by_rows = (tiles * tile.block_t, H, BLOCK_D)
    in_fragments = (tiles, H, tile.block_t // 16, BLOCK_D // 8, 8, 4, 2, 2)
    return torch.zeros(in_fragments if tile.dq == "fragments" else by_rows, dtype=torch.float32, device=q.device)


def dq_accum_argument(dq_accum: Tensor, tile: BackwardTile) -> Tensor | TensorDescriptor:
    """The accumulator as the kernel's argument."""
    return token_descriptor(dq_accum, tile.block_t) if tile.dq == "tma" else dq_accum


def convert_dq(dq_accum: Tensor, q: Tensor, tile: BackwardTile) -> Tensor:
    """dQ (T, H, D), contiguous in q's dtype, from the accumulator of `allocate_dq_accum(q, tile)`."""
    T, H, D = q.shape
    if tile.dq != "fragments":
        return dq_accum[:T, :, :D].to(q.dtype)
    token = H * D  # stride of a token
    dq = torch.empty(len(dq_accum) * tile.block_t, H, D, dtype=q.dtype, device=q.device)
    strides = (tile.block_t * token, D, 16 * token, 8, token, 2, 8 * token, 1)  # of the fragment layout's dimensions
    in_fragments = dq.as_strided((*dq_accum.shape[:3], D // 8, *dq_accum.shape[4:]), strides)
    in_fragments.copy_(dq_accum[:, :, :, : D // 8])
    return dq[:T]

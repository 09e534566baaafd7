"""dQ as the programs of the fused backward add it up in float32 memory, and what is returned of it.

The memory is in one of two orders. By rows it is (tokens, H, BLOCK_D): a thread adds two neighbours at a time, and the
32 pairs of a warp lie in eight rows, 32 bytes in each. In fragments it is (tiles, H, BLOCK_T / 16, BLOCK_D / 8,
8, 4, 2, 2): 16 tokens x 8 columns lie together as a warp holds them (token, pair of columns; token + 0 or 8,
neighbour). A thread's four values are then neighbours, too, and a warp's reduction is 512 bytes on end: half as many
reductions, and no cache line is met twice. What rounds dQ reads it in that order.

Or TMA adds a whole tile, by rows, from shared memory: no thread issues a reduction, but the tile is written to shared
memory and read again, where it takes 32 KiB at head dim 64. At head dim 128 there is no room for its 64 KiB.
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
from flashmhf.ops.hopper.primitives import halves, matrix, multiply, multiply_add, zero
from flashmhf.ops.hopper.tiles import BackwardTile, block_d


@gluon.jit
def add_pairs(ptrs, values):
    """Adds two neighbours at a time to float32 memory; the order among programs is open."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;",
        "=r,=r,l,l,f,f",
        [ptrs.to(gl.int64, bitcast=True), values],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def add_fours(ptrs, values):
    """Adds four values of a thread at a time to four neighbours in float32 memory."""
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
def add_columns(ptrs, values, FRAGMENTS: gl.constexpr):
    """Adds values to memory eight columns at a time, so that all addresses are a few registers and constants.

    ptrs (rows, 8) point at the first eight columns.
    """
    COLUMNS: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS // 2, 16])
    if COLUMNS > 8:
        left, right = halves(values, layout)
        add_columns(ptrs, left, FRAGMENTS)
        add_columns(ptrs + COLUMNS // 2 * (16 if FRAGMENTS else 1), right, FRAGMENTS)
    elif FRAGMENTS:
        add_fours(ptrs, values)
    else:
        add_pairs(ptrs, values)


@gluon.jit
def add_tile(dq_ptr, dq, i, t, head, H, FRAGMENTS: gl.constexpr):
    """Adds dq (BLOCK_T, BLOCK_D), of item i: the tokens from t on of one head."""
    BLOCK_T: gl.constexpr = dq.shape[0]
    BLOCK_D: gl.constexpr = dq.shape[1]
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 16])
    rows = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, narrow))
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, narrow))
    if FRAGMENTS:  # where a thread's first value goes, of an even column of the upper eight rows; the rest follow
        rows = rows // 16 * (16 * BLOCK_D) + rows % 8 * 16
        columns *= 2
        head *= BLOCK_T
    else:
        rows *= H * BLOCK_D
    rows += zero(i)  # or a 64-bit address is kept in registers from tile to tile
    add_columns(dq_ptr + (t.to(gl.int64) * H + head) * BLOCK_D + (rows[:, None] + columns[None, :]), dq, FRAGMENTS)


@builtin
def reduce_add(desc, coord, source, _semantic=None):
    """Asks TMA to add a tile of shared memory to global memory: an operation without a name in Gluon 3.6 and 3.7."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle)


@gluon.jit
def add_tile_by_tma(dq_desc, s_dq, dq, i, t, head):
    """As `add_tile`, through shared memory (1, BLOCK_T, 1, BLOCK_D)."""
    tma.store_wait(pendings=0)  # the tile before has left shared memory
    s_tile = s_dq.index(zero(i))
    matrix(s_tile).store(dq)
    fence_async_shared()
    reduce_add(dq_desc, [t, head, 0], s_tile)


@gluon.jit
def add_dq(
    dm, dn, s_ku, s_dq, dq_accum, i, t, head, H, whole: gl.constexpr, FRAGMENTS: gl.constexpr, BY_TMA: gl.constexpr
):  # fmt: skip
    """dQ = dM K + dN U, added to float32 memory."""
    BLOCK_T: gl.constexpr = dm.shape[0]
    BLOCK_F: gl.constexpr = dm.shape[1]
    BLOCK_D: gl.constexpr = s_ku.shape[3]
    operand: gl.constexpr = gl.DotOperandLayout(0, whole, 2)
    s_k = matrix(s_ku.index(zero(i))).slice(0, BLOCK_F)
    s_u = matrix(s_ku.index(zero(i))).slice(BLOCK_F, BLOCK_F)
    dq = multiply(gl.convert_layout(dm, operand), s_k, gl.zeros([BLOCK_T, BLOCK_D], gl.float32, whole))
    dq = multiply_add(gl.convert_layout(dn, operand), s_u, dq)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
    if BY_TMA:
        add_tile_by_tma(dq_accum, s_dq, dq, i, t, head)
    else:
        add_tile(dq_accum, dq, i, t, head, H, FRAGMENTS)


def dq_buffer(q: Tensor, tile: BackwardTile) -> Tensor:
    """Zeros in float32 that whole tiles of q (T, H, D) can be added to, in the tile's order."""
    T, H, D = q.shape
    tiles, BLOCK_D = -(-T // tile.block_t), block_d(D)
    by_rows = (tiles * tile.block_t, H, BLOCK_D)
    in_fragments = (tiles, H, tile.block_t // 16, BLOCK_D // 8, 8, 4, 2, 2)
    return torch.zeros(in_fragments if tile.dq == "fragments" else by_rows, dtype=torch.float32, device=q.device)


def dq_argument(added: Tensor, tile: BackwardTile) -> Tensor | TensorDescriptor:
    """The buffer as the kernel takes it."""
    return token_descriptor(added, tile.block_t) if tile.dq == "tma" else added


def rounded_dq(added: Tensor, q: Tensor, tile: BackwardTile) -> Tensor:
    """(T, H, D) in q's dtype, contiguous, of what has been added to `dq_buffer(q, tile)`."""
    T, H, D = q.shape
    if tile.dq != "fragments":
        return added[:T, :, :D].to(q.dtype)
    token = H * D  # elements from one to the next
    dq = torch.empty(len(added) * tile.block_t, H, D, dtype=q.dtype, device=q.device)
    strides = (tile.block_t * token, D, 16 * token, 8, token, 2, 8 * token, 1)  # of the fragments' dims, see above
    in_fragments = dq.as_strided((*added.shape[:3], D // 8, *added.shape[4:]), strides)
    in_fragments.copy_(added[:, :, :, : D // 8])
    return dq[:T]

"""Building blocks of the Hopper kernels: TMA pipelines, wgmma products, the activation and its derivative.

A pipeline is a number of stages in shared memory with two mbarriers each. The producer waits until a stage is empty and
issues TMA loads into it; their bytes complete `full`. Consumers wait for `full` and arrive at `empty` when their
products have read the stage. Item i uses stage i % STAGES for the (i // STAGES)-th time; the parity of that count is
the phase to wait for.

Names with the prefix `s_` are in shared memory; the others are in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers whose phases complete after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_full(full, i, STAGES: gl.constexpr):
    """Waits until item i has arrived."""
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def wait_empty(empty, i, STAGES: gl.constexpr):
    """Waits until the stage of item i may be overwritten; returns at once on its first use."""
    mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def release(empty, i, STAGES: gl.constexpr, pred=True):
    """Arrives at `empty`: item i has been read."""
    mbarrier.arrive(empty.index(i % STAGES), count=1, pred=pred)


@gluon.jit
def tma_load(desc, coord, full, s_tile):
    """Issues the TMA load of a tile, the only one of its barrier's phase; zeros outside the tensor."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coord, full, s_tile)


@gluon.jit
def tma_load_pair(first_desc, second_desc, coord, full, s_pair):
    """Issues the TMA loads of one tile from each of two tensors, stacked as (2, rows, columns)."""
    mbarrier.expect(full, 2 * first_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(first_desc, coord, full, s_pair.slice(0, 1))
    tma.async_copy_global_to_shared(second_desc, coord, full, s_pair.slice(1, 1))


@gluon.jit
def as_matrix(s_tile):
    """A (..., rows, columns) tile of shared memory as a matrix; the outer dimensions are folded into the rows."""
    COLUMNS: gl.constexpr = s_tile.shape[2]
    ROWS: gl.constexpr = s_tile.shape[0] * s_tile.shape[1]
    return s_tile.reshape([ROWS, COLUMNS])


@gluon.jit
def opaque_zero(i):
    """0 for every item i, which the compiler cannot know.

    Indexing a tile that stays in shared memory with it keeps the compiler from hoisting the tile's addresses out of the
    loop, where they would take the registers that the accumulators need.
    """
    return i >> 30


@gluon.jit
def mma(a, s_b, like):
    """Issues a @ s_b; wait for it before use. `like` only gives shape and layout, its values are not read."""
    return warpgroup_mma(a, s_b, like, use_acc=False, is_async=True)


@gluon.jit
def mma_add(a, s_b, acc):
    """Issues acc += a @ s_b."""
    return warpgroup_mma(a, s_b, acc, is_async=True)


@gluon.jit
def mma_nt(a, a_high, s_b, like, D_LOW: gl.constexpr, D_HIGH: gl.constexpr):
    """Issues a @ s_b^T over the first D_LOW + D_HIGH columns of both; `a_high` holds a's last D_HIGH of those."""
    acc = mma(a, slice_columns(s_b, 0, D_LOW, None).permute((1, 0)), like)
    if D_HIGH > 0:
        acc = mma_add(a_high, slice_columns(s_b, D_LOW, D_HIGH, None).permute((1, 0)), acc)
    return acc


@gluon.jit
def slice_columns(s_matrix, FIRST: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """COUNT columns of a matrix, as a view of shared memory, or loaded to registers in LAYOUT unless that is None."""
    part = s_matrix if s_matrix.shape[1] == COUNT else s_matrix.slice(FIRST, COUNT, dim=1)
    return part if LAYOUT is None else part.load(LAYOUT)


@gluon.jit
def split_columns(pair, layout: gl.constexpr):
    """The left and the right half of the columns. A thread holds both, so no data moves."""
    ROWS: gl.constexpr = pair.shape[0]
    COLUMNS: gl.constexpr = pair.shape[1] // 2
    left, right = pair.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1]).split()
    return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


@gluon.jit
def join_columns(left, right, layout: gl.constexpr):
    """The inverse of `split_columns`."""
    ROWS: gl.constexpr = left.shape[0]
    COLUMNS: gl.constexpr = left.shape[1] * 2
    return gl.convert_layout(gl.join(left, right).permute([0, 2, 1]).reshape([ROWS, COLUMNS]), layout)


@gluon.jit
def tanh(x):
    """One special-function instruction, relative error up to 2^-11: float16's rounding, an eighth of bfloat16's."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def activation_backward(scores, da, gate, m_layout: gl.constexpr, dtype: gl.constexpr):
    """From S = [M N] and dA: P, dM and dN in the inputs' dtype, and dgate per row."""
    m, n = split_columns(scores, m_layout)
    t = tanh(0.5 * m)
    sigmoid = 0.5 + 0.5 * t
    silu = m * sigmoid
    a = silu * n
    dgate = gl.sum(da * a, axis=1)
    da = da * gate[:, None]
    dm = da * n * (sigmoid + silu * (1.0 - sigmoid))
    return (a * gate[:, None]).to(dtype), dm.to(dtype), (da * silu).to(dtype), dgate

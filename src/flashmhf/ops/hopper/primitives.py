"""What the Hopper kernels are written with: tiles that arrive through a ring, products, the activation.

A ring is a number of stages in shared memory with two barriers each. The producer waits until a stage is empty and asks
TMA to fill it; TMA's bytes complete `full`; every consumer waits for `full` and arrives at `empty` when its products
have read the stage. Item i lies in stage i % STAGES, in the stage's use number i // STAGES, whose parity a wait names.

Prefixes say where a value lives: `s` shared memory; what has none is in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which completes after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_full(full, i, STAGES: gl.constexpr):
    """Until item i has arrived."""
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def wait_empty(empty, i, STAGES: gl.constexpr):
    """Until the stage of item i may be filled; at once in its first use."""
    mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def release(empty, i, STAGES: gl.constexpr, pred=True):
    """Item i has been read."""
    mbarrier.arrive(empty.index(i % STAGES), count=1, pred=pred)


@gluon.jit
def load(desc, coord, full, s_tile):
    """Asks TMA for one tile, the only one of its barrier; zeros where it lies outside the tensor."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coord, full, s_tile)


@gluon.jit
def load_pair(first_desc, second_desc, coord, full, s_pair):
    """Asks TMA for a tile of each of two tensors, which come to lie behind one another: (2, rows, columns)."""
    mbarrier.expect(full, 2 * first_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(first_desc, coord, full, s_pair.slice(0, 1))
    tma.async_copy_global_to_shared(second_desc, coord, full, s_pair.slice(1, 1))


@gluon.jit
def matrix(s_tile):
    """A (..., rows, columns) tile of shared memory as a matrix: the outer dimensions become rows."""
    COLUMNS: gl.constexpr = s_tile.shape[2]
    ROWS: gl.constexpr = s_tile.shape[0] * s_tile.shape[1]
    return s_tile.reshape([ROWS, COLUMNS])


@gluon.jit
def zero(i):
    """0 for every item i, which the compiler does not know.

    Indexing with it keeps the addresses of a tile that stays in shared memory from being computed before the loop: they
    would fill the registers that the accumulators need.
    """
    return i >> 30


@gluon.jit
def multiply(a, s_b, zero):
    """Issues a @ s_b; wait for it before use. `zero` is never read, it names shape and layout."""
    return warpgroup_mma(a, s_b, zero, use_acc=False, is_async=True)


@gluon.jit
def columns(s_matrix, FIRST: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """Some columns of a matrix: where they lie in shared memory, or in registers, in LAYOUT."""
    part = s_matrix if s_matrix.shape[1] == COUNT else s_matrix.slice(FIRST, COUNT, dim=1)
    return part if LAYOUT is None else part.load(LAYOUT)


@gluon.jit
def multiply_rows(a, a_high, s_b, zero, LOW: gl.constexpr, HIGH: gl.constexpr):
    """Issues a @ s_b^T over the first LOW + HIGH columns of both; the rest is padding. `a_high` holds the last HIGH."""
    total = multiply(a, columns(s_b, 0, LOW, None).permute((1, 0)), zero)
    if HIGH > 0:
        total = multiply_add(a_high, columns(s_b, LOW, HIGH, None).permute((1, 0)), total)
    return total


@gluon.jit
def multiply_add(a, s_b, total):
    """Issues total += a @ s_b."""
    return warpgroup_mma(a, s_b, total, is_async=True)


@gluon.jit
def halves(pair, layout: gl.constexpr):
    """The left and the right half of the columns. A thread holds both, so nothing moves."""
    ROWS: gl.constexpr = pair.shape[0]
    COLUMNS: gl.constexpr = pair.shape[1] // 2
    left, right = pair.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1]).split()
    return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


@gluon.jit
def side_by_side(left, right, layout: gl.constexpr):
    """The inverse of `halves`."""
    ROWS: gl.constexpr = left.shape[0]
    COLUMNS: gl.constexpr = left.shape[1] * 2
    return gl.convert_layout(gl.join(left, right).permute([0, 2, 1]).reshape([ROWS, COLUMNS]), layout)


@gluon.jit
def tanh(x):
    """One instruction of the special-function unit, relative error up to 2^-11: float16's rounding, bfloat16's / 8."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def differentiate(scores, da, r, score: gl.constexpr, dtype: gl.constexpr):
    """From S = [M N] and dA: P, dM and dN in the inputs' dtype, and dR of every row."""
    m, n = halves(scores, score)
    t = tanh(0.5 * m)
    sigmoid = 0.5 + 0.5 * t
    silu = m * sigmoid
    a = silu * n
    dr = gl.sum(da * a, axis=1)
    da = da * r[:, None]
    dm = da * n * (sigmoid + silu * (1.0 - sigmoid))
    return (a * r[:, None]).to(dtype), dm.to(dtype), (da * silu).to(dtype), dr

"""Device functions shared by the forward and backward kernels."""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# Arguments that depend on the number of tokens and gain nothing from specialisation: one kernel serves every length.
DO_NOT_SPECIALIZE = ("T", "L", "stride_gateb", "stride_dgateb", "tiles_per_split")


@triton.jit
def tanh(x):
    """One special-function instruction, relative error up to 2^-11: for 16-bit inputs on NVIDIA (`has_fast_tanh`)."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu_of(m, FAST_TANH: tl.constexpr):
    """SiLU(m) = m sigmoid(m) = h + h tanh(h) with h = m / 2."""
    if FAST_TANH:
        h = 0.5 * m
        return h + h * tanh(h)
    return m * tl.sigmoid(m)


@triton.jit
def silu_and_slope_of(m, FAST_TANH: tl.constexpr):
    """SiLU(m) and SiLU'(m)."""
    sigmoid = 0.5 + 0.5 * tanh(0.5 * m) if FAST_TANH else tl.sigmoid(m)
    silu = m * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def token_offsets(offs_t, L, stride_b, stride_l, FLAT: tl.constexpr):
    """64-bit element offsets of tokens whose index runs over (B, L)."""
    if FLAT:
        return offs_t.to(tl.int64) * stride_l
    return (offs_t // L).to(tl.int64) * stride_b + (offs_t % L).to(tl.int64) * stride_l


@triton.jit
def packed_rows(rows, T, PACK: tl.constexpr):
    """Token and head of each row of PACK heads packed into the token dimension, one head after another."""
    if PACK == 1:
        token, head = rows, 0
    else:
        token, head = rows % T, rows // T
    return token, head


@triton.jit
def load_tile(ptrs, mask_rows, mask_d, EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr):
    """A (rows, BLOCK_D) tile with zeros outside the masks; unmasked where the sizes are even."""
    if EVEN_ROWS and EVEN_D:
        return tl.load(ptrs)
    if EVEN_ROWS:
        return tl.load(ptrs, mask=mask_d[None, :], other=0.0)
    if EVEN_D:
        return tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_rows[:, None] & mask_d[None, :], other=0.0)


@triton.jit
def load_tokens(
    ptr, offs_t, offs_d, mask_t, head, L, stride_b, stride_l, stride_h, stride_x, D: tl.constexpr, FLAT: tl.constexpr
):
    """The (tokens, BLOCK_D) tile of one head, with zeros outside the tokens and beyond D."""
    rows = token_offsets(offs_t, L, stride_b, stride_l, FLAT) + head * stride_h
    return load_tile(ptr + rows[:, None] + offs_d[None, :] * stride_x, mask_t, offs_d < D, False, offs_d.shape[0] == D)


# Whether the kernels, and the library functions that they call, run in Triton's interpreter: TRITON_INTERPRET decides
# when a module is imported.
INTERPRETED, LIBRARY_INTERPRETED = (not isinstance(function, JITFunction) for function in (load_tile, tl.sum))

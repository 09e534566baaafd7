"""Device functions that the forward and backward kernels share."""

import triton
import triton.language as tl

# Arguments that change with the number of tokens and make no better code: one compiled kernel serves every length.
DO_NOT_SPECIALIZE = ("T", "L", "stride_gateb", "stride_dgateb", "tiles_per_split")


@triton.jit
def token_offsets(offs_t, L, stride_b, stride_l, FLAT: tl.constexpr):
    """64-bit element offsets of tokens whose index runs over (B, L)."""
    if FLAT:
        return offs_t.to(tl.int64) * stride_l
    return (offs_t // L).to(tl.int64) * stride_b + (offs_t % L).to(tl.int64) * stride_l


@triton.jit
def stacked_rows(rows, T, STACK: tl.constexpr):
    """Token, and head among STACK heads, of each row: the heads lie behind one another, as more tokens of one head."""
    if STACK == 1:
        token, head = rows, 0
    else:
        token, head = rows % T, rows // T
    return token, head


@triton.jit
def load_tile(ptrs, mask_rows, mask_d, EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr):
    """A (rows, BLOCK_D) tile with zeros outside the masks; no mask where the sizes need none."""
    if EVEN_ROWS and EVEN_D:
        return tl.load(ptrs)
    if EVEN_ROWS:
        return tl.load(ptrs, mask=mask_d[None, :], other=0.0)
    if EVEN_D:
        return tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_rows[:, None] & mask_d[None, :], other=0.0)

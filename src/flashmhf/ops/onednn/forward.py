"""The forward kernel: S = (SiLU(Q K^T) * (Q U^T) * gate) V, head by head."""

import numba

from flashmhf.ops.onednn.elementwise import activate_bfloat16, activate_float32
from flashmhf.ops.onednn.launch import BLOCK_ROWS, BLOCK_TOKENS, region
from flashmhf.ops.onednn.packing import (
    clear_columns,
    copy,
    copy_rows,
    pack_pairs,
    round_rows,
    transpose_words,
    widen_rows,
)
from flashmhf.ops.onednn.primitives import (
    call_brgemm,
    call_release,
    fetch_add,
    floats,
    halves,
    inlined,
    kernel,
    thread_number,
    words,
)


@inlined
def segment_of(a, segment):
    """The tokens of a segment."""
    return a.tokens * segment // a.segments, a.tokens * (segment + 1) // a.segments


@inlined
def padded_rows(a, rows):
    return rows + rows % 2 if a.is_bfloat16 else rows


@inlined
def element_bytes(a):
    return 2 if a.is_bfloat16 else 4


@inlined
def block_of_sums(a, h, t, tokens):
    """The first row of a block's float32 sums: one block, or all of a segment where several panels add to them."""
    group = a.heads // a.kv_heads
    return 0 if a.panel_rows == a.rows else t * group + h % group * tokens


@kernel
def load(a, source, target, tokens):
    """A block of one head's columns, (tokens, D) with the stride of all heads, as float32."""
    D, stride = a.head_dim, a.heads * a.head_dim
    size = stride * (tokens - 1) + D
    if a.is_bfloat16:
        widen_rows(halves(source, size), floats(target, D * tokens), tokens, D, stride)
    else:
        copy_rows(floats(source, size), floats(target, D * tokens), tokens, D, stride, D)


@kernel
def store(a, source, target, tokens):
    """The reverse: float32 to a block of one head's columns."""
    D, stride = a.head_dim, a.heads * a.head_dim
    size = stride * (tokens - 1) + D
    if a.is_bfloat16:
        round_rows(floats(source, D * tokens), halves(target, size), tokens, D, stride)
    else:
        copy_rows(floats(source, D * tokens), floats(target, size), tokens, D, D, stride)


@kernel
def pack_forward(a, workspace, head, first, last):
    """[K^T U^T] of each block of rows, (D, 2 rows), and V: as pairs of rows for bfloat16."""
    for row in range(first, last, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, last - row)
        pack_ku_t(a, workspace + a.buffer_ku_t, head, first, row, rows)
        pack_rows(a, a.v, workspace + a.buffer_v + (row - first) * a.head_dim * element_bytes(a), head, row, rows)


@kernel
def pack_ku_t(a, target, head, first, row, rows):
    size, padded = element_bytes(a), padded_rows(a, rows)
    target += 2 * (row - first) * a.head_dim * size
    transpose_block(a, a.k, target, head, row, rows, padded, 2 * padded)
    transpose_block(a, a.u, target + 4 * padded, head, row, rows, padded, 2 * padded)


@kernel
def transpose_block(a, source, target, head, row, rows, padded, stride):
    """The transposed block of a parameter, (D, padded) with a stride, or (D / 2, padded, 2)."""
    source_words = a.head_dim * element_bytes(a) // 4
    source += (head * a.rows + row) * a.head_dim * element_bytes(a)
    out = words(target, stride * source_words)
    transpose_words(words(source, rows * source_words), out, rows, source_words, source_words, stride)
    clear_columns(out, source_words, rows, padded, stride)


@kernel
def pack_rows(a, source, target, head, row, rows):
    """A block of a parameter as it is, or as pairs of rows."""
    size = rows * a.head_dim
    source += (head * a.rows + row) * a.head_dim * element_bytes(a)
    if a.is_bfloat16:
        pack_pairs(halves(source, size), words(target, padded_rows(a, rows) // 2 * a.head_dim), rows, a.head_dim)
    else:
        copy(words(source, size), words(target, size))


@kernel
def forward_block(a, workspace, h, t, tokens, first, last, segment_start):
    """One block of tokens of one head against the packed rows."""
    D, size, stride = a.head_dim, element_bytes(a), a.heads * a.head_dim
    q = a.q + (t * stride + h * D) * size
    out, out_stride = a.out + (t * stride + h * D) * size, stride
    mn, p, p_stride = workspace + a.buffer_mn, workspace + a.buffer_p, 0
    if a.is_bfloat16:
        out, out_stride = workspace + a.buffer_sum + 4 * D * block_of_sums(a, h, t - segment_start, tokens), D
    gate = floats(a.gate + 4 * (t * a.gate_stride + h * (a.gate_stride // a.heads)), 1 << 40)
    for row in range(first, last, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, last - row)
        padded = padded_rows(a, rows)
        at = (row - first) * D * size
        ku_t, v = workspace + a.buffer_ku_t + 2 * at, workspace + a.buffer_v + at
        call_brgemm(a.brgemm, tokens, 2 * padded, D, stride, 2 * padded, 2 * padded, 0, q, ku_t, mn, a.is_bfloat16)
        tile = floats(mn, 2 * padded * tokens)
        if a.is_bfloat16:
            activate_bfloat16(tile, halves(p, padded * tokens), gate, a.gate_stride, tokens, rows, padded, row, a.width)
            p_stride = padded
        else:
            activate_float32(tile, gate, a.gate_stride, tokens, rows, padded, row, a.width)
            p, p_stride = mn, 2 * padded
        call_brgemm(a.brgemm, tokens, D, padded, p_stride, D, out_stride, row > 0, p, v, out, a.is_bfloat16)
    if a.is_bfloat16 and last == a.rows:
        store(a, out, a.out + (t * stride + h * D) * size, tokens)


@region
def forward_region(pointer):
    a = numba.carray(pointer, 1)[0]
    workspace = a.workspace + thread_number(a.thread_number) * a.workspace_bytes
    item = fetch_add(a.next_item)
    while item < a.items:
        head, segment = item // a.segments, item % a.segments
        start, stop = segment_of(a, segment)
        for first in range(0, a.rows, a.panel_rows):
            last = min(first + a.panel_rows, a.rows)
            pack_forward(a, workspace, head, first, last)
            group = a.heads // a.kv_heads
            for h in range(head * group, (head + 1) * group):
                for t in range(start, stop, BLOCK_TOKENS):
                    forward_block(a, workspace, h, t, min(BLOCK_TOKENS, stop - t), first, last, start)
        item = fetch_add(a.next_item)
    call_release(a.release, a.is_bfloat16)

"""The backward kernel: all gradients, head by head, from recomputed activations."""

import numba

from flashmhf.ops.onednn.elementwise import differentiate_bfloat16, differentiate_float32
from flashmhf.ops.onednn.forward import (
    block_of_sums,
    element_bytes,
    pack_ku_t,
    pack_rows,
    padded_rows,
    segment_of,
    store,
    transpose_block,
)
from flashmhf.ops.onednn.launch import BLOCK_ROWS, BLOCK_TOKENS, region
from flashmhf.ops.onednn.packing import (
    clear_columns,
    clear_rows,
    transpose_bfloat16,
    transpose_rounded,
    transpose_words,
)
from flashmhf.ops.onednn.primitives import (
    call_brgemm,
    call_release,
    fetch_add,
    floats,
    halves,
    kernel,
    thread_number,
    words,
)


@kernel
def pack_backward(a, workspace, head, first, last):
    """Of each block of rows: [K^T U^T] (D, 2 rows), [K U] (2 rows, D), V^T (D, rows)."""
    size = element_bytes(a)
    for row in range(first, last, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, last - row)
        padded, at = padded_rows(a, rows), (row - first) * a.head_dim * size
        pack_ku_t(a, workspace + a.buffer_ku_t, head, first, row, rows)
        transpose_block(a, a.v, workspace + a.buffer_v_t + at, head, row, rows, padded, padded)
        if a.dq:
            ku = workspace + a.buffer_ku + 2 * at
            pack_rows(a, a.k, ku, head, row, rows)
            pack_rows(a, a.u, ku + padded * a.head_dim * size, head, row, rows)


@kernel
def backward_block(a, workspace, h, t, tokens, first, last, segment_start, is_first):
    """One block of tokens of one head against the packed rows."""
    D, size, stride, brgemm, pairs = a.head_dim, element_bytes(a), a.heads * a.head_dim, a.brgemm, a.is_bfloat16
    at = (t * stride + h * D) * size
    q, dout = a.q + at, a.dout + at
    padded_tokens = tokens + tokens % 2 if pairs else tokens
    needs_ku, needs_v = a.dk or a.du, a.dv
    if needs_ku:
        transpose_tokens(a, q, workspace + a.buffer_q_t, tokens, padded_tokens)
    if needs_v:
        transpose_tokens(a, dout, workspace + a.buffer_dout_t, tokens, padded_tokens)
    dq, dq_stride = a.dq + at, stride
    if pairs:
        dq, dq_stride = workspace + a.buffer_sum + 4 * D * block_of_sums(a, h, t - segment_start, tokens), D
    E = a.gate_stride // a.heads
    at_gate = 4 * (t * a.gate_stride + h * E)
    gate = floats(a.gate + at_gate, 1 << 40)
    dgate = floats(a.dgate + at_gate, 1 << 40 if a.dgate else 0)
    if a.dgate and first == 0:
        clear_columns(words(a.dgate + at_gate, 1 << 40), tokens, 0, E, a.gate_stride)
    products = floats(workspace + a.buffer_products, 2 * BLOCK_ROWS)
    mn, da = workspace + a.buffer_mn, workspace + a.buffer_da
    for row in range(first, last, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, last - row)
        padded = padded_rows(a, rows)
        at_row = (row - first) * D * size
        ku_t, v_t = workspace + a.buffer_ku_t + 2 * at_row, workspace + a.buffer_v_t + at_row
        call_brgemm(brgemm, tokens, 2 * padded, D, stride, 2 * padded, 2 * padded, 0, q, ku_t, mn, pairs)
        call_brgemm(brgemm, tokens, padded, D, stride, padded, padded, 0, dout, v_t, da, pairs)
        mn_tile, da_tile = floats(mn, 2 * padded * padded_tokens), floats(da, padded * padded_tokens)
        if pairs:
            clear_rows(mn_tile, 2 * padded * tokens)
            clear_rows(da_tile, padded * tokens)
            dmn, dmn_pairs, p_pairs = (
                workspace + a.buffer_dmn,
                workspace + a.buffer_dmn_pairs,
                workspace + a.buffer_p_pairs,
            )
            differentiate_bfloat16(
                mn_tile,
                da_tile,
                halves(dmn, 2 * padded * padded_tokens),
                words(dmn_pairs, padded * padded_tokens),
                words(p_pairs, padded * padded_tokens // 2),
                products,
                gate,
                dgate,
                a.gate_stride,
                tokens,
                rows,
                padded,
                row,
                a.width,
            )
        else:
            dmn, dmn_pairs, p_pairs = mn, mn, da
            differentiate_float32(
                mn_tile, da_tile, products, gate, dgate, a.gate_stride, tokens, rows, padded, row, a.width
            )
        at_sum = (row - first) * D * 4
        if a.dq:
            ku = workspace + a.buffer_ku + 2 * at_row
            call_brgemm(brgemm, tokens, D, 2 * padded, 2 * padded, D, dq_stride, row > 0, dmn, ku, dq, pairs)
        if needs_ku:
            q_t, sums = workspace + a.buffer_q_t, workspace + a.buffer_dku_t + 2 * at_sum
            n = 2 * padded
            call_brgemm(brgemm, D, n, padded_tokens, padded_tokens, n, n, not is_first, q_t, dmn_pairs, sums, pairs)
        if needs_v:
            dout_t, sums, n = workspace + a.buffer_dout_t, workspace + a.buffer_dv_t + at_sum, padded
            call_brgemm(brgemm, D, n, padded_tokens, padded_tokens, n, n, not is_first, dout_t, p_pairs, sums, pairs)
    if pairs and a.dq and last == a.rows:
        store(a, dq, a.dq + at, tokens)


@kernel
def transpose_tokens(a, source, target, tokens, padded):
    """(tokens, D) of all heads' -> (D, padded)."""
    D, stride = a.head_dim, a.heads * a.head_dim
    size = stride * (tokens - 1) + D
    if a.is_bfloat16:
        transpose_bfloat16(halves(source, size), words(target, D * padded // 2), tokens, D, stride, padded // 2)
    else:
        transpose_words(words(source, size), words(target, D * padded), tokens, D, stride, padded)


@kernel
def store_weight_gradients(a, workspace, segment, head, first, last):
    """The sums of a panel, transposed, to the gradients or to this segment's part of them."""
    D = a.head_dim
    for row in range(first, last, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, last - row)
        padded = padded_rows(a, rows)
        at, at_sum = (head * a.rows + row) * D, (row - first) * D * 4
        if a.weights_are_partial:
            at += segment * a.kv_heads * a.rows * D
        ku = workspace + a.buffer_dku_t + 2 * at_sum
        if a.dk:
            store_transposed(a, ku, a.dk, at, rows, 2 * padded)
        if a.du:
            store_transposed(a, ku + 4 * padded, a.du, at, rows, 2 * padded)
        if a.dv:
            store_transposed(a, workspace + a.buffer_dv_t + at_sum, a.dv, at, rows, padded)


@kernel
def store_transposed(a, source, target, at, rows, stride):
    D = a.head_dim
    if a.is_bfloat16 and not a.weights_are_partial:
        transpose_rounded(floats(source, D * stride), words(target + 2 * at, rows * D // 2), D, rows, stride)
    else:
        transpose_words(words(source, D * stride), words(target + 4 * at, rows * D), D, rows, stride, D)


@region
def backward_region(pointer):
    a = numba.carray(pointer, 1)[0]
    workspace = a.workspace + thread_number(a.thread_number) * a.workspace_bytes
    item = fetch_add(a.next_item)
    while item < a.items:
        head, segment = item // a.segments, item % a.segments
        start, stop = segment_of(a, segment)
        for first in range(0, a.rows, a.panel_rows):
            last = min(first + a.panel_rows, a.rows)
            pack_backward(a, workspace, head, first, last)
            group = a.heads // a.kv_heads
            is_first = True
            for h in range(head * group, (head + 1) * group):
                for t in range(start, stop, BLOCK_TOKENS):
                    backward_block(a, workspace, h, t, min(BLOCK_TOKENS, stop - t), first, last, start, is_first)
                    is_first = False
            store_weight_gradients(a, workspace, segment, head, first, last)
        item = fetch_add(a.next_item)
    call_release(a.release, a.is_bfloat16)

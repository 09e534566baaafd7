"""The forward pass of a few tokens, as in generation: it reads the parameters once, where they lie, row by row."""

import numba
import numpy as np

from flashmhf.ops.onednn.elementwise import silu
from flashmhf.ops.onednn.forward import element_bytes, load, store
from flashmhf.ops.onednn.launch import region
from flashmhf.ops.onednn.packing import widen_rows
from flashmhf.ops.onednn.primitives import (
    fetch_add,
    floats,
    halves,
    kernel,
    summing_kernel,
    thread_number,
    vector_kernel,
)

ZERO = np.float32(0)


@summing_kernel
def two_products(q, k, u):
    """q . k and q . u."""
    m, n = ZERO, ZERO
    for i in range(q.size):
        m += q[i] * k[i]
        n += q[i] * u[i]
    return m, n


@vector_kernel
def add_scaled(target, scale, row):
    for i in range(target.size):
        target[i] += scale * row[i]


@kernel
def row_of(a, weight, row, buffer):
    """A row of a parameter in float32."""
    address = weight + row * a.head_dim * element_bytes(a)
    if not a.is_bfloat16:
        return floats(address, a.head_dim)
    target = floats(buffer, a.head_dim)
    widen_rows(halves(address, a.head_dim), target, 1, a.head_dim, a.head_dim)
    return target


@kernel
def few_tokens_of_head(a, workspace, h):
    D, E = a.head_dim, a.gate_stride // a.heads
    q, sums = workspace + a.buffer_x, workspace + a.buffer_sum
    load(a, a.q + h * D * element_bytes(a), q, a.tokens)
    floats(sums, a.tokens * D)[:] = ZERO
    gate = floats(a.gate, 1 << 40)
    first = h // (a.heads // a.kv_heads) * a.rows
    for r in range(a.rows):
        k = row_of(a, a.k, first + r, workspace + a.buffer_ku)
        u = row_of(a, a.u, first + r, workspace + a.buffer_ku + 4 * D)
        v = row_of(a, a.v, first + r, workspace + a.buffer_v)
        for t in range(a.tokens):
            m, n = two_products(floats(q + 4 * t * D, D), k, u)
            g = gate[t * a.gate_stride + h * E + r // a.width]
            add_scaled(floats(sums + 4 * t * D, D), silu(m) * n * g, v)
    store(a, sums, a.out + h * D * element_bytes(a), a.tokens)


@region
def few_tokens_region(pointer):
    a = numba.carray(pointer, 1)[0]
    workspace = a.workspace + thread_number(a.thread_number) * a.workspace_bytes
    h = fetch_add(a.next_item)
    while h < a.items:
        few_tokens_of_head(a, workspace, h)
        h = fetch_add(a.next_item)

"""The kernels of the norm and the gate, and of their gradients: blocks of tokens of one head in float32."""

import numba
import numpy as np

from flashmhf.ops.onednn.elementwise import LEAST as VANISHES
from flashmhf.ops.onednn.elementwise import exponential, sigmoid, total
from flashmhf.ops.onednn.forward import element_bytes, load, segment_of, store
from flashmhf.ops.onednn.launch import BLOCK_TOKENS, region
from flashmhf.ops.onednn.packing import transpose_words
from flashmhf.ops.onednn.primitives import (
    call_brgemm,
    call_release,
    fetch_add,
    floats,
    from_bfloat16,
    kernel,
    summing_kernel,
    thread_number,
    to_bfloat16,
    vector_kernel,
    words,
)
from flashmhf.ops.prologue import MIN_GATE_SUM

f32 = np.float32
ZERO, ONE, LEAST = f32(0), f32(1), f32(MIN_GATE_SUM)


@summing_kernel
def dot(x, y):
    result = ZERO
    for i in range(x.size):
        result += x[i] * y[i]
    return result


@vector_kernel
def normalise(x, unit, normed, inverse_rms, weight, tokens, columns, eps, rounds):
    """unit = x / rms(x), normed = unit times the weight, rounded to bfloat16 or not."""
    for t in range(tokens):
        row, u = x[columns * t : columns * (t + 1)], unit[columns * t : columns * (t + 1)]
        n = normed[columns * t : columns * (t + 1)]
        scale = ONE / np.sqrt(dot(row, row) / f32(columns) + eps)
        inverse_rms[t] = scale
        if rounds:
            for i in range(n.size):
                u[i] = row[i] * scale
                n[i] = from_bfloat16(to_bfloat16(u[i] * weight[i]))
        else:
            for i in range(n.size):
                u[i] = row[i] * scale
                n[i] = u[i] * weight[i]


@vector_kernel
def differentiate_norm(dx, unit, inverse_rms, weight, dweight, tokens, columns):
    """dx, the gradient of normed, becomes that of x; that of the weight is added to `dweight`."""
    for t in range(tokens):
        d, u = dx[columns * t : columns * (t + 1)], unit[columns * t : columns * (t + 1)]
        for i in range(d.size):
            dweight[i] += d[i] * u[i]
            d[i] *= weight[i]
        mean, scale = dot(d, u) / f32(columns), inverse_rms[t]
        for i in range(d.size):
            d[i] = (d[i] - u[i] * mean) * scale


@vector_kernel
def all_sigmoids(x):
    for i in range(x.size):
        x[i] = sigmoid(x[i])


@vector_kernel
def all_exponentials(x):
    for i in range(x.size):
        x[i] = ZERO if x[i] < VANISHES else exponential(x[i])


@kernel
def scores_of(logits, tokens, subnetworks, is_softmax):
    """The logits become sigmoids, or softmax's terms."""
    if not is_softmax:
        all_sigmoids(logits)
        return
    for t in range(tokens):
        row = logits[subnetworks * t : subnetworks * (t + 1)]
        largest = row[0]
        for e in range(1, subnetworks):
            if not row[e] <= largest:  # NaN, too
                largest = row[e]
        for e in range(subnetworks):
            row[e] -= largest
    all_exponentials(logits)


@kernel
def store_gate(scores, gate, tokens, subnetworks, stride, gate_total, is_softmax):
    for t in range(tokens):
        row = scores[subnetworks * t : subnetworks * (t + 1)]
        share = gate_total / clamped(total(row), is_softmax)
        for e in range(subnetworks):
            gate[stride * t + e] = row[e] * share


@kernel
def clamped(sum_of_scores, is_softmax):
    return LEAST if not is_softmax and sum_of_scores < LEAST else sum_of_scores


@kernel
def differentiate_gate(scores, dgate, dlogits, tokens, subnetworks, stride, gate_total, is_softmax):
    for t in range(tokens):
        row, d = scores[subnetworks * t : subnetworks * (t + 1)], dgate[stride * t : stride * t + subnetworks]
        sum_of_scores = total(row)
        divisor = clamped(sum_of_scores, is_softmax)
        through_sum = ZERO
        if is_softmax or not sum_of_scores <= LEAST:  # the sum has no gradient where it is clamped
            for e in range(subnetworks):
                through_sum += d[e] * gate_total * (row[e] / divisor)
        for e in range(subnetworks):
            rest = ONE if is_softmax else ONE - row[e]
            dlogits[subnetworks * t + e] = (d[e] * gate_total - through_sum) * (row[e] / divisor) * rest


@kernel
def norm_and_scores(a, workspace, h, t, tokens):
    """x, unit and normed of a block of tokens, and its scores; returns the address of normed."""
    D, E = a.head_dim, a.subnetworks
    x, unit, normed = workspace + a.buffer_x, workspace + a.buffer_unit, workspace + a.buffer_normed
    load(a, a.q + (t * a.heads + h) * D * element_bytes(a), x, tokens)
    if a.norm_weight:
        normalise(
            floats(x, D * tokens),
            floats(unit, D * tokens),
            floats(normed, D * tokens),
            floats(workspace + a.buffer_inverse_rms, tokens),
            floats(a.norm_weight + 4 * h * D, D),
            tokens,
            D,
            f32(a.norm_eps),
            a.is_bfloat16,
        )
    else:
        normed = x
    if E:
        logits = workspace + a.buffer_logits
        call_brgemm(a.brgemm, tokens, E, D, D, E, E, 0, normed, a.gate_weight + 4 * h * D * E, logits, 0)
        scores_of(floats(logits, E * tokens), tokens, E, a.is_softmax)
    return normed


@kernel
def forward_block(a, workspace, h, t, tokens):
    D, E = a.head_dim, a.subnetworks
    normed = norm_and_scores(a, workspace, h, t, tokens)
    if a.norm_weight:
        store(a, normed, a.out + (t * a.heads + h) * D * element_bytes(a), tokens)
    if E:
        gate = floats(a.gate_out + 4 * (t * a.heads + h) * E, a.heads * E * tokens)
        scores = floats(workspace + a.buffer_logits, E * tokens)
        store_gate(scores, gate, tokens, E, a.heads * E, f32(a.gate_total), a.is_softmax)


@kernel
def backward_block(a, workspace, segment, h, t, tokens):
    D, E = a.head_dim, a.subnetworks
    normed = norm_and_scores(a, workspace, h, t, tokens)
    dq = a.dq + (t * a.heads + h) * D * element_bytes(a)
    dx, dlogits = workspace + a.buffer_dx, workspace + a.buffer_dlogits
    load(a, dq, dx, tokens)
    part = segment * a.heads + h
    if E and a.dgate:
        at = 4 * (t * a.heads + h) * E
        scores, block = floats(workspace + a.buffer_logits, E * tokens), floats(dlogits, E * tokens)
        dgate = floats(a.dgate + at, a.heads * E * tokens)
        differentiate_gate(scores, dgate, block, tokens, E, a.heads * E, f32(a.gate_total), a.is_softmax)
        dlogits_t = dlogits + 4 * E * BLOCK_TOKENS
        transpose_words(words(dlogits, E * tokens), words(dlogits_t, E * tokens), tokens, E, E, tokens)
        dgate_weight_t = a.dgate_weight_t + 4 * part * E * D
        call_brgemm(a.brgemm, E, D, tokens, tokens, D, D, 1, dlogits_t, normed, dgate_weight_t, 0)
        call_brgemm(a.brgemm, tokens, D, E, E, D, D, 1, dlogits, workspace + a.buffer_gate_weight_t, dx, 0)
    if a.norm_weight:
        differentiate_norm(
            floats(dx, D * tokens),
            floats(workspace + a.buffer_unit, D * tokens),
            floats(workspace + a.buffer_inverse_rms, tokens),
            floats(a.norm_weight + 4 * h * D, D),
            floats(a.dnorm_weight + 4 * part * D, D),
            tokens,
            D,
        )
    store(a, dx, dq, tokens)


@region
def prologue_forward_region(pointer):
    a = numba.carray(pointer, 1)[0]
    workspace = a.workspace + thread_number(a.thread_number) * a.workspace_bytes
    item = fetch_add(a.next_item)
    while item < a.items:
        h, segment = item // a.segments, item % a.segments
        start, stop = segment_of(a, segment)
        for t in range(start, stop, BLOCK_TOKENS):
            forward_block(a, workspace, h, t, min(BLOCK_TOKENS, stop - t))
        item = fetch_add(a.next_item)
    call_release(a.release, 0)


@region
def prologue_backward_region(pointer):
    a = numba.carray(pointer, 1)[0]
    workspace = a.workspace + thread_number(a.thread_number) * a.workspace_bytes
    item = fetch_add(a.next_item)
    while item < a.items:
        h, segment = item // a.segments, item % a.segments
        start, stop = segment_of(a, segment)
        D, E = a.head_dim, a.subnetworks
        gate_weight = words(a.gate_weight + 4 * h * D * E, D * E)
        transpose_words(gate_weight, words(workspace + a.buffer_gate_weight_t, D * E), D, E, E, D)
        for t in range(start, stop, BLOCK_TOKENS):
            backward_block(a, workspace, segment, h, t, min(BLOCK_TOKENS, stop - t))
        item = fetch_add(a.next_item)
    call_release(a.release, 0)

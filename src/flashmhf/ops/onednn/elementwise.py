"""SiLU(M) N times the gate and its gradients on one tile, each in a single pass.

M and N lie side by side in `mn`, (tokens, 2 padded) in float32, of which `columns` each are in use. A tile may cover
parts of several sub-networks of `width` rows; `first` is the tile's first row. Products are computed in float32 in the
reference's order, and rounded once.
"""

import numpy as np

from flashmhf.ops.onednn.primitives import inlined, pair, power_of_two, summing_kernel, to_bfloat16, vector_kernel

f32 = np.float32
ZERO, ONE, HALF = f32(0), f32(1), f32(0.5)
LEAST, LARGEST = f32(-87), f32(89)  # exp(89) overflows; exp(-87) vanishes beside one
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
# exp(r) = 1 + r + r^2 (...) for |r| <= ln(2) / 2: Cephes' expf, error 2e-7.
C0, C1, C2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
C3, C4, C5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)


@inlined
def exponential(x):
    """For x between -87 and 88.3; above it is infinite, below exp(-87)."""
    y = min(max(x, LEAST), LARGEST)
    k = np.floor(y * LOG2_E + HALF)
    r = y - k * LN2_HIGH - k * LN2_LOW
    power = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    return (power * (r * r) + r + ONE) * power_of_two(k)


@inlined
def sigmoid(x):
    return ONE / (ONE + exponential(-x))


@inlined
def silu(x):
    return x / (ONE + exponential(-x))


@inlined
def silu_derivative(x, s):
    return s * (ONE + x * (ONE - s))


@summing_kernel
def total(x):
    result = ZERO
    for i in range(x.size):
        result += x[i]
    return result


@vector_kernel
def activate_bfloat16(mn, p, gate, gate_stride, tokens, columns, padded, first, width):
    """P (tokens, padded); its padding becomes zero. The gate of token t is gate[t gate_stride + sub-network]."""
    for t in range(tokens):
        m_row, p_row, start = 2 * padded * t, padded * t, 0
        while start < columns:
            subnetwork = (first + start) // width
            stop = min(columns, (subnetwork + 1) * width - first)
            g = gate[gate_stride * t + subnetwork]
            m, out = mn[m_row + start : m_row + stop], p[p_row + start : p_row + stop]
            n = mn[m_row + padded + start : m_row + padded + stop]
            for i in range(out.size):
                out[i] = to_bfloat16(silu(m[i]) * n[i] * g)
            start = stop
        for i in range(columns, padded):
            p[p_row + i] = np.uint16(0)


@vector_kernel
def activate_float32(mn, gate, gate_stride, tokens, columns, padded, first, width):
    """P in place of M."""
    for t in range(tokens):
        m_row, start = 2 * padded * t, 0
        while start < columns:
            subnetwork = (first + start) // width
            stop = min(columns, (subnetwork + 1) * width - first)
            g = gate[gate_stride * t + subnetwork]
            m = mn[m_row + start : m_row + stop]
            n = mn[m_row + padded + start : m_row + padded + stop]
            for i in range(m.size):
                m[i] = silu(m[i]) * n[i] * g
            start = stop


@vector_kernel
def differentiate_bfloat16(
    mn, da, dmn, dmn_pairs, p_pairs, products, gate, dgate, gate_stride, tokens, columns, padded, first, width
):
    """From dA (tokens, padded): dM and dN side by side (tokens, 2 padded), P times the gate, and the gate's gradient.

    dM and dN also, and P only, as pairs of tokens (tokens / 2, 2 padded or padded, 2). With an odd number of tokens,
    `mn` and `da` have a further row of zeros. `dgate` is empty if it is not needed; `products` has room for 2 padded.
    """
    for t in range(0, tokens, 2):
        is_pair = t + 1 < tokens
        row_0, row_1, row_pair, start = 2 * padded * t, 2 * padded * (t + 1), padded * t, 0
        while start < columns:
            subnetwork = (first + start) // width
            stop = min(columns, (subnetwork + 1) * width - first)
            g0 = gate[gate_stride * t + subnetwork]
            g1 = gate[gate_stride * (t + 1) + subnetwork] if is_pair else ZERO
            m0, m1 = mn[row_0 + start : row_0 + stop], mn[row_1 + start : row_1 + stop]
            dm0, dm1 = dmn[row_0 + start : row_0 + stop], dmn[row_1 + start : row_1 + stop]
            dm_pair = dmn_pairs[row_pair + start : row_pair + stop]
            begin, end = padded + start, padded + stop
            n0, n1 = mn[row_0 + begin : row_0 + end], mn[row_1 + begin : row_1 + end]
            dn0, dn1 = dmn[row_0 + begin : row_0 + end], dmn[row_1 + begin : row_1 + end]
            dn_pair = dmn_pairs[row_pair + begin : row_pair + end]
            da0 = da[padded * t + start : padded * t + stop]
            da1 = da[padded * (t + 1) + start : padded * (t + 1) + stop]
            p_pair = p_pairs[padded * (t // 2) + start : padded * (t // 2) + stop]
            w0, w1 = products[: stop - start], products[padded : padded + stop - start]
            for i in range(m0.size):
                x, s = m0[i], sigmoid(m0[i])
                y = x * s
                p = y * n0[i]
                w0[i] = p * da0[i]
                d = da0[i] * g0
                dm_0, dn_0, p_0 = (
                    to_bfloat16(d * n0[i] * silu_derivative(x, s)),
                    to_bfloat16(d * y),
                    to_bfloat16(p * g0),
                )
                x, s = m1[i], sigmoid(m1[i])
                y = x * s
                p = y * n1[i]
                w1[i] = p * da1[i]
                d = da1[i] * g1
                dm_1, dn_1, p_1 = (
                    to_bfloat16(d * n1[i] * silu_derivative(x, s)),
                    to_bfloat16(d * y),
                    to_bfloat16(p * g1),
                )
                dm0[i], dm1[i], dn0[i], dn1[i] = dm_0, dm_1, dn_0, dn_1
                dm_pair[i], dn_pair[i], p_pair[i] = pair(dm_0, dm_1), pair(dn_0, dn_1), pair(p_0, p_1)
            if dgate.size > 0:
                dgate[gate_stride * t + subnetwork] += total(w0)
                if is_pair:
                    dgate[gate_stride * (t + 1) + subnetwork] += total(w1)
            start = stop
        for i in range(columns, padded):
            for j in (i, padded + i):
                dmn[row_0 + j] = dmn[row_1 + j] = np.uint16(0)
                dmn_pairs[row_pair + j] = np.uint32(0)
            p_pairs[padded * (t // 2) + i] = np.uint32(0)


@vector_kernel
def differentiate_float32(mn, da, products, gate, dgate, gate_stride, tokens, columns, padded, first, width):
    """The same for float32, with dM and dN in place of M and N, and P times the gate in place of dA."""
    for t in range(tokens):
        row, start = 2 * padded * t, 0
        while start < columns:
            subnetwork = (first + start) // width
            stop = min(columns, (subnetwork + 1) * width - first)
            g = gate[gate_stride * t + subnetwork]
            m, n = mn[row + start : row + stop], mn[row + padded + start : row + padded + stop]
            a = da[padded * t + start : padded * t + stop]
            w = products[: stop - start]
            for i in range(m.size):
                x, s, z = m[i], sigmoid(m[i]), n[i]
                y = x * s
                p = y * z
                w[i] = p * a[i]
                d = a[i] * g
                m[i], n[i], a[i] = d * z * silu_derivative(x, s), d * y, p * g
            if dgate.size > 0:
                dgate[gate_stride * t + subnetwork] += total(w)
            start = stop

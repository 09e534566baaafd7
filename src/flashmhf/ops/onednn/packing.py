"""Copies of blocks of matrices in the layouts that the products read.

oneDNN's 16-bit products read their second matrix (K, N) as pairs of rows, (K / 2, N, 2), which it calls VNNI; an odd
last row gets a partner of zeros. A word is a float32, or two neighbouring bfloat16 values.
"""

import numpy as np

from flashmhf.ops.onednn.primitives import from_bfloat16, pair, to_bfloat16, vector_kernel

ZERO = np.uint16(0)


@vector_kernel
def transpose_words(source, target, rows, columns, source_stride, target_stride):
    """target[c, r] = source[r, c], of words.

    Of bfloat16 this is the transposed matrix as pairs of rows.
    """
    for c in range(columns):
        out = target[target_stride * c : target_stride * c + rows]
        for r in range(out.size):
            out[r] = source[source_stride * r + c]


@vector_kernel
def clear_columns(target, rows, start, stop, stride):
    for r in range(rows):
        for c in range(start, stop):
            target[stride * r + c] = np.uint32(0)


@vector_kernel
def transpose_bfloat16(source, target, rows, columns, source_stride, target_stride):
    """target[c, r] = source[r, c]; an odd last row gets one of zeros. `target` and its stride are in words."""
    for r in range(0, rows, 2):
        low = source[source_stride * r : source_stride * r + columns]
        if r + 1 < rows:
            high = source[source_stride * (r + 1) : source_stride * (r + 1) + columns]
            for c in range(columns):
                target[target_stride * c + r // 2] = pair(low[c], high[c])
        else:
            for c in range(columns):
                target[target_stride * c + r // 2] = pair(low[c], ZERO)


@vector_kernel
def pack_pairs(source, target, rows, columns):
    """Rows of bfloat16 as pairs of rows: (rows, columns) -> words ((rows + 1) / 2, columns)."""
    for r in range(0, rows, 2):
        low, out = source[columns * r : columns * (r + 1)], target[columns * (r // 2) : columns * (r // 2 + 1)]
        if r + 1 < rows:
            high = source[columns * (r + 1) : columns * (r + 2)]
            for c in range(out.size):
                out[c] = pair(low[c], high[c])
        else:
            for c in range(out.size):
                out[c] = pair(low[c], ZERO)


@vector_kernel
def copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@vector_kernel
def copy_rows(source, target, rows, columns, source_stride, target_stride):
    """float32 rows to float32 rows."""
    for r in range(rows):
        row = source[source_stride * r : source_stride * r + columns]
        out = target[target_stride * r : target_stride * r + columns]
        for c in range(out.size):
            out[c] = row[c]


@vector_kernel
def widen_rows(source, target, rows, columns, source_stride):
    """bfloat16 rows with a stride to float32 rows."""
    for r in range(rows):
        row, out = source[source_stride * r : source_stride * r + columns], target[columns * r : columns * (r + 1)]
        for c in range(out.size):
            out[c] = from_bfloat16(row[c])


@vector_kernel
def round_rows(source, target, rows, columns, target_stride):
    """float32 rows to bfloat16 rows with a stride."""
    for r in range(rows):
        row, out = source[columns * r : columns * (r + 1)], target[target_stride * r : target_stride * r + columns]
        for c in range(out.size):
            out[c] = to_bfloat16(row[c])


@vector_kernel
def transpose_rounded(source, target, rows, columns, source_stride):
    """target[c, r] = source[r, c], float32 to bfloat16, for an even number of rows; `target` is in words."""
    for r in range(0, rows, 2):
        low = source[source_stride * r : source_stride * r + columns]
        high = source[source_stride * (r + 1) : source_stride * (r + 1) + columns]
        for c in range(columns):
            target[rows // 2 * c + r // 2] = pair(to_bfloat16(low[c]), to_bfloat16(high[c]))


@vector_kernel
def clear_rows(target, start):
    for i in range(start, target.size):
        target[i] = np.float32(0)

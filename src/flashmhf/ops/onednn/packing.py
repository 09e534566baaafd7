"""Copies of blocks of matrices in the layouts that the products read.

oneDNN's 16-bit products read their second matrix (K, N) as pairs of rows, (K / 2, N, 2), which it calls VNNI; an odd
last row gets a partner of zeros. A word is a float32, or two neighbouring bfloat16 values.
"""

import numpy as np

from flashmhf.ops.onednn.primitives import pair, to_bfloat16, vector_kernel

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
    """target[c, r] = source[r, c], of bfloat16, two of which are a word of `source`; an odd row gets one of zeros.

    Sizes and strides in bfloat16 elements; `target` has halves.
    """
    for r in range(rows):
        row = source[source_stride * r : source_stride * r + columns]
        for c in range(row.size):
            target[target_stride * c + r] = row[c]
    if rows % 2 == 1:
        for c in range(columns):
            target[target_stride * c + rows] = ZERO


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
def round_rows(source, target, rows, columns, target_stride):
    """float32 rows to bfloat16 rows with a stride."""
    for r in range(rows):
        row, out = source[columns * r : columns * (r + 1)], target[target_stride * r : target_stride * r + columns]
        for c in range(out.size):
            out[c] = to_bfloat16(row[c])


@vector_kernel
def transpose_rounded(source, target, rows, columns, source_stride):
    """target[c, r] = source[r, c], float32 to bfloat16, for `columns` of the source's."""
    for c in range(columns):
        out = target[rows * c : rows * (c + 1)]
        for r in range(out.size):
            out[r] = to_bfloat16(source[source_stride * r + c])


@vector_kernel
def clear_rows(target, start):
    for i in range(start, target.size):
        target[i] = np.float32(0)

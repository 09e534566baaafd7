"""The kernels in which one program owns rows of the parameters and walks over the tokens: dK, dU and dV.

`backward_dkuv_kernel` computes these alone, six products a tile. `backward_fused_kernel` also adds its share of
dQ and of the gate's gradient to float32 buffers in memory, eight products a tile.

Scores (M, N, dA and what follows from them) are (rows, tokens) tiles, or (tokens, rows) with TOKENS_FIRST; the sums are
(rows, D) or (D, rows). The products are the same. What differs is who computes them: Triton hands out the warps of a
score tile along its first axis alone, and warps for which nothing is left there repeat what others do. Three sums
leave registers for few rows, so Hopper, whose products want 64 of the first axis for each four warps, takes tokens
first, and 128 of them. `mma.sync` holds its second operand in registers: there tokens first would have each warp hold
all of K, U and V, and rows first, each warp its own rows of them.
"""

import triton
import triton.language as tl

from flashmhf.ops.triton.common import DO_NOT_SPECIALIZE, load_tile, load_tokens, silu_and_slope_of, token_offsets


@triton.jit
def scores_of(tokens, rows, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """tokens rows^T, or its transpose."""
    if TOKENS_FIRST:
        return tl.dot(tokens, tl.trans(rows), input_precision=PRECISION)
    else:  # noqa: RET505 -- Triton compiles what follows a return in a branch, too
        return tl.dot(rows, tl.trans(tokens), input_precision=PRECISION)


@triton.jit
def add_products(scores, tokens, total, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """total + scores^T tokens, transposed as the scores are; no product reads the transpose of another's result."""
    if TOKENS_FIRST:
        return tl.dot(tl.trans(tokens), scores, total, input_precision=PRECISION)
    else:  # noqa: RET505
        return tl.dot(scores, tokens, total, input_precision=PRECISION)


@triton.jit
def load_gate(
    ptr, offs_t, mask_t, head, e, L, stride_b, stride_l, stride_h, stride_x,
    FLAT: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """One number for each token, shaped to multiply scores."""
    rows = token_offsets(offs_t, L, stride_b, stride_l, FLAT) + head * stride_h
    r = tl.load(ptr + rows + e * stride_x, mask=mask_t, other=0.0).to(tl.float32)
    if TOKENS_FIRST:
        return r[:, None]
    else:  # noqa: RET505
        return r[None, :]


@triton.jit
def store_gradient(
    ptr, gradient, first_row, offs_f, offs_d, F, D: tl.constexpr, TOKENS_FIRST: tl.constexpr
):  # fmt: skip
    """Into the rows of a contiguous (H_kv, E, F, D)."""
    if TOKENS_FIRST:
        ptrs = ptr + (first_row + offs_f)[None, :] * D + offs_d[:, None]
        mask = (offs_f < F)[None, :] & (offs_d < D)[:, None]
    else:
        ptrs = ptr + (first_row + offs_f)[:, None] * D + offs_d[None, :]
        mask = (offs_f < F)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, gradient.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zeros_of(BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """The sum that one gradient starts with."""
    if TOKENS_FIRST:
        return tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    else:  # noqa: RET505
        return tl.zeros((BLOCK_F, BLOCK_D), tl.float32)


@triton.jit
def load_own_rows(
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    E, F, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, EVEN_F: tl.constexpr,
):  # fmt: skip
    """The program's parameter head, sub-network and rows, and K, U and V of these."""
    tiles_f = tl.cdiv(F, BLOCK_F)
    kv_head = (tl.program_id(0) // (E * tiles_f)).to(tl.int64)
    e = (tl.program_id(0) // tiles_f) % E
    offs_f = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    rows_w = kv_head * stride_wh + e.to(tl.int64) * stride_we + offs_f.to(tl.int64) * stride_wf
    offs_w = rows_w[:, None] + offs_d[None, :] * stride_wd
    k = load_tile(k_ptr + offs_w, offs_f < F, offs_d < D, EVEN_F, D == BLOCK_D)
    u = load_tile(u_ptr + offs_w, offs_f < F, offs_d < D, EVEN_F, D == BLOCK_D)
    v = load_tile(v_ptr + offs_w, offs_f < F, offs_d < D, EVEN_F, D == BLOCK_D)
    return kv_head, e, offs_f, k, u, v


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_dkuv_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    dout_ptr, stride_doutb, stride_doutl, stride_douth, stride_doutx,
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    gate_ptr, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
    dk_ptr, du_ptr, dv_ptr,
    T, L, E, F, GROUP,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr, EVEN_F: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    FAST_TANH: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    NEEDS_K: tl.constexpr, NEEDS_U: tl.constexpr, NEEDS_V: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_F rows of one sub-network and walks over all tokens of the heads that share them."""
    kv_head, e, offs_f, k, u, v = load_own_rows(
        k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd, E, F, D, BLOCK_D, BLOCK_F, EVEN_F
    )
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    dk = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    du = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    dv = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)

    tiles_t = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(0, GROUP * tiles_t):
        head = kv_head * GROUP + tile // tiles_t
        t = (tile % tiles_t) * BLOCK_T + offs_t
        q = load_tokens(q_ptr, t, offs_d, t < T, head, L, stride_qb, stride_ql, stride_qh, stride_qx, D, FLAT)
        dout = load_tokens(
            dout_ptr, t, offs_d, t < T, head, L, stride_doutb, stride_doutl, stride_douth, stride_doutx, D, FLAT
        )
        m = scores_of(q, k, TOKENS_FIRST, PRECISION)
        n = scores_of(q, u, TOKENS_FIRST, PRECISION)
        da = scores_of(dout, v, TOKENS_FIRST, PRECISION)
        silu, slope = silu_and_slope_of(m, FAST_TANH)
        if HAS_GATE:
            r = load_gate(
                gate_ptr, t, t < T, head, e, L, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
                FLAT, TOKENS_FIRST,
            )  # fmt: skip
            silu *= r
            slope *= r
        # What is not needed, the compiler leaves out.
        p, dm, dn = (silu * n).to(q.dtype), (da * n * slope).to(q.dtype), (da * silu).to(q.dtype)
        if NEEDS_V:
            dv = add_products(p, dout, dv, TOKENS_FIRST, PRECISION)
        if NEEDS_U:
            du = add_products(dn, q, du, TOKENS_FIRST, PRECISION)
        if NEEDS_K:
            dk = add_products(dm, q, dk, TOKENS_FIRST, PRECISION)

    first_row = (kv_head * E + e) * F
    if NEEDS_K:
        store_gradient(dk_ptr, dk, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    if NEEDS_U:
        store_gradient(du_ptr, du, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    if NEEDS_V:
        store_gradient(dv_ptr, dv, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_fused_kernel(
    q_ptr, stride_qb, stride_ql, stride_qh, stride_qx,
    dout_ptr, stride_doutb, stride_doutl, stride_douth, stride_doutx,
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    gate_ptr, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
    dk_ptr, du_ptr, dv_ptr,
    dq_ptr, stride_dqb, stride_dql, stride_dqh, stride_dqx,
    dgate_ptr, stride_dgateb, stride_dgatel, stride_dgateh, stride_dgatex,
    T, L, E, F, GROUP,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr, EVEN_F: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    FAST_TANH: tl.constexpr, TOKENS_FIRST: tl.constexpr, ADDS_GATE: tl.constexpr,
):  # fmt: skip
    """As `backward_dkuv_kernel`; dq and dgate are float32 and get this program's share added."""
    kv_head, e, offs_f, k, u, v = load_own_rows(
        k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd, E, F, D, BLOCK_D, BLOCK_F, EVEN_F
    )
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    dk = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    du = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    dv = zeros_of(BLOCK_F, BLOCK_D, TOKENS_FIRST)

    tiles_t = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(0, GROUP * tiles_t):
        head = kv_head * GROUP + tile // tiles_t
        t = (tile % tiles_t) * BLOCK_T + offs_t
        q = load_tokens(q_ptr, t, offs_d, t < T, head, L, stride_qb, stride_ql, stride_qh, stride_qx, D, FLAT)
        dout = load_tokens(
            dout_ptr, t, offs_d, t < T, head, L, stride_doutb, stride_doutl, stride_douth, stride_doutx, D, FLAT
        )
        m = scores_of(q, k, TOKENS_FIRST, PRECISION)
        n = scores_of(q, u, TOKENS_FIRST, PRECISION)
        da = scores_of(dout, v, TOKENS_FIRST, PRECISION)
        silu, slope = silu_and_slope_of(m, FAST_TANH)
        if ADDS_GATE:
            rows_dgate = token_offsets(t, L, stride_dgateb, stride_dgatel, FLAT) + head * stride_dgateh
            dr = tl.sum(da * silu * n, axis=1 if TOKENS_FIRST else 0)
            tl.atomic_add(dgate_ptr + rows_dgate + e * stride_dgatex, dr, mask=t < T, sem="relaxed")
        if HAS_GATE:
            r = load_gate(
                gate_ptr, t, t < T, head, e, L, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
                FLAT, TOKENS_FIRST,
            )  # fmt: skip
            silu *= r
            slope *= r
        p, dm, dn = (silu * n).to(q.dtype), (da * n * slope).to(q.dtype), (da * silu).to(q.dtype)
        dv = add_products(p, dout, dv, TOKENS_FIRST, PRECISION)
        du = add_products(dn, q, du, TOKENS_FIRST, PRECISION)
        dk = add_products(dm, q, dk, TOKENS_FIRST, PRECISION)
        if TOKENS_FIRST:
            dq = tl.dot(dm, k, input_precision=PRECISION)
            dq = tl.dot(dn, u, dq, input_precision=PRECISION)
        else:  # the transpose of another product's result: see `miscompiles_transposed_results`
            dq = tl.dot(tl.trans(dm), k, input_precision=PRECISION)
            dq = tl.dot(tl.trans(dn), u, dq, input_precision=PRECISION)
        rows_dq = token_offsets(t, L, stride_dqb, stride_dql, FLAT) + head * stride_dqh
        mask_dq = (t < T)[:, None] & (offs_d < D)[None, :]
        tl.atomic_add(dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dqx, dq, mask=mask_dq, sem="relaxed")

    first_row = (kv_head * E + e) * F
    store_gradient(dk_ptr, dk, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    store_gradient(du_ptr, du, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    store_gradient(dv_ptr, dv, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)

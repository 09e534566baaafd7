"""The kernels in which one program owns parameter rows and loops over the tokens: dK, dU and dV.

`backward_dkuv_kernel` computes only these, six products per tile. `backward_fused_kernel` also accumulates dQ and dgate
atomically in float32 buffers, eight products per tile.

Scores (M, N, dA and what is computed from them) are (rows, tokens) tiles, or (tokens, rows) with TOKENS_FIRST, like
swapAB in FlashAttention's backward; the accumulators are (rows, D) or (D, rows). The products are the same, but Triton
distributes the warps of a score tile over its first dimension only, and warps that get no rows there duplicate the work
of others. Three accumulators leave registers for few parameter rows, so Hopper, whose wgmma needs 64 rows of the first
dimension per four warps, puts 128 tokens first. `mma.sync` holds its second operand in registers: with tokens first
every warp would hold all of K, U and V, with rows first each warp holds only its own rows.
"""

import triton
import triton.language as tl

from flashmhf.ops.triton.common import DO_NOT_SPECIALIZE, load_tile, load_tokens, silu_and_slope_of, token_offsets


@triton.jit
def scores_of(tokens, rows, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """tokens @ rows^T, or its transpose with rows first."""
    if TOKENS_FIRST:
        return tl.dot(tokens, tl.trans(rows), input_precision=PRECISION)
    else:  # noqa: RET505 -- Triton compiles what follows a return in a branch, too
        return tl.dot(rows, tl.trans(tokens), input_precision=PRECISION)


@triton.jit
def accumulate(acc, scores, tokens, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + scores^T @ tokens, in the orientation of the scores; no product reads the transpose of another's result."""
    if TOKENS_FIRST:
        return tl.dot(tl.trans(tokens), scores, acc, input_precision=PRECISION)
    else:  # noqa: RET505
        return tl.dot(scores, tokens, acc, input_precision=PRECISION)


@triton.jit
def load_gate(
    ptr, offs_t, mask_t, head, e, L, stride_b, stride_l, stride_h, stride_x,
    FLAT: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """The gate of each token, shaped to multiply scores."""
    rows = token_offsets(offs_t, L, stride_b, stride_l, FLAT) + head * stride_h
    gate = tl.load(ptr + rows + e * stride_x, mask=mask_t, other=0.0).to(tl.float32)
    if TOKENS_FIRST:
        return gate[:, None]
    else:  # noqa: RET505
        return gate[None, :]


@triton.jit
def store_gradient(
    ptr, gradient, first_row, offs_f, offs_d, F, D: tl.constexpr, TOKENS_FIRST: tl.constexpr
):  # fmt: skip
    """Stores an accumulator to rows of a contiguous (H_kv, E, F, D) tensor."""
    if TOKENS_FIRST:
        ptrs = ptr + (first_row + offs_f)[None, :] * D + offs_d[:, None]
        mask = (offs_f < F)[None, :] & (offs_d < D)[:, None]
    else:
        ptrs = ptr + (first_row + offs_f)[:, None] * D + offs_d[None, :]
        mask = (offs_f < F)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, gradient.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_accumulator(BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """The initial accumulator of dK, dU or dV."""
    if TOKENS_FIRST:
        return tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    else:  # noqa: RET505
        return tl.zeros((BLOCK_F, BLOCK_D), tl.float32)


@triton.jit
def load_row_tile(
    k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd,
    E, F, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, EVEN_F: tl.constexpr,
):  # fmt: skip
    """The parameter head, sub-network and rows that the program owns, and their K, U and V."""
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
    NEEDS_DK: tl.constexpr, NEEDS_DU: tl.constexpr, NEEDS_DV: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_F rows of one sub-network and loops over the tokens of all heads that share them."""
    kv_head, e, offs_f, k, u, v = load_row_tile(
        k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd, E, F, D, BLOCK_D, BLOCK_F, EVEN_F
    )
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    dk = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    du = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    dv = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)

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
            gate = load_gate(
                gate_ptr, t, t < T, head, e, L, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
                FLAT, TOKENS_FIRST,
            )  # fmt: skip
            silu *= gate
            slope *= gate
        # The compiler eliminates what is not needed.
        p, dm, dn = (silu * n).to(q.dtype), (da * n * slope).to(q.dtype), (da * silu).to(q.dtype)
        if NEEDS_DV:
            dv = accumulate(dv, p, dout, TOKENS_FIRST, PRECISION)
        if NEEDS_DU:
            du = accumulate(du, dn, q, TOKENS_FIRST, PRECISION)
        if NEEDS_DK:
            dk = accumulate(dk, dm, q, TOKENS_FIRST, PRECISION)

    first_row = (kv_head * E + e) * F
    if NEEDS_DK:
        store_gradient(dk_ptr, dk, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    if NEEDS_DU:
        store_gradient(du_ptr, du, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    if NEEDS_DV:
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
    FAST_TANH: tl.constexpr, TOKENS_FIRST: tl.constexpr, ACCUM_DGATE: tl.constexpr,
):  # fmt: skip
    """Like `backward_dkuv_kernel`, and atomically accumulates float32 dq and dgate."""
    kv_head, e, offs_f, k, u, v = load_row_tile(
        k_ptr, u_ptr, v_ptr, stride_wh, stride_we, stride_wf, stride_wd, E, F, D, BLOCK_D, BLOCK_F, EVEN_F
    )
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    dk = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    du = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)
    dv = zero_accumulator(BLOCK_F, BLOCK_D, TOKENS_FIRST)

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
        if ACCUM_DGATE:
            rows_dgate = token_offsets(t, L, stride_dgateb, stride_dgatel, FLAT) + head * stride_dgateh
            dgate = tl.sum(da * silu * n, axis=1 if TOKENS_FIRST else 0)
            tl.atomic_add(dgate_ptr + rows_dgate + e * stride_dgatex, dgate, mask=t < T, sem="relaxed")
        if HAS_GATE:
            gate = load_gate(
                gate_ptr, t, t < T, head, e, L, stride_gateb, stride_gatel, stride_gateh, stride_gatex,
                FLAT, TOKENS_FIRST,
            )  # fmt: skip
            silu *= gate
            slope *= gate
        p, dm, dn = (silu * n).to(q.dtype), (da * n * slope).to(q.dtype), (da * silu).to(q.dtype)
        dv = accumulate(dv, p, dout, TOKENS_FIRST, PRECISION)
        du = accumulate(du, dn, q, TOKENS_FIRST, PRECISION)
        dk = accumulate(dk, dm, q, TOKENS_FIRST, PRECISION)
        if TOKENS_FIRST:
            dq = tl.dot(dm, k, input_precision=PRECISION)
            dq = tl.dot(dn, u, dq, input_precision=PRECISION)
        else:  # reads the transpose of another product's result: see `miscompiles_transposed_results`
            dq = tl.dot(tl.trans(dm), k, input_precision=PRECISION)
            dq = tl.dot(tl.trans(dn), u, dq, input_precision=PRECISION)
        rows_dq = token_offsets(t, L, stride_dqb, stride_dql, FLAT) + head * stride_dqh
        mask_dq = (t < T)[:, None] & (offs_d < D)[None, :]
        tl.atomic_add(dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dqx, dq, mask=mask_dq, sem="relaxed")

    first_row = (kv_head * E + e) * F
    store_gradient(dk_ptr, dk, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    store_gradient(du_ptr, du, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)
    store_gradient(dv_ptr, dv, first_row, offs_f, offs_d, F, D, TOKENS_FIRST)

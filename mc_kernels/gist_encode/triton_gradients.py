# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernels of `gist_encode`'s backward: what surrounds its matrix products, which are torch's.

    norm_kernel:                 y = x / rms(x) * gain, the operand of a product that was fused in the forward
    norm_backward_kernel:        dx = add + inv (dy gain - n mean(dy gain n)) with n = x inv; dgain += dy n
    swiglu_backward_kernel:      gate, up, dy -> dgate, dup and y = silu(gate) up, in place
    rotate_kernel, attention_backward_kernel:  q, k, v; do -> dq, dk, dv, in place
    pool_backward_kernel, match_backward_kernel: of triton_pool's

Sums are fp32. Sums over rows or windows (gains, queries of the pooling) are written in parts, one for each program or
window, and added by torch in a fixed order: no atomics. In-place kernels read and write the same elements in the same
program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import inverse_rms, product
from .triton_pool import window_probabilities


@triton.jit
def norm_kernel(
    x, gain, y, n_rows, stride_n, stride_k,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row r of y [n_rows, WIDTH] is row [r // K, r % K] of x; gain [WIDTH] or None."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    inside = (row < n_rows)[:, None] & (c < WIDTH)[None, :]
    at = (row // K) * stride_n + (row % K) * stride_k
    wide = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    wide = wide * inverse_rms(tl.sum(wide * wide, axis=1), WIDTH)[:, None]
    if gain is not None:
        wide = wide * tl.load(gain + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * WIDTH + c[None, :], wide.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    x, gain, dy, add, dx, dgain, n_rows, stride_n, stride_k, add_scale,
    K: tl.constexpr, ADD_ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row r of dy and dx [n_rows, WIDTH] is row [r // K, r % K] of x and row r // ADD_ROWS of `add`, which is scaled.
    A program takes BLOCKS tiles of rows and writes its row of dgain [programs, WIDTH]; gain and dgain may be None."""
    c = tl.arange(0, BLOCK_N)
    keep = c < WIDTH
    g = tl.zeros([BLOCK_N], tl.float32) + 1.0
    if gain is not None:
        g = tl.load(gain + c, mask=keep, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in range(BLOCKS):
        row = (tl.program_id(0).to(tl.int64) * BLOCKS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < n_rows)[:, None] & keep[None, :]
        at = (row // K) * stride_n + (row % K) * stride_k
        n = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(tl.sum(n * n, axis=1), WIDTH)[:, None]
        n = n * inverse
        to = row[:, None] * WIDTH + c[None, :]
        d = tl.load(dy + to, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(d * n, axis=0)
        d = d * g[None, :]
        d = inverse * (d - n * (tl.sum(d * n, axis=1) / WIDTH)[:, None])
        more = tl.load(add + (row // ADD_ROWS)[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
        tl.store(dx + to, (d + more.to(tl.float32) * add_scale).to(dx.dtype.element_ty), mask=inside)
    if dgain is not None:
        tl.store(dgain + tl.program_id(0) * WIDTH + c, total, mask=keep)


@triton.jit
def swiglu_backward_kernel(gate_up, dy, n_numbers, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [n_rows, 2 FFN] becomes its gradient, dy [n_rows, FFN] the activation; n_numbers = n_rows * FFN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n_numbers
    to = gate_up + (at // FFN) * (2 * FFN) + at % FFN
    gate = tl.load(to, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(to + FFN, mask=keep, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = dy.dtype.element_ty
    tl.store(to, (d * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=keep)
    tl.store(to + FFN, (d * silu).to(dtype), mask=keep)
    tl.store(dy + at, (silu * up).to(dtype), mask=keep)


@triton.jit
def _phases(phases, r, inside, b, ROWS: tl.constexpr, HALF: tl.constexpr):
    at = phases + ((r % ROWS)[:, None] * HALF + b[None, :])
    return tl.load(at, mask=inside, other=0.0), tl.load(at + ROWS * HALF, mask=inside, other=0.0)


@triton.jit
def rotate_kernel(
    qkv, phases, n_numbers,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates queries and keys of qkv [n_rows, 3 WIDTH] in place; n_numbers = n_rows * WIDTH pairs. Apart from
    attention's backward, where the compiler would rotate once for each layout that a product wants, and spill."""
    HALF: tl.constexpr = HEAD_DIM // 2
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n_numbers
    row, pair = at // WIDTH, at % WIDTH  # WIDTH / 2 pairs of queries, as many of keys
    phase = phases + (row % ROWS) * HALF + pair % HALF
    cos = tl.load(phase, mask=keep, other=0.0)
    sin = tl.load(phase + ROWS * HALF, mask=keep, other=0.0)
    to = qkv + row * (3 * WIDTH) + (pair // HALF) * HEAD_DIM + pair % HALF
    one = tl.load(to, mask=keep, other=0.0).to(tl.float32)
    two = tl.load(to + HALF, mask=keep, other=0.0).to(tl.float32)
    tl.store(to, (one * cos - two * sin).to(qkv.dtype.element_ty), mask=keep)
    tl.store(to + HALF, (two * cos + one * sin).to(qkv.dtype.element_ty), mask=keep)


@triton.jit
def _half(x, r, n_live, b, WIDTH: tl.constexpr, HALF: tl.constexpr):
    inside = (r < n_live)[:, None] & (b < HALF)[None, :]
    return tl.load(x + (r[:, None] * (3 * WIDTH) + b[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_unrotated(x, phases, d1, d2, r, n_live, b, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    inside = (r < n_live)[:, None] & (b < HALF)[None, :]
    at = x + (r[:, None] * (3 * WIDTH) + b[None, :])
    cos, sin = _phases(phases, r, inside, b, ROWS, HALF)
    tl.store(at, (d1 * cos + d2 * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (d2 * cos - d1 * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def attention_backward_kernel(
    qkv, d_out, phases, n_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, HALF_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """qkv [n_rows, 3 WIDTH], rotated, becomes its gradient before rotation; d_out [n_rows, WIDTH]. One program
    per group of windows and head; it goes through its queries BLOCK_Q at a time, to stay within the registers."""
    dtype = qkv.dtype.element_ty
    heads: tl.constexpr = WIDTH // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    scale: tl.constexpr = HEAD_DIM**-0.5
    pid = tl.program_id(0)
    first = (pid // heads).to(tl.int64) * (GROUP * ROWS)  # row; offsets from it fit 32 bits and half the registers
    base = qkv + first * (3 * WIDTH) + (pid % heads) * HEAD_DIM
    d_base = d_out + first * WIDTH + (pid % heads) * HEAD_DIM
    n_live = tl.minimum(n_rows - first, GROUP * ROWS).to(tl.int32)
    b, d = tl.arange(0, HALF_BLOCK), tl.arange(0, HEAD_BLOCK)
    r = tl.arange(0, BLOCK_M)
    whole = (r < n_live)[:, None] & (d < HEAD_DIM)[None, :]
    k1 = _half(base + WIDTH, r, n_live, b, WIDTH, HALF)
    k2 = _half(base + WIDTH + HALF, r, n_live, b, WIDTH, HALF)
    v_at = base + 2 * WIDTH + (r[:, None] * (3 * WIDTH) + d[None, :])
    v = tl.load(v_at, mask=whole, other=0.0)
    dk1 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    dk2 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    dv = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    for start in range(0, BLOCK_M, BLOCK_Q):
        q_r = start + tl.arange(0, BLOCK_Q)
        q1 = _half(base, q_r, n_live, b, WIDTH, HALF)
        q2 = _half(base + HALF, q_r, n_live, b, WIDTH, HALF)
        at = d_base + (q_r[:, None] * WIDTH + d[None, :])
        do = tl.load(at, mask=(q_r < n_live)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        zero = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
        s = product(q2, tl.trans(k2), product(q1, tl.trans(k1), zero)) * scale
        s = tl.where((q_r // ROWS)[:, None] == (r // ROWS)[None, :], s, float("-inf"))
        p = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        dv = product(tl.trans(p.to(dtype)), do, dv)
        dp = product(do, tl.trans(v), zero)
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(dtype)
        zero_half = tl.zeros([BLOCK_Q, HALF_BLOCK], tl.float32)
        dq1, dq2 = product(ds, k1, zero_half), product(ds, k2, zero_half)
        _store_unrotated(base, phases, dq1, dq2, q_r, n_live, b, ROWS, WIDTH, HALF)
        dk1, dk2 = product(tl.trans(ds), q1, dk1), product(tl.trans(ds), q2, dk2)
    _store_unrotated(base + WIDTH, phases, dk1, dk2, r, n_live, b, ROWS, WIDTH, HALF)
    tl.store(v_at, dv.to(dtype), mask=whole)


@triton.jit
def pool_backward_kernel(
    h, final_norm, pool_q, d_pooled, dh, d_norm, d_query, stride_q,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GISTS: tl.constexpr, POOL: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    GIST_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per window: d_pooled [N * GISTS, WIDTH] -> dh [N * ROWS, WIDTH] and the window's parts of d_norm
    [N, WIDTH] and d_query [N, GISTS, WIDTH] (written for softmax only).

    With s = n * final_norm, ds_j = sum_g p_gj dpooled_g + dl_gj q_g / sqrt(Eg) and l_gj = q_g . s_j / sqrt(Eg), the
    norm's ds_j . s_j is sum_g p_gj dp_gj + dl_gj l_gj: no pass of its own.
    """
    dtype = h.dtype.element_ty
    window = tl.program_id(0).to(tl.int64)
    p, logits, inverse = window_probabilities(
        h, final_norm, pool_q, window, stride_q, ROWS, WIDTH, GISTS, POOL, ROWS_BLOCK, GIST_BLOCK, BLOCK_K
    )
    j, g = tl.arange(0, ROWS_BLOCK), tl.arange(0, GIST_BLOCK)
    row, gist = window * ROWS + j, window * GISTS + g
    in_row, in_gist = (j < ROWS)[:, None], (g < GISTS)[:, None]
    p = tl.where(in_gist, p, 0.0)
    dp = tl.zeros([GIST_BLOCK, ROWS_BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        keep = (k < WIDTH)[None, :]
        x = tl.load(h + row[:, None] * WIDTH + k[None, :], mask=in_row & keep, other=0.0)
        norm = tl.load(final_norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        d = tl.load(d_pooled + gist[:, None] * WIDTH + k[None, :], mask=in_gist & keep, other=0.0).to(tl.float32)
        dp = product((d * norm[None, :]).to(dtype), tl.trans(x), dp)
    dp = dp * inverse[None, :]
    dot = tl.sum(p * dp, axis=0)
    dl = tl.zeros([GIST_BLOCK, ROWS_BLOCK], tl.float32)
    if POOL == "softmax":
        dl = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        dot += tl.sum(dl * tl.where((j < ROWS)[None, :], logits, 0.0), axis=0)
    dot = (dot / WIDTH)[:, None]
    weight, dl = p.to(dtype), (dl * WIDTH**-0.5).to(dtype)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        keep = (k < WIDTH)[None, :]
        x = tl.load(h + row[:, None] * WIDTH + k[None, :], mask=in_row & keep, other=0.0)
        n = x.to(tl.float32) * inverse[:, None]
        norm = tl.load(final_norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        d = tl.load(d_pooled + gist[:, None] * WIDTH + k[None, :], mask=in_gist & keep, other=0.0)
        ds = product(tl.trans(weight), d, tl.zeros([ROWS_BLOCK, BLOCK_K], tl.float32))
        if POOL == "softmax":
            q = tl.load(pool_q + g[:, None] * stride_q + k[None, :], mask=in_gist & keep, other=0.0).to(dtype)
            ds = product(tl.trans(dl), q, ds)
            s = (n * norm[None, :]).to(dtype)
            dq = product(dl, s, tl.zeros([GIST_BLOCK, BLOCK_K], tl.float32))
            tl.store(d_query + gist[:, None] * WIDTH + k[None, :], dq, mask=in_gist & keep)
        tl.store(d_norm + window * WIDTH + k, tl.sum(ds * n, axis=0), mask=k < WIDTH)
        out = inverse[:, None] * (ds * norm[None, :] - n * dot)
        tl.store(dh + row[:, None] * WIDTH + k[None, :], out.to(dtype), mask=in_row & keep)


@triton.jit
def match_backward_kernel(
    grad, y, centred, gain, dy, d_centred, d_gain, target_rms,
    GISTS: tl.constexpr, EMBED: tl.constexpr, EMBED_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per window: grad and y [N, GISTS, EMBED] -> dy, d_centred [N, EMBED] and the window's part of d_gain
    [N]."""
    window = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EMBED_BLOCK)
    keep = e < EMBED
    c = tl.load(centred + window * EMBED + e, mask=keep, other=0.0)
    inverse = inverse_rms(tl.sum(c * c, axis=0), EMBED)
    c *= inverse
    scale = tl.load(gain).to(tl.float32) * target_rms
    d_base = tl.zeros([EMBED_BLOCK], tl.float32)
    total = 0.0
    for g in range(GISTS):
        at = (window * GISTS + g) * EMBED + e
        d = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
        z = tl.load(y + at, mask=keep, other=0.0) + c * target_rms
        inverse_z = inverse_rms(tl.sum(z * z, axis=0), EMBED)
        z *= inverse_z
        dot = tl.sum(d * z, axis=0)
        total += dot
        d = (scale * inverse_z) * (d - z * (dot / EMBED))
        d_base += d
        tl.store(dy + at, d.to(dy.dtype.element_ty), mask=keep)
    tl.store(d_gain + window, total * target_rms)
    d_base = (target_rms * inverse) * (d_base - c * (tl.sum(d_base * c, axis=0) / EMBED))
    tl.store(d_centred + window * EMBED + e, d_base, mask=keep)

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The end of GistNet in Triton: pooling, output projection, RMS match.

    pool_kernel:     s = norm(h, final_norm); pooled_g = sum_j p_gj s_j
                     (p: softmax of s_j . pool_q_g / sqrt(Eg), mean, or the last row)
                     centred = mean_j x_j - mu (level 1) or mean_j x_j
    project_kernel:  y = W_out pooled
    match_kernel:    z = centred / rms(centred) * target_rms + y;  gist = z / rms(z) * gain * target_rms

x [N, K, EMBED], h [N * ROWS, WIDTH] -> pooled [N * GISTS, WIDTH] in h's dtype, y [N * GISTS, EMBED] and centred
[N, EMBED] in fp32, gists [N, GISTS, EMBED]. The three are launches of their own because each needs all of what the one
before it makes: a column tile of y every pooled number, an RMS the whole row. Pooled rows are K times fewer than h's,
so that what travels between them is next to nothing; one program per window that did all three would read W_out alone,
35 us for E = 4096 at an SM's share of the bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import inverse_rms, product, weight_tile


@triton.jit
def window_probabilities(
    h, final_norm, pool_q, window, stride_q,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GISTS: tl.constexpr, POOL: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    GIST_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p and its logits [GIST_BLOCK, ROWS_BLOCK] of a window (mean, cls: zeros), and 1 / rms of its rows."""
    dtype = h.dtype.element_ty
    j, g = tl.arange(0, ROWS_BLOCK), tl.arange(0, GIST_BLOCK)
    squares = tl.zeros([ROWS_BLOCK], tl.float32)
    s = tl.zeros([GIST_BLOCK, ROWS_BLOCK], tl.float32)
    at = h + (window * ROWS + j)[:, None] * WIDTH
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(at + k[None, :], mask=(j < ROWS)[:, None] & (k < WIDTH)[None, :], other=0.0)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if POOL == "softmax":
            inside = (g < GISTS)[:, None] & (k < WIDTH)[None, :]
            q = tl.load(pool_q + g[:, None] * stride_q + k[None, :], mask=inside, other=0.0).to(tl.float32)
            norm = tl.load(final_norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
            s = product((q * norm[None, :]).to(dtype), tl.trans(x), s)
    inverse = inverse_rms(squares, WIDTH)
    if POOL == "softmax":
        s = tl.where((j < ROWS)[None, :], s * (inverse * WIDTH**-0.5)[None, :], float("-inf"))
        p = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
    else:
        weight = tl.where(j < ROWS, 1.0 / ROWS, 0.0) if POOL == "mean" else tl.where(j == ROWS - 1, 1.0, 0.0)
        p = tl.zeros([GIST_BLOCK, ROWS_BLOCK], tl.float32) + weight[None, :]
    return p, s, inverse


@triton.jit
def _pool(
    h, final_norm, pool_q, pooled, window, stride_q,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GISTS: tl.constexpr, POOL: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    GIST_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    p, _, inverse = window_probabilities(
        h, final_norm, pool_q, window, stride_q, ROWS, WIDTH, GISTS, POOL, ROWS_BLOCK, GIST_BLOCK, BLOCK_K
    )
    weights = (p * inverse[None, :]).to(dtype)
    j, g = tl.arange(0, ROWS_BLOCK), tl.arange(0, GIST_BLOCK)
    at = h + (window * ROWS + j)[:, None] * WIDTH
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(at + k[None, :], mask=(j < ROWS)[:, None] & (k < WIDTH)[None, :], other=0.0)
        norm = tl.load(final_norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        out = product(weights, x, tl.zeros([GIST_BLOCK, BLOCK_K], tl.float32)) * norm[None, :]
        to = pooled + (window * GISTS + g)[:, None] * WIDTH + k[None, :]
        tl.store(to, out.to(dtype), mask=(g < GISTS)[:, None] & (k < WIDTH)[None, :])


@triton.jit
def pool_kernel(
    h, final_norm, pool_q, pooled, x, mu, centred, stride_q, stride_n, stride_k,
    K: tl.constexpr, ROWS: tl.constexpr, EMBED: tl.constexpr, WIDTH: tl.constexpr, GISTS: tl.constexpr,
    POOL: tl.constexpr, CENTRE: tl.constexpr, ROWS_BLOCK: tl.constexpr, GIST_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A window's first program pools, each of the others takes the mean of BLOCK_N columns of x."""
    tiles: tl.constexpr = (EMBED + BLOCK_N - 1) // BLOCK_N
    window = (tl.program_id(0) // (tiles + 1)).to(tl.int64)
    tile = tl.program_id(0) % (tiles + 1) - 1
    if tile < 0:
        _pool(
            h, final_norm, pool_q, pooled, window, stride_q,
            ROWS, WIDTH, GISTS, POOL, ROWS_BLOCK, GIST_BLOCK, BLOCK_K,
        )  # fmt: skip
        return
    n, j = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 16)
    keep = n < EMBED
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, 16):
        at = x + window * stride_n + (start + j)[:, None].to(tl.int64) * stride_k + n[None, :]
        some = tl.load(at, mask=(start + j < K)[:, None] & keep[None, :], other=0.0)
        total += tl.sum(some.to(tl.float32), axis=0)
    total = total / K
    if CENTRE:
        total -= tl.load(mu + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(centred + window * EMBED + n, total, mask=keep)


@triton.jit
def project_kernel(
    pooled, w, y, n_gists, stride_w,
    EMBED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """n_gists = N * GISTS rows."""
    dtype = pooled.dtype.element_ty
    tiles: tl.constexpr = (EMBED + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, keep = row < n_gists, n < EMBED
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(pooled + row[:, None] * WIDTH + k[None, :], mask=live[:, None] & (k < WIDTH)[None, :], other=0.0)
        acc = product(a, weight_tile(w, stride_w, n, keep, k, WIDTH, dtype), acc)
    tl.store(y + row[:, None] * EMBED + n[None, :], acc, mask=live[:, None] & keep[None, :])


@triton.jit
def match_kernel(
    y, centred, gain, out, target_rms, GISTS: tl.constexpr, EMBED: tl.constexpr, EMBED_BLOCK: tl.constexpr
):
    gist = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EMBED_BLOCK)
    keep = e < EMBED
    c = tl.load(centred + (gist // GISTS) * EMBED + e, mask=keep, other=0.0)
    z = tl.load(y + gist * EMBED + e, mask=keep, other=0.0)
    z += c * (inverse_rms(tl.sum(c * c, axis=0), EMBED) * target_rms)
    z *= inverse_rms(tl.sum(z * z, axis=0), EMBED) * tl.load(gain).to(tl.float32) * target_rms
    tl.store(out + gist * EMBED + e, z.to(out.dtype.element_ty), mask=keep)

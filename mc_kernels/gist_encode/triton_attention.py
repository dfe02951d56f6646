# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Attention inside windows in Triton: one program per group of windows and head, no intermediate in memory.

    a = norm(h, gain); q, k, v = the head's rows of W_qkv times a; q, k rotated at 0 .. ROWS-1 (halves paired)
    att = softmax(q k^T / sqrt(HEAD_DIM)) v inside each window

h [n_rows, WIDTH], n_rows = N * ROWS, contiguous; qkv weights [3 WIDTH, WIDTH], last dimension contiguous; phases fp32
[2, ROWS, HALF], cos then sin -> att [n_rows, WIDTH] in h's dtype. A program takes GROUP windows, as many as fit BLOCK_M
rows; keys of other windows are masked, which at 128 rows of 32-row windows is 4x the FLOPs of scores that are 2% of the
layer's. Queries and keys are made as two halves of a head each, so that rotation pairs registers of the same thread.
A window that holds NaN or infinity spoils no other: masked probabilities are zero and values that meet them finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import gained_tile, inverse_rms, product, weight_tile


@triton.jit
def attention_kernel(
    h, gain, qkv, phases, att, n_rows, stride_w,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, HALF_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    heads: tl.constexpr = WIDTH // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    pid = tl.program_id(0)
    first = (pid % heads) * HEAD_DIM  # column of the head; heads of a group run together and share its rows in L2
    r = tl.arange(0, BLOCK_M)
    row = (pid // heads).to(tl.int64) * (GROUP * ROWS) + r
    live = (r < GROUP * ROWS) & (row < n_rows)
    b, d = tl.arange(0, HALF_BLOCK), tl.arange(0, HEAD_BLOCK)
    in_half, in_head = b < HALF, d < HEAD_DIM

    squares = tl.zeros([BLOCK_M], tl.float32)
    q1 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    q2 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    k1 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    k2 = tl.zeros([BLOCK_M, HALF_BLOCK], tl.float32)
    v = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    q_row, k_row = first + b, WIDTH + first + b
    for start in range(0, WIDTH, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        wide, a = gained_tile(h, row, live, gain, c, WIDTH)
        squares += tl.sum(wide * wide, axis=1)
        q1 = product(a, weight_tile(qkv, stride_w, q_row, in_half, c, WIDTH, dtype), q1)
        q2 = product(a, weight_tile(qkv, stride_w, q_row + HALF, in_half, c, WIDTH, dtype), q2)
        k1 = product(a, weight_tile(qkv, stride_w, k_row, in_half, c, WIDTH, dtype), k1)
        k2 = product(a, weight_tile(qkv, stride_w, k_row + HALF, in_half, c, WIDTH, dtype), k2)
        v = product(a, weight_tile(qkv, stride_w, 2 * WIDTH + first + d, in_head, c, WIDTH, dtype), v)

    scale = inverse_rms(squares, WIDTH)[:, None]
    at = (r % ROWS)[:, None] * HALF + b[None, :]
    cos = tl.load(phases + at, mask=in_half[None, :], other=0.0) * scale
    sin = tl.load(phases + ROWS * HALF + at, mask=in_half[None, :], other=0.0) * scale
    kr1, kr2 = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
    cos, sin = cos * (HEAD_DIM**-0.5), sin * (HEAD_DIM**-0.5)
    qr1, qr2 = (q1 * cos - q2 * sin).to(dtype), (q2 * cos + q1 * sin).to(dtype)
    s = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    s = product(qr2, tl.trans(kr2), product(qr1, tl.trans(kr1), s))
    window = r // ROWS  # what pads the last windows is a window of its own, of zeros
    s = tl.where(window[:, None] == window[None, :], s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    total = tl.sum(p, axis=1)
    v = v * scale
    v = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(dtype)
    o = product(p.to(dtype), v, tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)) / total[:, None]
    tl.store(att + row[:, None] * WIDTH + first + d[None, :], o.to(dtype), mask=live[:, None] & in_head[None, :])

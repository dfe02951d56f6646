# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The linear layers of GistNet in Triton, with what surrounds each fused into it.

    embed_kernel:     h = W_in (x / rms(x)) + level_emb  (cls: row K of a window is pool_q + level_emb)
    residual_kernel:  out = residual + W x
    swiglu_kernel:    y = silu(W_gate a) * (W_up a) with a = norm(h, gain)

x, h, y: rows of fp32, bf16 or fp16; products take the dtype of h (`x` and weights are converted to it), sums are fp32.
A norm costs no pass of its own: W (h * gain / rms(h)) = (W (h * gain)) / rms(h), so that the sum of squares is taken
from the tiles that the product reads and divides it at the end. `out` may be `residual`: a program reads the tile that
it writes and nothing else of it. Weights are [out, in] with a contiguous last dimension. A program makes one tile of
the output; column tiles run fastest, so that the rows of a tile are read from L2 but once from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_backend import interpreted

RMS_EPS = tl.constexpr(1e-12)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def product(a, b, acc):
    """acc + a b, with fp32 sums; fp32 operands are not rounded to TF32."""
    if INTERPRETED:  # which would multiply the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def inverse_rms(squares, WIDTH: tl.constexpr):
    """1 / rms from a sum of WIDTH squares."""
    return tl.rsqrt(squares / WIDTH + RMS_EPS)


@triton.jit
def gained_tile(h, rows, live, gain, k, WIDTH: tl.constexpr):
    """Tile h[rows, k] in fp32 and h[rows, k] * gain[k] in h's dtype, zero outside."""
    inside = k < WIDTH
    x = tl.load(h + rows[:, None] * WIDTH + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
    g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    return wide, (wide * g[None, :]).to(h.dtype.element_ty)


@triton.jit
def weight_tile(w, stride_w, n, keep, k, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Tile w[n, k], transposed to [k, n], zero outside."""
    at = w + n[None, :].to(tl.int64) * stride_w + k[:, None]
    return tl.load(at, mask=(k < WIDTH)[:, None] & keep[None, :], other=0.0).to(dtype)


@triton.jit
def _write_phases(phases, ROWS: tl.constexpr, HALF: tl.constexpr, LOG2_THETA: tl.constexpr, BLOCK: tl.constexpr):
    """cos [ROWS, HALF], then sin, of the angles j * theta^(-b / HALF), to fp32 rounding.

    In fp64: whole quarter turns off, then the two Taylor series on [-pi/4, pi/4].
    """
    for start in range(0, ROWS * HALF, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = at < ROWS * HALF
        exponent = (at % HALF).to(tl.float64) * (-LOG2_THETA / HALF)
        quarters = (at // HALF).to(tl.float64) * tl.exp2(exponent) * 0.6366197723675814
        whole = tl.floor(quarters + 0.5)
        x = (quarters - whole) * 1.5707963267948966
        s = x * x
        sin = x * (1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72 * (1 - s / 110)))))
        cos = 1 - s / 2 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56 * (1 - s / 90))))
        turn = whole.to(tl.int32) & 3
        odd = (turn & 1) == 1
        c = tl.where(odd, sin, cos) * tl.where((turn == 1) | (turn == 2), -1.0, 1.0)
        d = tl.where(odd, cos, sin) * tl.where(turn >= 2, -1.0, 1.0)
        tl.store(phases + at, c.to(tl.float32), mask=keep)
        tl.store(phases + ROWS * HALF + at, d.to(tl.float32), mask=keep)


@triton.jit
def embed_kernel(
    x, w, level_emb, pool_q, h, phases, sums, n_rows, stride_n, stride_k, stride_w, one,
    K: tl.constexpr, ROWS: tl.constexpr, EMBED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    LOG2_THETA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [N, K, EMBED] -> h [N * ROWS, WIDTH], ROWS = K or, with a class token, K + 1. The last program writes the
    rotary phases instead, for the attention of all layers. sums: None, or of the squares of h's rows in
    parts, fp32 [tiles of WIDTH, n_rows].

    one: 1.0, which the compiler must not know. A tile that the matrix units read in shared memory and that is loaded
    from there as well gets a buffer too few in a pipelined loop (triton-lang/triton issue 6691); multiplied, it is read
    once and goes to the matrix units from registers.
    """
    dtype = h.dtype.element_ty
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if pid == tl.num_programs(0) - 1:
        _write_phases(phases, ROWS, HALF, LOG2_THETA, 256)
        return
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = row % ROWS
    live, keep = row < n_rows, n < WIDTH
    token = live & (j < K)
    at = x + (row // ROWS) * stride_n + j * stride_k
    squares = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, EMBED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(at[:, None] + k[None, :], mask=token[:, None] & (k < EMBED)[None, :], other=0.0)
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if BLOCK_M >= 64:  # as wgmma takes
            a = wide * one
        acc = product(a.to(dtype), weight_tile(w, stride_w, n, keep, k, EMBED, dtype), acc)
    acc = acc * inverse_rms(squares, EMBED)[:, None] + tl.load(level_emb + n, mask=keep, other=0.0).to(tl.float32)
    if ROWS > K:
        token_q = tl.load(pool_q + n, mask=keep, other=0.0).to(tl.float32)
        acc += tl.where((j == K)[:, None], token_q[None, :], 0.0)
    tl.store(h + row[:, None] * WIDTH + n[None, :], acc.to(dtype), mask=live[:, None] & keep[None, :])
    if sums is not None:
        wide = acc.to(dtype).to(tl.float32)
        tl.store(sums + (pid % tiles) * n_rows + row, tl.sum(wide * wide, axis=1), mask=live)


@triton.jit
def residual_kernel(
    x, w, residual, out, n_rows, stride_w,
    IN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [n_rows, IN], residual and out [n_rows, WIDTH]."""
    dtype = x.dtype.element_ty
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, keep = row < n_rows, n < WIDTH
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + row[:, None] * IN + k[None, :], mask=live[:, None] & (k < IN)[None, :], other=0.0)
        acc = product(a, weight_tile(w, stride_w, n, keep, k, IN, dtype), acc)
    at = row[:, None] * WIDTH + n[None, :]
    inside = live[:, None] & keep[None, :]
    acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(
    h, gain, w, y, n_rows, stride_w,
    WIDTH: tl.constexpr, FFN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [n_rows, WIDTH], w [2 FFN, WIDTH] with the gate's rows first -> y [n_rows, FFN]."""
    dtype = h.dtype.element_ty
    tiles: tl.constexpr = (FFN + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, keep = row < n_rows, n < FFN
    squares = tl.zeros([BLOCK_M], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        wide, a = gained_tile(h, row, live, gain, k, WIDTH)
        squares += tl.sum(wide * wide, axis=1)
        gate = product(a, weight_tile(w, stride_w, n, keep, k, WIDTH, dtype), gate)
        up = product(a, weight_tile(w, stride_w, FFN + n, keep, k, WIDTH, dtype), up)
    scale = inverse_rms(squares, WIDTH)[:, None]
    gate, up = gate * scale, up * scale
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row[:, None] * FFN + n[None, :], out.to(dtype), mask=live[:, None] & keep[None, :])

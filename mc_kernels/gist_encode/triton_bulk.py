# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The products of GistNet's layers for many windows, in Triton: operands that nothing touches on the way.

    gained_kernel:         v = w * gain, of the queries', keys', values', gates' and ups' weights, once a call
    bulk_attention_kernel: triton_attention's, on v
    bulk_swiglu_kernel:    triton_linear's, on v
    bulk_residual_kernel:  triton_linear's, which leaves the squares of its rows

W (h * gain) / rms(h) = (W * gain) h / rms(h): with the gain in the weight and the squares of h's rows summed by the
kernel that made h (`squares`, fp32 [PARTS, n_rows], a part a tile of columns), no product touches its operands on the
way. They go from memory to shared memory and from there to the matrix units, several steps ahead, where a row that is
multiplied by the gain and squared waits in registers for every step's product.

h [n_rows, WIDTH] contiguous, of 16 bits; v likewise; phases fp32 [2, ROWS, HALF]. Sizes fill the tiles: WIDTH and FFN
are multiples of BLOCK_K and of their BLOCK_N, HEAD_DIM is a power of two. Only rows may end inside a tile: what is read
beyond them is the last row again, and is not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import inverse_rms, product


@triton.jit
def gained_kernel(
    w, gain, v, stride_layer, stride_w, stride_gain, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w [layers, N, WIDTH], gain [layers, WIDTH] -> v, contiguous."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    layer = (tl.program_id(0) // tiles).to(tl.int64)
    n, c = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH_BLOCK)
    inside = (n < N)[:, None] & (c < WIDTH)[None, :]
    at = w + layer * stride_layer + n[:, None].to(tl.int64) * stride_w + c[None, :]
    by = tl.load(gain + layer * stride_gain + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by[None, :]
    tl.store(v + (layer * N + n)[:, None] * WIDTH + c[None, :], x.to(v.dtype.element_ty), mask=inside)


@triton.jit
def _row_scale(squares, row, n_rows, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """1 / rms of rows from the sums of their parts."""
    total = tl.load(squares + row)
    for part in tl.static_range(1, PARTS):
        total += tl.load(squares + part * n_rows + row)
    return inverse_rms(total, WIDTH)[:, None]


@triton.jit
def _turned(x, cos, sin, M: tl.constexpr, N: tl.constexpr):
    """Neighbouring columns of x [M, N] turned as pairs."""
    one, two = tl.split(tl.reshape(x, (M, N // 2, 2)))
    return tl.reshape(tl.join(one * cos - two * sin, two * cos + one * sin), (M, N))


@triton.jit
def bulk_attention_kernel(
    h, squares, qkv, phases, att, n_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    heads: tl.constexpr = WIDTH // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    pid = tl.program_id(0)
    first = (pid % heads) * HEAD_DIM  # column of the head; heads of a group run together and share its rows in L2
    r = tl.arange(0, BLOCK_M)
    row = (pid // heads).to(tl.int64) * (GROUP * ROWS) + r
    live = (r < GROUP * ROWS) & (row < n_rows)
    row = tl.minimum(row, n_rows - 1)
    c, d, b = tl.arange(0, BLOCK_K), tl.arange(0, HEAD_DIM), tl.arange(0, HALF)
    # A rotary pair is two neighbouring columns, which one thread holds; a score does not see the order of the columns.
    pair = first + (d % 2) * HALF + d // 2
    at_h = h + row[:, None] * WIDTH + c[None, :]
    at_q = qkv + pair[None, :] * WIDTH + c[:, None]
    at_v = qkv + (2 * WIDTH + first + d)[None, :] * WIDTH + c[:, None]
    q = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    k = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    v = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = tl.load(at_h + start)
        q = product(a, tl.load(at_q + start), q)
        k = product(a, tl.load(at_q + WIDTH * WIDTH + start), k)
        v = product(a, tl.load(at_v + start), v)

    scale = _row_scale(squares, row, n_rows, WIDTH, PARTS)
    at = (r % ROWS)[:, None] * HALF + b[None, :]
    cos = tl.load(phases + at) * scale
    sin = tl.load(phases + ROWS * HALF + at) * scale
    k = _turned(k, cos, sin, BLOCK_M, HEAD_DIM).to(dtype)
    q = _turned(q, cos * (HEAD_DIM**-0.5), sin * (HEAD_DIM**-0.5), BLOCK_M, HEAD_DIM).to(dtype)
    s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_M], tl.float32))
    window = r // ROWS  # what pads the last windows is a window of its own
    s = tl.where(window[:, None] == window[None, :], s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    total = tl.sum(p, axis=1)
    v = v * scale
    v = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(dtype)
    o = product(p.to(dtype), v, tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)) / total[:, None]
    tl.store(att + row[:, None] * WIDTH + first + d[None, :], o.to(dtype), mask=live[:, None])


@triton.jit
def bulk_swiglu_kernel(
    h, squares, w, y, n_rows,
    WIDTH: tl.constexpr, FFN: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [n_rows, WIDTH], w [2 FFN, WIDTH] with the gate's rows first -> y [n_rows, FFN]."""
    tiles: tl.constexpr = FFN // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    n, c = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    at_h = h + row[:, None] * WIDTH + c[None, :]
    at_w = w + n[None, :] * WIDTH + c[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = tl.load(at_h + start)
        gate = product(a, tl.load(at_w + start), gate)
        up = product(a, tl.load(at_w + FFN * WIDTH + start), up)
    scale = _row_scale(squares, row, n_rows, WIDTH, PARTS)
    gate, up = gate * scale, up * scale
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row[:, None] * FFN + n[None, :], out.to(y.dtype.element_ty), mask=live[:, None])


@triton.jit
def bulk_residual_kernel(
    x, w, residual, out, squares, n_rows, stride_w,
    IN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [n_rows, IN], residual and out [n_rows, WIDTH]; squares of what is stored [WIDTH / BLOCK_N, n_rows]."""
    tiles: tl.constexpr = WIDTH // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < n_rows
    inside = tl.minimum(row, n_rows - 1)
    n, c = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    at_x = x + inside[:, None] * IN + c[None, :]
    at_w = w + n[None, :].to(tl.int64) * stride_w + c[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        acc = product(tl.load(at_x + start), tl.load(at_w + start), acc)
    at = row[:, None] * WIDTH + n[None, :]
    acc += tl.load(residual + at, mask=live[:, None], other=0.0).to(tl.float32)
    sums = acc.to(out.dtype.element_ty)
    tl.store(out + at, sums, mask=live[:, None])
    wide = sums.to(tl.float32)
    tl.store(squares + (pid % tiles) * n_rows + row, tl.sum(wide * wide, axis=1), mask=live)

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A whole layer of a narrow GistNet in one Triton program per group of windows: nothing of it leaves the chip.

    x = x + W_o attention(norm(x, gain1));  x = x + W_down (silu(gate) * up),  gate, up = W_gate_up norm(x, gain2)

h, out [n_rows, WIDTH], n_rows = N * ROWS, contiguous, of 16 bits; weights [out, in] of one layer, last dimension
contiguous; phases as `embed_kernel` leaves them. `out` may be `h`: a program reads the rows that it writes, first.
Windows that hold NaN or infinity spoil no others.

The residual stream of BLOCK_M rows stays in registers in fp32, unrounded from the first norm to the end of the layer:
it is the accumulator of both projections back. Its normed copy is the left operand of every product; weights come
through the chip's cache in tiles of CHUNK rows or columns, so that queries, keys, values, gates and activations exist
for CHUNK columns at a time and scores for one head. Rows of W_q and W_k are taken such that a rotary pair is two
neighbouring columns, which one thread holds; a score does not see the order of the columns.

A program reads all weights of the layer, for 64 rows. Per row and layer that is, at Eg 128 and F 384, 6.7 KB from the
L2 cache and 0.5 KB from memory; the four kernels of `triton_kernel` ask the L2 for 7.9 KB (weights for 128 rows, and
activations once per tile of columns) and memory for 3.6 KB (1.1 ns a row at 3.35 TB/s, against 0.4 ns of products).
Wider nets do not fit: see `heuristics`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import inverse_rms, product, weight_tile


@triton.jit
def _normed(x, gain, c, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """x * gain in dtype, and 1 / rms of the rows, which divides what a product makes of it."""
    g = tl.load(gain + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    return (x * g[None, :]).to(dtype), inverse_rms(tl.sum(x * x, axis=1), WIDTH)[:, None]


@triton.jit
def _rotated(x, phases, at, keep, ROWS: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Neighbouring columns of x [M, N] turned as pairs."""
    one, two = tl.split(tl.reshape(x, (M, N // 2, 2)))
    cos = tl.load(phases + at, mask=keep, other=0.0)
    sin = tl.load(phases + ROWS * HALF + at, mask=keep, other=0.0)
    return tl.reshape(tl.join(one * cos - two * sin, two * cos + one * sin), (M, N))


@triton.jit
def _column_tile(w, stride_w, n, keep, c, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Tile w[c, n], transposed to [n, c], zero outside."""
    at = w + c[None, :] * stride_w + n[:, None]
    return tl.load(at, mask=(c < WIDTH)[None, :] & keep[:, None], other=0.0).to(dtype)


@triton.jit
def layer_kernel(
    h, out, phases, gain1, qkv, attn_out, gain2, gate_up, down, n_rows, stride_qkv, stride_out, stride_gate_up,
    stride_down,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FFN: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    r, c = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH_BLOCK)
    row = tl.program_id(0).to(tl.int64) * (GROUP * ROWS) + r
    inside = ((r < GROUP * ROWS) & (row < n_rows))[:, None] & (c < WIDTH)[None, :]
    x = tl.load(h + row[:, None] * WIDTH + c[None, :], mask=inside, other=0.0).to(tl.float32)
    d, b = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 2)
    window = r // ROWS  # what pads the last windows is a window of its own, of zeros
    none = tl.zeros([BLOCK_M, CHUNK], tl.float32)

    a, scale = _normed(x, gain1, c, WIDTH, dtype)
    for first in range(0, WIDTH, HEAD_DIM):
        s = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        for start in range(0, HALF, CHUNK // 2):
            n, keep = first + (d % 2) * HALF + start + d // 2, start + d // 2 < HALF
            at, in_half = (r % ROWS)[:, None] * HALF + (start + b)[None, :], (start + b < HALF)[None, :]
            q = product(a, weight_tile(qkv, stride_qkv, n, keep, c, WIDTH, dtype), none) * (scale * HEAD_DIM**-0.5)
            q = _rotated(q, phases, at, in_half, ROWS, HALF, BLOCK_M, CHUNK).to(dtype)
            k = product(a, weight_tile(qkv, stride_qkv, WIDTH + n, keep, c, WIDTH, dtype), none) * scale
            k = _rotated(k, phases, at, in_half, ROWS, HALF, BLOCK_M, CHUNK).to(dtype)
            s = product(q, tl.trans(k), s)
        s = tl.where(window[:, None] == window[None, :], s, float("-inf"))
        s = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = (s / tl.sum(s, axis=1)[:, None]).to(dtype)
        for start in range(0, HEAD_DIM, CHUNK):
            n, keep = first + start + d, start + d < HEAD_DIM
            v = product(a, weight_tile(qkv, stride_qkv, 2 * WIDTH + n, keep, c, WIDTH, dtype), none) * scale
            v = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(dtype)
            o = product(p, v, none).to(dtype)
            x = product(o, _column_tile(attn_out, stride_out, n, keep, c, WIDTH, dtype), x)

    a, scale = _normed(x, gain2, c, WIDTH, dtype)
    for start in range(0, FFN, CHUNK):
        n = start + d
        keep = n < FFN
        gate = product(a, weight_tile(gate_up, stride_gate_up, n, keep, c, WIDTH, dtype), none) * scale
        up = product(a, weight_tile(gate_up, stride_gate_up, FFN + n, keep, c, WIDTH, dtype), none) * scale
        y = (gate / (1.0 + tl.exp(-gate)) * up).to(dtype)
        x = product(y, _column_tile(down, stride_down, n, keep, c, WIDTH, dtype), x)
    tl.store(out + row[:, None] * WIDTH + c[None, :], x.to(dtype), mask=inside)

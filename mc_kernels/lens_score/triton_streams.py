"""Triton kernels of `lens_score` that stream over the entries: N x E numbers against a few dozen vectors of width E.

    products        y[c, n] = x_n . v_c / rms(x_n), or exp of it with the statistics of a softmax over each block
    weighted_sum    sum_n w[c, n] x_n over a split of N, of a softmax by blocks or plain
    score_entries   the whole score pass: products with the absorbed queries and the direct rows, softmax over the
                    queries, match, the head's MLP, legality

x [N, E] is raw; its RMS is found in the first stream that multiplies it. Blocks and splits depend on shapes alone and
every program owns what it writes, so results repeat bit for bit. Operands are of the dtype of v or w (16 bits: tensor
cores at full rate), sums are fp32; PRECISION is for fp32 operands.

A tile of 16-bit entries goes to the tensor cores and nowhere else: where it is read into registers too, Triton 3.6
gives it one buffer too few on Hopper, and a later tile overwrites it while it is multiplied (its issue 6691). So
squares are the diagonal of the tile's product with itself, on the tensor cores as well. fp32 products have no tensor
cores, and a chain of E roundings errs by more than torch's sums: there SPAN columns are summed, then the sums.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..triton_backend import interpreted
from .triton_query import EPS, LENGTHS

# The interpreter keeps bf16 as integers and would multiply those.
_WIDEN = tl.constexpr(interpreted())
SPAN = tl.constexpr(128)  # columns in one chain of fp32 additions


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_entries(x, rows, n, columns, e, row_stride):
    """Tile [rows, columns] of x, zero outside. rows: int64."""
    at = x + rows[:, None] * row_stride + columns[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & (columns < e)[None, :], other=0.0)


@triton.jit
def add_products(
    v_at, v_ok, x, rows, n, first, last, y, square, x_row, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """y + v x^T and square + |x|^2 over columns first .. last - 1. GRAM: square is [rows, rows], of x x^T."""
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = load_entries(x, rows, n, k, last, x_row)
        v = tl.load(v_at + k[None, :], mask=v_ok[:, None] & (k < last)[None, :], other=0.0)
        if GRAM:
            square = multiply(tile, tl.trans(tile), square, PRECISION)
        else:
            wide = tile.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        y = multiply(v, tl.trans(tile.to(v.dtype)), y, PRECISION)
    return y, square


@triton.jit(do_not_specialize=LENGTHS)
def products(
    x, vectors, out, inverse, maxima, totals, n, width, e, count, x_row, out_row, SOFTMAX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of N, tiles of the `count` vectors [count, E]). inverse[n] = 1 / rms(x_n).

    SOFTMAX: out[c, n] = exp(y[c, n] - maxima[block, c]) / rms(x_n), totals[block, c] the sum over the block of the
    exponentials; out is zero for n in [N, whole blocks). Otherwise out[c, n] = y[c, n] for n < width (= N).
    """
    # Fewer vectors are not multiplied from shared memory: then every use of a tile is in registers.
    GRAM: tl.constexpr = BLOCK_C >= 64 and x.dtype == vectors.dtype and x.dtype.element_ty.primitive_bitwidth == 16
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = c < count
    y = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    at = vectors + c.to(tl.int64)[:, None] * e
    if GRAM:
        gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        y, gram = add_products(at, used, x, rows, n, 0, e, y, gram, x_row, BLOCK_K, PRECISION, GRAM)
        i = tl.arange(0, BLOCK_N)
        square = tl.sum(tl.where(i[:, None] == i[None, :], gram, 0.0), axis=0)
    else:
        square = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, e, SPAN):
            part, square = add_products(
                at, used, x, rows, n, first, tl.minimum(first + SPAN, e), tl.zeros_like(y), square, x_row, BLOCK_K,
                PRECISION, GRAM,
            )  # fmt: skip
            y += part
    if PRECISION == "ieee":
        scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(square / e + EPS))
    else:
        scale = 1.0 / tl.sqrt(square / e + EPS)
    y *= scale[None, :]
    at = out + c.to(tl.int64)[:, None] * out_row + rows[None, :]
    if SOFTMAX:
        y = tl.where((rows < n)[None, :], y, float("-inf"))
        top = tl.max(y, axis=1)
        p = tl.exp(y - top[:, None])
        tl.store(maxima + block * count + c, top, mask=c < count)
        tl.store(totals + block * count + c, tl.sum(p, axis=1), mask=c < count)
        p *= scale[None, :]
        if out.dtype.element_ty == tl.float16:  # a zero entry has 1 / rms = 1e6: not inf, which times 0 is NaN
            p = tl.where(p > 65504.0, 65504.0, p)
        tl.store(at, p.to(out.dtype.element_ty), mask=(c < count)[:, None])
    else:
        tl.store(at, y, mask=used[:, None] & (rows < width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(inverse + rows, scale, mask=rows < n)


@triton.jit
def _of_blocks(values, start, end, count, c, used, other):
    """values [blocks, count] of 16 blocks from `start` on, and `other` from `end` on."""
    block = start + tl.arange(0, 16)
    at = values + block[:, None] * count + c[None, :]
    return tl.load(at, mask=(block < end)[:, None] & used[None, :], other=other)


@triton.jit(do_not_specialize=LENGTHS)
def weighted_sum(
    x, weights, maxima, totals, sums, split_maxima, split_totals, n, width, e, count, x_row, weights_row, n_blocks,
    blocks_per_split, SOFTMAX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[s, c] = sum over the split of weights[c, n] x_n. Grid: (tiles of E, splits, tiles of the `count` rows).

    width: columns of weights, n or more (what lies beyond n is 0). Unlike n it may tell the compiler that rows are
    aligned, so that they are loaded 16 bytes at a time.

    SOFTMAX: `products` gave weights, maxima and totals for the same blocks; sums are relative to split_maxima[s, c],
    and so is the softmax's denominator split_totals[s, c]. The maximum is known before the sum begins, so that the
    accumulator is never rescaled, and the loop loads nothing that it has to wait for.
    """
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = c < count
    total = tl.zeros((BLOCK_C, BLOCK_E), dtype=tl.float32)
    first, last = split * blocks_per_split, tl.minimum(n_blocks, (split + 1) * blocks_per_split)
    if SOFTMAX:
        top = tl.full((BLOCK_C,), float("-inf"), dtype=tl.float32)
        for start in range(first, last, 16):
            tops = _of_blocks(maxima, start, last, count, c, used, float("-inf"))
            top = tl.maximum(top, tl.max(tops, axis=0))
    for block in range(first, last):
        rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        tile = load_entries(x, rows, n, columns, e, x_row)
        at = weights + c.to(tl.int64)[:, None] * weights_row + rows[None, :]
        w = tl.load(at, mask=used[:, None] & (rows < width)[None, :], other=0.0)
        if SOFTMAX:
            share = tl.exp(tl.load(maxima + block * count + c, mask=used, other=0.0) - top)
            w = (w.to(tl.float32) * share[:, None]).to(weights.dtype.element_ty)
        total = multiply(w, tile.to(w.dtype), total, PRECISION)
    at = sums + (split * count + c).to(tl.int64)[:, None] * e + columns[None, :]
    tl.store(at, total, mask=used[:, None] & (columns < e)[None, :])
    if SOFTMAX:  # noqa: SIM102 a constexpr prunes only by itself
        if tl.program_id(0) == 0:
            mass = tl.zeros((BLOCK_C,), dtype=tl.float32)
            for start in range(first, last, 16):
                tops = _of_blocks(maxima, start, last, count, c, used, float("-inf"))
                mass += tl.sum(tl.exp(tops - top) * _of_blocks(totals, start, last, count, c, used, 0.0), axis=0)
            tl.store(split_maxima + split * count + c, top, mask=used)
            tl.store(split_totals + split * count + c, mass, mask=used)


@triton.jit
def add_scores(
    x, rows, n, vectors, c, direct, j, n_direct, first, last, y, straight, x_row, e, direct_row,
    DIRECT: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y + x vectors^T and straight + x direct^T over columns first .. last - 1."""
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < last)[None, :]
        tile = load_entries(x, rows, n, k, last, x_row)
        v = tl.load(vectors + c[:, None] * e + k[None, :], mask=inside, other=0.0)
        narrow = tile.to(v.dtype)
        y = multiply(narrow, tl.trans(v), y, PRECISION)
        if DIRECT:
            at = direct + j[:, None].to(tl.int64) * direct_row + k[None, :]
            v = tl.load(at, mask=(j < n_direct)[:, None] & inside, other=0.0)
            straight = multiply(narrow, tl.trans(v.to(narrow.dtype)), straight, PRECISION)
    return y, straight


@triton.jit(do_not_specialize=LENGTHS)
def score_entries(
    x, inverse, features, vectors, folded, direct, head_in, head_bias, head_out, out_bias, legal, out, n, e, n_queries,
    n_heads, n_direct, n_features, hidden, before_match, x_row, features_row, direct_row, in_row, out_weight_row,
    legal_row, legal_column, log_queries, H_PAD: tl.constexpr, Q_PAD: tl.constexpr, DIRECT: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HID: tl.constexpr, BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, 2]. Grid: (blocks of N). inverse: of `products`.

    vectors [H_PAD Q_PAD, E] and folded [H_PAD Q_PAD, BLOCK_HID] from `absorb`; before_match: head_in's columns before
    those of the match.
    """
    C: tl.constexpr = H_PAD * Q_PAD
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, C)
    j = tl.arange(0, BLOCK_X)
    hid = tl.arange(0, BLOCK_HID)
    y = tl.zeros((BLOCK_N, C), dtype=tl.float32)
    straight = tl.zeros((BLOCK_N, BLOCK_X), dtype=tl.float32)
    if PRECISION == "ieee":
        for first in range(0, e, SPAN):
            part, straight_part = add_scores(
                x, rows, n, vectors, c, direct, j, n_direct, first, tl.minimum(first + SPAN, e), tl.zeros_like(y),
                tl.zeros_like(straight), x_row, e, direct_row, DIRECT, BLOCK_K, PRECISION,
            )  # fmt: skip
            y += part
            straight += straight_part
    else:
        y, straight = add_scores(
            x, rows, n, vectors, c, direct, j, n_direct, 0, e, y, straight, x_row, e, direct_row, DIRECT, BLOCK_K,
            PRECISION,
        )  # fmt: skip
    scale = tl.load(inverse + rows, mask=rows < n, other=0.0)[:, None]

    logits = tl.reshape(y * scale, (BLOCK_N, H_PAD, Q_PAD))
    m = tl.arange(0, Q_PAD)[None, None, :]
    logits = tl.where(m < n_queries, logits, float("-inf"))
    top = tl.max(logits, axis=2)
    p = tl.exp(logits - top[:, :, None])
    mass = tl.sum(p, axis=2)
    match = top + tl.log(mass) - log_queries
    p = tl.reshape(p / mass[:, :, None], (BLOCK_N, C))
    # One match per head, put in the place of its first query, so that a product with the head's columns adds it.
    match = tl.reshape(tl.where(m == 0, match[:, :, None], 0.0), (BLOCK_N, C))

    before = tl.load(folded + c[:, None] * BLOCK_HID + hid[None, :])
    hidden_in = tl.dot(p, before, input_precision=PRECISION)
    columns = head_in + hid[None, :].to(tl.int64) * in_row + before_match
    valid = (hid < hidden)[None, :]
    h = c // Q_PAD
    w = tl.load(columns + h[:, None], mask=(h < n_heads)[:, None] & valid, other=0.0).to(tl.float32)
    hidden_in = tl.dot(match, w, hidden_in, input_precision=PRECISION)
    columns += n_heads
    if DIRECT:
        w = tl.load(columns + j[:, None], mask=(j < n_direct)[:, None] & valid, other=0.0).to(tl.float32)
        hidden_in = tl.dot(straight * scale, w, hidden_in, input_precision=PRECISION)
    columns += n_direct
    for start in range(0, n_features, BLOCK_X):
        f = start + j
        at = features + rows[:, None] * features_row + f[None, :]
        value = tl.load(at, mask=(rows < n)[:, None] & (f < n_features)[None, :], other=0.0)
        w = tl.load(columns + f[:, None], mask=(f < n_features)[:, None] & valid, other=0.0).to(tl.float32)
        hidden_in = tl.dot(value, w, hidden_in, input_precision=PRECISION)
    hidden_in += tl.load(head_bias + hid, mask=hid < hidden, other=0.0).to(tl.float32)[None, :]
    active = hidden_in * tl.sigmoid(hidden_in)
    for side in tl.static_range(2):
        w = tl.load(head_out + side * out_weight_row + hid, mask=hid < hidden, other=0.0).to(tl.float32)
        score = tl.sum(active * w[None, :], axis=1) + tl.load(out_bias + side).to(tl.float32)
        if MASKED:
            allowed = tl.load(legal + rows * legal_row + side * legal_column, mask=rows < n, other=0)
            score = tl.where(allowed != 0, score, 0.0)
        tl.store(out + rows * 2 + side, score, mask=rows < n)

"""Triton kernels of `lens_score` on the side of the queries: at most 16 rows against weight matrices.

The work is a chain of products [16, k] x [k, n] whose weights (19 MB in bf16 at E = 4096, d = f = 512) are read once:
floor 4.5 us at 4.2 TB/s, but each link waits for the one before, so its launch counts more than its bytes. Hence few,
fused links, each cut into about as many programs as a GPU has SMs:

    project_queries    split over E: parts of W_in query_m and of |query_m|^2
    collect            adds up parts. Where each program of the next link did that for itself, 32 of them read 256 KB
                       of parts each: 29 us for a `linear`, 18 for the first `turn`.
    turn               norm and read_q (score_k)
    absorb             read_k (score_q) times what `turn` left; the score pass's launch folds the values into the head
                       as well. Both in one had each program multiply its head's 64 KB of read_q anew, in eight steps
                       of a latency each: 24 us.
    attended_values    adds up the N splits of the weighted sums and multiplies by read_v, split over E
    linear             z += W input
    swiglu             silu(gate) * up of norm(z)

Residual stream z [16, d] fp32, rows from Q on are zero. PRECISION is "ieee" where anything is fp32, else "tf32", which
takes the weights' 16 bits exactly and rounds the other operand to 11. No program writes what another one reads.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # what a tensor core takes at least; Q <= 16
EPS = tl.constexpr(1e-12)  # ref.RMS_EPS
# Arguments that change with the numbers of entries and queries: no kernel is compiled anew for their values.
LENGTHS = ("n", "n_blocks", "blocks_per_split", "n_queries")


@triton.jit
def _rows_of(weight, rows, valid, columns, n_columns, row_stride):
    """Tile [rows, columns] of a matrix with contiguous rows, as fp32; zero outside."""
    at = weight + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < n_columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _sum_parts(parts, columns, width, PARTS: tl.constexpr, n_rows=ROWS):
    """Columns of the sum of PARTS matrices [ROWS, width], fp32, zero from row n_rows on."""
    m = tl.arange(0, ROWS)
    at = m[:, None] * width + columns[None, :]
    inside = (columns < width)[None, :] & (m < n_rows)[:, None]
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * ROWS * width + at, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def project_queries(
    queries, w_in, parts, squares, n_queries, e, d, query_row, w_row, chunk,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[s, m, j] = W_in[j, chunk s] query_m[chunk s], squares[s, m] = |query_m[chunk s]|^2. Grid: (d tiles, S).

    SPAN: columns in one chain of additions, as in `triton_streams`.
    """
    split = tl.program_id(1)
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    end = tl.minimum(e, (split + 1) * chunk)
    for first in range(split * chunk, end, SPAN):
        product = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
        last = tl.minimum(end, first + SPAN)
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = _rows_of(queries, m, m < n_queries, k, last, query_row)
            square += tl.sum(x * x, axis=1)
            w = _rows_of(w_in, j, j < d, k, last, w_row)
            product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
        total += product
    at = parts + split * ROWS * d + m[:, None] * d + j[None, :]
    tl.store(at, total, mask=(j < d)[None, :])
    if tl.program_id(0) == 0:
        tl.store(squares + split * ROWS + m, square)


@triton.jit(do_not_specialize=LENGTHS)
def collect(parts, squares, out, n_queries, e, width, PARTS: tl.constexpr, NORMED: tl.constexpr, BLOCK_J: tl.constexpr):
    """out [ROWS, width] = the sum of PARTS such matrices. Grid: (tiles of width).

    NORMED: over the root mean square of the queries, of which `project_queries` has left the parts of the squares.
    """
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = _sum_parts(parts, j, width, PARTS, n_queries)
    if NORMED:
        square = tl.zeros((ROWS,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            square += tl.load(squares + part * ROWS + m)
        total *= tl.math.div_rn(1.0, tl.math.sqrt_rn(square / e + EPS))[:, None]
    tl.store(out + m[:, None] * width + j[None, :], total, mask=(j < width)[None, :])


@triton.jit
def _multiply_normed(
    z, scale, gain, weight, rows, valid, row_stride, d, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(z scale gain) weight[rows]^T: [ROWS, BLOCK]; scale per row, gain per column."""
    product = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g = tl.load(gain + k, mask=k < d, other=0.0).to(tl.float32)
        x = _sum_parts(z, k, d, 1) * scale[:, None] * g[None, :]
        w = _rows_of(weight, rows, valid, k, d, row_stride)
        product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    return product


@triton.jit
def _inverse_rms(z, d, BLOCK_K: tl.constexpr):
    """Of rows of z; all columns at once up to 512: each step of a loop would wait for its loads."""
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        x = _sum_parts(z, start + tl.arange(0, BLOCK_K), d, 1)
        square += tl.sum(x * x, axis=1)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(square / d + EPS))


@triton.jit
def turn(
    z, gain, weight, turned, d, w_row, scale, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """turned[m, j] = scale weight[j] norm(z_m, gain), [ROWS, d]. Grid: (tiles of d)."""
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    inverse = _inverse_rms(z, d, BLOCK_NORM)
    x = _multiply_normed(z, inverse, gain, weight, j, j < d, w_row, d, BLOCK_J, BLOCK_K, PRECISION)
    tl.store(turned + m[:, None] * d + j[None, :], x * scale, mask=(j < d)[None, :])


@triton.jit
def absorb(
    z, gain, turned, w_k, vectors, w_v, head_in, folded, e, d, head_dim, n_heads, k_row, v_row, in_row, value_dim,
    hidden, tiles, Q_PAD: tl.constexpr, SCORE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_NORM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_HID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """vectors[h Q_PAD + m] = w_k[h]^T turned_m[h]. Grid: (tiles of E, padded heads).

    SCORE: one more tile, which writes
    folded[h Q_PAD + m] = head_in[:, values of h] (w_v norm(z_m, gain))[h]: the attended values enter the head as P
    folded. Rows of padded heads and queries are zero.
    """
    tile, h = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, ROWS)
    row = h * Q_PAD + m
    if tile < tiles:
        columns = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        total = tl.zeros((ROWS, BLOCK_E), dtype=tl.float32)
        for start in range(0, head_dim, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            valid = j < tl.where(h < n_heads, head_dim, 0)
            j += h * head_dim
            q = tl.load(turned + m[:, None] * d + j[None, :], mask=valid[None, :], other=0.0)
            keys = _rows_of(w_k, j, valid, columns, e, k_row)
            total = tl.dot(q, keys, total, input_precision=PRECISION)
        at = vectors + row[:, None] * e + columns[None, :]
        tl.store(at, total.to(vectors.dtype.element_ty), mask=(m < Q_PAD)[:, None] & (columns < e)[None, :])
    if SCORE:  # noqa: SIM102 a constexpr prunes only by itself
        if tile == tiles:
            hid = tl.arange(0, BLOCK_HID)
            inverse = _inverse_rms(z, d, BLOCK_NORM)
            total = tl.zeros((ROWS, BLOCK_HID), dtype=tl.float32)
            for start in range(0, value_dim, BLOCK_V):
                j = start + tl.arange(0, BLOCK_V)
                valid = j < tl.where(h < n_heads, value_dim, 0)
                j += h * value_dim
                v = _multiply_normed(z, inverse, gain, w_v, j, valid, v_row, d, BLOCK_V, BLOCK_K, PRECISION)
                at = head_in + hid[None, :].to(tl.int64) * in_row + j[:, None]
                into = tl.load(at, mask=valid[:, None] & (hid < hidden)[None, :], other=0.0).to(tl.float32)
                total = tl.dot(v, into, total, input_precision=PRECISION)
            at = folded + row[:, None] * BLOCK_HID + hid[None, :]
            tl.store(at, total, mask=(m < Q_PAD)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def attended_values(
    sums, maxima, totals, w_v, parts, n_queries, n_rows, e, d, head_dim, v_row, chunk, tiles, SPLITS: tl.constexpr,
    Q_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[s, m, j] = w_v[j, chunk s] c[h, m, chunk s], c the splits of N put together.

    Grid: (heads x tiles of d/H, S).
    """
    h, split = tl.program_id(0) // tiles, tl.program_id(1)
    m = tl.arange(0, ROWS)
    row, used = h * Q_PAD + m, m < n_queries
    j = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = j < head_dim
    j += h * head_dim
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):  # unrolled: all loads under way at once
        top = tl.maximum(top, tl.load(maxima + s * n_rows + row, mask=used, other=0.0))
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        share = tl.exp(tl.load(maxima + s * n_rows + row, mask=used, other=0.0) - top)
        mass += share * tl.load(totals + s * n_rows + row, mask=used, other=1.0)
    product = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(split * chunk, tl.minimum(e, (split + 1) * chunk), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        context = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        for s in tl.static_range(SPLITS):
            share = tl.exp(tl.load(maxima + s * n_rows + row, mask=used, other=0.0) - top) / mass
            at = sums + (s * n_rows + row).to(tl.int64)[:, None] * e + k[None, :]
            context += share[:, None] * tl.load(at, mask=used[:, None] & (k < e)[None, :], other=0.0)
        w = _rows_of(w_v, j, valid, k, e, v_row)
        product = tl.dot(context, tl.trans(w), product, input_precision=PRECISION)
    at = parts + split * ROWS * d + m[:, None] * d + j[None, :]
    tl.store(at, product, mask=valid[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def linear(
    z, x, weight, n_queries, d, width, w_row, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """z[m, j] += weight[j] x_m, x [ROWS, width]. Grid: (tiles of d); each owns its columns of z."""
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    at = z + m[:, None] * d + j[None, :]
    total = tl.load(at, mask=(j < d)[None, :], other=0.0)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = _sum_parts(x, k, width, 1, n_queries)
        w = _rows_of(weight, j, j < d, k, width, w_row)
        total = tl.dot(rows, tl.trans(w), total, input_precision=PRECISION)
    tl.store(at, total, mask=(j < d)[None, :])


@triton.jit
def swiglu(
    z, gain, weight, out, d, width, w_row, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, j] = silu(gate) up, of rows j and width + j of weight norm(z_m, gain). Grid: (tiles of width)."""
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    scale = _inverse_rms(z, d, BLOCK_NORM)
    gate = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g = tl.load(gain + k, mask=k < d, other=0.0).to(tl.float32)
        x = _sum_parts(z, k, d, 1) * scale[:, None] * g[None, :]
        gate = tl.dot(x, tl.trans(_rows_of(weight, j, j < width, k, d, w_row)), gate, input_precision=PRECISION)
        w = _rows_of(weight, j + width, j < width, k, d, w_row)
        up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + m[:, None] * width + j[None, :], value, mask=(j < width)[None, :])

"""Triton kernels of `lens_score` on the side of the queries: at most 16 rows against weight matrices.

The work is a chain of products [16, k] x [k, n] whose weights (19 MB in bf16 at E = 4096, d = f = 512) are read once:
floor 4.5 us at 4.2 TB/s, but each link waits for the one before, so its launch counts more than its bytes. Hence few,
fused links, each cut into about as many programs as a GPU has SMs:

    project_queries    split over E: parts of W_in query_m and of |query_m|^2
    absorb             norm, read_q and the absorption of read_k in one (also score_k with score_q); the score pass's
                       launch folds the values into the head as well. read_q of a head is read by each of its programs:
                       64 KB from L2 against another launch. The first one adds up the parts of `project_queries`.
    attended_values    adds up the N splits of the weighted sums and multiplies by read_v, split over E
    linear             z += W input, the input in parts
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
def _sum_parts(parts, columns, width, PARTS: tl.constexpr):
    """Columns of the sum of PARTS matrices [ROWS, width], fp32."""
    at = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    inside = (columns < width)[None, :]
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


@triton.jit
def _residual(z, parts, scale, columns, d, PARTS: tl.constexpr):
    """Columns of z, rows times scale; PARTS > 0: z is what `project_queries` left in as many parts."""
    if PARTS > 0:
        value = _sum_parts(parts, columns, d, PARTS)
    else:
        value = _sum_parts(z, columns, d, 1)
    return value * scale[:, None]


@triton.jit
def _multiply_normed(
    z, parts, scale, gain, weight, rows, valid, row_stride, d, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(z scale gain) weight[rows]^T: [ROWS, BLOCK]; scale per row, gain per column."""
    product = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g = tl.load(gain + k, mask=k < d, other=0.0).to(tl.float32)
        x = _residual(z, parts, scale, k, d, PARTS) * g[None, :]
        w = _rows_of(weight, rows, valid, k, d, row_stride)
        product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    return product


@triton.jit
def _inverse_rms(z, parts, scale, d, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of rows of z; all columns at once up to 512: each step of a loop would wait for its loads."""
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        x = _residual(z, parts, scale, start + tl.arange(0, BLOCK_K), d, PARTS)
        square += tl.sum(x * x, axis=1)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(square / d + EPS))


@triton.jit
def absorb(
    z, parts, squares, gain, w_q, w_k, vectors, w_v, head_in, folded, e, d, head_dim, n_heads, q_row, k_row, v_row,
    in_row, value_dim, hidden, tiles, scale, PARTS: tl.constexpr, Q_PAD: tl.constexpr, SCORE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_NORM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_HID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """vectors[h Q_PAD + m] = scale w_k[h]^T (w_q norm(z_m, gain))[h]. Grid: (tiles of E, padded heads).

    PARTS > 0: z comes from `project_queries` and is written. SCORE: one more tile, which writes
    folded[h Q_PAD + m] = head_in[:, values of h] (w_v norm(z_m))[h]: the attended values enter the head as P folded.
    Rows of padded heads and queries are zero.
    """
    tile, h = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, ROWS)
    from_parts = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if PARTS > 0:
        square = tl.zeros((ROWS,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            square += tl.load(squares + part * ROWS + m)
        from_parts = tl.math.div_rn(1.0, tl.math.sqrt_rn(square / e + EPS))
        if (tile == 0) & (h == 0):
            for start in range(0, d, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                value = _residual(z, parts, from_parts, k, d, PARTS)
                tl.store(z + m[:, None] * d + k[None, :], value, mask=(k < d)[None, :])
    inverse = _inverse_rms(z, parts, from_parts, d, PARTS, BLOCK_NORM) * from_parts
    row = h * Q_PAD + m
    if tile < tiles:
        columns = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        total = tl.zeros((ROWS, BLOCK_E), dtype=tl.float32)
        for start in range(0, head_dim, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            valid = j < tl.where(h < n_heads, head_dim, 0)
            j += h * head_dim
            q = _multiply_normed(z, parts, inverse, gain, w_q, j, valid, q_row, d, PARTS, BLOCK_D, BLOCK_K, PRECISION)
            keys = _rows_of(w_k, j, valid, columns, e, k_row)
            total = tl.dot(q * scale, keys, total, input_precision=PRECISION)
        at = vectors + row[:, None] * e + columns[None, :]
        tl.store(at, total.to(vectors.dtype.element_ty), mask=(m < Q_PAD)[:, None] & (columns < e)[None, :])
    if SCORE:  # noqa: SIM102 a constexpr prunes only by itself
        if tile == tiles:
            hid = tl.arange(0, BLOCK_HID)
            total = tl.zeros((ROWS, BLOCK_HID), dtype=tl.float32)
            for start in range(0, value_dim, BLOCK_V):
                j = start + tl.arange(0, BLOCK_V)
                valid = j < tl.where(h < n_heads, value_dim, 0)
                j += h * value_dim
                v = _multiply_normed(
                    z, parts, inverse, gain, w_v, j, valid, v_row, d, PARTS, BLOCK_V, BLOCK_K, PRECISION
                )
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


@triton.jit
def linear(
    z, parts, weight, d, width, w_row, PARTS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z[m, j] += weight[j] (sum of parts [ROWS, width])_m. Grid: (tiles of d); each owns its columns of z."""
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    at = z + m[:, None] * d + j[None, :]
    total = tl.load(at, mask=(j < d)[None, :], other=0.0)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _sum_parts(parts, k, width, PARTS)
        w = _rows_of(weight, j, j < d, k, width, w_row)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    tl.store(at, total, mask=(j < d)[None, :])


@triton.jit
def swiglu(
    z, gain, weight, out, d, width, w_row, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, j] = silu(gate) up, of rows j and width + j of weight norm(z_m, gain). Grid: (tiles of width)."""
    m = tl.arange(0, ROWS)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    one = tl.full((ROWS,), 1.0, dtype=tl.float32)
    scale = _inverse_rms(z, z, one, d, 0, BLOCK_NORM)
    gate = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g = tl.load(gain + k, mask=k < d, other=0.0).to(tl.float32)
        x = _residual(z, z, scale, k, d, 0) * g[None, :]
        gate = tl.dot(x, tl.trans(_rows_of(weight, j, j < width, k, d, w_row)), gate, input_precision=PRECISION)
        w = _rows_of(weight, j + width, j < width, k, d, w_row)
        up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + m[:, None] * width + j[None, :], value, mask=(j < width)[None, :])

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernels of `gist_pool`'s backward; what they compute and in which order: triton_backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pool import attend, inverse_rms, load_block, load_head


@triton.jit
def load_gradient(
    ok_ptr, ov_ptr, n_rows, m_ptr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and gy = o + o M^T of a tile: o's columns' sums [DP] and gy [ROWS, DP], for key and value. In fp32 o is added
    last, as y is in `add_residual`."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DP)
    here = (rows < n_rows)[:, None]
    mask = here & (dims < D)[None, :]
    gk = tl.load(ok_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    gv = tl.load(ov_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    ck, cv = tl.sum(gk, axis=0), tl.sum(gv, axis=0)
    if PRECISION == "ieee":
        gk, gv = tl.zeros((ROWS, DP), tl.float32), tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, D, INNER):
        i = start + tl.arange(0, INNER)
        o_at, o_mask = rows[:, None] * D + i[None, :], here & (i < D)[None, :]
        m_at, m_mask = dims[None, :] * (2 * D) + i[:, None], (i < D)[:, None] & (dims < D)[None, :]
        ok = tl.load(ok_ptr + o_at, mask=o_mask, other=0.0).to(PRODUCT)
        ov = tl.load(ov_ptr + o_at, mask=o_mask, other=0.0).to(PRODUCT)
        kk = tl.load(m_ptr + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        kv = tl.load(m_ptr + D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        vk = tl.load(m_ptr + 2 * D * D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        vv = tl.load(m_ptr + 2 * D * D + D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        gk = tl.dot(ok, kk, gk, input_precision=PRECISION)
        gk = tl.dot(ov, kv, gk, input_precision=PRECISION)
        gv = tl.dot(ok, vk, gv, input_precision=PRECISION)
        gv = tl.dot(ov, vv, gv, input_precision=PRECISION)
    if PRECISION == "ieee":
        gk += tl.load(ok_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
        gv += tl.load(ov_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    return ck, cv, gk, gv


@triton.jit(do_not_specialize=["n_blocks", "tile_blocks"])
def backward_blocks_kernel(
    ok_ptr, ov_ptr, k_ptr, v_ptr, w_ptr, b_ptr, m_ptr, dk_ptr, dv_ptr, y_ptr, sums_ptr,
    k_row, k_head, k_block, k_entry, v_row, v_head, v_block, v_entry, n_blocks, tile_blocks, heads, rows_per_layer,
    K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, GP: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Step 1. dk_ptr is None if the cache needs no gradient, y_ptr and sums_ptr if the weights need none."""
    tiles = tl.cdiv(n_blocks, tile_blocks)
    tile = tl.program_id(0) % tiles
    lane = (tl.program_id(0) // tiles).to(tl.int64)
    first = tile * tile_blocks
    row, head = lane // heads, lane % heads
    layer = (row // rows_per_layer) * heads + head
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head
    w_ptr += layer * (G * 2 * D)
    b_ptr += layer * (G * K)
    count = min(tile_blocks, n_blocks - first)
    gists = (lane * n_blocks + first) * G
    ck, cv, gk, gv = load_gradient(
        ok_ptr + gists * D, ov_ptr + gists * D, count * G, m_ptr + layer * (4 * D * D),
        D, DP, ROWS, INNER, PRODUCT, PRECISION,
    )  # fmt: skip
    entries, dims, rows, heads_of = tl.arange(0, KP), tl.arange(0, DP), tl.arange(0, ROWS), tl.arange(0, GP)
    inside = entries < K
    block_at = entries[:, None] * D + dims[None, :]
    block_mask = inside[:, None] & (dims < D)[None, :]
    wk_sum, wv_sum = tl.zeros((GP, DP), tl.float32), tl.zeros((GP, DP), tl.float32)
    b_sum = tl.zeros((GP, KP), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        block = tl.cast(first + i, tl.int64)
        k = load_block(k_ptr, block * k_block + entries * k_entry, inside, dims, D)
        v = load_block(v_ptr, block * v_block + entries * v_entry, inside, dims, D)
        inv_rms = inverse_rms(k, v, D)
        if dk_ptr is not None:
            dk, dv = tl.zeros((KP, DP), tl.float32), tl.zeros((KP, DP), tl.float32)
            along = tl.zeros((KP,), tl.float32)
        for g in range(G):
            wk, wv, b = load_head(w_ptr, b_ptr, g, inside, entries, dims, D, K)
            nw, p = attend(k, v, inv_rms, wk, wv, b, inside, PRECISION == "ieee")
            here = rows[:, None] == i * G + g
            ok, ov = tl.sum(tl.where(here, gk, 0.0), axis=0), tl.sum(tl.where(here, gv, 0.0), axis=0)
            gx = tl.sum(k * ok[None, :] + v * ov[None, :], axis=1)
            ds = p * (gx - tl.sum(p * gx, axis=0))
            scaled = ds * inv_rms
            if sums_ptr is not None:
                y = y_ptr + (gists + i * G + g) * (2 * D) + dims
                tl.store(y, tl.sum(p[:, None] * k, axis=0), mask=dims < D)
                tl.store(y + D, tl.sum(p[:, None] * v, axis=0), mask=dims < D)
                own = heads_of[:, None] == g
                wk_sum += tl.where(own, tl.sum(scaled[:, None] * k, axis=0)[None, :], 0.0)
                wv_sum += tl.where(own, tl.sum(scaled[:, None] * v, axis=0)[None, :], 0.0)
                b_sum += tl.where(own, ds[None, :], 0.0)
            if dk_ptr is not None:
                dk += p[:, None] * ok[None, :] + scaled[:, None] * wk[None, :]
                dv += p[:, None] * ov[None, :] + scaled[:, None] * wv[None, :]
                along += ds * nw
        if dk_ptr is not None:
            back = along * inv_rms * inv_rms / (2 * D)
            at = (lane * n_blocks + block) * (K * D)
            tl.store(dk_ptr + at + block_at, dk - k * back[:, None], mask=block_mask)
            tl.store(dv_ptr + at + block_at, dv - v * back[:, None], mask=block_mask)
    if sums_ptr is not None:
        # A tile's sums: dw [G, 2D], db [G, K], dc [2D]; of a layer and head all tiles of all sequences in a row.
        place = (layer * rows_per_layer + row % rows_per_layer) * tiles + tile
        sums_ptr += place * (G * (2 * D + K) + 2 * D)
        w_at, w_mask = heads_of[:, None] * (2 * D) + dims[None, :], (heads_of < G)[:, None] & (dims < D)[None, :]
        tl.store(sums_ptr + w_at, wk_sum, mask=w_mask)
        tl.store(sums_ptr + D + w_at, wv_sum, mask=w_mask)
        b_mask = (heads_of < G)[:, None] & inside[None, :]
        tl.store(sums_ptr + 2 * D * G + heads_of[:, None] * K + entries[None, :], b_sum, mask=b_mask)
        tl.store(sums_ptr + G * (2 * D + K) + dims, ck, mask=dims < D)
        tl.store(sums_ptr + G * (2 * D + K) + D + dims, cv, mask=dims < D)


@triton.jit(do_not_specialize=["n_gists"])
def backward_matrix_kernel(
    y_ptr, ok_ptr, ov_ptr, dm_ptr, n_gists, heads, rows_per_layer,
    D: tl.constexpr, DP: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Step 2: rows SLICE * pid_0 ... of dM of layer and head pid_1. n_gists: of one row and head."""
    layer, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    i, dims, steps = tl.program_id(0) * SLICE + tl.arange(0, SLICE), tl.arange(0, DP), tl.arange(0, STEP)
    dm_k, dm_v = tl.zeros((SLICE, DP), tl.float32), tl.zeros((SLICE, DP), tl.float32)
    total = rows_per_layer * n_gists
    for start in range(0, total, STEP):
        t = start + steps
        gist = ((layer * rows_per_layer + t // n_gists) * heads + head) * n_gists + t % n_gists
        y_mask = (t < total)[None, :] & (i < 2 * D)[:, None]
        y = tl.load(y_ptr + gist[None, :] * (2 * D) + i[:, None], mask=y_mask, other=0.0).to(PRODUCT)
        o_at, o_mask = gist[:, None] * D + dims[None, :], (t < total)[:, None] & (dims < D)[None, :]
        ok = tl.load(ok_ptr + o_at, mask=o_mask, other=0.0).to(PRODUCT)
        ov = tl.load(ov_ptr + o_at, mask=o_mask, other=0.0).to(PRODUCT)
        dm_k = tl.dot(y, ok, dm_k, input_precision=PRECISION)
        dm_v = tl.dot(y, ov, dm_v, input_precision=PRECISION)
    dm_ptr += tl.program_id(1).to(tl.int64) * (4 * D * D)
    at, mask = i[:, None] * (2 * D) + dims[None, :], (i < 2 * D)[:, None] & (dims < D)[None, :]
    tl.store(dm_ptr + at, dm_k, mask=mask)
    tl.store(dm_ptr + D + at, dm_v, mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
def backward_sums_kernel(
    sums_ptr, dw_ptr, db_ptr, dc_ptr, n_tiles,
    K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step 3: WIDTH columns of the sums of layer and head pid_1 over its n_tiles tiles."""
    W: tl.constexpr = G * 2 * D
    B: tl.constexpr = G * K
    lane = tl.program_id(1).to(tl.int64)
    i, tiles = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, STEP)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, n_tiles, STEP):
        tile = start + tiles
        at = (lane * n_tiles + tile)[:, None] * (W + B + 2 * D) + i[None, :]
        total += tl.sum(
            tl.load(sums_ptr + at, mask=(tile < n_tiles)[:, None] & (i < W + B + 2 * D)[None, :], other=0.0), axis=0
        )
    tl.store(dw_ptr + lane * W + i, total, mask=i < W)
    tl.store(db_ptr + lane * B + (i - W), total, mask=(i >= W) & (i < W + B))
    tl.store(dc_ptr + lane * (2 * D) + (i - W - B), total, mask=(i >= W + B) & (i < W + B + 2 * D))

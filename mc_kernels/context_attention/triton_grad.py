# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Backward of `context_attention` in Triton: the closed form of the softmax's gradient (FlashAttention-2, Dao 2023).

    p = exp(logits - lse) / z;  dv = p^T do;  ds = p (do v^T - rowsum(do * o));  dq = ds k; dk = ds^T q; dbias = sum ds

on rotated q and k, which two passes put into the workspace; gradients are turned back as they are stored (the
transpose of a rotation is the rotation back, damping and magnitude are diagonal). One kernel owns blocks of keys and
runs over the queries of all heads of its group (dk, dv, dbias), one owns blocks of queries and runs over the keys (dq):
no atomics, the same bits each time. z, the sum of a row's exp(logits - lse), is 1 but for the rounding of lse (0.001
where logits are 10^4): the second kernel, which runs first, sums it beside dq and leaves 1 / z to the other.

Floor: the matrix rate; seven products a pair (logits and do v^T in both kernels) to the forward's two. Few queries
against many slots make few programs of the second kernel; training has many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import end_of_past
from .triton_mass import load_lse
from .triton_tiles import (
    LENGTHS,
    OF_SLOTS,
    band_steps,
    cos_sin,
    damping,
    dot,
    load_key_positions,
    load_pairs,
    pair_products,
    rotate,
    row_of_query,
    store_pairs,
)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def delta_kernel(
    grad_out, out, delta, grad_b, grad_h, grad_t, out_b, out_h, out_t, heads, T, all_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, T] = rowsum(do * o)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b, h, t = row // T // heads, row // T % heads, row % T
    d = tl.arange(0, D_PAD)
    ok = (row < all_rows)[:, None] & (d < D)[None, :]
    do = tl.load(grad_out + (b * grad_b + h * grad_h + t * grad_t)[:, None] + d[None, :], mask=ok, other=0.0)
    o = tl.load(out + (b * out_b + h * out_h + t * out_t)[:, None] + d[None, :], mask=ok, other=0.0)
    tl.store(delta + row, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=row < all_rows)


@triton.jit
def first_to_see(q_pos, stride, T, earliest):
    """The first query at or after `earliest`; T if there is none."""
    first = tl.zeros((1024,), tl.int32) + T
    for start in tl.range(0, T, 1024):
        t = start + tl.arange(0, 1024)
        at = tl.load(q_pos + t.to(tl.int64) * stride, mask=t < T, other=-1).to(tl.int64)
        first = tl.minimum(first, tl.where(at >= earliest, t, T))
    return tl.min(first, 0)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def grad_keys_kernel(
    q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias, grad_out, lse, share, delta, grad_k, grad_v, grad_bias,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, grad_b, grad_h, grad_t,
    q_pos_b, q_pos_t, kv_pos_b, kv_pos_s, sigma_b, sigma_s, bias_b, bias_s, kv_heads, T, S, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QK_D: tl.constexpr, HALF: tl.constexpr,
    HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, SKIP_FUTURE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, Hkv, S, D] and the bias' gradient by KV head [B, Hkv, S] (if asked) of a block of slots. q and k are
    rotated already; HALF_ROT, INTERLEAVED and ROTATE say how dk is turned back. scale: as in the forward. share
    [B, Hq, T]: 1 / z."""
    s_blocks = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // s_blocks // kv_heads).to(tl.int64)
    h = (tl.program_id(0) // s_blocks % kv_heads).to(tl.int64)
    s = (tl.program_id(0) % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    s_ok = s < S
    rows = T * G
    d = tl.arange(0, D_PAD)
    at, since = load_key_positions(kv_pos + b * kv_pos_b, kv_pos_s, s, s_ok)
    s = s.to(tl.int64)
    k1, k2 = load_pairs(k + b * k_b + h * k_h + s * k_s, s_ok, BLOCK_S, HALF, 0, QK_D, False)
    v_ok = s_ok[:, None] & (d < D)[None, :]
    v_tile = tl.load(v + b * v_b + h * v_h + s[:, None] * v_s + d[None, :], mask=v_ok, other=0.0)
    bias = tl.zeros((BLOCK_S,), tl.float32)
    if kv_bias is not None:
        bias += tl.load(kv_bias + b * bias_b + s * bias_s, mask=s_ok, other=0.0).to(tl.float32)

    dk1 = tl.zeros((BLOCK_S, HALF), tl.float32)
    dk2 = tl.zeros((BLOCK_S, HALF), tl.float32)
    dv = tl.zeros((BLOCK_S, D_PAD), tl.float32)
    dbias = tl.zeros((BLOCK_S,), tl.float32)
    lo = 0
    if SKIP_FUTURE:
        lo = first_to_see(q_pos + b * q_pos_b, q_pos_t, T, tl.min(since, 0)) * G
    for start in tl.range(lo, rows, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row_ok = m < rows
        t, q_head, row = row_of_query(m, h, T, G)
        row += b * kv_heads * rows
        q_at = tl.load(q_pos + b * q_pos_b + t * q_pos_t, mask=row_ok, other=-1).to(tl.int64)
        q1, q2 = load_pairs(q + b * q_b + q_head * q_h + t * q_t, row_ok, BLOCK_M, HALF, 0, QK_D, False)
        do_rows = grad_out + (b * grad_b + q_head * grad_h + t * grad_t)[:, None]
        do = tl.load(do_rows + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        x = pair_products(k1, k2, q1, q2) * scale + bias[:, None]
        x = tl.where(since[:, None] <= q_at[None, :], x, float("-inf"))
        row_share = tl.load(share + row, mask=row_ok, other=0.0)
        p = tl.exp(x - load_lse(lse, row, row_ok)[None, :]) * row_share[None, :]
        dv = dot(p.to(do.dtype), do, dv)
        dp = dot(v_tile, tl.trans(do))
        ds = p * (dp - tl.load(delta + row, mask=row_ok, other=0.0)[None, :])
        dbias += tl.sum(ds, 1)
        ds = ds.to(q1.dtype)
        dk1 = dot(ds, q1, dk1)
        dk2 = dot(ds, q2, dk2)

    grad_row = (b * kv_heads + h) * S + s
    tl.store(grad_v + grad_row[:, None] * D + d[None, :], dv.to(grad_v.dtype.element_ty), mask=v_ok)
    if grad_bias is not None:
        tl.store(grad_bias + grad_row, dbias, mask=s_ok)
    dk1 *= scale
    dk2 *= scale
    if ROTATE:
        freq, step = band_steps(inv_freq, HALF, HALF_ROT)
        cos, sin = cos_sin(at, step)
        if sigma is not None:
            damp = damping(tl.load(sigma + b * sigma_b + s * sigma_s, mask=s_ok, other=0.0).to(tl.float32), freq)
            cos, sin = cos * damp, sin * damp
        dk1, dk2 = rotate(dk1, dk2, cos, -sin)
    store_pairs(grad_k + grad_row * D, s_ok, dk1, dk2, BLOCK_S, HALF, HALF_ROT, D, INTERLEAVED)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def grad_queries_kernel(
    q, k, v, q_pos, kv_pos, inv_freq, kv_bias, grad_out, lse, share, delta, grad_q,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, grad_b, grad_h, grad_t,
    q_pos_b, q_pos_t, kv_pos_b, kv_pos_s, bias_b, bias_s, kv_heads, T, S, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QK_D: tl.constexpr, HALF: tl.constexpr,
    HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, SKIP_FUTURE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, T, D] and share of a block of rows, packed as in the forward. Arguments as of `grad_keys_kernel`."""
    rows = T * G
    m_blocks = tl.cdiv(rows, BLOCK_M)
    b = (tl.program_id(0) // m_blocks // kv_heads).to(tl.int64)
    h = (tl.program_id(0) // m_blocks % kv_heads).to(tl.int64)
    m = (m_blocks - 1 - tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < rows
    t, q_head, row = row_of_query(m, h, T, G)
    row += b * kv_heads * rows
    d = tl.arange(0, D_PAD)
    q_at = tl.load(q_pos + b * q_pos_b + t * q_pos_t, mask=row_ok, other=-1).to(tl.int64)
    q1, q2 = load_pairs(q + b * q_b + q_head * q_h + t * q_t, row_ok, BLOCK_M, HALF, 0, QK_D, False)
    do_rows = grad_out + (b * grad_b + q_head * grad_h + t * grad_t)[:, None]
    do = tl.load(do_rows + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    row_lse = load_lse(lse, row, row_ok)
    row_delta = tl.load(delta + row, mask=row_ok, other=0.0)

    z = tl.zeros((BLOCK_M,), tl.float32)
    dq1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    dq2 = tl.zeros((BLOCK_M, HALF), tl.float32)
    hi = S
    if SKIP_FUTURE:
        hi = end_of_past(kv_pos + b * kv_pos_b, kv_pos_s, 0, S, tl.max(q_at, 0))
    for start in tl.range(0, hi, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        s_ok = s < hi
        _, since = load_key_positions(kv_pos + b * kv_pos_b, kv_pos_s, s, s_ok)
        s = s.to(tl.int64)
        k1, k2 = load_pairs(k + b * k_b + h * k_h + s * k_s, s_ok, BLOCK_S, HALF, 0, QK_D, False)
        v_ok = s_ok[:, None] & (d < D)[None, :]
        v_tile = tl.load(v + b * v_b + h * v_h + s[:, None] * v_s + d[None, :], mask=v_ok, other=0.0)
        x = pair_products(q1, q2, k1, k2) * scale
        if kv_bias is not None:
            bias = tl.load(kv_bias + b * bias_b + s * bias_s, mask=s_ok, other=0.0)
            x += bias.to(tl.float32)[None, :]
        x = tl.where(since[None, :] <= q_at[:, None], x, float("-inf"))
        dp = dot(do, tl.trans(v_tile))
        p = tl.exp(x - row_lse[:, None])
        z += tl.sum(p, 1)
        ds = (p * (dp - row_delta[:, None])).to(k1.dtype)
        dq1 = dot(ds, k1, dq1)
        dq2 = dot(ds, k2, dq2)

    row_share = 1.0 / tl.where(z > 0, z, 1.0)  # nothing seen: p is 0
    tl.store(share + row, row_share, mask=row_ok)
    dq1 *= (row_share * scale)[:, None]
    dq2 *= (row_share * scale)[:, None]
    if ROTATE:
        _, step = band_steps(inv_freq, HALF, HALF_ROT)
        cos, sin = cos_sin(q_at, step)
        dq1, dq2 = rotate(dq1, dq2, cos, -sin)
    store_pairs(grad_q + row * D, row_ok, dq1, dq2, BLOCK_M, HALF, HALF_ROT, D, INTERLEAVED)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def sum_heads_kernel(parts, total, heads, S, total_b, total_s, BLOCK_S: tl.constexpr):
    """parts [B, heads, S] fp32 -> total [B, S]."""
    s_blocks = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    s = (tl.program_id(0) % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S,), tl.float32)
    for h in tl.range(0, heads):
        acc += tl.load(parts + (b * heads + h) * S + s, mask=s < S, other=0.0)
    tl.store(total + b * total_b + s.to(tl.int64) * total_s, acc.to(total.dtype.element_ty), mask=s < S)

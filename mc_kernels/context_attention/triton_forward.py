# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Forward kernels of `context_attention`: attention over a range of slots, and what joins several ranges.

The G query heads of a KV head are packed: row m of its T * G rows is head m % G of query m // G, so that a key is read,
and rotated, once for all of them. Online softmax in fp32, natural logarithms. Sums over slots are in a fixed
order: results do not depend on the order of the blocks. What a softmax is normalised by goes on as its greatest logit
and the sum over that, not as lse: the last bit of lse is 0.001 where logits are 10^4, an error of every probability.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LENGTHS,
    OF_SLOTS,
    band_steps,
    damping,
    dot,
    load_key_positions,
    load_pairs,
    pair_products,
    phases_for,
    rotate,
    row_of_query,
)


@triton.jit
def end_of_past(kv_pos, stride, lo, hi, latest):
    """The end of the slots in [lo, hi) that a query at `latest` sees; lo if there are none."""
    last = tl.zeros((1024,), tl.int32) + lo
    for start in tl.range(lo, hi, 1024):
        s = start + tl.arange(0, 1024)
        _, since = load_key_positions(kv_pos, stride, s, s < hi)
        last = tl.maximum(last, tl.where(since <= latest, s + 1, lo))
    return tl.max(last, 0)


# Compiled anew for other alignments of lengths and strides: without them it spills registers.
@triton.jit
def attend_kernel(
    q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias, out, lse, logits, partial_out, tops, totals,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_t,
    q_pos_b, q_pos_t, kv_pos_b, kv_pos_s, sigma_b, sigma_s, bias_b, bias_s,
    kv_heads, T, S, all_rows, splits, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QK_D: tl.constexpr, HALF: tl.constexpr,
    HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, SKIP_FUTURE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One block of rows of one KV head over `chunk` slots. scale: of <q, k>, magnitude of the rotation
    included. ROTATE: q and k, else they are taken as they lie. Results go to out and lse, or with several splits to
    partial_out [splits, all_rows = B Hq T, D]. tops and totals [splits, all_rows] (greatest logit, sum of exp(logit -
    top)) and logits [B, Hq, T, S] are stored if given."""
    rows = T * G
    m_blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    m_block = m_blocks - 1 - pid % m_blocks  # the last queries see most: they start first
    split = pid // m_blocks % splits
    b = (pid // m_blocks // splits // kv_heads).to(tl.int64)
    h = (pid // m_blocks // splits % kv_heads).to(tl.int64)

    lo = split * chunk
    hi = tl.minimum(lo + chunk, S)

    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < rows
    t, q_head, row = row_of_query(m, h, T, G)
    row += b * kv_heads * rows
    q_at = tl.load(q_pos + b * q_pos_b + t * q_pos_t, mask=row_ok, other=-1).to(tl.int64)
    q1, q2 = load_pairs(q + b * q_b + q_head * q_h + t * q_t, row_ok, BLOCK_M, HALF, HALF_ROT, QK_D, INTERLEAVED)
    if ROTATE:
        freq, step = band_steps(inv_freq, HALF, HALF_ROT)
        q_cos, q_sin = phases_for(q, q_at, step)
        q1, q2 = rotate(q1, q2, q_cos, q_sin)
        q1, q2 = q1.to(q.dtype.element_ty), q2.to(q.dtype.element_ty)

    if SKIP_FUTURE:
        hi = end_of_past(kv_pos + b * kv_pos_b, kv_pos_s, lo, hi, tl.max(q_at, 0))
    d = tl.arange(0, D_PAD)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Few rows: a sum a column, joined at the end. The sum over a tile's slots would be one over warps, with barriers.
    COLUMNS: tl.constexpr = BLOCK_M * BLOCK_S <= 1024
    total = tl.zeros((BLOCK_M, BLOCK_S) if COLUMNS else (BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    for start in tl.range(lo, hi, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        s_ok = s < hi
        k_at, since = load_key_positions(kv_pos + b * kv_pos_b, kv_pos_s, s, s_ok)
        key_rows = k + b * k_b + h * k_h + s.to(tl.int64) * k_s
        k1, k2 = load_pairs(key_rows, s_ok, BLOCK_S, HALF, HALF_ROT, QK_D, INTERLEAVED)
        if ROTATE:
            cos, sin = phases_for(k, k_at, step)
            if sigma is not None:
                spread = tl.load(sigma + b * sigma_b + s.to(tl.int64) * sigma_s, mask=s_ok, other=0.0)
                damp = damping(spread.to(tl.float32), freq)
                cos, sin = cos * damp, sin * damp
            k1, k2 = rotate(k1, k2, cos, sin)
            k1, k2 = k1.to(k.dtype.element_ty), k2.to(k.dtype.element_ty)
        x = pair_products(q1, q2, k1, k2) * scale
        if kv_bias is not None:
            bias = tl.load(kv_bias + b * bias_b + s.to(tl.int64) * bias_s, mask=s_ok, other=0.0)
            x += bias.to(tl.float32)[None, :]
        x = tl.where(since[None, :] <= q_at[:, None], x, float("-inf"))
        if logits is not None:
            tl.store(logits + row[:, None] * S + s[None, :], x, mask=row_ok[:, None] & s_ok[None, :])
        new_top = tl.maximum(top, tl.max(x, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(x - anchor[:, None])
        shrink = tl.exp(top - anchor)
        total = total * shrink[:, None] + p if COLUMNS else total * shrink + tl.sum(p, 1)
        values = v + b * v_b + h * v_h + s.to(tl.int64)[:, None] * v_s + d[None, :]
        v_tile = tl.load(values, mask=s_ok[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(p.to(v.dtype.element_ty), v_tile, acc * shrink[:, None])
        top = new_top

    if COLUMNS:
        total = tl.sum(total, 1)
    total = tl.where(total > 0, total, 1.0)
    acc /= total[:, None]
    stored = row_ok[:, None] & (d < D)[None, :]
    slot = split.to(tl.int64) * all_rows + row
    if tops is not None:
        tl.store(tops + slot, top, mask=row_ok)
        tl.store(totals + slot, total, mask=row_ok)
    if partial_out is None:
        target = out + b * out_b + q_head[:, None] * out_h + t[:, None] * out_t + d[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=stored)
        tl.store(lse + row, top + tl.log(total), mask=row_ok)  # nothing seen: -inf
    else:
        tl.store(partial_out + slot[:, None] * D + d[None, :], acc, mask=stored)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def combine_kernel(
    partial_out, tops, totals, out, lse, row_top, row_total, out_b, out_h, out_t, heads, T, splits,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One row of [B, Hq, T]: the parts of its splits, weighted by their share of the softmax. row_top and row_total
    [B, Hq, T], of all of them, are stored if given. All of a row is asked for at once, its greatest logits with the
    parts that they weigh: the kernel is one latency of L2, whatever the number of splits."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    i = tl.arange(0, SPLITS_PAD)
    ok = (i < splits)[:, None] & (d < D)[None, :]
    part = tl.load(partial_out + (i * rows + row)[:, None] * D + d[None, :], mask=ok, other=0.0)
    tops_of = tl.load(tops + i * rows + row, mask=i < splits, other=float("-inf"))
    weight = tl.load(totals + i * rows + row, mask=i < splits, other=0.0)
    top = tl.max(tops_of, 0)
    weight *= tl.exp(tops_of - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    acc = tl.sum(part * weight[:, None], 0)
    total = tl.where(total > 0, total, 1.0)
    acc /= total
    b, h, t = row // T // heads, row // T % heads, row % T
    tl.store(out + b * out_b + h * out_h + t * out_t + d, acc.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + row, top + tl.log(total))
    if row_top is not None:
        tl.store(row_top + row, top)
        tl.store(row_total + row, total)

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Mass of `context_attention` in Triton: the probability that each slot receives, summed over heads and queries.

It needs the whole softmax, so it is a second pass: over logits that the first one stored where queries are few
(written and read, 8 bytes each; in a decode step of Llama-3-8B 6 % of the bytes of keys and values, reading the keys
again would be 50 %), over recomputed ones where they are many. Each slot is summed by one program in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import load_key_positions, load_pairs, pair_products, row_of_query


@triton.jit
def load_lse(lse, rows, valid):
    """inf where a query sees nothing, which makes its probabilities 0."""
    x = tl.load(lse + rows, mask=valid, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


@triton.jit
def load_softmax(row_top, row_total, rows, valid):
    """The greatest logit (as `load_lse`) and the logarithm of the sum over it: a probability is exp(logit - top - log
    sum), exact where the greatest is taken off first."""
    return load_lse(row_top, rows, valid), tl.log(tl.load(row_total + rows, mask=valid, other=1.0))


# As `attend_kernel`.
@triton.jit
def mass_of_logits_kernel(logits, row_top, row_total, mass, rows, S, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """logits [B, rows, S], row_top and row_total [B, rows] -> mass [B, S]."""
    s_blocks = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    s = (tl.program_id(0) % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        row = b * rows + r
        ok = (r < rows)[:, None] & (s < S)[None, :]
        x = tl.load(logits + row[:, None] * S + s[None, :], mask=ok, other=float("-inf"))
        top, log_sum = load_softmax(row_top, row_total, row, r < rows)
        total += tl.sum(tl.exp((x - top[:, None]) - log_sum[:, None]), 0)
    tl.store(mass + b * S + s, total, mask=s < S)


# As `attend_kernel`.
@triton.jit
def mass_kernel(
    q, k, q_pos, kv_pos, kv_bias, row_top, row_total, mass, q_b, q_h, q_t, k_b, k_h, k_s,
    q_pos_b, q_pos_t, kv_pos_b, kv_pos_s, bias_b, bias_s, kv_heads, T, S, scale,
    G: tl.constexpr, QK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A block of slots against all queries; q and k are rotated already."""
    s_blocks = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    s = (tl.program_id(0) % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    s_ok = s < S
    rows = T * G
    _, since = load_key_positions(kv_pos + b * kv_pos_b, kv_pos_s, s, s_ok)
    bias = tl.zeros((BLOCK_S,), tl.float32)
    if kv_bias is not None:
        bias += tl.load(kv_bias + b * bias_b + s.to(tl.int64) * bias_s, mask=s_ok, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for h in tl.range(0, kv_heads):
        key_rows = k + b * k_b + tl.cast(h, tl.int64) * k_h + s.to(tl.int64) * k_s
        k1, k2 = load_pairs(key_rows, s_ok, BLOCK_S, HALF, 0, QK_D, False)
        for start in tl.range(0, rows, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            row_ok = m < rows
            t, q_head, row = row_of_query(m, h, T, G)
            q_at = tl.load(q_pos + b * q_pos_b + t * q_pos_t, mask=row_ok, other=-1).to(tl.int64)
            q1, q2 = load_pairs(q + b * q_b + q_head * q_h + t * q_t, row_ok, BLOCK_M, HALF, 0, QK_D, False)
            x = pair_products(k1, k2, q1, q2) * scale + bias[:, None]
            x = tl.where(since[:, None] <= q_at[None, :], x, float("-inf"))
            top, log_sum = load_softmax(row_top, row_total, b * kv_heads * rows + row, row_ok)
            total += tl.sum(tl.exp((x - top[None, :]) - log_sum[None, :]), 1)
    tl.store(mass + b * S + s, total, mask=s_ok)

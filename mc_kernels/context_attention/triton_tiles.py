# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Device functions that the Triton kernels of `context_attention` share: pairs of dimensions, rotation, logits.

A head is handled as pairs (first, second) of dimensions, each member a tile [N, HALF] of its own: a rotation is then
elementwise, and <q, k> is the sum of two products. Rotary pairs come first, in the layout's pairing; dimensions that do
not turn are paired too, with frequency 0. The order of the pairs is the same on both sides, so products do not see it.

Phases are fixed point: band b advances by step[b] = inv_freq[b] / 2 pi turns, held in 64 bits modulo one turn, so that
position * step wraps around exactly where whole turns are dropped. The only error is that of step, below 2**-55 turns
(inv_freq / 2 pi in fp64): 2**-31 turns at a position of 1e7, as the oracle's fp64, at the price of three integer
multiply-adds. Sine and cosine are polynomials on half a turn, or for 16 bits the processor's approximations: `tl.sin`
would bring a path for huge angles, which keeps a table in local memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_backend import interpreted

INTERPRETED = tl.constexpr(interpreted())
HIGH_PER_RADIAN = tl.constexpr(683565275.5764316)  # 2**32 / 2 pi
HALF_WORD = tl.constexpr(4294967296.0)  # 2**32
ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: the lower bits of a sum with it are the nearest whole number
NEVER = tl.constexpr(9223372036854775807)  # the position of an empty slot, past every query
# Arguments that change with the lengths, and pointers that may begin at any slot: no kernel is compiled anew for them.
LENGTHS = (
    "T",
    "S",
    "N",
    "rows",
    "all_rows",
    "splits",
    "chunk",
    "q_pos_b",
    "kv_pos_b",
    "pos_b",
    "sigma_b",
    "bias_b",
    "total_b",
)
OF_SLOTS = ("q_pos", "kv_pos", "positions", "sigma", "kv_bias")


@triton.jit
def band_steps(inv_freq, HALF: tl.constexpr, HALF_ROT: tl.constexpr):
    """Frequencies [HALF] fp32 and steps [HALF] int64; 0 for pairs that do not turn."""
    pair = tl.arange(0, HALF)
    freq = tl.load(inv_freq + pair, mask=pair < HALF_ROT, other=0.0)
    # By sums, in whose lower bits whole turns drop out: conversions between 64-bit types are 16 a cycle and
    # multiprocessor. And as the compiler carries no layout of a product through a bitcast, a thread needs the 8 bands
    # that the queries' rotation has had already, and not 16 of its own.
    high = freq.to(tl.float64) * HIGH_PER_RADIAN
    rounded = high + ROUNDER
    low = (high - (rounded - ROUNDER)) * HALF_WORD + ROUNDER
    zero = tl.full((HALF,), ROUNDER, tl.float64).to(tl.int64, bitcast=True)
    return freq.to(tl.float32), (rounded.to(tl.int64, bitcast=True) << 32) + (low.to(tl.int64, bitcast=True) - zero)


@triton.jit
def cos_sin(positions, step):
    """Of positions [N] int64 and steps [HALF]: two tiles [N, HALF] fp32."""
    turn = ((positions[:, None] * step[None, :]) >> 32).to(tl.int32)  # in 2**-32 turns
    half_turn = turn << 1  # the angle modulo half a turn, in 2**-31 quarter turns
    x = half_turn.to(tl.float32) * 4.656612873077393e-10
    z = x * x
    sin = -0.004672227893024683 + z * 0.00015082054596859962
    sin = 0.07968848198652267 + z * sin
    sin = x * (1.570796251296997 + z * (-0.6459633708000183 + z * sin))
    cos = 0.0009177887695841491 + z * -2.384833715041168e-05
    cos = 0.2536693513393402 + z * (-0.020862750709056854 + z * cos)
    cos = 1.0 + z * (-1.2337005138397217 + z * cos)
    opposite = (turn ^ half_turn) < 0  # further than a quarter turn from 0
    return tl.where(opposite, -cos, cos), tl.where(opposite, -sin, sin)


@triton.jit
def cos_sin_16(positions, step):
    """As `cos_sin`, to 2**-20: for what is rounded to 16 bits. By the special function unit, which is that exact up to
    half a turn: 9 instructions in the place of 24. The upper half of the product's lower 64 bits is made by halves: its
    lower half is never added up."""
    low, low_step = positions.to(tl.uint32)[:, None], step.to(tl.uint32)[None, :]
    high, high_step = (positions >> 32).to(tl.uint32)[:, None], (step >> 32).to(tl.uint32)[None, :]
    turn = tl.umulhi(low, low_step) + low * high_step + high * low_step
    angle = turn.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
    if INTERPRETED:
        cos, sin = tl.cos(angle), tl.sin(angle)
    else:
        cos, sin = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;", "=&f,=f,f", [angle],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return cos, sin


@triton.jit
def phases_for(x, positions, step):
    """cos and sin [N, HALF] for rows in memory at x: what is rounded to 16 bits again takes the cheaper ones."""
    if x.dtype.element_ty == tl.float32:
        cos, sin = cos_sin(positions, step)
    else:
        cos, sin = cos_sin_16(positions, step)
    return cos, sin


@triton.jit
def damping(sigma, freq):
    """exp(-(freq sigma)^2 / 2) [N, HALF]; exactly 1 where either is 0."""
    spread = (sigma * 0.8493218002880191)[:, None] * freq[None, :]  # sqrt(log2(e) / 2)
    power = -(spread * spread)
    if INTERPRETED:
        damp = tl.exp2(power)
    else:  # what `tl.exp2` is, but for results below 1e-38
        damp = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
        )
    return damp


@triton.jit
def _pair_dims(HALF: tl.constexpr, HALF_ROT: tl.constexpr, D: tl.constexpr):
    """Dimensions of the pairs, not interleaved, and which pairs exist."""
    pair = tl.arange(0, HALF)
    PAIRS: tl.constexpr = (D + 1) // 2
    if HALF_ROT == 0 or HALF_ROT == PAIRS:
        first, second = pair, pair + PAIRS  # written so that the compiler sees contiguous runs
    else:
        first = pair + tl.where(pair < HALF_ROT, 0, HALF_ROT)
        second = pair + tl.where(pair < HALF_ROT, HALF_ROT, PAIRS)
    return first, second, pair < PAIRS


@triton.jit
def load_pairs(
    rows, valid, N: tl.constexpr, HALF: tl.constexpr, HALF_ROT: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both members [N, HALF] of the pairs of N rows (pointers); 0 where not valid."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)
        x = tl.load(rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        return tl.split(tl.reshape(x, (N, HALF, 2)))
    first, second, exists = _pair_dims(HALF, HALF_ROT, D)
    a = tl.load(rows[:, None] + first[None, :], mask=valid[:, None] & exists[None, :], other=0.0)
    b = tl.load(rows[:, None] + second[None, :], mask=valid[:, None] & (exists & (second < D))[None, :], other=0.0)
    return a, b


@triton.jit
def store_pairs(
    rows, valid, a, b, N: tl.constexpr, HALF: tl.constexpr, HALF_ROT: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)
        x = tl.reshape(tl.join(a, b), (N, 2 * HALF))
        tl.store(rows[:, None] + d[None, :], x.to(rows.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    else:
        first, second, exists = _pair_dims(HALF, HALF_ROT, D)
        a, b = a.to(rows.dtype.element_ty), b.to(rows.dtype.element_ty)
        tl.store(rows[:, None] + first[None, :], a, mask=valid[:, None] & exists[None, :])
        tl.store(rows[:, None] + second[None, :], b, mask=valid[:, None] & (exists & (second < D))[None, :])


@triton.jit
def rotate(a, b, cos, sin):
    """Pairs turned by their phases, fp32."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def dot(a, b, acc=None):
    """a b (+ acc), fp32 accumulation, never TF32."""
    if INTERPRETED:  # it would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def pair_products(a1, a2, b1, b2):
    """<a, b> over both members: [N, HALF] x 2 and [M, HALF] x 2 -> [N, M] fp32."""
    return dot(a2, tl.trans(b2), dot(a1, tl.trans(b1)))


@triton.jit
def load_key_positions(kv_pos, stride, s, valid):
    """Positions of slots s, and when they become visible: NEVER for an empty slot."""
    at = tl.load(kv_pos + s.to(tl.int64) * stride, mask=valid, other=-1).to(tl.int64)
    return at, tl.where(at < 0, NEVER, at)


@triton.jit
def row_of_query(m, head, T, G: tl.constexpr):
    """Row m of a KV head's packed queries: (query, query head, row of [Hq, T]). Heads of a query lie together."""
    t = m // G
    q_head = head * G + m % G
    return t.to(tl.int64), q_head.to(tl.int64), q_head.to(tl.int64) * T + t

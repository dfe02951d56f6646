# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What both splice kernels are built from: where entries lie, their phases, and tiles of them, loaded and turned.

A tile is [ENTRIES, HEADS, columns] of one row's keys or values. For rotation its columns are BANDS pairs, and a loaded
tile is the pair (x, y): first and second dimensions, [.., BANDS] each, or, with interleaved pairs, x = y
[.., 2 * BANDS] as they lie in memory, so that a tile loaded ahead of its use is not touched before.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_PI = tl.constexpr(1.57079632679489661923)
# Kernel arguments that change from plan to plan: no kernel is compiled anew for their values or alignment.
PLAN_INTEGERS = ("n_rows", "batch", "tiles", "at_rows", "at_segments", "at_stays", "at_inserts", "table_b")
PLAN_POINTERS = ("words", "before", "after")


@triton.jit
def program_part(lane, groups, PARTS: tl.constexpr):
    """Row (int64), group of heads and part of the columns of a lane."""
    return (lane // (groups * PARTS)).to(tl.int64), lane // PARTS % groups, lane % PARTS


@triton.jit
def plan_of(words, at_rows, row, ROWS: tl.constexpr):
    """A row's plan (-1: none) and where its bounds begin, two rows of [5]: segments, stays, insert_slots, positions,
    new_positions."""
    if ROWS:
        plan = tl.load(words + at_rows + row)
    else:
        plan = tl.zeros([], tl.int64)
    return plan, words + 5 * plan


@triton.jit
def row_base(cache, row, batch, stride_l, stride_b, PAGE: tl.constexpr):
    """Where a row begins; in the paged form its layer."""
    base = cache + row // batch * stride_l
    if PAGE:
        return base
    else:
        return base + row % batch * stride_b


@triton.jit
def quarter_turns(inv_freq, row, freq_r, freq_b, bands, HALF: tl.constexpr):
    """Quarter turns a position, fp64 [BANDS]: exactly four times the oracle's inv_freq / (2 pi)."""
    freq = tl.load(inv_freq + row * freq_r + bands * freq_b, mask=bands < HALF, other=0.0)
    return freq.to(tl.float64) / tl.full([], HALF_PI, tl.float64)


@triton.jit
def phases(quarters):
    """cos and sin, fp32, of angles in quarter turns (fp64, any shape).

    The angle is reduced in fp64 to an eighth of a turn either way, which is exact from the product on, as in the
    oracle; the polynomials (Cephes sinf and cosf) err by less than an fp32 rounding there and, unlike the library's
    sine, need no stack for a slow path.
    """
    whole = tl.floor(quarters + 0.5)
    z = ((quarters - whole) * tl.full([], HALF_PI, tl.float64)).to(tl.float32)
    zz = z * z
    s = z + z * zz * (-1.6666654611e-1 + zz * (8.3321608736e-3 + zz * -1.9515295891e-4))
    c = 1.0 - 0.5 * zz + zz * zz * (4.166664568298827e-2 + zz * (-1.388731625493765e-3 + zz * 2.443315711809948e-5))
    quadrant = whole.to(tl.int64) & 3
    odd = (quadrant & 1) == 1
    sin, cos = tl.where(odd, c, s), tl.where(odd, s, c)
    sin = tl.where(quadrant >= 2, -sin, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, sin


@triton.jit
def position_of(positions, slots, ok):
    """Position of the entries in `slots`; their slot where no positions are given."""
    if positions is None:
        return slots
    else:
        return tl.load(positions + slots, mask=ok, other=0)


@triton.jit
def slot_pointers(base, slots, ok, heads, table, table_p, stride_b, stride_h, stride_s, PAGE: tl.constexpr):
    """Pointers [ENTRIES, HEADS, 1] to the entries in `slots`; `base` is the row's, in the paged form its layer's."""
    if PAGE:
        pages = tl.load(table + (slots // PAGE) * table_p, mask=ok, other=0).to(tl.int64)
        offsets = pages * stride_b + (slots % PAGE) * stride_s
    else:
        offsets = slots * stride_s
    return base + offsets[:, None, None] + heads[None, :, None] * stride_h


@triton.jit
def load_pairs(pointers, ok, bands, first, HALF: tl.constexpr, BANDS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The tile (x, y) at `pointers`, of the pairs `bands` = first + 0..BANDS-1."""
    if INTERLEAVED:
        columns = 2 * first + tl.arange(0, 2 * BANDS)
        x = tl.load(pointers + columns[None, None, :], mask=ok & (columns < 2 * HALF)[None, None, :])
        return x, x
    else:
        some = ok & (bands < HALF)[None, None, :]
        x = tl.load(pointers + bands[None, None, :], mask=some)
        y = tl.load(pointers + HALF + bands[None, None, :], mask=some)
        return x, y


@triton.jit
def store_pairs(pointers, ok, x, y, bands, first, HALF: tl.constexpr, BANDS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The counterpart of `load_pairs`."""
    if INTERLEAVED:
        columns = 2 * first + tl.arange(0, 2 * BANDS)
        tl.store(pointers + columns[None, None, :], x, mask=ok & (columns < 2 * HALF)[None, None, :])
    else:
        some = ok & (bands < HALF)[None, None, :]
        tl.store(pointers + bands[None, None, :], x, mask=some)
        tl.store(pointers + HALF + bands[None, None, :], y, mask=some)


@triton.jit
def turn(x, y, cos, sin, scaling, INTERLEAVED: tl.constexpr):
    """The tile (x, y) turned by the phases and scaled, in fp32, rounded once. Phases broadcast over the tile."""
    if INTERLEAVED:
        pairs = x.to(tl.float32).reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2)
        a, b = tl.split(pairs)
        out = tl.join((a * cos - b * sin) * scaling, (b * cos + a * sin) * scaling)
        x = out.reshape(x.shape[0], x.shape[1], x.shape[2]).to(x.dtype)
        return x, x
    else:
        a, b = x.to(tl.float32), y.to(tl.float32)
        return ((a * cos - b * sin) * scaling).to(x.dtype), ((b * cos + a * sin) * scaling).to(y.dtype)


@triton.jit
def turn_by(x, y, delta, quarters, INTERLEAVED: tl.constexpr):
    """The tile turned by each entry's own `delta` [ENTRIES]: one phase an entry and band for all heads of the tile.
    Where delta is zero the bits stay."""
    cos, sin = phases(delta.to(tl.float64)[:, None] * quarters[None, :])
    turned, turned_y = turn(x, y, cos[:, None, :], sin[:, None, :], 1.0, INTERLEAVED)
    moves = (delta != 0)[:, None, None]
    return tl.where(moves, turned, x), tl.where(moves, turned_y, y)


@triton.jit
def insert_pairs(
    base, new, after, inserts, first_insert, n_inserts, heads, heads_ok, table, table_p, stride_b, stride_h, stride_s,
    new_h, new_m, quarters, bands, first, scaling,
    HALF: tl.constexpr, BANDS: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Inserted keys first_insert .. first_insert + ENTRIES - 1, freshly rotated at their position and scaled."""
    j = first_insert + tl.arange(0, ENTRIES).to(tl.int64)
    some = j < n_inserts
    slots = tl.load(inserts + j, mask=some, other=0)
    ok = some[:, None, None] & heads_ok[None, :, None]
    source = new + j[:, None, None] * new_m + heads[None, :, None] * new_h
    x, y = load_pairs(source, ok, bands, first, HALF, BANDS, INTERLEAVED)
    cos, sin = phases(position_of(after, slots, some).to(tl.float64)[:, None] * quarters[None, :])
    x, y = turn(x, y, cos[:, None, :], sin[:, None, :], scaling, INTERLEAVED)
    target = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
    store_pairs(target, ok, x, y, bands, first, HALF, BANDS, INTERLEAVED)


@triton.jit
def insert_plain(
    base, new, inserts, first_insert, n_inserts, heads, heads_ok, columns, columns_ok, table, table_p, stride_b,
    stride_h, stride_s, new_h, new_m, scaling,
    SCALED: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Inserted values, copied, or those dimensions of keys that do not rotate: SCALED with the rest of the key."""
    j = first_insert + tl.arange(0, ENTRIES).to(tl.int64)
    some = j < n_inserts
    slots = tl.load(inserts + j, mask=some, other=0)
    ok = some[:, None, None] & heads_ok[None, :, None] & columns_ok[None, None, :]
    x = tl.load(new + j[:, None, None] * new_m + heads[None, :, None] * new_h + columns[None, None, :], mask=ok)
    if SCALED:
        x = (x.to(tl.float32) * scaling).to(x.dtype)
    target = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
    tl.store(target + columns[None, None, :], x, mask=ok)

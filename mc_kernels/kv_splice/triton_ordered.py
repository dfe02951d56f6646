# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernel of the ordered discipline: entries keep their order in memory, the tail shifts in place.

One launch. A *lane* is what one program owns: in one row the columns [first, first + n) of one head's keys or values
(or of the keys of a group of heads). No program touches another's lane, so programs need no order among them, and there
is no auxiliary memory but registers.

Within a lane, safe with overlapping moves to the left and to the right:
  1. Segments run in the plan's order, left-moving ones ascending, then right-moving ones descending. In this order no
     segment writes what a later one still has to read (see `SplicePlan.segments`).
  2. A segment runs in tiles in the direction of memmove: ascending when it moves left, descending when it moves right.
     Then a tile's destination holds sources of this tile and of earlier ones only, never of later tiles.
  3. All threads of a program have loaded a tile before any thread stores it: `debug_barrier` stands between. So a tile
     may overlap its own destination, and the stores of 1 and 2 come after the loads of what they overwrite.
  4. The next tile is loaded ahead, before the present one is stored. Loading early is always safe: by 1 and 2 nothing
     that is stored before has touched it.
  5. Inserted entries are written last, into slots that are no survivor's destination; whatever was to be read from
     those slots has been loaded before the last barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    PLAN_INTEGERS,
    PLAN_POINTERS,
    insert_pairs,
    insert_plain,
    load_pairs,
    phases,
    plan_of,
    position_of,
    program_part,
    quarter_turns,
    row_base,
    slot_pointers,
    store_pairs,
    turn,
    turn_by,
)


@triton.jit
def _segment(segments, s):
    """Source, destination and count of a segment."""
    return tl.load(segments + 3 * s), tl.load(segments + 3 * s + 1), tl.load(segments + 3 * s + 2)


@triton.jit
def _tile(slot, i, count, left, ENTRIES: tl.constexpr):
    """Slots of tile i of a run that begins at `slot`, and which of them exist: counted from the run's start where it
    moves left, else from its end."""
    first = tl.where(left, i * ENTRIES, count - (i + 1) * ENTRIES).to(tl.int32)
    entries = first + tl.arange(0, ENTRIES)
    return slot + entries, (entries >= 0) & (entries < count)


@triton.jit
def _turn_lane(
    base, new, before, after, segments, n_segments, stays, n_stays, inserts, n_inserts, heads, heads_ok, table,
    table_p, stride_b, stride_h, stride_s, new_h, new_m, quarters, bands, first, scaling,
    HALF: tl.constexpr, BANDS: tl.constexpr, INTERLEAVED: tl.constexpr, POSITIONS: tl.constexpr, PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """The rotating dimensions of keys. Packed positions: one phase a segment and band; else one an entry and band."""
    if POSITIONS:
        # Keys that stay may turn where they are. No move and no insertion touches them.
        for s in range(n_stays):
            slot, _, count = _segment(stays, s)
            for i in range(tl.cdiv(count, ENTRIES)):
                slots, some = _tile(slot, i, count, True, ENTRIES)
                delta = position_of(after, slots, some) - position_of(before, slots, some)
                some = some & (delta != 0)
                if tl.max(some.to(tl.int32), 0) > 0:
                    ok = some[:, None, None] & heads_ok[None, :, None]
                    at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
                    x, y = load_pairs(at, ok, bands, first, HALF, BANDS, INTERLEAVED)
                    tl.debug_barrier()
                    x, y = turn_by(x, y, delta, quarters, INTERLEAVED)
                    store_pairs(at, ok, x, y, bands, first, HALF, BANDS, INTERLEAVED)
    for s in range(n_segments):
        source, destination, count = _segment(segments, s)
        left = destination < source
        if not POSITIONS:
            cos, sin = phases((destination - source).to(tl.float64) * quarters)
        slots, some = _tile(source, 0, count, left, ENTRIES)
        ok = some[:, None, None] & heads_ok[None, :, None]
        at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
        x, y = load_pairs(at, ok, bands, first, HALF, BANDS, INTERLEAVED)
        for i in range(tl.cdiv(count, ENTRIES)):
            slots, some = _tile(source, i + 1, count, left, ENTRIES)
            ok = some[:, None, None] & heads_ok[None, :, None]
            at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
            next_x, next_y = load_pairs(at, ok, bands, first, HALF, BANDS, INTERLEAVED)
            tl.debug_barrier()
            slots, some = _tile(destination, i, count, left, ENTRIES)
            if POSITIONS:
                delta = position_of(after, slots, some) - position_of(before, slots - destination + source, some)
                x, y = turn_by(x, y, delta, quarters, INTERLEAVED)
            else:
                x, y = turn(x, y, cos[None, None, :], sin[None, None, :], 1.0, INTERLEAVED)
            ok = some[:, None, None] & heads_ok[None, :, None]
            at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
            store_pairs(at, ok, x, y, bands, first, HALF, BANDS, INTERLEAVED)
            x, y = next_x, next_y
    INSERTS: tl.constexpr = (ENTRIES + 3) // 4  # each has a phase of its own: fewer at a time, for registers
    for i in range(tl.cdiv(n_inserts, INSERTS)):
        insert_pairs(
            base, new, after, inserts, i * INSERTS, n_inserts, heads, heads_ok, table, table_p, stride_b, stride_h,
            stride_s, new_h, new_m, quarters, bands, first, scaling, HALF, BANDS, INTERLEAVED, PAGE, INSERTS,
        )  # fmt: skip


@triton.jit
def _copy_lane(
    base, new, segments, n_segments, inserts, n_inserts, head, columns, columns_ok, table, table_p, stride_b, stride_h,
    stride_s, new_h, new_m, scaling, SCALED: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Values, and dimensions of keys that do not rotate: bits are moved."""
    heads = head + tl.zeros([1], tl.int64)
    for s in range(n_segments):
        source, destination, count = _segment(segments, s)
        left = destination < source
        slots, some = _tile(source, 0, count, left, ENTRIES)
        at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
        x = tl.load(at + columns[None, None, :], mask=some[:, None, None] & columns_ok[None, None, :])
        for i in range(tl.cdiv(count, ENTRIES)):
            slots, some = _tile(source, i + 1, count, left, ENTRIES)
            at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
            next_x = tl.load(at + columns[None, None, :], mask=some[:, None, None] & columns_ok[None, None, :])
            tl.debug_barrier()
            slots, some = _tile(destination, i, count, left, ENTRIES)
            at = slot_pointers(base, slots, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
            tl.store(at + columns[None, None, :], x, mask=some[:, None, None] & columns_ok[None, None, :])
            x = next_x
    for i in range(tl.cdiv(n_inserts, ENTRIES)):
        insert_plain(
            base, new, inserts, i * ENTRIES, n_inserts, heads, heads >= 0, columns, columns_ok, table, table_p,
            stride_b, stride_h, stride_s, new_h, new_m, scaling, SCALED, PAGE, ENTRIES,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLAN_INTEGERS, do_not_specialize_on_alignment=PLAN_POINTERS)
def splice_ordered(
    k, v, k_new, v_new, table, words, before, after, inv_freq,
    n_rows, batch, heads, at_rows, at_segments, at_stays, at_inserts,
    k_l, k_b, k_h, k_s, v_l, v_b, v_h, v_s, kn_r, kn_h, kn_m, vn_r, vn_h, vn_m, table_b, table_p, freq_r, freq_b,
    scaling,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, TURN_ENTRIES: tl.constexpr, HEADS: tl.constexpr, BANDS: tl.constexpr,
    COPY_ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program -> lane: first all that turn (they take longest), then what is copied of the keys, then the values."""
    pid = tl.program_id(0)
    groups = tl.cdiv(heads, HEADS)
    key_parts: tl.constexpr = (DIM - 2 * HALF + COLUMNS - 1) // COLUMNS
    turning = n_rows * groups * ((HALF + BANDS - 1) // BANDS)
    copying = n_rows * heads * key_parts
    if pid < turning:
        row, group, part = program_part(pid, groups, (HALF + BANDS - 1) // BANDS)
    elif pid < turning + copying:
        row, group, part = program_part(pid - turning, heads, max(key_parts, 1))
    else:
        row, group, part = program_part(pid - turning - copying, heads, (DIM + COLUMNS - 1) // COLUMNS)
    plan, low = plan_of(words, at_rows, row, ROWS)
    if plan >= 0:
        segment, stay, insert = tl.load(low), tl.load(low + 1), tl.load(low + 2)
        n_segments, n_stays, n_inserts = tl.load(low + 5) - segment, tl.load(low + 6) - stay, tl.load(low + 7) - insert
        segments, inserts = words + at_segments + 3 * segment, words + at_inserts + insert
        if PAGE:
            table += row % batch * table_b
        if pid < turning:
            if HALF > 0:
                if before is not None:
                    before += tl.load(low + 3)
                if after is not None:
                    after += tl.load(low + 4)
                bands = part * BANDS + tl.arange(0, BANDS)
                quarters = quarter_turns(inv_freq, row, freq_r, freq_b, bands, HALF)
                every = group * HEADS + tl.arange(0, HEADS)
                _turn_lane(
                    row_base(k, row, batch, k_l, k_b, PAGE), k_new + row * kn_r, before, after, segments, n_segments,
                    words + at_stays + 3 * stay, n_stays, inserts, n_inserts, every.to(tl.int64), every < heads, table,
                    table_p, k_b, k_h, k_s, kn_h, kn_m, quarters, bands, part * BANDS, scaling,
                    HALF, BANDS, INTERLEAVED, POSITIONS, PAGE, TURN_ENTRIES,
                )  # fmt: skip
        elif pid < turning + copying:
            if key_parts > 0:
                columns = 2 * HALF + part * COLUMNS + tl.arange(0, COLUMNS)
                _copy_lane(
                    row_base(k, row, batch, k_l, k_b, PAGE), k_new + row * kn_r, segments, n_segments, inserts,
                    n_inserts, group, columns, columns < DIM, table, table_p, k_b, k_h, k_s, kn_h, kn_m,
                    scaling, inv_freq is not None, PAGE, COPY_ENTRIES,
                )  # fmt: skip
        else:
            columns = part * COLUMNS + tl.arange(0, COLUMNS)
            _copy_lane(
                row_base(v, row, batch, v_l, v_b, PAGE), v_new + row * vn_r, segments, n_segments, inserts, n_inserts,
                group, columns, columns < DIM, table, table_p, v_b, v_h, v_s, vn_h, vn_m, scaling, False, PAGE,
                COPY_ENTRIES,
            )  # fmt: skip

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernel of the slots discipline: every entry moves by itself, whatever the length of the tail.

One launch. A program owns ENTRIES entries of one row: the dimensions of their keys that rotate, those that do not, or
their values, for a group of heads. All moves of a plan have their sources in slots >= new_length and their destinations
below (`SplicePlan.segments`), inserted entries are written below too, into slots that hold no survivor, and a key that
turns where it stays is neither: no program reads or writes what another writes, in any order. Within a program all
threads have loaded the tile before one stores it (`debug_barrier`).
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
    plan_of,
    position_of,
    program_part,
    quarter_turns,
    row_base,
    slot_pointers,
    store_pairs,
    turn_by,
)


@triton.jit
def _entries(moves, first, count, ENTRIES: tl.constexpr):
    """Source and destination slots of entries `first` on, and which of them exist."""
    i = first + tl.arange(0, ENTRIES).to(tl.int64)
    some = i < count
    return tl.load(moves + 2 * i, mask=some, other=0), tl.load(moves + 2 * i + 1, mask=some, other=0), some


@triton.jit
def _copy_entries(
    base, new, moves, n_moves, inserts, n_inserts, tile, heads, heads_ok, columns, columns_ok, table, table_p, stride_b,
    stride_h, stride_s, new_h, new_m, scaling, SCALED: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    move_tiles = tl.cdiv(n_moves, ENTRIES)
    if tile < move_tiles:
        source, destination, some = _entries(moves, tile * ENTRIES, n_moves, ENTRIES)
        ok = some[:, None, None] & heads_ok[None, :, None] & columns_ok[None, None, :]
        at = slot_pointers(base, source, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
        x = tl.load(at + columns[None, None, :], mask=ok)
        at = slot_pointers(base, destination, some, heads, table, table_p, stride_b, stride_h, stride_s, PAGE)
        tl.store(at + columns[None, None, :], x, mask=ok)
    elif (tile - move_tiles) * ENTRIES < n_inserts:
        insert_plain(
            base, new, inserts, (tile - move_tiles) * ENTRIES, n_inserts, heads, heads_ok, columns, columns_ok, table,
            table_p, stride_b, stride_h, stride_s, new_h, new_m, scaling, SCALED, PAGE, ENTRIES,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLAN_INTEGERS, do_not_specialize_on_alignment=PLAN_POINTERS)
def splice_slots(
    k, v, k_new, v_new, table, words, before, after, inv_freq,
    n_rows, batch, heads, tiles, at_rows, at_segments, at_inserts,
    k_l, k_b, k_h, k_s, v_l, v_b, v_h, v_s, kn_r, kn_h, kn_m, vn_r, vn_h, vn_m, table_b, table_p, freq_r, freq_b,
    scaling,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    ENTRIES: tl.constexpr, HEADS: tl.constexpr, BANDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program -> (tile of entries, row, group of heads, part of the columns: turning, other keys, values).

    Here `at_segments` is where pairs (source, destination) begin, of each plan first the moves, then the stays, and
    bounds[0] counts pairs. In each row the tiles of moves come first, then those of inserted entries; a plan with
    fewer tiles than the largest leaves the rest of its programs without work.
    """
    turn_parts: tl.constexpr = (HALF + BANDS - 1) // BANDS
    key_parts: tl.constexpr = (DIM - 2 * HALF + COLUMNS - 1) // COLUMNS
    parts: tl.constexpr = turn_parts + key_parts + (DIM + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    tile = (pid % tiles).to(tl.int64)
    row, group, part = program_part(pid // tiles, tl.cdiv(heads, HEADS), parts)
    plan, low = plan_of(words, at_rows, row, ROWS)
    if plan >= 0:
        entry, stay, insert = tl.load(low), tl.load(low + 1), tl.load(low + 2)
        n_entries, n_stays, n_inserts = tl.load(low + 5) - entry, tl.load(low + 6) - stay, tl.load(low + 7) - insert
        moves, inserts = words + at_segments + 2 * entry, words + at_inserts + insert
        every = (group * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        heads_ok = every < heads
        if PAGE:
            table += row % batch * table_b
        if part < turn_parts:
            if HALF > 0:
                if before is not None:
                    before += tl.load(low + 3)
                if after is not None:
                    after += tl.load(low + 4)
                base, first = row_base(k, row, batch, k_l, k_b, PAGE), part * BANDS
                bands = first + tl.arange(0, BANDS)
                quarters = quarter_turns(inv_freq, row, freq_r, freq_b, bands, HALF)
                move_tiles = tl.cdiv(n_entries, ENTRIES)
                if tile < move_tiles:
                    source, destination, some = _entries(moves, tile * ENTRIES, n_entries, ENTRIES)
                    delta = position_of(after, destination, some) - position_of(before, source, some)
                    some = some & ((delta != 0) | (source != destination))
                    ok = some[:, None, None] & heads_ok[None, :, None]
                    at = slot_pointers(base, source, some, every, table, table_p, k_b, k_h, k_s, PAGE)
                    x, y = load_pairs(at, ok, bands, first, HALF, BANDS, INTERLEAVED)
                    tl.debug_barrier()
                    x, y = turn_by(x, y, delta, quarters, INTERLEAVED)
                    at = slot_pointers(base, destination, some, every, table, table_p, k_b, k_h, k_s, PAGE)
                    store_pairs(at, ok, x, y, bands, first, HALF, BANDS, INTERLEAVED)
                elif (tile - move_tiles) * ENTRIES < n_inserts:
                    insert_pairs(
                        base, k_new + row * kn_r, after, inserts, (tile - move_tiles) * ENTRIES, n_inserts, every,
                        heads_ok, table, table_p, k_b, k_h, k_s, kn_h, kn_m, quarters, bands, first, scaling,
                        HALF, BANDS, INTERLEAVED, PAGE, ENTRIES,
                    )  # fmt: skip
        elif part < turn_parts + key_parts:
            if key_parts > 0:
                columns = 2 * HALF + (part - turn_parts) * COLUMNS + tl.arange(0, COLUMNS)
                _copy_entries(
                    row_base(k, row, batch, k_l, k_b, PAGE), k_new + row * kn_r, moves, n_entries - n_stays, inserts,
                    n_inserts, tile, every, heads_ok, columns, columns < DIM, table, table_p, k_b, k_h, k_s, kn_h, kn_m,
                    scaling, inv_freq is not None, PAGE, ENTRIES,
                )  # fmt: skip
        else:
            columns = (part - turn_parts - key_parts) * COLUMNS + tl.arange(0, COLUMNS)
            _copy_entries(
                row_base(v, row, batch, v_l, v_b, PAGE), v_new + row * vn_r, moves, n_entries - n_stays, inserts,
                n_inserts, tile, every, heads_ok, columns, columns < DIM, table, table_p, v_b, v_h, v_s, vn_h, vn_m,
                scaling, False, PAGE, ENTRIES,
            )  # fmt: skip

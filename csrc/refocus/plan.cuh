// From what opens and closes to the new layout and the moves of the slots discipline, by one block of threads: what
// SplicePlan.from_edits(discipline="slots") makes of the same edits. Freed slots below the new length and those that the
// cache grows by are holes; inserted entries fill them lowest first in timeline order, then entries beyond the new length do.
#pragma once

#include "allocate.cuh"

namespace mc::cuda {

struct Counts {
    int before, after, inserted;  // entries

    MC_DEVICE Counts(const RefocusCall& c, int n, const Choice& choice)
        : before(n),
          after(n + (c.block - 1) * (choice.opened - choice.closed)),
          inserted(c.block * choice.opened + choice.closed) {}
};

// One entry of the old layout, and what becomes of it.
struct Visit {
    int level = 0, born = 0, child = 0;  // child: its place in its group
    int64_t index = 0, slot = 0;
    bool opens = false, closes = false, kept = false;

    // first: the group's first entry, in whose place the parent comes.
    MC_DEVICE bool first() const { return closes && child == 0; }
};

MC_DEVICE Visit visit(const RefocusCall& c, int n, int r) {
    Visit v;
    if (r >= n) return v;
    v.level = read<int32_t>(c.levels + r);
    v.born = read<int32_t>(c.born + r);
    v.index = read<int64_t>(c.index + r);
    v.slot = read<int64_t>(c.slots + r);
    v.child = static_cast<int>(v.index % c.block);
    v.opens = read<int32_t>(c.actions + r) == kOpens;
    v.closes = v.child <= r && read<int32_t>(c.actions + r - v.child) == kCloses;
    v.kept = !v.opens && !v.closes;
    return v;
}

// freed [slot]: 1 where the entry goes.
MC_DEVICE void free_slots(const RefocusCall& c, int n) {
    for (int r = static_cast<int>(threadIdx.x); r < n; r += static_cast<int>(blockDim.x)) {
        const Visit v = visit(c, n, r);
        write(c.freed + v.slot, v.kept ? 0 : 1);
    }
}

// holes: slots to fill, ascending. Of an entry that has to move, `freed` becomes the number of its move. Returns how many do.
MC_DEVICE int find_holes(const RefocusCall& c, Rounds& rounds, const Counts& counts) {
    const int size = static_cast<int>(blockDim.x), end = max(counts.before, counts.after);
    Three all{};
    for (int first = 0; first < end; first += size) {
        const int s = first + static_cast<int>(threadIdx.x);
        const bool used = s < counts.before && read<int32_t>(c.freed + s) == 0;
        const bool hole = s < counts.after && !used, moves = s >= counts.after && used;
        const Three at = count_before(rounds, hole, moves, false, all);
        if (hole) write(c.holes + at.a, s);
        if (moves) write(c.freed + s, at.b);
    }
    return all.b;
}

MC_DEVICE void put(const RefocusCall& c, int rank, int level, int64_t index, int slot, int born) {
    write(c.new_levels + rank, level);
    write(c.new_index + rank, index);
    write(c.new_slots + rank, slot);
    write(c.new_born + rank, born);
}

MC_DEVICE void put_edit(const RefocusCall& c, int i, int start, int remove, int insert) {
    write(c.edits + 3 * i, start);
    write(c.edits + 3 * i + 1, remove);
    write(c.edits + 3 * i + 2, insert);
}

MC_DEVICE int put_inserted(const RefocusCall& c, int i, int source) {
    const int slot = read<int32_t>(c.holes + i);
    write(c.inserted + 2 * i, slot);
    write(c.inserted + 2 * i + 1, source);
    return slot;
}

// The new layout, and the lists: edits, inserted entries, moves, children of closed groups.
MC_DEVICE void lay_out(const RefocusCall& c, Rounds& rounds, const Counts& counts, int cycle) {
    const int size = static_cast<int>(blockDim.x), k = c.block, n = counts.before;
    Three all{};
    for (int from = 0; from < n; from += size) {
        const int r = from + static_cast<int>(threadIdx.x);
        const Visit v = visit(c, n, r);
        const Three at = count_before(rounds, v.opens, v.kept, v.first(), all);
        const int inserted = k * at.a + at.c, rank = inserted + at.b;
        if (v.opens) {
            const int row = read<int32_t>(c.rows + r);
            put_edit(c, at.a + at.c, r, 1, k);
            for (int j = 0; j < k; ++j) {
                const int slot = put_inserted(c, inserted + j, row + j);
                put(c, rank + j, v.level - 1, v.index * k + j, slot, cycle);
            }
        } else if (v.closes) {
            const int group = at.c - (v.child > 0);
            write(c.children + k * group + v.child, static_cast<int32_t>(v.slot));
            if (v.child > 0) continue;
            put_edit(c, at.a + at.c, r, k, 1);
            write(c.pooled_levels + group, v.level + 1);
            put(c, rank, v.level + 1, v.index / k, put_inserted(c, inserted, -1 - group), -cycle);
        } else if (v.kept) {
            int slot = static_cast<int>(v.slot);
            if (slot >= counts.after) {
                const int move = read<int32_t>(c.freed + slot);
                write(c.moves + 2 * move, slot);
                slot = read<int32_t>(c.holes + counts.inserted + move + (MC_FAULT(1) ? 1 : 0));
                write(c.moves + 2 * move + 1, slot);
            }
            put(c, rank, v.level, v.index, slot, v.born);
        }
    }
}

// The new layout takes the old one's place. Positions are ranks; slots that were used and are not any more are empty.
MC_DEVICE void put_back(const RefocusCall& c, const Counts& counts) {
    const int end = max(counts.before, counts.after);
    for (int r = static_cast<int>(threadIdx.x); r < end; r += static_cast<int>(blockDim.x)) {
        if (r >= counts.after) {
            write(c.pos + r, int64_t{-1});
            if (c.bias) write(c.bias + r, 0.0f);
            continue;
        }
        const int level = read<int32_t>(c.new_levels + r), slot = read<int32_t>(c.new_slots + r);
        write(c.levels + r, level);
        write(c.index + r, read<int64_t>(c.new_index + r));
        write(c.born + r, read<int32_t>(c.new_born + r));
        write(c.slots + r, static_cast<int64_t>(slot));
        write(c.pos + slot, static_cast<int64_t>(r));
        if (c.bias) write(c.bias + slot, level > 0 ? static_cast<float>(c.gist_bias) : 0.0f);
    }
}

}  // namespace mc::cuda

// What the splice kernels are told: one struct, passed by value. Plans of a few edits travel in it, so that a splice is
// one launch and no copy.
#pragma once

#include "device_types.cuh"
#include "words.cuh"

namespace mc::cuda {

// Bytes.
struct CacheSteps {
    int64_t layer, b_or_page, head, slot;
};
struct FreshSteps {
    int64_t row, head, entry;
};

// A number below 2^31 by one that the host knows, in two instructions: a division of integers is some 25, and five of them
// were a third of what a thread did. With 2^(s - 1) < by <= 2^s the factor is 2^(31 + s) / by, rounded up, and fits.
struct Divider {
    int32_t by;
    uint32_t factor, shift;

    MC_BOTH int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> shift);
    }
    MC_BOTH int remainder(int n) const { return n - quotient(n) * by; }
};

inline Divider divider(int64_t by) {
    uint32_t s = 0;
    while (int64_t{1} << s < by) ++s;
    const auto whole = static_cast<uint64_t>(by);
    return {static_cast<int32_t>(by), static_cast<uint32_t>(((uint64_t{1} << (31 + s)) + whole - 1) / whole), 31 + s};
}

// How the columns of one kind of lane are dealt out. An item is what a thread holds of an entry: V bands (two packs) of
// a key that turns, or one pack. A lane has `columns` of them, the last one of `parts` perhaps fewer.
struct Split {
    Divider columns, parts, tiles, groups;  // tiles: see splice_slots; groups: of heads
    int32_t items, heads, group, blocks;    // heads of a lane; entries that a block covers at once; blocks of the kind
};

enum Kind : int { kTurn, kKeyRest, kValue, kKinds };

// A plan's header within the words. moves: (source, destination, count, how many entries the moves before it have), those
// that move first, then those that stay. before_at, after_at: where its positions begin.
struct PlanWords {
    int32_t first_move, n_moves, n_stays, moved, stayed, first_insert, n_inserts, before_at, after_at;
};
constexpr int kPlanWords = 9, kMoveWords = 4;

struct SpliceCall {
    char *k, *v;
    const char *k_new, *v_new;
    CacheSteps k_steps, v_steps;
    FreshSteps k_new_steps, v_new_steps;
    const char* table;            // nullptr: contiguous
    int64_t table_b, table_page;  // bytes
    const int64_t *positions, *new_positions;
    const double* inv_freq;
    int64_t inv_freq_row;  // doubles from row to row
    float scaling;
    int32_t n_rows, heads, half;
    Divider batch, page;
    bool wide_table, interleaved, rotates, explicit_positions;
    Split split[kKinds];
    int32_t rows_at, plans_at;  // in words; rows_at < 0: plan 0 for all rows
    Words word;

    // False: the row is left alone.
    MC_DEVICE bool plan_of(int row, PlanWords& p) const {
        const int plan = rows_at < 0 ? 0 : word[rows_at + row], at = plans_at + kPlanWords * plan;
        if (plan < 0) return false;
        p = {word[at],     word[at + 1], word[at + 2], word[at + 3], word[at + 4],
             word[at + 5], word[at + 6], word[at + 7], word[at + 8]};
        return true;
    }
};

}  // namespace mc::cuda

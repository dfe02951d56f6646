// How the kernel sees a call: the parts of a plan, and lanes, the strips of memory that it moves entries along.
#pragma once

#include "check.h"

namespace mc {

struct Segment {
    int64_t source, destination, count;
};

// One plan's part of the arrays.
struct Plan {
    const int64_t *segments, *stays, *insert_slots, *positions, *new_positions;
    int64_t n_segments, n_stays, n_inserts;

    Plan(const mc_kv_splice_args& a, int64_t p) {
        const int64_t *low = a.offsets + 5 * p, *high = low + 5;
        segments = a.segments + 3 * low[0];
        stays = a.stays + 3 * low[1];
        insert_slots = a.insert_slots + low[2];
        positions = a.positions ? a.positions + low[3] : nullptr;
        new_positions = a.new_positions ? a.new_positions + low[4] : nullptr;
        n_segments = high[0] - low[0];
        n_stays = high[1] - low[1];
        n_inserts = high[2] - low[2];
    }

    int64_t before(int64_t slot) const { return positions ? positions[slot] : slot; }
    int64_t after(int64_t slot) const { return new_positions ? new_positions[slot] : slot; }
    int64_t delta(int64_t source, int64_t destination) const {
        return static_cast<int64_t>(static_cast<uint64_t>(after(destination)) - static_cast<uint64_t>(before(source)));
    }
    static Segment at(const int64_t* array, int64_t i) { return {array[3 * i], array[3 * i + 1], array[3 * i + 2]}; }
};

// The keys or the values of one row: of one head or, where heads lie side by side within a slot (NHD), of all of them.
// An entry is then one piece of memory, and the row is passed over once instead of once a head.
struct Lane {
    const Cache& c;
    char* base;         // page 0, slot 0
    const char* fresh;  // the first inserted entry
    int64_t page_step, slot_step, fresh_step, fresh_head, heads, b;

    int64_t row_bytes() const { return c.dim * c.bytes; }
    int64_t entry_bytes() const { return heads * row_bytes(); }

    char* at(int64_t slot) const {
        const int64_t page = slot / c.block;
        return base + page_id(page) * page_step + (slot - page * c.block) * slot_step;
    }

    int64_t page_id(int64_t page) const {
        if (!c.table) return b;
        const int64_t i = b * c.table->stride[0] + page * c.table->stride[1];
        return c.table->dtype == MC_I32 ? static_cast<const int32_t*>(c.table->data)[i]
                                        : static_cast<const int64_t*>(c.table->data)[i];
    }
};

// The lanes of a call, numbered (row, head or all heads, key or value).
class Lanes {
public:
    // wide: heads go together, if the strides allow it.
    Lanes(const mc_kv_splice_args& a, const Cache& c, bool wide) : a_(a), c_(c) {
        const int64_t row = c.dim * c.bytes;
        heads_ = wide && c.k_stride[2] == row && c.v_stride[2] == row ? c.heads : 1;
    }

    int64_t count() const { return first_of(c_.layers * c_.batch); }
    int64_t row_of(int64_t lane) const { return lane / (2 * groups()); }
    int64_t first_of(int64_t row) const { return row * 2 * groups(); }
    static bool is_key(int64_t lane) { return lane % 2 == 0; }

    Lane operator[](int64_t lane) const {
        const int64_t row = row_of(lane), head = lane / 2 % groups() * heads_, layer = row / c_.batch;
        const bool key = is_key(lane);
        const int64_t* stride = key ? c_.k_stride : c_.v_stride;
        const mc_tensor& fresh = key ? a_.k_new : a_.v_new;
        return {c_,
                (key ? c_.k : c_.v) + layer * stride[0] + head * stride[2],
                static_cast<const char*>(fresh.data) + (row * fresh.stride[0] + head * fresh.stride[1]) * c_.bytes,
                stride[1],
                stride[3],
                fresh.stride[2] * c_.bytes,
                fresh.stride[1] * c_.bytes,
                heads_,
                row % c_.batch};
    }

private:
    int64_t groups() const { return c_.heads / heads_; }

    const mc_kv_splice_args& a_;
    const Cache& c_;
    int64_t heads_;
};

}  // namespace mc

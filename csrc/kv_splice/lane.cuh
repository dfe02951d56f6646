// A thread's share of a splice: where the entries of its lane lie, phases, and entries moved for all heads of the lane.
#pragma once

#include <type_traits>

#include "call.cuh"

namespace mc::cuda {

// kTurnItems pairs or kCopyItems packs of 16 bytes a thread are a tile: 16 KB a block.
constexpr int kThreads = 256, kTurnItems = 2, kCopyItems = 4;
// In the slots discipline: heads of an entry that a thread has on their way together where nothing turns.
constexpr int kSlotItems = 8;

template <class E, int V>
struct Pair {
    Pack<typename E::Bits, V> x, y;
};

struct Lane {
    const SpliceCall& c;
    char* base = nullptr;         // of the row's first head of the lane; in the paged form of its layer's
    const char* fresh = nullptr;  // the first inserted entry
    CacheSteps steps = {};
    FreshSteps fresh_steps = {};
    int64_t column = 0, second = 0;  // byte offsets of the thread's pack, or packs, within an entry
    int row = 0, kind = 0, tile = 0, heads = 0;
    int band = 0;              // the first of V
    int entry = 0, group = 0;  // the thread's entry among the `group` that a block covers at once
    bool active = false;

    MC_DEVICE char* slot(int s) const {
        if (!c.table) return base + s * steps.slot;
        const int page = c.page.quotient(s);
        const char* at = c.table + c.batch.remainder(row) * c.table_b + page * c.table_page;
        const int64_t id = c.wide_table ? read_constant<int64_t>(at) : read_constant<int32_t>(at);
        return base + id * steps.b_or_page + (s - page * c.page.by) * steps.slot;
    }
    MC_DEVICE const char* inserted(int j) const { return fresh + j * fresh_steps.entry; }
};

// Blocks are numbered (kind, row, group of heads, part of the columns, tile).
template <class E, int V>
MC_DEVICE Lane lane_of(const SpliceCall& c, int block) {
    int kind = 0;
    for (; kind < kKinds - 1 && block >= c.split[kind].blocks; ++kind) block -= c.split[kind].blocks;
    const Split& s = c.split[kind];
    const int bytes = sizeof(typename E::Bits), thread = static_cast<int>(threadIdx.x);
    const int tiled = s.tiles.quotient(block), parted = s.parts.quotient(tiled), row = s.groups.quotient(parted);
    const int part = s.parts.remainder(tiled), head = s.groups.remainder(parted) * s.heads;
    const int item = part * s.columns.by + s.columns.remainder(thread), layer = c.batch.quotient(row);
    const bool key = kind != kValue;
    const CacheSteps& steps = key ? c.k_steps : c.v_steps;
    const FreshSteps& fresh_steps = key ? c.k_new_steps : c.v_new_steps;
    Lane lane{c};
    lane.base = (key ? c.k : c.v) + layer * steps.layer + head * steps.head;
    if (!c.table) lane.base += c.batch.remainder(row) * steps.b_or_page;
    lane.fresh = (key ? c.k_new : c.v_new) + row * fresh_steps.row + head * fresh_steps.head;
    lane.steps = steps;
    lane.fresh_steps = fresh_steps;
    if (kind == kTurn) {
        lane.column = (c.interleaved ? 2 : 1) * item * V * bytes;
        lane.second = lane.column + (c.interleaved ? V : c.half) * bytes;
    } else {
        lane.column = (item * V + (kind == kKeyRest ? 2 * c.half : 0)) * bytes;
        lane.second = lane.column;
    }
    lane.row = row;
    lane.kind = kind;
    lane.tile = s.tiles.remainder(block);
    lane.heads = min(s.heads, c.heads - head);
    lane.band = item * V;
    lane.entry = s.columns.quotient(thread);
    lane.group = s.group;
    lane.active = lane.entry < lane.group && item < s.items;
    return lane;
}

struct Positions {
    const SpliceCall& c;
    const PlanWords& plan;

    MC_DEVICE int64_t before(int slot) const {
        return c.positions ? read_constant<int64_t>(c.positions + plan.before_at + slot) : slot;
    }
    MC_DEVICE int64_t after(int slot) const {
        return c.new_positions ? read_constant<int64_t>(c.new_positions + plan.after_at + slot) : slot;
    }
};

// cos and sin of V bands. The angle is reduced in fp64, in quarter turns, to an eighth of a turn either way. There the
// polynomials (Cephes' sinf and cosf) err by less than an fp32 rounding and need, unlike the library's sine, no slow
// path and no stack.
template <int V>
struct Phase {
    float cos[V], sin[V];

    MC_DEVICE void set(const SpliceCall& c, const Lane& lane, int64_t by) {
        constexpr double kQuarters = 0.63661977236758134308, kQuarter = 1.57079632679489661923;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const double frequency = read_constant<double>(c.inv_freq + lane.row * c.inv_freq_row + lane.band + i);
            const double turn = static_cast<double>(by) * (frequency * kQuarters), whole = rint(turn);
            const float z = static_cast<float>((turn - whole) * kQuarter), zz = z * z;
            const float s = z + z * zz * (-1.6666654611e-1f + zz * (8.3321608736e-3f + zz * -1.9515295891e-4f));
            const float k =
                1.0f - 0.5f * zz +
                zz * zz * (4.166664568298827e-2f + zz * (-1.388731625493765e-3f + zz * 2.443315711809948e-5f));
            const int quadrant = static_cast<int>(static_cast<int64_t>(whole) & 3);
            const float a = quadrant & 1 ? s : k, b = quadrant & 1 ? k : s;
            cos[i] = quadrant == 1 || quadrant == 2 ? -a : a;
            sin[i] = quadrant >= 2 ? -b : b;
        }
    }
};

template <class E, int V>
MC_DEVICE Pair<E, V> load_pair(const char* entry, const Lane& lane) {
    using P = Pack<typename E::Bits, V>;
    return {read<P>(entry + lane.column), read<P>(entry + lane.second)};
}

template <class E, int V>
MC_DEVICE void store_pair(char* entry, const Lane& lane, const Pair<E, V>& p) {
    write(entry + lane.column, p.x);
    write(entry + lane.second, p.y);
}

template <class E>
MC_DEVICE void turn_one(typename E::Bits& x, typename E::Bits& y, float cos, float sin, float scale) {
    const float a = E::widen(x), b = E::widen(y);
    x = E::narrow((a * cos - b * sin) * scale);
    y = E::narrow((b * cos + a * sin) * scale);
}

// Interleaved pairs lie side by side within the packs: V / 2 of them in each.
template <class E, int V>
MC_DEVICE void turn(Pair<E, V>& p, const Phase<V>& phase, float scale, bool interleaved) {
    if (V > 1 && interleaved) {
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
            turn_one<E>(p.x.x[2 * i], p.x.x[2 * i + 1], phase.cos[i], phase.sin[i], scale);
            turn_one<E>(p.y.x[2 * i], p.y.x[2 * i + 1], phase.cos[V / 2 + i], phase.sin[V / 2 + i], scale);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) turn_one<E>(p.x.x[i], p.y.x[i], phase.cos[i], phase.sin[i], scale);
}

// One entry, all heads of the lane: from `from`, heads `from_head` bytes apart, to the slot at `to`. Loads of several
// heads are on their way together.
template <class E, int V>
MC_DEVICE void turn_entry(const SpliceCall& c, const Lane& lane, const char* from, int64_t from_head, char* to,
                          int64_t by, float scale) {
    Phase<V> phase;
    phase.set(c, lane, by);
    for (int h = 0; h < lane.heads; h += kTurnItems) {
        Pair<E, V> p[kTurnItems];
#pragma unroll
        for (int n = 0; n < kTurnItems; ++n) {
            if (h + n < lane.heads) p[n] = load_pair<E, V>(from + (h + n) * from_head, lane);
        }
#pragma unroll
        for (int n = 0; n < kTurnItems; ++n) {
            if (h + n >= lane.heads) continue;
            if (by != 0 || scale != 1.0f) turn<E, V>(p[n], phase, scale, c.interleaved);
            store_pair<E, V>(to + (h + n) * lane.steps.head, lane, p[n]);
        }
    }
}

template <class E, int V>
MC_DEVICE void copy_entry(const Lane& lane, const char* from, int64_t from_head, char* to, float scale = 1.0f) {
    using P = Pack<typename E::Bits, V>;
    constexpr int N = kCopyItems;
    for (int h = 0; h < lane.heads; h += N) {
        P p[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (h + n < lane.heads) p[n] = read<P>(from + (h + n) * from_head + lane.column);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (h + n >= lane.heads) continue;
            if (scale != 1.0f) {
#pragma unroll
                for (int i = 0; i < V; ++i) p[n].x[i] = E::narrow(E::widen(p[n].x[i]) * scale);
            }
            write(to + (h + n) * lane.steps.head + lane.column, p[n]);
        }
    }
}

// As it is, to slot `to`, at most kSlotItems heads: words of 32 bits, which the compiler does not take apart.
template <class E, int V>
MC_DEVICE void copy_bits(const Lane& lane, const char* from, int64_t from_head, int to) {
    constexpr int N = kSlotItems, bytes = V * sizeof(typename E::Bits);
    using P = std::conditional_t<bytes == 16, Pack<uint32_t, 4>, Pack<typename E::Bits, V>>;
    P p[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (n < lane.heads) p[n] = read<P>(from + n * from_head);
    }
    char* at = lane.slot(fresh(to)) + lane.column;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (n < lane.heads) write(at + n * lane.steps.head, p[n]);
    }
}

// Inserted entry j: keys freshly rotated at their position, all their dimensions scaled.
template <class E, int V>
MC_DEVICE void insert_turned(const SpliceCall& c, const Lane& lane, const PlanWords& plan, const Positions& at, int j) {
    const int slot = c.word[plan.first_insert + j];
    turn_entry<E, V>(c, lane, lane.inserted(j), lane.fresh_steps.head, lane.slot(slot), at.after(slot), c.scaling);
}

template <class E, int V>
MC_DEVICE void insert_plain(const SpliceCall& c, const Lane& lane, const PlanWords& plan, int j) {
    const float scale = lane.kind == kKeyRest && c.rotates ? c.scaling : 1.0f;
    copy_entry<E, V>(lane, lane.inserted(j), lane.fresh_steps.head, lane.slot(c.word[plan.first_insert + j]), scale);
}

}  // namespace mc::cuda

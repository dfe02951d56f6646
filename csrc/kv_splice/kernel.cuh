// kv_splice on a GPU: survivors move and turn in place, inserted entries are written, in one launch for all layers,
// sequences and heads. The contract: mc_kernels.h. Two kernels, one a discipline; cuda.cu chooses.
//
// Floor. A moved entry's key and value are read once and written once: 4 * D * sizeof(dtype) bytes a head and row over
// the copy bandwidth (Llama-3-8B in bf16, 8,192 entries: 2.1 GB, 0.45 ms at 4.8 TB/s). By Little's law 2.4 TB/s of reads
// at 1 us of loaded latency are 18 KB in flight a multiprocessor: a block keeps a tile of 16 KB on its way while it
// stores the one before, and 512 lanes (the case above) are four blocks a multiprocessor. A splice in the slots
// discipline costs O(edit): 132 entries of the same model are 35 MB, 7 us; its plan comes with the launch.
// Phases: a sine and a cosine an entry and band for all heads of a lane; at packed positions one a segment.
//
// Ordered. A *lane* is what one block owns: of one row the same columns of some heads' keys or values. No block touches
// another's lane, so blocks need no order among them, and there is no auxiliary memory but registers. Within a lane:
//   1. Segments run in the plan's order, left-moving ones ascending, then right-moving ones descending: no segment
//      writes what a later one still has to read (SplicePlan.segments).
//   2. A segment runs in tiles in the direction of memmove, so a tile's destination holds sources of this tile and of
//      earlier ones only.
//   3. A barrier stands between the loads of a tile, by all threads, and its stores: a tile may overlap its own
//      destination, and stores of tiles before come after the loads of what they overwrite.
//   4. The next tile is loaded before the present one is stored, and before that barrier. By 1 and 2 nothing that has
//      been stored by then has touched it: loading early is always safe.
//   5. Inserted entries come last, into slots that are no survivor's destination; whatever was to be read there has
//      been loaded before the last barrier. Keys that turn where they stay are touched by one thread each.
//
// Slots. Sources lie beyond all destinations, inserted entries go to slots that hold no survivor: no thread touches what
// another does, in any order, and there is no barrier.
#pragma once

#include "lane.cuh"

namespace mc::cuda {

// What a thread of an ordered lane does next: a tile of one move, for `step` heads from `head` on.
struct Cursor {
    int move, end, tile, head;  // moves [move, end) are left
    int source, destination, count;

    MC_DEVICE bool done() const { return move >= end; }
    MC_DEVICE bool left() const { return destination <= source; }

    MC_DEVICE void open(const SpliceCall& c) {
        for (tile = head = 0; move < end; ++move) {
            source = c.word[kMoveWords * move + 0];
            destination = c.word[kMoveWords * move + 1];
            count = c.word[kMoveWords * move + 2];
            if (count > 0) return;
        }
    }

    MC_DEVICE void next(const SpliceCall& c, int tile_entries, int heads, int step) {
        if ((head += step) < heads) return;
        head = 0;
        if ((++tile) * tile_entries < count) return;
        ++move;
        open(c);
    }

    // Entry `i` of the tile, counted from the move's first.
    MC_DEVICE int entry(int i, int tile_entries) const {
        return left() ? tile * tile_entries + i : count - (tile + 1) * tile_entries + i;
    }
};

// Keys that turn. Item n of a thread is entry n of the tile (packed positions: all of a move turn alike) or head n of
// one entry (explicit ones: what the heads share is the phase).
template <class E, int V>
MC_DEVICE void turn_lane(const SpliceCall& c, const Lane& lane, const PlanWords& plan, const Positions& at) {
    constexpr int N = kTurnItems;
    using P = Pair<E, V>;
    const bool each = c.explicit_positions;
    const int tile_entries = each ? lane.group : N * lane.group, step = each ? N : 1;
    Cursor now{plan.first_move, plan.first_move + plan.n_moves + (each ? plan.n_stays : 0), 0, 0, 0, 0, 0};
    const auto load = [&](const Cursor& t, P(&to)[N]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int e = t.entry(lane.entry + (each ? 0 : n * lane.group), tile_entries), h = t.head + (each ? n : 0);
            if (lane.active && e >= 0 && e < t.count && h < lane.heads) {
                to[n] = load_pair<E, V>(lane.slot(t.source + e + (MC_FAULT(1) ? 1 : 0)) + h * lane.steps.head, lane);
            }
        }
    };
    P present[N], ahead[N];
    Phase<V> phase;
    now.open(c);
    if (!now.done()) load(now, present);
    while (!now.done()) {
        Cursor then = now;
        then.next(c, tile_entries, lane.heads, step);
        if (!then.done()) load(then, ahead);
        if (!MC_FAULT(2)) __syncthreads();
        const int first = now.entry(lane.entry, tile_entries);
        int64_t delta = each ? 0 : now.destination - now.source;
        if (!lane.active) delta = 0;
        if (each && lane.active && first >= 0 && first < now.count) {
            delta = at.after(now.destination + first) - at.before(now.source + first);
        }
        if (delta != 0 && now.head == 0 && (each || now.tile == 0)) phase.set(c, lane, delta);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int e = each ? first : first + n * lane.group, h = now.head + (each ? n : 0);
            if (!lane.active || e < 0 || e >= now.count || h >= lane.heads) continue;
            if (delta != 0) {
                turn<E, V>(present[n], phase, 1.0f, c.interleaved);
            } else if (now.source == now.destination) {
                continue;
            }
            store_pair<E, V>(lane.slot(now.destination + e) + h * lane.steps.head, lane, present[n]);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) present[n] = ahead[n];
        now = then;
    }
    for (int j = lane.entry; lane.active && j < plan.n_inserts; j += lane.group) {
        insert_turned<E, V>(c, lane, plan, at, j);
    }
}

// Values, and dimensions of keys that do not turn.
template <class E, int V>
MC_DEVICE void copy_lane(const SpliceCall& c, const Lane& lane, const PlanWords& plan) {
    constexpr int N = kCopyItems;
    using P = Pack<typename E::Bits, V>;
    const int tile_entries = N * lane.group;
    Cursor now{plan.first_move, plan.first_move + plan.n_moves, 0, 0, 0, 0, 0};
    const auto load = [&](const Cursor& t, P(&to)[N]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int e = t.entry(lane.entry + n * lane.group, tile_entries);
            if (lane.active && e >= 0 && e < t.count) to[n] = read<P>(lane.slot(t.source + e) + lane.column);
        }
    };
    P present[N], ahead[N];
    now.open(c);
    if (!now.done()) load(now, present);
    while (!now.done()) {
        Cursor then = now;
        then.next(c, tile_entries, 1, 1);
        if (!then.done()) load(then, ahead);
        if (!MC_FAULT(2)) __syncthreads();
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int e = now.entry(lane.entry + n * lane.group, tile_entries);
            if (lane.active && e >= 0 && e < now.count) {
                write(lane.slot(now.destination + e + (MC_FAULT(3) ? 1 : 0)) + lane.column, present[n]);
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) present[n] = ahead[n];
        now = then;
    }
    for (int j = lane.entry; lane.active && j < plan.n_inserts; j += lane.group) insert_plain<E, V>(c, lane, plan, j);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads, 2) splice_ordered(const __grid_constant__ SpliceCall c) {
    const Lane lane = lane_of<E, V>(c, static_cast<int>(blockIdx.x));
    PlanWords plan;
    if (!c.plan_of(lane.row, plan)) return;
    if (lane.kind == kTurn) {
        turn_lane<E, V>(c, lane, plan, Positions{c, plan});
    } else {
        copy_lane<E, V>(c, lane, plan);
    }
}

// Which entry of the plan is at `i` of its list of moves and stays.
MC_DEVICE int move_of(const SpliceCall& c, const PlanWords& plan, int i) {
    int low = plan.first_move, high = plan.first_move + plan.n_moves + plan.n_stays;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (c.word[kMoveWords * middle + 3] <= i ? low : high) = middle;
    }
    return low;
}

// A lane has as many blocks as the largest plan has groups of entries, inserted ones at the end of the list; those that
// a row's own plan does not have end at once. A thread has one entry, for all heads of the lane. What a block costs before
// its first load is some microsecond, so blocks are few and threads have all their heads' loads on their way at once: 132
// entries of Llama-3-8B are 576 blocks, of which five fit a multiprocessor where nothing turns (no phases to hold).
template <class E, int V, bool kTurns>
__global__ void __launch_bounds__(kThreads, kTurns ? 2 : 5) splice_slots(const __grid_constant__ SpliceCall c) {
    const Lane lane = lane_of<E, V>(c, static_cast<int>(blockIdx.x));
    PlanWords plan;
    if (!lane.active || !c.plan_of(lane.row, plan)) return;
    const bool turns = kTurns && lane.kind == kTurn;
    const int listed = plan.moved + (turns ? plan.stayed : 0), i = lane.tile * lane.group + lane.entry, j = i - listed;
    if (j >= plan.n_inserts) return;
    if constexpr (!kTurns) {
        const char* from;
        int destination;
        if (j >= 0) {
            from = lane.inserted(j);
            destination = c.word[plan.first_insert + j];
        } else {
            const int m = move_of(c, plan, i), e = i - c.word[kMoveWords * m + 3];
            from = lane.slot(c.word[kMoveWords * m] + e);
            destination = c.word[kMoveWords * m + 1] + e;
        }
        copy_bits<E, V>(lane, from + lane.column, j >= 0 ? lane.fresh_steps.head : lane.steps.head,
                        destination);
    } else {
        const Positions at{c, plan};
        if (j >= 0) {
            turns ? insert_turned<E, V>(c, lane, plan, at, j) : insert_plain<E, V>(c, lane, plan, j);
            return;
        }
        const int m = move_of(c, plan, i), e = i - c.word[kMoveWords * m + 3];
        const int source = c.word[kMoveWords * m] + e, destination = c.word[kMoveWords * m + 1] + e;
        const int64_t delta = turns ? at.after(destination) - at.before(source) : 0;
        if (delta == 0 && source == destination) return;
        const char* from = lane.slot(source);
        char* to = lane.slot(destination);
        if (turns) {
            turn_entry<E, V>(c, lane, from, lane.steps.head, to, delta, 1.0f);
        } else {
            copy_entry<E, V>(lane, from, lane.steps.head, to);
        }
    }
}

}  // namespace mc::cuda

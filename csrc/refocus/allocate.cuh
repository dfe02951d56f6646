// Which gists open and which sibling groups close: the rule of mc_refocus_args, by one block of threads.
//
// The result is that of the allocator on the host (mc_runtime/focus/allocator.py) to the last bit of every weight: weights
// are fp64, computed by the same operations in the same order, each rounded once (no fused multiply-add), sums of costs
// run over the children in timeline order. Of candidates that are independent of each other the best closed set of so
// many nodes is simply the heaviest ones, and which these are does not depend on an order of summation.
#pragma once

#include "block.cuh"
#include "call.cuh"

namespace mc::cuda {

constexpr double kTie = 1e-9;      // TIE of the allocator
constexpr double kMostNats = 1e3;  // a score is clipped to it
constexpr int kOpens = 1, kCloses = 2;

// A score as the allocator takes it: finite, of bounded size.
MC_DEVICE double nats_of(float score) {
    const double x = score;
    if (x != x) return 0.0;
    return x > kMostNats ? kMostNats : x < -kMostNats ? -kMostNats : x;
}

MC_DEVICE int64_t span_of(const RefocusCall& c, int level) {
    int64_t span = 1;
    for (int i = 0; i < level; ++i) span *= c.block;
    return span;
}

// The end of a node's span as a share of the history.
MC_DEVICE double place_of(const RefocusCall& c, int level, int64_t index) {
    const int64_t tokens = read_constant<int64_t>(c.counts);
    const double share =
        __ddiv_rn(static_cast<double>(span_of(c, level)), static_cast<double>(tokens > 1 ? tokens : 1));
    return __dmul_rn(static_cast<double>(MC_FAULT(4) ? -index : index + 1), share);
}

MC_DEVICE double opening_weight(const RefocusCall& c, double gain, int level, int64_t index) {
    return __dadd_rn(__dadd_rn(gain, -c.min_gain), __dmul_rn(0.5 * kTie, place_of(c, level, index)));
}

MC_DEVICE double closing_weight(const RefocusCall& c, double cost, int level, int64_t index) {
    const double spare = __dadd_rn(cost, c.spare), size = spare < 0.0 ? -spare : spare;
    const double useless = __dadd_rn(2.0, __ddiv_rn(spare, __dadd_rn(1.0, size)));
    const double tie = __dmul_rn(kTie, __dadd_rn(useless, __dmul_rn(0.5, place_of(c, level, index))));
    return __dadd_rn(spare > 0.0 ? spare : 0.0, tie);
}

// Positive doubles are ordered as their bits are.
MC_DEVICE uint64_t key_of(double weight) {
    uint64_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits;
}

MC_DEVICE int64_t node_key(const RefocusCall& c, int level, int64_t index) {
    return index * span_of(c, level) * 64 + level;
}

// The first of the rows that the children of a gist have in the store, -1: not resident.
MC_DEVICE int store_row(const RefocusCall& c, int64_t key) {
    int low = 0, high = c.n_store;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (read_constant<int64_t>(c.store_keys + middle) < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == c.n_store || read_constant<int64_t>(c.store_keys + low) != key) return -1;
    return read_constant<int32_t>(c.store_rows + low);
}

// Changed in one of the cycles before `cycle` that it rests for. born: + the cycle in which its parent opened, - the one in
// which it took the place of its children.
MC_DEVICE bool rests(const RefocusCall& c, int64_t cycle, int64_t changed) {
    return changed > 0 && changed < cycle && cycle <= changed + c.cooldown;
}

// Asks for what the passes read to come to L2, all at once: in their rounds every load of a chain would wait for DRAM.
MC_DEVICE void ask_for_all(const RefocusCall& c, int n) {
    const auto ask = [](const void* array, int64_t bytes) {
        constexpr int64_t kLine = 128;
        for (int64_t at = threadIdx.x * kLine; at < bytes; at += blockDim.x * kLine) {
            prefetch(static_cast<const char*>(array) + at);
        }
    };
    ask(c.levels, 4 * static_cast<int64_t>(n));
    ask(c.born, 4 * static_cast<int64_t>(n));
    ask(c.index, 8 * static_cast<int64_t>(n));
    ask(c.slots, 8 * static_cast<int64_t>(n));
    ask(c.scores, 8 * static_cast<int64_t>(n));
    ask(c.store_keys, 8 * static_cast<int64_t>(c.n_store));
    ask(c.store_rows, 4 * static_cast<int64_t>(c.n_store));
}

// Shared out over the entries: which gists may open and want to. rows: the first row of the children in the store, or -1.
// Those that want to and are not resident are listed.
MC_DEVICE void find_openings(const RefocusCall& c, Rounds& rounds, int n, int64_t cycle, int& n_wanted) {
    const int size = static_cast<int>(blockDim.x);
    Three wanted{};
    for (int first = 0; first < n; first += size) {
        const int r = first + static_cast<int>(threadIdx.x);
        int row = -1;
        int64_t key = 0;
        bool wants = false;
        if (r < n) {  // first what is read anyway, at once: what is read in turn costs the round a latency each
            const int level = read<int32_t>(c.levels + r), born = read<int32_t>(c.born + r);
            const int64_t index = read<int64_t>(c.index + r), slot = read<int64_t>(c.slots + r);
            if (level > 0 && !rests(c, cycle, -static_cast<int64_t>(born))) {
                const double gain = nats_of(read_constant<float>(c.scores + 2 * slot));
                wants = opening_weight(c, gain, level, index) > 0.0;
                key = node_key(c, level, index);
                if (wants) row = store_row(c, key);
            }
            write(c.rows + r, row);
            write(c.actions + r, 0);
        }
        const int at = count_before(rounds, wants && row < 0, false, false, wanted).a;
        if (wants && row < 0 && at < c.n_wanted) write(c.wanted + at, key);
    }
    n_wanted = wanted.a;
}

// Whether a complete group of siblings begins at rank r whose parent may close, and what that costs.
MC_DEVICE bool may_close(const RefocusCall& c, int n, int64_t cycle, int r, int level, int64_t index, double& cost) {
    const int k = c.block;
    const int64_t parent = index / k;
    if (index % k != 0 || r + k > n || level >= c.n_levels) return false;
    // Read at once: one after the other, each would cost the round a latency.
    const int64_t stored = read_constant<int64_t>(c.counts + level + 1), last = read<int64_t>(c.index + r + k - 1);
    const int last_level = read<int32_t>(c.levels + r + k - 1), born = read<int32_t>(c.born + r);
    if (stored <= parent || last_level != level || last != index + k - 1 || rests(c, cycle, born)) return false;
    const int64_t span = span_of(c, level + 1), start = parent * span, stop = start + span;
    for (int i = 0; i < c.n_pinned; ++i) {
        const int64_t from = read_constant<int64_t>(c.pinned + 2 * i),
                      to = read_constant<int64_t>(c.pinned + 2 * i + 1);
        if (from < to && from < stop && to > start) return false;
    }
    cost = 0.0;
    const int leaves = level > 0 ? k : 1;  // a block of tokens is one leaf
    constexpr int kAtOnce = 8;
    for (int from = 0; from < leaves; from += kAtOnce) {
        int64_t slots[kAtOnce];
        float scores[kAtOnce];
        bool opens = false;  // a child asks to be opened
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const bool some = from + j < leaves;
            slots[j] = some ? read<int64_t>(c.slots + r + from + j) : 0;
            if (some && read<int32_t>(c.rows + r + from + j) >= 0) opens = true;
        }
        if (opens) return false;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            scores[j] = from + j < leaves ? read_constant<float>(c.scores + 2 * slots[j] + 1) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            if (from + j < leaves) cost = __dadd_rn(cost, nats_of(scores[j]));
        }
    }
    return true;
}

// The candidates in timeline order: key of the weight, and rank of the gist, or ~rank of a group's first entry.
MC_DEVICE Three list_candidates(const RefocusCall& c, Rounds& rounds, int n, int64_t cycle) {
    const int size = static_cast<int>(blockDim.x);
    Three found{};  // all, that open, that close
    for (int first = 0; first < n; first += size) {
        const int r = first + static_cast<int>(threadIdx.x);
        bool opens = false, closes = false;
        uint64_t key = 0;
        if (r < n) {
            const int level = read<int32_t>(c.levels + r);
            const int64_t index = read<int64_t>(c.index + r);
            double cost;
            opens = read<int32_t>(c.rows + r) >= 0;
            if (opens) {
                const double gain = nats_of(read_constant<float>(c.scores + 2 * read<int64_t>(c.slots + r)));
                key = key_of(opening_weight(c, gain, level, index));
            } else if (may_close(c, n, cycle, r, level, index, cost)) {
                closes = true;
                key = key_of(closing_weight(c, cost, level + 1, index / c.block));
            }
        }
        const int at = count_before(rounds, opens || closes, opens, closes, found).a;
        if (opens || closes) {
            write(c.keys + at, key);
            write(c.ranks + at, opens ? r : ~r);
        }
    }
    return found;
}

// Candidates on one side of it: heavier ones, of equal weights those later in the history.
struct Cut {
    uint64_t key;
    int rank;

    MC_DEVICE bool takes(uint64_t k, int r) const { return k > key || (k == key && r >= rank); }
};

// The cut that exactly `want` candidates of the kinds (kOpens | kCloses) are above, of `have` such. Bit by bit from the
// top, each with a count over all candidates; it ends as soon as the count is right.
MC_DEVICE Cut heaviest(const RefocusCall& c, Rounds& rounds, int n, int kinds, int want, int have) {
    if (want >= have) return {0, 0};
    if (want <= 0) return {~uint64_t{0}, 0};
    const int size = static_cast<int>(blockDim.x);
    const auto above = [&](const Cut& cut) {
        int count = 0;
        for (int i = static_cast<int>(threadIdx.x); i < n; i += size) {
            const int r = read<int32_t>(c.ranks + i);
            if (!(kinds & (r < 0 ? kCloses : kOpens))) continue;
            count += cut.takes(read<uint64_t>(c.keys + i), r < 0 ? ~r : r);
        }
        return block_sum(rounds, count);
    };
    Cut cut{0, 0};
    for (int bit = 62; bit >= 0; --bit) {
        const Cut next{cut.key | uint64_t{1} << bit, 0};
        const int count = above(next);
        if (count >= want) cut = next;
        if (count == want) return cut;
    }
    for (int bit = 30; bit >= 0; --bit) {  // several have that weight
        const Cut next{cut.key, cut.rank | 1 << bit};
        const int count = above(next);
        if (count >= want) cut = next;
        if (count == want) return cut;
    }
    return cut;
}

// What happens to the candidates: they open above one cut and close below the other.
struct Choice {
    Cut open, close;
    int opened, closed;
};

MC_DEVICE Choice choose(const RefocusCall& c, Rounds& rounds, int n, const Three& candidates) {
    const int64_t step = c.block - 1, slack = c.budget - n;
    const int64_t room = slack >= 0 ? slack / step : -((-slack + step - 1) / step);  // in nodes, rounded down
    const int opens = candidates.b, closes = candidates.c;
    const int units = static_cast<int>(between(0, room + closes, opens + closes));
    const Cut all = heaviest(c, rounds, candidates.a, kOpens | kCloses, units, candidates.a);
    int opened = 0, kept = 0;
    for (int i = static_cast<int>(threadIdx.x); i < candidates.a; i += static_cast<int>(blockDim.x)) {
        const int r = read<int32_t>(c.ranks + i);
        const bool above = all.takes(read<uint64_t>(c.keys + i), r < 0 ? ~r : r);
        opened += above && r >= 0;
        kept += above && r < 0;
    }
    opened = block_sum(rounds, opened);
    kept = block_sum(rounds, kept);
    const int64_t changes = opened + closes - kept;
    if (c.max_edits < 0 || changes <= c.max_edits) return {all, all, opened, closes - kept};
    // Forced ones happen and count; of the others the best openings, and the cheapest closings that make room for them.
    const int forced = static_cast<int>(between(0, -room, closes));
    const int64_t left = c.max_edits - forced, free = room > 0 ? room : 0;
    int more = 0, excess = 0;
    if (left > 0) {
        more = static_cast<int>(between(0, left <= free ? left : (left + free) / 2, opened));
        excess = static_cast<int>(between(0, more - free, more));
    }
    const Cut open = heaviest(c, rounds, candidates.a, kOpens, more, opens);
    const Cut close = heaviest(c, rounds, candidates.a, kCloses, closes - forced - excess, closes);
    return {open, close, more, forced + excess};
}

// actions [rank]: kOpens of a gist, kCloses of a group's first entry.
MC_DEVICE void mark(const RefocusCall& c, const Choice& choice, int n) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        const int given = read<int32_t>(c.ranks + i), r = given < 0 ? ~given : given;
        const bool closing = given < 0;
        if ((closing ? choice.close : choice.open).takes(read<uint64_t>(c.keys + i), r) == closing) continue;
        write(c.actions + r, closing ? kCloses : kOpens);
    }
}

}  // namespace mc::cuda

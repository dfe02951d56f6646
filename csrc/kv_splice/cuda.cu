// mc_kv_splice_cuda: checks, the plan as words, how columns and heads are dealt out to blocks, the launch. The kernels:
// kernel.cuh.
#include <algorithm>
#include <vector>

#include "check.h"
#include "kernel.cuh"
#include "launch.cuh"
#include "put_words.cuh"

namespace mc::cuda {
namespace {

// Blocks, of all kinds of lanes together, that keep all multiprocessors of today's largest devices busy, two each.
constexpr int64_t kWantedBlocks = 264;
// What DRAM delivers at once: a lane's share of an entry is not cut below it.
constexpr int64_t kLeastBytes = 64;

// The plans as 32-bit words: rows, headers, moves, inserted slots. See PlanWords.
struct PlanList {
    std::vector<int32_t> words;
    int32_t rows_at = -1, plans_at = 0;
    // Of any plan: entries that keys' lanes have, those that values' lanes have.
    int64_t most_listed = 0, most_moved = 0;
    bool ordered = false;
};

// Whether entries may move in any order: all sources lie beyond all that is written. So it is in the slots discipline, and
// in an ordered plan with nothing behind its edits.
bool any_order(const mc_kv_splice_args& a, int64_t plan) {
    const int64_t *low = a.offsets + 5 * plan, *high = low + 5;
    int64_t least_source = kMostInt, most_destination = -1;  // the latter of all that is written
    for (int64_t i = low[0]; i < high[0]; ++i) {
        const int64_t* s = a.segments + 3 * i;
        if (s[2] == 0) continue;
        least_source = std::min(least_source, s[0]);
        most_destination = std::max(most_destination, s[1] + s[2] - 1);
    }
    for (int64_t i = low[2]; i < high[2]; ++i) most_destination = std::max(most_destination, a.insert_slots[i]);
    return least_source > most_destination;
}

PlanList words_of(const mc_kv_splice_args& a, int64_t n_rows, bool explicit_positions) {
    PlanList out;
    std::vector<int32_t>& w = out.words;
    const int64_t* total = a.offsets + 5 * a.n_plans;
    narrow("offsets", std::max({total[0] + total[1], total[2], total[3], total[4]}) * kMoveWords);
    narrow("rows", n_rows);
    // Moves first, so that entry m of them begins at word kMoveWords * m.
    std::vector<int32_t> headers;
    for (int64_t p = 0; p < a.n_plans; ++p) {
        const int64_t *low = a.offsets + 5 * p, *high = low + 5;
        const int32_t first = static_cast<int32_t>(w.size()) / kMoveWords;
        int64_t entries[2] = {0, 0};
        int32_t n[2] = {0, 0};
        const int64_t* const lists[2] = {a.segments, a.stays};
        for (int list = 0; list < (explicit_positions ? 2 : 1); ++list) {
            for (int64_t i = low[list]; i < high[list]; ++i) {
                const int64_t* s = lists[list] + 3 * i;
                if (s[2] == 0) continue;
                w.insert(w.end(), {static_cast<int32_t>(s[0]), static_cast<int32_t>(s[1]), static_cast<int32_t>(s[2]),
                                   static_cast<int32_t>(entries[0] + entries[1])});
                entries[list] += s[2];
                ++n[list];
            }
        }
        narrow("segments", entries[0] + entries[1] + (high[2] - low[2]));
        headers.insert(headers.end(),
                       {first, n[0], n[1], static_cast<int32_t>(entries[0]), static_cast<int32_t>(entries[1]),
                        static_cast<int32_t>(low[2]), static_cast<int32_t>(high[2] - low[2]),
                        static_cast<int32_t>(low[3]), static_cast<int32_t>(low[4])});
        out.ordered = out.ordered || !any_order(a, p);
        out.most_listed = std::max(out.most_listed, entries[0] + entries[1] + (high[2] - low[2]));
        out.most_moved = std::max(out.most_moved, entries[0] + (high[2] - low[2]));
    }
    const int32_t inserts_at = static_cast<int32_t>(w.size());
    for (int64_t i = 0; i < total[2]; ++i) w.push_back(static_cast<int32_t>(a.insert_slots[i]));
    for (int64_t p = 0; p < a.n_plans; ++p) headers[static_cast<size_t>(kPlanWords * p + 5)] += inserts_at;
    out.plans_at = static_cast<int32_t>(w.size());
    w.insert(w.end(), headers.begin(), headers.end());
    if (a.rows) {
        out.rows_at = static_cast<int32_t>(w.size());
        for (int64_t r = 0; r < n_rows; ++r) w.push_back(static_cast<int32_t>(a.rows[r]));
    }
    return out;
}

// Heads and columns of a lane: as many as leave `wanted` blocks. Columns are cut where entries (ordered: 0) are no tiles.
Split split(int64_t rows, int64_t heads, int64_t items, int64_t item_bytes, int64_t heads_wanted, int threads,
            int64_t entries, int64_t wanted) {
    Split s{};
    const auto over = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    int64_t columns = std::max<int64_t>(std::min<int64_t>(items, threads), 1);
    const int64_t tiles = std::max<int64_t>(over(entries, threads / columns), 1);
    int64_t h = std::max<int64_t>(std::min(heads, heads_wanted), 1);
    while (h > 1 && rows * over(heads, h) * over(items, columns) * tiles < wanted) h = (h + 1) / 2;
    while (entries == 0 && columns * item_bytes > kLeastBytes &&
           rows * over(heads, h) * over(items, columns) < wanted) {
        columns = (columns + 1) / 2;
    }
    s.items = static_cast<int32_t>(items);
    s.columns = divider(columns);
    s.parts = divider(std::max<int64_t>(over(items, columns), 1));
    s.heads = static_cast<int32_t>(h);
    s.tiles = divider(narrow("segments", tiles));
    s.groups = divider(over(heads, h));
    s.group = static_cast<int32_t>(threads / columns);
    return s;
}

template <class E>
void launch_with(bool packs, bool ordered, int64_t blocks, int threads, void* stream, const SpliceCall& c) {
    constexpr int V = 16 / sizeof(typename E::Bits);
    const auto kernel = ordered     ? packs ? splice_ordered<E, V> : splice_ordered<E, 1>
                        : c.rotates ? packs ? splice_slots<E, V, true> : splice_slots<E, 1, true>
                        : packs     ? splice_slots<E, V, false>
                                    : splice_slots<E, 1, false>;
    launch(ordered ? "kv_splice (ordered)" : "kv_splice (slots)", kernel, blocks, threads, 0, stream, c);
}

bool has_explicit_positions(const mc_kv_splice_args& a) {
    return a.inv_freq_rows != 0 && (a.positions || a.new_positions);
}

void watch(Watched& watched, const mc_kv_splice_args& a, const Cache& c) {
    const int64_t* total = a.offsets + 5 * a.n_plans;
    watched.view("k", a.k, true);
    watched.view("v", a.v, true);
    watched.view("k_new", a.k_new, false);
    watched.view("v_new", a.v_new, false);
    if (c.table) watched.view("table", a.table, false);
    watched.array("positions", a.positions, 8 * total[3], false);
    watched.array("new_positions", a.new_positions, 8 * total[4], false);
    watched.array("inv_freq", a.inv_freq, 8 * a.inv_freq_rows * a.half, false);
}

void set_memory(SpliceCall& c, const mc_kv_splice_args& a, const Cache& cache) {
    const auto steps = [](const int64_t* s) { return CacheSteps{s[0], s[1], s[2], s[3]}; };
    const auto fresh = [&](const mc_tensor& x) {
        return FreshSteps{x.stride[0] * cache.bytes, x.stride[1] * cache.bytes, x.stride[2] * cache.bytes};
    };
    c.k = cache.k;
    c.v = cache.v;
    c.k_new = static_cast<const char*>(a.k_new.data);
    c.v_new = static_cast<const char*>(a.v_new.data);
    c.k_steps = steps(cache.k_stride);
    c.v_steps = steps(cache.v_stride);
    c.k_new_steps = fresh(a.k_new);
    c.v_new_steps = fresh(a.v_new);
    if (cache.table) {
        const int64_t bytes = a.table.dtype == MC_I32 ? 4 : 8;
        c.table = static_cast<const char*>(a.table.data);
        c.table_b = a.table.stride[0] * bytes;
        c.table_page = a.table.stride[1] * bytes;
        c.wide_table = bytes == 8;
    }
    c.page = divider(std::max<int64_t>(narrow("k", cache.block), 1));
    c.n_rows = narrow("k", cache.layers * cache.batch);
    c.batch = divider(std::max<int64_t>(narrow("k", cache.batch), 1));
    c.heads = narrow("k", cache.heads);
    c.half = a.inv_freq_rows ? narrow("half", a.half) : 0;
    c.rotates = a.inv_freq_rows != 0;
    c.interleaved = a.interleaved != 0;
    c.scaling = static_cast<float>(a.attention_scaling);
    c.inv_freq = a.inv_freq;
    c.inv_freq_row = a.inv_freq_rows > 1 ? a.half : 0;
}

void kv_splice(const mc_kv_splice_args& a, void* workspace, int64_t workspace_bytes, void* stream) {
    const Cache cache = check_kv_splice(a, false);
    narrow("k", cache.slots);
    SpliceCall c{};
    set_memory(c, a, cache);
    c.explicit_positions = has_explicit_positions(a);
    const PlanList w = words_of(a, c.n_rows, c.explicit_positions);
    const int64_t needed = words_workspace(w.words.size());
    check_workspace(workspace, workspace_bytes, needed);
    if (w.most_listed == 0 || c.n_rows == 0 || c.heads == 0 || cache.dim == 0) return;
    if (c.explicit_positions) {
        c.positions = a.positions;
        c.new_positions = a.new_positions;
    }

    const int pack = static_cast<int>(16 / cache.bytes), threads = block_threads(kThreads);
    const bool packs = cache.dim % pack == 0 && c.half % pack == 0 && rows_on_16(a.k) && rows_on_16(a.v) &&
                       rows_on_16(a.k_new) && rows_on_16(a.v_new);
    const int64_t v = packs ? pack : 1, item = v * cache.bytes;
    const int64_t heads = w.ordered ? 1 : c.rotates ? c.heads : std::min(c.heads, kSlotItems);
    const int64_t items[kKinds] = {c.half / v, (cache.dim - 2 * c.half) / v, cache.dim / v};
    // An ordered plan has no tiles, which entries would make. Where nothing is listed for a kind its blocks end at once.
    const int64_t moved = w.ordered ? 0 : std::max<int64_t>(w.most_moved, 1), listed = w.ordered ? 0 : w.most_listed;
    // Small edits are over before a block's start is: what they need is many loads at once, twice the blocks.
    const int64_t wanted = (w.ordered ? 1 : 2) * kWantedBlocks / (items[kTurn] && items[kKeyRest] ? 3 : 2);
    int64_t blocks = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
        const bool turns = kind == kTurn;
        Split& s = c.split[kind];
        s = split(c.n_rows, c.heads, items[kind], turns ? 2 * item : item,
                  turns && c.explicit_positions ? c.heads : heads, threads, turns ? listed : moved, wanted);
        const int64_t lanes = static_cast<int64_t>(c.n_rows) * s.groups.by * s.parts.by;
        const int64_t own = items[kind] == 0 ? 0 : lanes * s.tiles.by;
        s.blocks = static_cast<int32_t>(std::min(own, kMostBlocks));
        blocks += own;
    }
    if (blocks == 0) return;
    if (blocks > kMostBlocks) {
        invalid("k: expected a splice of at most " + std::to_string(kMostBlocks) + " blocks, got " +
                std::to_string(blocks));
    }

    Watched watched;
    watch(watched, a, cache);
    c.rows_at = w.rows_at;
    c.plans_at = w.plans_at;
    watched.shared_array("workspace", workspace, needed);
    give_words(c.word, w.words, workspace, stream);
    switch (cache.dtype) {
        case MC_F32:
            return launch_with<Float>(packs, w.ordered, blocks, threads, stream, c);
        case MC_F16:
            return launch_with<Half>(packs, w.ordered, blocks, threads, stream, c);
        default:
            return launch_with<Bfloat>(packs, w.ordered, blocks, threads, stream, c);
    }
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_kv_splice_cuda_workspace(const mc_kv_splice_args* args, int64_t* bytes) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        const mc::Cache c = mc::check_kv_splice(*args, false);
        *bytes = mc::cuda::words_workspace(
            mc::cuda::words_of(*args, c.layers * c.batch, mc::cuda::has_explicit_positions(*args)).words.size());
    });
}

extern "C" int32_t mc_kv_splice_cuda(const mc_kv_splice_args* args, void* workspace, int64_t workspace_bytes,
                                     void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::kv_splice(*args, workspace, workspace_bytes, stream);
    });
}

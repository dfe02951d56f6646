// The plan of a refocus, applied to the keys and values of one lane: (layer, KV head) of the cache, by one block of threads.
#pragma once

#include "../gist_pool/pool.cuh"
#include "call.cuh"

namespace mc::cuda {

constexpr int kMostWeights = 4;

struct ApplyCall {
    PoolWeights weights[kMostWeights];  // of the gists of levels 1, 2, ...; the last one's serve those above too
    char *k, *v;
    const char *k_store, *v_store;
    int64_t k_steps[3], v_steps[3], k_store_steps[3], v_store_steps[3];  // bytes: layer, head, slot or row
    char* kept;                                                          // [lanes, groups, 2D] in the cache's dtype
    const int64_t* state;
    const int32_t *inserted, *moves, *children, *pooled_levels;
    int32_t n_weights, heads, groups;
};

// Packs of a key and of a value, side by side: p < half is the key's.
template <class P>
struct Rows {
    const char *k, *v;
    int64_t k_step, v_step;
    int half;

    MC_DEVICE const char* at(int64_t row, int p) const {
        return p < half ? k + row * k_step + p * sizeof(P) : v + row * v_step + (p - half) * sizeof(P);
    }
};

// Gists of all closed groups, kept aside: nothing of the cache is written before all of its children have been read.
// Groups of one level that follow each other go through together, up to kRows of them.
template <class E, int V>
MC_DEVICE void pool_groups(const ApplyCall& c, const Rows<Pack<typename E::Bits, V>>& lane, int64_t layer, int64_t head,
                           char* kept, int closed) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    const PoolWeights& any = c.weights[0];
    const PoolMemory memory = pool_memory(shared, any, static_cast<int>(blockDim.x) / kWarp, V);
    const int width = 2 * any.dims, k = any.count;
    const auto weights_of = [&](int group) { return min(read<int32_t>(c.pooled_levels + group), c.n_weights) - 1; };
    for (int first = 0, n; first < closed; first += n) {
        const int which = weights_of(first);
        for (n = 1; n < kRows && first + n < closed && weights_of(first + n) == which;) ++n;
        pool_pairs<E, V>(
            Head(c.weights[which], layer, head), first, n, memory,
            [&](int group, int j) {
                const int slot = read<int32_t>(c.children + group * k + j);
                return EntryAt{lane.at(slot, 0), lane.at(slot, lane.half)};
            },
            [&](int r, int column, float value) {
                using Bits = typename E::Bits;
                const int64_t i = static_cast<int64_t>(first + r) * width + column;
                write(kept + i * static_cast<int64_t>(sizeof(Bits)), E::narrow(value));
            });
    }
}

// One block of threads a lane, and no other touches its part of the cache. Once the gists are pooled (pool_pairs ends with a
// barrier) every entry that is written lies below the new length, every entry that moves beyond it, and no two go to the
// same slot: they need no order.
template <class E, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) refocus_apply(const __grid_constant__ ApplyCall c) {
    using P = Pack<typename E::Bits, V>;
    const int64_t block = blockIdx.x, layer = block / c.heads, head = block % c.heads;
    const int width = 2 * c.weights[0].dims, packs = width / V, half = packs / 2;
    const auto rows = [&](const char* k, const char* v, const int64_t* k_steps, const int64_t* v_steps) {
        return Rows<P>{k + layer * k_steps[0] + head * k_steps[1], v + layer * v_steps[0] + head * v_steps[1],
                       k_steps[2], v_steps[2], half};
    };
    const Rows<P> lane = rows(c.k, c.v, c.k_steps, c.v_steps);
    const Rows<P> store = rows(c.k_store, c.v_store, c.k_store_steps, c.v_store_steps);
    char* const kept = c.kept + block * c.groups * width * static_cast<int64_t>(sizeof(typename E::Bits));
    const int closed = static_cast<int>(read<int64_t>(c.state + kClosed));
    const int moved = static_cast<int>(read<int64_t>(c.state + kMoved));
    const int all = moved + static_cast<int>(read<int64_t>(c.state + kInserted));
    pool_groups<E, V>(c, lane, layer, head, kept, closed);

    const int columns = min(packs, static_cast<int>(blockDim.x)), group = static_cast<int>(blockDim.x) / columns;
    const int mine = static_cast<int>(threadIdx.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
    if (mine >= group) return;
    for (int p = column; p < packs; p += columns) {
        for (int done = 0; done < all; done += kEntries * group) {
            P in[kEntries];
            int slots[kEntries];
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                const int e = done + i * group + mine;
                if (e >= all) continue;
                const int32_t* const pair = e < moved ? c.moves + 2 * e : c.inserted + 2 * (e - moved);
                const int first = read<int32_t>(pair), second = read<int32_t>(pair + 1);
                slots[i] = e < moved ? second : first;
                const char* from = e < moved ? lane.at(first, p)
                                   : second >= 0
                                       ? store.at(second, p)
                                       : kept + (int64_t{-1 - second} * packs + p) * static_cast<int64_t>(sizeof(P));
                in[i] = read<P>(from);
            }
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                if (done + i * group + mine >= all) continue;
                write(const_cast<char*>(lane.at(slots[i] + (MC_FAULT(3) ? 1 : 0), p)), in[i]);
            }
        }
    }
}

}  // namespace mc::cuda

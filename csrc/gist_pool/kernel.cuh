// gist_pool and collapse on a GPU. The contract: mc_kernels.h.
//
// Floor. A block of K entries is read from memory once, K * 4 * D elements with key and value, M once a row of blocks that
// share it: for one block a head M is most of it (Llama-3-8B in bf16: 34 MB of M and 4 MB of entries, 8 us at 4.8 TB/s),
// for 256 blocks the entries are (1.1 GB, 0.22 ms). The product with M is 4 * D * D fused operations a gist, 0.14 ms of a
// H200's fp32 rate in that case: below the traffic, and it overlaps with other blocks' reads. Eight blocks collapsed at
// once: 34 MB of entries and 34 MB of M, 14 us, and what moves.
//
// gist_pool. A block of threads has kRows (block, gist) pairs of one row and head; M comes from memory for the first of a
// head's and from the second-level cache for the others. A warp reads the entries of its pair twice, the second time
// from the caches (16 KB a warp).
//
// collapse. A block of threads has a lane, (layer, sequence, head), and no other block touches its part of the cache, so
// blocks need no order. Within it: all gists first, kept aside (in shared memory, or in the workspace where they are
// many); a barrier; segments one after the other; a barrier; the gists into their slots. A segment moves in tiles in the
// direction of memmove, so a tile's destination holds sources of this and of earlier tiles only; between the loads of a
// tile by all threads and its stores stands a barrier, and another after the segment, before the next one's loads.
#pragma once

#include "pool.cuh"
#include "words.cuh"

namespace mc::cuda {

struct PoolCall {
    PoolWeights weights;
    const char *k, *v;
    char *k_gist, *v_gist;
    int64_t k_steps[4], v_steps[4], k_out[4], v_out[4];  // bytes: row, head, block, entry or gist
    int32_t rows_per_layer, heads, pairs, groups;        // pairs of a row and head; groups of kRows of them
};

template <class E, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) gist_pool(const __grid_constant__ PoolCall c) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    const PoolMemory memory = pool_memory(shared, c.weights, static_cast<int>(blockDim.x) / kWarp, V);
    const int group = static_cast<int>(blockIdx.x) % c.groups, rest = static_cast<int>(blockIdx.x) / c.groups;
    const int64_t head = rest % c.heads, row = rest / c.heads;
    const int first = group * kRows, n = min(kRows, c.pairs - first), dims = c.weights.dims;
    const char *k = c.k + row * c.k_steps[0] + head * c.k_steps[1], *v = c.v + row * c.v_steps[0] + head * c.v_steps[1];
    char* const k_out = c.k_gist + row * c.k_out[0] + head * c.k_out[1];
    char* const v_out = c.v_gist + row * c.v_out[0] + head * c.v_out[1];
    pool_pairs<E, V>(
        Head(c.weights, row / c.rows_per_layer, head), first, n, memory,
        [&](int64_t block, int64_t j) {
            return EntryAt{k + block * c.k_steps[2] + j * c.k_steps[3], v + block * c.v_steps[2] + j * c.v_steps[3]};
        },
        [&](int r, int column, float x) {
            const int64_t block = (first + r) / c.weights.gists, gist = (first + r) % c.weights.gists;
            constexpr int kBytes = sizeof(typename E::Bits);
            char* const to = column < dims ? k_out + block * c.k_out[2] + gist * c.k_out[3] + column * kBytes
                                           : v_out + block * c.v_out[2] + gist * c.v_out[3] + (column - dims) * kBytes;
            write(to, E::narrow(x));
        });
}

struct CollapseCall {
    PoolWeights weights;
    char *k, *v;
    int64_t k_steps[4], v_steps[4];  // bytes: layer, sequence, head, slot
    char* kept;                      // [lanes, pairs, 2D] in the cache's dtype, or nullptr: shared memory
    int32_t batch, heads, pairs, n_segments;
    int32_t children_at, gist_slots_at, segments_at;  // in words
    Words word;
};

// Packs of a key and a value that lie side by side in a lane: p < half is the key's.
template <class P>
struct CacheLane {
    char *k, *v;
    int64_t k_slot, v_slot;
    int half;

    MC_DEVICE char* at(int64_t slot, int p) const {
        return p < half ? k + slot * k_slot + p * sizeof(P) : v + slot * v_slot + (p - half) * sizeof(P);
    }
};

// Segments in their order, for packs first .. first + columns - 1 of every entry.
template <class P>
MC_DEVICE void move_segments(const CollapseCall& c, const CacheLane<P>& lane, int first, int columns) {
    const int thread = static_cast<int>(threadIdx.x), group = static_cast<int>(blockDim.x) / columns;
    const int mine = thread / columns, p = first + thread % columns;
    const bool active = mine < group && p < 2 * lane.half;
    for (int s = 0; s < c.n_segments; ++s) {
        const int at = c.segments_at + 3 * s, source = c.word[at], destination = c.word[at + 1], count = c.word[at + 2];
        const int tile = kEntries * group;
        for (int done = 0; done < count; done += tile) {
            const int start = destination <= source ? done : count - done - tile;
            P in[kEntries];
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                const int e = start + i * group + mine;
                if (active && e >= 0 && e < count) in[i] = read<P>(lane.at(source + e, p));
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                const int e = start + i * group + mine;
                if (active && e >= 0 && e < count) write(lane.at(destination + e, p), in[i]);
            }
        }
        if (!MC_FAULT(1)) __syncthreads();
    }
}

template <class E, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) collapse(const __grid_constant__ CollapseCall c) {
    using Bits = typename E::Bits;
    using P = Pack<Bits, V>;
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    const PoolWeights& x = c.weights;
    const PoolMemory memory = pool_memory(shared, x, static_cast<int>(blockDim.x) / kWarp, V);
    const int width = 2 * x.dims, packs = width / V;
    const Span<Bits> near = shared.take<Bits>(c.kept ? 0 : static_cast<int64_t>(c.pairs) * width);
    const int64_t block = blockIdx.x, b = block % c.batch, head = block / c.batch % c.heads;
    const int64_t layer = block / c.batch / c.heads;
    const CacheLane<P> lane{c.k + layer * c.k_steps[0] + b * c.k_steps[1] + head * c.k_steps[2],
                            c.v + layer * c.v_steps[0] + b * c.v_steps[1] + head * c.v_steps[2], c.k_steps[3],
                            c.v_steps[3], packs / 2};
    char* const far = c.kept + (c.kept ? block * c.pairs * width * static_cast<int64_t>(sizeof(Bits)) : 0);
    for (int first = 0; first < c.pairs; first += kRows) {
        pool_pairs<E, V>(
            Head(x, layer, head), first, min(kRows, c.pairs - first), memory,
            [&](int i, int j) {
                const int slot = c.word[c.children_at + i * x.count + j];
                return EntryAt{lane.at(slot, 0), lane.at(slot, lane.half)};
            },
            [&](int r, int column, float value) {
                const int64_t i = static_cast<int64_t>(first + r) * width + column;
                if (c.kept) {
                    write(far + i * static_cast<int64_t>(sizeof(Bits)), E::narrow(value));
                } else {
                    near[i] = E::narrow(value);
                }
            });
    }
    // add_residual has ended with a barrier: all that is pooled has been read, and what is kept is there for all.
    const int columns = min(packs, static_cast<int>(blockDim.x));
    for (int first = 0; first < packs; first += columns) move_segments<P>(c, lane, first, columns);
    for (int i = static_cast<int>(threadIdx.x); i < c.pairs * width; i += static_cast<int>(blockDim.x)) {
        const int64_t slot = c.word[c.gist_slots_at + i / width], column = i % width;
        char* const entry = lane.at(slot, column < x.dims ? 0 : lane.half);
        write(entry + (column - (column < x.dims ? 0 : x.dims)) * static_cast<int64_t>(sizeof(Bits)),
              c.kept ? read<Bits>(far + i * static_cast<int64_t>(sizeof(Bits))) : near[i]);
    }
}

}  // namespace mc::cuda

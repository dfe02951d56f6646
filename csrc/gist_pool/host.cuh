// The host's side of what pools: weights as kernels take them, shared memory, the dtype switch. For gist_pool and refocus.
#pragma once

#include <algorithm>

#include "check.h"
#include "host_checks.h"
#include "launch.cuh"
#include "pool.cuh"

namespace mc::cuda {

// What every architecture gives a block. Gists are kept in it up to kMostKept: two blocks fit a multiprocessor.
constexpr int64_t kMostShared = 160 << 10, kMostKept = 32 << 10;

inline PoolWeights weights_of(const Pooling& x, const mc_gist_pool_weights& given, bool packs) {
    PoolWeights w{};
    w.w = x.w;
    w.b = x.b;
    w.m = x.m;
    w.c = x.c;
    std::copy_n(x.w_stride, 3, w.w_steps);
    std::copy_n(x.b_stride, 3, w.b_steps);
    std::copy_n(x.m_stride, 3, w.m_steps);
    std::copy_n(x.c_stride, 2, w.c_steps);
    w.dtype = x.weights_dtype;
    w.gists = narrow("weights.w", x.gists);
    w.count = narrow("weights.b", x.count);
    w.dims = narrow("k", x.dims);
    w.packed = packs && x.weights_dtype == x.dtype && rows_on_16(given.w) && rows_on_16(given.m);
    return w;
}

inline int64_t shared_for(const PoolWeights& w, int threads, int pack, int64_t kept_bytes) {
    const int64_t warps = threads / kWarp;
    const int64_t bytes = shared_bytes_of<float>(warps * w.count) +
                          shared_bytes_of<float>(int64_t{kRows} * 2 * w.dims) +
                          shared_bytes_of<float>(warps * kWarp * pack) + shared_bytes_of<char>(kept_bytes);
    if (bytes > kMostShared) {
        invalid("k: expected K and D for which a block of threads needs at most " + std::to_string(kMostShared) +
                " bytes of shared memory, got " + std::to_string(bytes) + " with K = " + std::to_string(w.count) +
                ", D = " + std::to_string(w.dims));
    }
    return bytes;
}

inline int32_t blocks_of(int64_t n) {
    if (n > kMostBlocks) {
        invalid("k: expected at most " + std::to_string(kMostBlocks) + " blocks of threads, got " + std::to_string(n));
    }
    return static_cast<int32_t>(n);
}

inline void watch_weights(Watched& watched, const mc_gist_pool_weights& x) {
    watched.view("weights.w", x.w, false);
    watched.view("weights.b", x.b, false);
    watched.view("weights.m", x.m, false);
    watched.view("weights.c", x.c, false);
}

// body(element type, elements of a pack)
template <class Body>
void with_type(int dtype, bool packs, Body&& body) {
    if (dtype == MC_F32) {
        packs ? body(Float{}, std::integral_constant<int, 4>{}) : body(Float{}, std::integral_constant<int, 1>{});
    } else if (dtype == MC_F16) {
        packs ? body(Half{}, std::integral_constant<int, 8>{}) : body(Half{}, std::integral_constant<int, 1>{});
    } else {
        packs ? body(Bfloat{}, std::integral_constant<int, 8>{}) : body(Bfloat{}, std::integral_constant<int, 1>{});
    }
}

inline int threads_of_a_block() { return std::max(block_threads(kPoolThreads) / kWarp, 1) * kWarp; }

inline bool packs_of(const Pooling& x, const mc_tensor& k, const mc_tensor& v) {
    return x.row_bytes() % 16 == 0 && rows_on_16(k) && rows_on_16(v);
}

}  // namespace mc::cuda

// What both pooling kernels are built from: gists of up to kRows (block, gist) pairs of one row and head, by one block of
// threads. A warp pools a pair at a time; the residual's product is shared out over all warps.
#pragma once

#include "values.cuh"

namespace mc::cuda {

constexpr int kPoolThreads = 256, kRows = 8, kEntries = 4;
constexpr float kPoolEps = 1e-12f;  // mc_kernels/gist_pool/ref.py

// The weights of all layers and heads. Steps in bytes.
struct PoolWeights {
    const char *w, *b, *m, *c;
    int64_t w_steps[3], b_steps[3], m_steps[3], c_steps[2];
    int32_t dtype, gists, count, dims;
    bool packed;  // of the data's dtype, rows on 16 bytes: read as the data is
};

// Those of one layer and head.
struct Head {
    const PoolWeights& all;
    const char *w, *b, *m, *c;

    MC_DEVICE Head(const PoolWeights& x, int64_t layer, int64_t head)
        : all(x),
          w(x.w + layer * x.w_steps[0] + head * x.w_steps[1]),
          b(x.b + layer * x.b_steps[0] + head * x.b_steps[1]),
          m(x.m + layer * x.m_steps[0] + head * x.m_steps[1]),
          c(x.c + layer * x.c_steps[0] + head * x.c_steps[1]) {}

    MC_DEVICE int width() const { return 2 * all.dims; }
};

// Shared memory of a block.
struct PoolMemory {
    Span<float> scores;  // [warps, count]
    Span<float> y;       // [kRows, 2D]
    Span<float> parts;   // [warps, kWarp * V]: a column chunk's partial sums
};

MC_DEVICE PoolMemory pool_memory(SharedMemory& shared, const PoolWeights& w, int warps, int pack) {
    return {shared.take<float>(static_cast<int64_t>(warps) * w.count), shared.take<float>(kRows * 2 * w.dims),
            shared.take<float>(static_cast<int64_t>(warps) * kWarp * pack)};
}

// y[r] of the pair (block, gist), by one warp. entry(j): the addresses of entry j's key and value.
template <class E, int V, class Entry>
MC_DEVICE void pool_row(const Head& head, int gist, Span<float> scores, Span<float> y, Entry&& entry) {
    using P = Pack<typename E::Bits, V>;
    const PoolWeights& x = head.all;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, half = x.dims / V, packs = 2 * half;
    const char *w = head.w + gist * x.w_steps[2], *b = head.b + gist * x.b_steps[2];
    const auto load = [&](int j, int p) {
        const auto at = entry(j);
        return read<P>(p < half ? at.key + p * sizeof(P) : at.value + (p - half) * sizeof(P));
    };
    for (int first = 0; first < x.count; first += kEntries) {
        float dot[kEntries] = {}, square[kEntries] = {};
        for (int p = lane; p < packs; p += kWarp) {
            P in[kEntries];
            float weight[V], value[V];
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                if (first + i < x.count) in[i] = load(first + i, p);
            }
            if (x.packed) {
                widen<E, V>(read_constant<P>(w + p * sizeof(P)), weight);
            } else {
#pragma unroll
                for (int i = 0; i < V; ++i) weight[i] = weight_at(w, x.dtype, p * V + i);
            }
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                if (first + i >= x.count) break;
                widen<E, V>(in[i], value);
#pragma unroll
                for (int d = 0; d < V; ++d) {
                    dot[i] += value[d] * weight[d];
                    square[i] += value[d] * value[d];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const float product = warp_sum(dot[i]), mean = warp_sum(square[i]) / static_cast<float>(2 * x.dims);
            if (lane != 0 || first + i >= x.count) continue;
            // Rounded correctly: there are only `count` of them.
            const float logit = __fdiv_rn(product, __fsqrt_rn(mean + kPoolEps));
            scores[first + i] = logit + weight_at(b, x.dtype, first + i);
        }
    }
    __syncwarp();
    float most = -INFINITY, total = 0.0f;
    for (int j = lane; j < x.count; j += kWarp) most = fmaxf(most, scores[j]);
    most = warp_max(most);
    for (int j = lane; j < x.count; j += kWarp) {
        const float s = scores[j], p = s == -INFINITY ? 0.0f : expf(s - most);  // a NaN stays
        scores[j] = p;
        total += p;
    }
    const float scale = 1.0f / warp_sum(total);
    __syncwarp();
    for (int p = lane; p < packs; p += kWarp) {  // the second read comes from the caches
        float sum[V] = {}, value[V];
#pragma unroll 4
        for (int j = 0; j < x.count; ++j) {
            widen<E, V>(load(j, p), value);
#pragma unroll
            for (int d = 0; d < V; ++d) sum[d] += scores[j] * value[d];
        }
#pragma unroll
        for (int d = 0; d < V; ++d) y[p * V + d] = sum[d] * scale;
    }
    __syncwarp();  // the next row's scores overwrite these
}

// emit(r, column, y + y M + c) for rows [0, n). A warp has every so-many-th row of M, a lane W columns; what the warps
// have is added up in shared memory. Ends with a barrier where n > 0.
template <int W, class Load, class Emit>
MC_DEVICE void add_residual(const Head& head, int n, const PoolMemory& memory, Load&& load, Emit&& emit) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp, width = head.width();
    constexpr int kChunk = kWarp * W;
    for (int first = 0; first < width; first += kChunk) {
        const int column = first + lane * W;
        float sum[kRows][W] = {};
        if (column < width) {
#pragma unroll 2
            for (int d = warp; d < width; d += warps) {
                float row[W];
                load(d, column, row);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float factor = memory.y[r * width + d];
#pragma unroll
                    for (int i = 0; i < W; ++i) sum[r][i] += factor * row[i];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= n) break;
#pragma unroll
            for (int i = 0; i < W; ++i) memory.parts[warp * kChunk + lane * W + i] = sum[r][i];
            __syncthreads();
            for (int i = thread; i < kChunk && first + i < width; i += threads) {
                float out = 0.0f;
                for (int part = 0; part < warps; ++part) out += memory.parts[part * kChunk + i];
                const int at = first + i;
                emit(r, at, memory.y[r * width + at] + out + weight_at(head.c, head.all.dtype, at));
            }
            __syncthreads();
        }
    }
}

// Gists of the pairs first .. first + n - 1, n <= kRows, counted gist within block. entry(block, j): addresses.
template <class E, int V, class Entry, class Emit>
MC_DEVICE void pool_pairs(const Head& head, int first, int n, const PoolMemory& memory, Entry&& entry, Emit&& emit) {
    const PoolWeights& x = head.all;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    const int width = head.width();
    for (int r = warp; r < kRows; r += warps) {
        const Span<float> y = memory.y.part(r * width, width);
        if (r < n) {
            const int pair = first + r, block = pair / x.gists;
            pool_row<E, V>(head, pair % x.gists, memory.scores.part(warp * x.count, x.count), y,
                           [&](int j) { return entry(block, j); });
        } else {  // the product has kRows rows whatever n is
            for (int d = static_cast<int>(threadIdx.x) % kWarp; d < width; d += kWarp) y[d] = 0.0f;
        }
    }
    __syncthreads();
    if (x.packed) {
        add_residual<V>(
            head, n, memory,
            [&](int d, int column, float (&out)[V]) {
                using P = Pack<typename E::Bits, V>;
                widen<E, V>(read_constant<P>(head.m + d * x.m_steps[2] + column * sizeof(typename E::Bits)), out);
            },
            emit);
    } else {
        add_residual<1>(
            head, n, memory,
            [&](int d, int column, float (&out)[1]) { out[0] = weight_at(head.m + d * x.m_steps[2], x.dtype, column); },
            emit);
    }
}

struct EntryAt {
    const char *key, *value;
};

}  // namespace mc::cuda

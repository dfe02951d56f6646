// lens_score on a GPU: one persistent launch of a block a multiprocessor, whose steps are separated by barriers of the
// grid. The contract: mc_kernels.h.
//
// Floor. Entries are read twice a read pass (their logits, then the weighted sums, whose weights need all logits'
// maximum) and once for the scores: N * E * sizeof(dtype) * (2 P + 1) bytes over the bandwidth, 201 MB or 85 us at 2.37
// TB/s for N = 8,192, E = 4,096 in bf16, less what the second-level cache keeps (50 MB of 67). Products: 2 * N * E *
// (2 H Q P + H Q + J) operations, 13.4 G, 17 us at 800 TFLOP/s of tensor cores. Weights (19 MB in bf16 at d = f = 512)
// 8 us, asked for ahead. Seven barriers a pass and two besides, about 1.5 us each. Steps of the queries' side run once:
// what they cost is latency, of loads and of their own instructions, so loads are wide and together, loops are not
// unrolled.
//
// Steps, between barriers of the grid:
//   project_queries | P times: absorb | logits: p relative to its tile's maximum | weighted sums, each tile's products
//   times its share, which is relative to the maximum over all tiles | attended values | z += read_out | swiglu |
//   z += mlp_down | then absorb, values, direct rows | scores
//
// A block owns what it writes in a step, and reads in a step only what earlier steps wrote; sums of parts are taken in
// one order, so results repeat to the bit whatever the order of blocks.
#pragma once

#include "net.cuh"
#include "product.cuh"
#include "scores.cuh"

namespace mc::cuda {

// p[v, n] = exp(a[v, n] - tops[v, tile]) / rms(x_n), totals[v, tile] = the sum of the exponentials. Grid: tiles.
template <class E>
MC_CALLED void logits(const LensCall& c) {
    const LensMemory<E> memory = lens_memory<E>(c);
    using Bits = typename E::Bits;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, count = c.vectors_n();
    for (int tile = static_cast<int>(blockIdx.x); tile < c.tiles; tile += static_cast<int>(gridDim.x)) {
        float squares;
        product<E, true>(c, {c.vectors, c.e_step, count, tile * kTile, 0, 0, c.e}, memory.stages, memory.out.data,
                         squares, {});
        inverse_rms(c, squares, memory.inverse);
        for (int v = thread / kWarp; v < count; v += kLensWarps) {
            float a[2], top = -INFINITY, total = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = lane + i * kWarp;
                a[i] = tile * kTile + n < c.n ? memory.out[v * kTile + n] * memory.inverse[n] : -INFINITY;
                top = fmaxf(top, a[i]);
            }
            top = warp_max(top);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = lane + i * kWarp;
                const float p = a[i] == -INFINITY ? 0.0f : expf(a[i] - top);
                total += p;
                // Of a zero entry 1 / rms is 1e6: in fp16 that must not become infinite, which times 0 is NaN.
                const float scaled = p == 0.0f ? 0.0f : p * memory.inverse[n];
                const float most = sizeof(Bits) == 2 && c.entry_dtype == 1 ? 65504.0f : INFINITY;
                const int64_t at = static_cast<int64_t>(v) * c.tiles * kTile + tile * kTile + n;
                write(reinterpret_cast<Bits*>(c.p) + at, E::narrow(scaled > most ? most : scaled));
            }
            total = warp_sum(total);
            if (lane == 0) {
                write(c.tops + v * c.tiles + tile, top);
                write(c.totals + v * c.tiles + tile, total);
            }
        }
        __syncthreads();
    }
}

// The maxima of all vectors' logits over all tiles, by each block for itself. Ends with a barrier.
MC_DEVICE void find_maxima(const LensCall& c, Span<float> maxima) {
    for (int v = static_cast<int>(threadIdx.x) / kWarp; v < c.vectors_n(); v += kLensWarps) {
        const float top = top_of_all(c, v);
        if (threadIdx.x % kWarp == 0) maxima[v] = top;
    }
    __syncthreads();
}

// sums[split, v, columns] = sum over the split's entries of p[v, n] x_n, p relative to the maximum over all tiles.
// Grid: (tiles of columns, splits).
template <class E>
MC_CALLED void weighted_sums(const LensCall& c) {
    const LensMemory<E> memory = lens_memory<E>(c);
    const int thread = static_cast<int>(threadIdx.x), count = c.vectors_n(), wide = (c.e + kTile - 1) / kTile;
    const int per_split = (c.tiles + c.splits - 1) / c.splits;
    find_maxima(c, memory.of_vectors);
    for (int task = static_cast<int>(blockIdx.x); task < wide * c.splits; task += static_cast<int>(gridDim.x)) {
        const int split = task / wide, column = task % wide * kTile;
        const int from = min(split * per_split, c.tiles), to = min(from + per_split, c.tiles);
        float squares;
        product<E, false>(c, {c.p, static_cast<int64_t>(c.tiles) * kTile, count, 0, column, from * kTile, to * kTile},
                          memory.stages, memory.out.data, squares, {c.tops, memory.of_vectors, memory.factors});
        for (int i = thread; i < count * kTile; i += kLensThreads) {
            const int v = i / kTile, at = column + i % kTile;
            if (at < c.e_step) write(c.sums + (static_cast<int64_t>(split) * count + v) * c.e_step + at, memory.out[i]);
        }
    }
}

// Asks for a matrix's lines to come to L2 while its step is still some barriers away.
MC_DEVICE void prefetch_rows(const LensCall& c, const char* data, int64_t step, int rows, int columns) {
    constexpr int kLine = 128;
    const int bytes = columns * (c.weight_dtype == 0 ? 4 : 2), lines = (bytes + kLine - 1) / kLine;
    for (int i = static_cast<int>(blockIdx.x * kLensThreads + threadIdx.x); i < rows * lines;
         i += static_cast<int>(gridDim.x) * kLensThreads) {
        prefetch(data + i / lines * step + i % lines * kLine);
    }
}

// What a read pass wants before it reads the entries.
MC_CALLED void prefetch_read(const LensCall& c, int pass) {
    prefetch_rows(c, c.read_q.of(pass), c.read_q.row, c.d, c.d);
    prefetch_rows(c, c.read_k.of(pass), c.read_k.row, c.d, c.e);
}

// What a pass and the next, or the scores, want before entries are read again.
MC_CALLED void prefetch_rest(const LensCall& c, int pass) {
    prefetch_rows(c, c.read_v.of(pass), c.read_v.row, c.d, c.e);
    prefetch_rows(c, c.read_out.of(pass), c.read_out.row, c.d, c.d);
    prefetch_rows(c, c.mlp_gate_up.of(pass), c.mlp_gate_up.row, 2 * c.f, c.d);
    prefetch_rows(c, c.mlp_down.of(pass), c.mlp_down.row, c.d, c.f);
    if (pass + 1 < c.passes) return prefetch_read(c, pass + 1);
    prefetch_rows(c, c.score_k.data, c.score_k.row, c.d, c.d);
    prefetch_rows(c, c.score_q.data, c.score_q.row, c.d, c.e);
    prefetch_rows(c, c.score_v.data, c.score_v.row, c.heads * c.head_values, c.d);
}

template <class E>
__global__ void __launch_bounds__(kLensThreads, 1) lens_score(const __grid_constant__ LensCall c) {
    project_queries(c);
    if (c.passes > 0) prefetch_read(c, 0);
    grid_barrier();
    for (int pass = 0; pass < c.passes; ++pass) {
        absorb(c, c.read_norm, c.read_q, c.read_k, pass);
        grid_barrier();
        logits<E>(c);
        if (!MC_FAULT(1)) grid_barrier();
        weighted_sums<E>(c);
        prefetch_rest(c, pass);
        grid_barrier();
        attended_values(c, pass);
        grid_barrier();
        add_linear(c, c.read_out, pass, c.d, c.parts, c.parts_n);
        grid_barrier();
        swiglu(c, pass);
        grid_barrier();
        add_linear(c, c.mlp_down, pass, c.f, c.act, 1);
        grid_barrier();
    }
    absorb(c, c.score_norm, c.score_k, c.score_q, 0);
    score_values(c);
    direct_vectors(c);
    grid_barrier();
    score_entries<E>(c);
}

}  // namespace mc::cuda

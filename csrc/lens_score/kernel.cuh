// lens_score on a GPU: one persistent launch of a block a multiprocessor, whose steps are separated by barriers of the
// grid. The contract: mc_kernels.h.
//
// Floor. Entries are read twice a read pass (their logits, then the weighted sums, whose weights need all logits'
// maximum) and once for the scores: N * E * sizeof(dtype) * (2 P + 1) bytes over the bandwidth, 201 MB or 42 us at 4.8
// TB/s for N = 8,192, E = 4,096 in bf16, less what the second-level cache keeps (50 MB). Products: 2 * N * E * (2 H Q P +
// H Q + J) operations, 13.4 G, 17 us at 800 TFLOP/s of tensor cores. Weights (19 MB in bf16 at d = f = 512) 4 us. Seven
// barriers a pass and three besides, about 1.5 us each.
//
// Steps, between barriers of the grid:
//   project_queries | P times: absorb | logits: p relative to its tile's maximum | maxima over all tiles, p rescaled |
//   weighted sums | attended values | z += read_out | swiglu | z += mlp_down | then absorb, values, direct rows | scores
//
// A block owns what it writes in a step, and reads in a step only what earlier steps wrote; sums of parts are taken in one
// order, so results repeat to the bit whatever the order of blocks.
#pragma once

#include "product.cuh"
#include "query.cuh"
#include "scores.cuh"

namespace mc::cuda {

// p[v, n] = exp(a[v, n] - tops[v, tile]) / rms(x_n), totals[v, tile] = the sum of the exponentials. Grid: tiles.
template <class E>
MC_DEVICE void logits(const LensCall& c, const LensMemory<E>& memory) {
    using Bits = typename E::Bits;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, count = c.vectors_n();
    for (int tile = static_cast<int>(blockIdx.x); tile < c.tiles; tile += static_cast<int>(gridDim.x)) {
        float squares;
        product<E, true>(c, {c.vectors, c.e_step, count, tile * kTile, 0, 0, c.e}, memory.stages, memory.out.data,
                         squares);
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

// p and the totals relative to the maximum over all tiles. Grid: vectors.
template <class E>
MC_DEVICE void rescale(const LensCall& c) {
    using Bits = typename E::Bits;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int task = grid_warp(); task < c.vectors_n() * c.tiles; task += grid_warps()) {
        const int v = task / c.tiles;
        float top = -INFINITY;
        for (int t = lane; t < c.tiles; t += kWarp) top = fmaxf(top, read<float>(c.tops + v * c.tiles + t));
        const float share = expf(read<float>(c.tops + task) - warp_max(top));
        for (int n = lane; n < kTile; n += kWarp) {
            Bits* const at = reinterpret_cast<Bits*>(c.p) + static_cast<int64_t>(task) * kTile + n;
            write(at, E::narrow(E::widen(read<Bits>(at)) * share));
        }
        if (lane == 0) write(c.totals + task, read<float>(c.totals + task) * share);
    }
}

// sums[split, v, columns] = sum over the split's entries of p[v, n] x_n. Grid: (tiles of columns, splits).
template <class E>
MC_DEVICE void weighted_sums(const LensCall& c, const LensMemory<E>& memory) {
    const int thread = static_cast<int>(threadIdx.x), count = c.vectors_n(), wide = (c.e + kTile - 1) / kTile;
    const int per_split = (c.tiles + c.splits - 1) / c.splits;
    for (int task = static_cast<int>(blockIdx.x); task < wide * c.splits; task += static_cast<int>(gridDim.x)) {
        const int split = task / wide, column = task % wide * kTile;
        const int from = min(split * per_split, c.tiles), to = min(from + per_split, c.tiles);
        float squares;
        product<E, false>(c, {c.p, static_cast<int64_t>(c.tiles) * kTile, count, 0, column, from * kTile, to * kTile},
                          memory.stages, memory.out.data, squares);
        for (int i = thread; i < count * kTile; i += kLensThreads) {
            const int v = i / kTile, at = column + i % kTile;
            if (at < c.e) write(c.sums + (static_cast<int64_t>(split) * count + v) * c.e + at, memory.out[i]);
        }
    }
}

template <class E>
__global__ void __launch_bounds__(kLensThreads, 1) lens_score(const __grid_constant__ LensCall c) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    const LensMemory<E> memory = lens_memory<E>(shared, c);
    project_queries(c);
    grid_barrier();
    for (int pass = 0; pass < c.passes; ++pass) {
        const auto of = [&](const LensRows& x) { return x.data + pass * x.pass; };
        absorb(c, of(c.read_norm), of(c.read_q), c.read_q.row, of(c.read_k), c.read_k.row, memory.in, memory.turned);
        grid_barrier();
        logits<E>(c, memory);
        if (!MC_FAULT(1)) grid_barrier();
        rescale<E>(c);
        grid_barrier();
        weighted_sums<E>(c, memory);
        grid_barrier();
        attended_values(c, of(c.read_v), c.read_v.row, memory.inverse_of_vectors);
        grid_barrier();
        add_linear(c, of(c.read_out), c.read_out.row, c.d, c.parts, kParts, memory.in);
        grid_barrier();
        swiglu(c, of(c.mlp_norm), of(c.mlp_gate_up), c.mlp_gate_up.row, memory.in);
        grid_barrier();
        add_linear(c, of(c.mlp_down), c.mlp_down.row, c.f, c.act, 1, memory.in);
        grid_barrier();
    }
    absorb(c, c.score_norm.data, c.score_k.data, c.score_k.row, c.score_q.data, c.score_q.row, memory.in,
           memory.turned);
    score_values(c, memory.in);
    direct_vectors(c);
    grid_barrier();
    score_entries<E>(c, memory);
}

}  // namespace mc::cuda

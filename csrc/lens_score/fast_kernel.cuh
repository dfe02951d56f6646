// lens_score of 16-bit entries and weights of one type, at most 8 queries and 64 vectors, sizes in whole steps: the
// steps of kernel.cuh, in less than half of the code. Code is most of what a call with few entries takes: each step
// runs once, from instructions that have to come from memory.
//
// Floor at N = 8,192, E = 4,096: three reads of 67 MB at 2.37 TB/s are 85 us, less the half that the second-level cache
// is told to keep from one to the next, and what comes to it during the queries' side; the vectors that each tile of 64
// entries meets are another 67 MB from that cache in the first and the last. Weights 19 MB, 8 us. 7 P + 2 barriers of 1
// to 1.5 us. A step of the queries' side is two latencies of that cache and its barrier, 3 us.
#pragma once

#include "fast_net.cuh"
#include "fast_scores.cuh"
#include "fast_sums.cuh"

namespace mc::cuda {

// Asks for a matrix that lies in one piece to come to L2 while its step is still some barriers away.
MC_CALLED void fast_prefetch(const char* data, int64_t row, int rows, int columns) {
    if (row != int64_t{2} * columns) return;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kLensThreads * 128;
#pragma unroll 1
    for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kLensThreads + threadIdx.x) * 128; at < rows * row;
         at += step) {
        prefetch(data + at);
    }
}

MC_DEVICE void fast_prefetch_read(const LensCall& c, int pass) {
    fast_prefetch(c.read_q.of(pass), c.read_q.row, c.d, c.d);
    fast_prefetch(c.read_k.of(pass), c.read_k.row, c.d, c.e);
}

// Of the block's first tile, `pieces` pieces of kFastWidth columns from `first` on: while the queries' side keeps no
// memory busy. `absent`: those alone that L2 has not been told to keep.
MC_DEVICE void fast_prefetch_entries(const LensCall& c, int first, int pieces, bool absent) {
    constexpr int kLine = 128, kLines = 2 * kFastWidth / kLine;
    const int tile = static_cast<int>(blockIdx.x), row = static_cast<int>(threadIdx.x) / 4;
    const int64_t entry = static_cast<int64_t>(tile) * kTile + row;
    if (entry >= c.n) return;
    const char* const from = c.entries.data + entry * c.entries.row;
#pragma unroll 1
    for (int line = static_cast<int>(threadIdx.x) % 4 + first * kLines; line < (first + pieces) * kLines; line += 4) {
        const bool kept = is_kept(c.keep, tile, line / kLines);
        if (line * kLine >= 2 * c.e || (absent && kept)) continue;
        prefetch(from + line * kLine);
    }
}

// What follows the sums of a pass.
MC_DEVICE void fast_prefetch_rest(const LensCall& c, int pass) {
    fast_prefetch(c.read_v.of(pass), c.read_v.row, c.d, c.e);
    fast_prefetch(c.read_out.of(pass), c.read_out.row, c.d, c.d);
    fast_prefetch(c.mlp_gate_up.of(pass), c.mlp_gate_up.row, 2 * c.f, c.d);
    fast_prefetch(c.mlp_down.of(pass), c.mlp_down.row, c.d, c.f);
    if (pass + 1 < c.passes) return fast_prefetch_read(c, pass + 1);
    fast_prefetch(c.score_k.data, c.score_k.row, c.d, c.d);
    fast_prefetch(c.score_q.data, c.score_q.row, c.d, c.e);
    fast_prefetch(c.score_v.data, c.score_v.row, c.heads * c.head_values, c.d);
    fast_prefetch(c.direct.data, c.direct.row, c.n_direct, c.e);
    fast_prefetch(c.head_in.data, c.head_in.row, c.hidden, c.inputs);
    fast_prefetch(c.head_bias.data, int64_t{2} * c.hidden, 1, c.hidden);
    fast_prefetch(c.head_out.data, c.head_out.row, 2, c.hidden);
    const int entry = static_cast<int>(blockIdx.x) * kTile + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) >= kTile || entry >= c.n) return;
    if (c.n_features > 0) prefetch(c.features.data + entry * c.features.row);
    if (c.legal && threadIdx.x == 0) prefetch(c.legal + 2 * entry);
}

// Pieces of entries that memory is asked for during a step of the queries' side: 16 MB of 8,192 entries.
constexpr int kEarlyPieces = 8;

constexpr int64_t kFastShared = 4 * kFastFixed + kFastRing;
constexpr int64_t kRowsShared = 2 * 2 * kFastQueries * (kFastStep + kTurnedStep) + 4 * kFastQueries * kFastChunk +
                                2 * 4 * kLensWarps * kFastSums;
static_assert(kRowsShared <= kFastShared && kFastShared <= (160 << 10), "shared memory");

// Once in the code rather than at each of its places.
MC_CALLED void fast_barrier() { grid_barrier(); }

template <class E>
__global__ void __launch_bounds__(kLensThreads, 1) lens_score_fast(const __grid_constant__ LensCall c) {
    fast_project<E>(c);
    if (c.passes > 0) fast_prefetch_read(c, 0);
    fast_prefetch_entries(c, 0, kEarlyPieces, false);
    fast_barrier();
#pragma unroll 1
    for (int pass = 0; pass <= c.passes; ++pass) {
        const bool score = pass == c.passes;
        fast_absorb<E>(c, either(score, c.score_norm, c.read_norm), either(score, c.score_k, c.read_q),
                       either(score, c.score_q, c.read_k), score ? 0 : pass, pass == 0, score);
        if (pass == 0) fast_prefetch_entries(c, kEarlyPieces, kEarlyPieces, false);
        fast_barrier();
        fast_tiles<E>(c, score, pass > 0);
        if (score) break;
        if (!MC_FAULT(1)) fast_barrier();
        fast_sums<E>(c);
        fast_prefetch_rest(c, pass);
        fast_barrier();
        fast_attended<E>(c, pass);
        fast_prefetch_entries(c, 0, kEarlyPieces, true);
        fast_barrier();
        fast_linear<E>(c.read_out.of(pass), c.read_out.row, c.z, c.d, c.q, c.d, c.parts, c.parts_n);
        fast_barrier();
        fast_swiglu<E>(c, pass);
        fast_barrier();
        fast_linear<E>(c.mlp_down.of(pass), c.mlp_down.row, c.z, c.d, c.q, c.f, c.act, 1);
        fast_barrier();
    }
}

}  // namespace mc::cuda

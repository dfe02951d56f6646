// The weighted sums of a read pass on 16-bit entries.
#pragma once

#include "fast_streams.cuh"

namespace mc::cuda {

// maxima[v] = the greatest of the vector's logits over all tiles, by four threads each.
MC_DEVICE void fast_maxima(const LensCall& c, Span<float> maxima) {
    const int v = static_cast<int>(threadIdx.x) / 4;
    float top = -INFINITY;
    if (v < c.vectors_n()) {
#pragma unroll 16
        for (int t = static_cast<int>(threadIdx.x) % 4; t < c.tiles; t += 4) {
            top = fmaxf(top, read<float>(c.tops + v * c.tiles + t));
        }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    maxima[v] = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
}

// sums[split, v, columns] = sum over the split's entries of p[v, n] x_n, p relative to the maximum over all tiles.
// Grid: (128 columns, splits). A warp has 32 columns of half of the vectors. A step is a tile, whose products count for
// the share that the tile has.
template <class E>
MC_DEVICE void fast_sums(const LensCall& c) {
    const StreamMemory memory = stream_memory();
    constexpr int kRows = kTile / 32, kColumns = 4, kAhead = kSumStages - 1;
    constexpr int kApart = kLensThreads / kFastPacks, kEntryRows = kTile / kApart, kSteps = kTile / 16;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4;
    const int count = c.vectors_n(), wide = (c.e + kFastWidth - 1) / kFastWidth, e = c.e;
    const int per_split = (c.tiles + c.splits - 1) / c.splits, group = warp % 4, upper = warp / 4 * kTile / 2;
    const int pack = thread % kFastPacks * 8, row = thread / kFastPacks, weight = thread % 8 * 8, line = thread / 8;
    const int64_t entry_row = c.entries.row, p_row = int64_t{2} * c.tiles * kTile;
    const int right_lane = group * 32 + left_at(lane, kFastLine);
    const int left_lane = upper * kSumLine + left_at(lane, kSumLine);
#pragma unroll 1
    for (int task = static_cast<int>(blockIdx.x); task < wide * c.splits; task += static_cast<int>(gridDim.x)) {
        const int split = task / wide, first = task % wide * kFastWidth;
        const int from = min(split * per_split, c.tiles), steps = min(per_split, c.tiles - from);
        const bool inside = first + pack < e;
        const char* const entries = c.entries.data + (int64_t{from} * kTile + row) * entry_row + 2 * (first + pack);
        const char* const weights = c.p + line * p_row + 2 * (from * kTile + weight);
        const auto load = [&](int s) {
            uint16_t* const to = memory.stages.part(s % kSumStages * kSumStage, kSumStage).data;
            const int tile = from + s;
            const uint64_t policy = piece_policy(c, tile, first / kFastWidth, false);
            const char* at = entries + s * kTile * entry_row;
#pragma unroll
            for (int i = 0; i < kEntryRows; ++i, at += kApart * entry_row) {
                const bool valid = inside && tile * kTile + row + i * kApart < c.n;
                copy_async(to + (row + i * kApart) * kFastLine + pack, at, valid, policy);
            }
            at = weights + 2 * s * kTile;
#pragma unroll
            for (int i = 0; i < 2; ++i, at += 32 * p_row) {
                copy_async(to + kTile * kFastLine + (line + 32 * i) * kSumLine + weight, at, line + 32 * i < count);
            }
            if (thread < kTile / 4) {
                const float* const tops = c.tile_tops + tile * kTile + 4 * thread;
                copy_async(to + kTile * (kFastLine + kSumLine) + 8 * thread, tops, true);
            }
        };
        float sums[kRows][kColumns][4] = {}, tops[2 * kRows] = {};
        __syncthreads();
#pragma unroll 1
        for (int s = -kAhead; s < steps; ++s) {
            if (s < 0) {
                if (s + kAhead < steps) load(s + kAhead);
                commit_copies();
                if (s < -1) continue;
                fast_maxima(c, memory.maxima);
                __syncthreads();
#pragma unroll
                for (int i = 0; i < 2 * kRows; ++i) tops[i] = memory.maxima[upper + i * 8 + g];
                continue;
            }
            if (!MC_FAULT(2)) wait_for_copies<kAhead - 1>();
            __syncthreads();
            const uint16_t* const x = memory.stages.part(s % kSumStages * kSumStage, kSumStage).data;
            const uint16_t* const p = x + kTile * kFastLine;
            const float* const tile_tops = reinterpret_cast<const float*>(p + kTile * kSumLine);
            uint32_t a[kSteps][kRows][4], b[kSteps][2][4];
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
                for (int j = 0; j < 2; ++j) load_matrices<true>(b[k][j], x + k * 16 * kFastLine + j * 16 + right_lane);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    load_matrices<false>(a[k][i], p + i * 16 * kSumLine + k * 16 + left_lane);
                }
            }
            // Behind the operands: copies that wait for room would hold those up.
            if (s + kAhead < steps) load(s + kAhead);
            commit_copies();
            float products[kRows][kColumns][4] = {};
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const uint32_t(&y)[4] = b[k][j / 2];
                        multiply_16x8x16<E>(products[i][j], a[k][i][0], a[k][i][1], a[k][i][2], a[k][i][3],
                                            y[j % 2 * 2], y[j % 2 * 2 + 1]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * kRows; ++i) {
                const float share = __expf(tile_tops[upper + i * 8 + g] - tops[i]);
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                    for (int w = i % 2 * 2; w < i % 2 * 2 + 2; ++w) sums[i / 2][j][w] += products[i / 2][j][w] * share;
                }
            }
        }
        wait_for_copies<0>();
        if (first + group * 32 >= e) continue;
        const int64_t above = static_cast<int64_t>(split) * count * c.e_step;
        float* const to = c.sums + above + first + group * 32 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kRows * 2; ++i) {
            const int v = upper + i * 8 + g;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const Pack<float, 2> x{sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]};
                if (v < count) write(to + v * static_cast<int64_t>(c.e_step) + j * 8, x);
            }
        }
    }
}

}  // namespace mc::cuda

// The streams over the entries: up to kTileRows vectors against a tile of kTile entries or columns, in steps of kTile,
// operands copied to shared memory kStages - 1 steps ahead: 16 KB each, or in fp32 32.
#pragma once

#include "call.cuh"
#include "fragments.cuh"
#include "grid.cuh"

namespace mc::cuda {

constexpr int kStageElements = (kTileRows + kTile) * kTileStep;
template <class E>
constexpr int kStages = sizeof(typename E::Bits) == 2 ? 4 : 2;

// Where a product's operands come from. Left: rows of the workspace. Right: the entries, of which this product takes
// rows [row, ..) and columns [column, ..); kTurned: the inner dimension runs over columns (logits), else over rows (sums).
struct Operands {
    const char* left;
    int64_t left_step;                     // elements
    int left_rows, row, column, from, to;  // inner dimension: [from, to)
};

template <class E>
MC_DEVICE typename E::Bits entry_at(const LensCall& c, int64_t row, int64_t column) {
    const char* const at = c.entries.data + row * c.entries.row;
    if constexpr (sizeof(typename E::Bits) == 4) {
        return E::narrow(weight_at(at, c.entry_dtype, column));
    } else {
        return read_constant<typename E::Bits>(at + column * static_cast<int64_t>(sizeof(typename E::Bits)));
    }
}

// One step's operands: zeros outside.
template <class E, bool kTurned>
MC_DEVICE void load_step(const LensCall& c, const Operands& o, int step, typename E::Bits* stage) {
    using Bits = typename E::Bits;
    constexpr int kPack = 16 / sizeof(Bits), kPacks = kTile / kPack;
    const int thread = static_cast<int>(threadIdx.x), inner = o.from + step * kTile;
    Bits* const right = stage + kTileRows * kTileStep;
    const int padded = (o.left_rows + 15) / 16 * 16;
    // Rows of the left operand begin on 16 bytes and end in whole packs; what lies beyond `to` meets zeros.
    for (int i = thread; i < padded * kPacks; i += kLensThreads) {
        const int row = i / kPacks, k = i % kPacks * kPack;
        const bool valid = row < o.left_rows && inner + k < o.to;
        const int64_t at = static_cast<int64_t>(row) * o.left_step + inner + k;
        copy_async(stage + row * kTileStep + k, o.left + (valid ? at : 0) * static_cast<int64_t>(sizeof(Bits)), valid);
    }
    const int first_row = kTurned ? o.row : inner, first_column = kTurned ? inner : o.column;
    if (c.aligned) {
        for (int i = thread; i < kTile * kPacks; i += kLensThreads) {
            const int row = first_row + i / kPacks, k = i % kPacks * kPack, column = first_column + k;
            const bool valid = row < c.n && column < c.e;
            const char* const from = c.entries.data + (valid ? row * c.entries.row : 0);
            copy_async(right + i / kPacks * kTileStep + k,
                       from + (valid ? column : 0) * static_cast<int64_t>(sizeof(Bits)), valid);
        }
        return;
    }
    for (int i = thread; i < kTile * kTile; i += kLensThreads) {
        const int row = first_row + i / kTile, column = first_column + i % kTile;
        right[i / kTile * kTileStep + i % kTile] = row < c.n && column < c.e ? entry_at<E>(c, row, column) : Bits{0};
    }
}

// out [kTileRows, kTile] (in shared memory; may lie over the stages) = left . right; squares: of a thread's share of the tile's
// rows, rows thread / 4. Begins and ends with a barrier.
template <class E, bool kTurned>
MC_DEVICE void product(const LensCall& c, const Operands& o, Span<typename E::Bits> stages, float* out,
                       float& squares) {
    using Bits = typename E::Bits;
    constexpr int kSums = kTileRows / 16 * (kTile / 16) / kLensWarps, kSize = kStageElements, kAhead = kStages<E> - 1;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
    const int column = warp % 4 * 16, steps = (o.to - o.from + kTile - 1) / kTile;
    WarpSums<E> sums[kSums];
    squares = 0.0f;
    __syncthreads();
    for (int s = 0; s < kAhead; ++s) {
        if (s < steps) load_step<E, kTurned>(c, o, s, stages.part(s * kSize, kSize).data);
        commit_copies();
    }
    for (int s = 0; s < steps; ++s) {
        if (!MC_FAULT(2)) wait_for_copies<kAhead - 1>();
        __syncthreads();
        // The stage before this one is free again: all have come through the barrier behind its use.
        const int ahead = s + kAhead;
        if (ahead < steps) load_step<E, kTurned>(c, o, ahead, stages.part(ahead % kStages<E> * kSize, kSize).data);
        commit_copies();
        const Bits* const left = stages.part(s % kStages<E> * kSize, kSize).data;
        const Bits* const right = left + kTileRows * kTileStep;
#pragma unroll 1
        for (int k = 0; k < kTile; k += 16) {
            const Bits* const b = kTurned ? right + column * kTileStep + k : right + k * kTileStep + column;
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                const int row = (warp / 4 + 2 * i) * 16;
                if (row < o.left_rows)
                    sums[i].template add<kTurned>(left + row * kTileStep + k, kTileStep, b, kTileStep);
            }
        }
        if (kTurned) {
            const Bits* const row = right + thread / 4 * kTileStep + thread % 4 * 16;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float x = E::widen(row[i]);
                squares += x * x;
            }
        }
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        const int row = (warp / 4 + 2 * i) * 16;
        if (row < o.left_rows) sums[i].store(out + row * kTile + column, kTile);
    }
    __syncthreads();
}

// 1 / rms of the entries of a tile, from what `product` has left of their squares.
MC_DEVICE void inverse_rms(const LensCall& c, float squares, Span<float> inverse) {
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % 4 == 0) {
        inverse[thread / 4] = __fdiv_rn(1.0f, __fsqrt_rn(squares / static_cast<float>(c.e) + kLensEps));
    }
    __syncthreads();
}

}  // namespace mc::cuda

// The streams over the entries: up to kTileRows vectors against a tile of kTile entries or columns, in steps of kTile,
// operands copied to shared memory kStages - 1 steps ahead: 16 KB each, or in fp32 32. A step has about 800 cycles at
// the rate of HBM (8 KB a multiprocessor at 18 bytes a nanosecond), in which shared memory moves 100 KB: operands take
// 50 KB.
#pragma once

#include "call.cuh"
#include "fragments.cuh"
#include "grid.cuh"

namespace mc::cuda {

constexpr int kStageElements = (kTileRows + kTile) * kTileStep;
template <class E>
constexpr int kStages = sizeof(typename E::Bits) == 2 ? 5 : 2;

// Where a product's operands come from. Left: rows of the workspace. Right: the entries, of which this product takes
// rows [row, ..) and columns [column, ..); kTurned: the inner dimension runs over columns (logits), else over rows
// (sums).
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

// What a step's products of p, which are relative to the maximum of the step's tile, count for in a sum over all tiles.
struct Shares {
    const float* tops;    // [vectors, tiles], as `logits` left them
    Span<float> maxima;   // [kTileRows], over all tiles
    Span<float> factors;  // [2, kTileRows]: of this step and the next
};

// One step of a warp: products[i] += left rows (warp / 4 + 2 i) * 16 .. + 15 times 16 columns of the tile.
template <class E, bool kTurned, int kSums>
MC_DEVICE void multiply_step(const typename E::Bits* left, const typename E::Bits* right, int left_rows,
                             WarpSums<E> (&products)[kSums]) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, column = warp % 4 * 16;
    const auto row_of = [&](int i) { return (warp / 4 + 2 * i) * 16; };
    const auto right_of = [&](int k) {
        return kTurned ? right + column * kTileStep + k : right + k * kTileStep + column;
    };
    if constexpr (WarpSums<E>::kTensor) {
        const int lane = WarpSums<E>::lane();
#pragma unroll
        for (int k = 0; k < kTile; k += 16) {
            uint32_t b[4];
            load_matrices<!kTurned>(b, right_of(k) + (kTurned ? right_at(lane, kTileStep) : left_at(lane, kTileStep)));
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (row_of(i) >= left_rows) break;
                uint32_t a[4];
                load_matrices<false>(a, left + row_of(i) * kTileStep + k + left_at(lane, kTileStep));
                multiply_16x8x16<E>(products[i].x[0], a[0], a[1], a[2], a[3], b[0], b[1]);
                multiply_16x8x16<E>(products[i].x[1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    } else {
#pragma unroll 1
        for (int k = 0; k < kTile; k += 16) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (row_of(i) >= left_rows) break;
                WarpSums<E> part;  // sums of sums: of thousands of terms in a row each would round
                part.template add<kTurned>(left + row_of(i) * kTileStep + k, kTileStep, right_of(k), kTileStep);
#pragma unroll
                for (int j = 0; j < 8; ++j) products[i].x[j / 4][j % 4] += part.x[j / 4][j % 4];
            }
        }
    }
}

// The squares of a quarter of a row of the tile: row thread / 4.
template <class E>
MC_DEVICE float squares_of(const typename E::Bits* right) {
    using Bits = typename E::Bits;
    constexpr int kPack = 16 / sizeof(Bits);
    const int thread = static_cast<int>(threadIdx.x);
    const Bits* const row = right + thread / 4 * kTileStep + thread % 4 * 16;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i += kPack) {
        const auto bits = *reinterpret_cast<const Pack<Bits, kPack>*>(row + i);
#pragma unroll
        for (int j = 0; j < kPack; ++j) sum += E::widen(bits.x[j]) * E::widen(bits.x[j]);
    }
    return sum;
}

// out [kTileRows, kTile] (in shared memory; may lie over the stages) = left . right, kTurned; else the sum over steps
// of that times the share of the step's tile. squares: of a thread's share of the tile's rows, rows thread / 4. Begins
// and ends with a barrier.
template <class E, bool kTurned>
MC_DEVICE void product(const LensCall& c, const Operands& o, Span<typename E::Bits> stages, float* out,
                       float& squares, const Shares& shares) {
    using Bits = typename E::Bits;
    constexpr int kSums = kTileRows / 16 * (kTile / 16) / kLensWarps, kSize = kStageElements, kAhead = kStages<E> - 1;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int column = warp % 4 * 16, steps = (o.to - o.from + kTile - 1) / kTile;
    const auto top_of = [&](int step) {
        const bool some = !kTurned && thread < o.left_rows && step < steps;
        return some ? read<float>(shares.tops + thread * c.tiles + o.from / kTile + step) : 0.0f;
    };
    WarpSums<E> sums[kSums];
    squares = 0.0f;
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < kAhead; ++s) {
        if (s < steps) load_step<E, kTurned>(c, o, s, stages.part(s * kSize, kSize).data);
        commit_copies();
    }
    float top = top_of(0);
    for (int s = 0; s < steps; ++s) {
        if (!kTurned && thread < o.left_rows) {
            shares.factors[s % 2 * kTileRows + thread] = expf(top - shares.maxima[thread]);
        }
        if (!MC_FAULT(2)) wait_for_copies<kAhead - 1>();
        __syncthreads();
        // The stage before this one is free again: all have come through the barrier behind its use.
        const int ahead = s + kAhead;
        if (ahead < steps) load_step<E, kTurned>(c, o, ahead, stages.part(ahead % kStages<E> * kSize, kSize).data);
        commit_copies();
        top = top_of(s + 1);
        const Bits* const left = stages.part(s % kStages<E> * kSize, kSize).data;
        const Bits* const right = left + kTileRows * kTileStep;
        if constexpr (kTurned) {
            multiply_step<E, kTurned>(left, right, o.left_rows, sums);
            squares += squares_of<E>(right);
        } else {
            WarpSums<E> products[kSums];
            multiply_step<E, kTurned>(left, right, o.left_rows, products);
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                const int row = (warp / 4 + 2 * i) * 16;
                if (row >= o.left_rows) break;
#pragma unroll
                for (int j = 0; j < 8; ++j) {  // as WarpSums::store lays them out; rows beyond left_rows are not used
                    const int in = WarpSums<E>::kTensor ? lane / 4 + j / 2 % 2 * 8 : lane / 2;
                    sums[i].x[j / 4][j % 4] +=
                        products[i].x[j / 4][j % 4] * shares.factors[s % 2 * kTileRows + row + in];
                }
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

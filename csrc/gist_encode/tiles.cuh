// Tiles of a linear map on tensor cores: 32 MT rows by up to 256 outputs, weights (and inputs, unless they are in shared
// memory) copied there two steps of 32 of the inner dimension ahead. Tiles follow each other without a gap in the copies.
//
// Eight warps, two by four: of a tile of 128 by 256 each has 64 by 64, in 128 registers a thread. A warp reads (64 + 64) *
// 32 bytes of shared memory for 131 kFLOP, 32 FLOPs a byte: at 128 bytes a clock no limit to mma.sync.
#pragma once

#include "fragments.cuh"
#include "grid.cuh"
#include "net.cuh"

namespace mc::cuda {

constexpr int kTileThreads = 256, kTileOutputs = 256, kTileInner = 32, kTileStages = 3;
constexpr int kStageStep = kTileInner + 8;  // elements from row to row of a stage
template <int MT>
constexpr int kTileRows = 32 * MT;
template <int MT>
constexpr int kStageSize = (kTileOutputs + kTileRows<MT>)*kStageStep;

struct TileMemory {
    Span<uint16_t> stages;
    Span<float> inverse;  // 1 / rms of a tile's rows

    template <int MT>
    static MC_DEVICE TileMemory take(SharedMemory& shared) {
        const Span<uint16_t> stages = shared.take<uint16_t>(kTileStages * kStageSize<MT>);
        return {stages, shared.take<float>(kTileRows<MT>)};
    }
    template <int MT>
    static int64_t bytes() {
        return shared_bytes_of<uint16_t>(kTileStages * kStageSize<MT>) + shared_bytes_of<float>(kTileRows<MT>);
    }
};

// Rows of inputs in shared memory, zeros from their width to the next multiple of 32.
struct Resident {
    Span<uint16_t> data;
    int step;
};

// Outputs of a tile, evenly shared, on a multiple of `unit`.
MC_BOTH int tile_width(int outputs, int most, int unit) {
    const int tiles = (outputs + most - 1) / most, each = (outputs + tiles - 1) / tiles;
    return (each + unit - 1) / unit * unit;
}

constexpr uint32_t kNoWeight = 0xffffffffu;

// Copies of a thread: a sixteenth of a kilobyte of four rows of the weight, and of as many rows of inputs as there are.
template <int MT, bool kStreamed, class P>
struct TileCopies {
    uint32_t weights[4];  // bytes from `p.weights`: four addresses would take the registers of sums
    const char* inputs[kStreamed ? MT / 2 : 1];
    int thread, tile = 0, inner = 0, slot = 0;

    MC_DEVICE explicit TileCopies(int t) : thread(t) {}
    MC_DEVICE void start(const P& p) {
        const int row = thread / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[i] = row + 64 * i < p.wide ? p.weight(tile, row + 64 * i) : kNoWeight;
        if constexpr (kStreamed) {
#pragma unroll
            for (int i = 0; i < MT / 2; ++i) inputs[i] = p.input(tile, row + 64 * i);
        }
    }
    // The next step's.
    MC_DEVICE void issue(const P& p, const Span<uint16_t>& stages) {
        if (tile < p.tiles) {
            if (inner == 0) start(p);
            const int row = thread / 4, piece = thread % 4 * 8, at = inner + piece;
            uint16_t* const to = stages.part(slot * kStageSize<MT>, kStageSize<MT>).data + row * kStageStep + piece;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (row + 64 * i >= p.wide) continue;
                const bool valid = weights[i] != kNoWeight && at < p.inner;
                copy_async(to + 64 * i * kStageStep, p.weights + (valid ? weights[i] + 2 * at : 0), valid);
            }
            if constexpr (kStreamed) {
#pragma unroll
                for (int i = 0; i < MT / 2; ++i) {
                    const bool valid = inputs[i] != nullptr && at < p.inner;
                    copy_async(to + (kTileOutputs + 64 * i) * kStageStep, valid ? inputs[i] + 2 * at : p.weights,
                               valid);
                }
            }
            inner += kTileInner;
            if (inner >= p.inner) inner = 0, ++tile;
        }
        commit_copies();
        slot = slot + 1 == kTileStages ? 0 : slot + 1;
    }
};

// Squares of a thread's share of a stage's inputs.
template <class E, int MT>
MC_DEVICE float stage_squares(const uint16_t* inputs) {
    constexpr int kEach = kTileThreads / kTileRows<MT>, kColumns = kTileInner / kEach;
    const int row = static_cast<int>(threadIdx.x) / kEach, column = static_cast<int>(threadIdx.x) % kEach * kColumns;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; i += 8) {
        const Quad x = *reinterpret_cast<const Quad*>(inputs + row * kStageStep + column + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = low_of<E>(x.x[j]), high = high_of<E>(x.x[j]);
            squares += low * low + high * high;
        }
    }
    return squares;
}

// All of a product's tiles. P: `tiles`, `inner` and `wide` (outputs of a tile, or twice as many pairs; a multiple of 32,
// of pairs 64); `weight(tile, n)`, where a row begins behind `weights`, and `input(tile, row)`, kNoWeight and nullptr for zeros;
// `live(tile)`, rows that count; `gain` (nullptr: none), which multiplies inputs; `normed`, whether sums are scaled by 1 / rms
// of a row: of streamed inputs it is summed here, else `inverse` has it; `finish(row, column, a, b)`, which takes outputs,
// or pairs, n and n + 1 of a tile: what it has to know of them is `Column column(tile, n)`, with `inside` false beyond the
// last one, and `Row row(tile, r)`. Of pairs, rows 16 i .. 16 i + 7 of the weight meet the eight behind them.
// Begins with stages free, ends with them free, all of it written and seen by the block.
template <class E, int MT, bool kStreamed, bool kPaired, class P>
MC_DEVICE void multiply_tiles(const P& p, const TileMemory& memory, const Resident& resident) {
    const int thread = fresh(static_cast<int>(threadIdx.x)), lane = thread % 32, warp = thread / 32;
    const int each = p.wide / 32, first_row = warp / 4 * 16 * MT, first = warp % 4 * 8 * each;
    const int steps = (p.inner + kTileInner - 1) / kTileInner, total = p.tiles * steps;
    TileCopies<MT, kStreamed, P> copies(thread);
    for (int s = 0; s + 1 < kTileStages; ++s) copies.issue(p, memory.stages);
    float sums[MT][8][4] = {}, squares = 0.0f;
    int tile = 0, inner = 0, slot = 0;
    for (int s = 0; s < total; ++s) {
        if (!MC_FAULT(22)) wait_for_copies<kTileStages - 2>();
        __syncthreads();
        copies.issue(p, memory.stages);  // to where all have read, before the barrier
        const uint16_t* const weights = memory.stages.part(slot * kStageSize<MT>, kStageSize<MT>).data;
        const uint16_t* const streamed = weights + kTileOutputs * kStageStep;
        slot = slot + 1 == kTileStages ? 0 : slot + 1;
        if (kStreamed && p.normed) squares += stage_squares<E, MT>(streamed);
        if (first_row < p.live(tile)) {
            const int step = kStreamed ? kStageStep : resident.step;
            const uint16_t* const inputs = (kStreamed ? streamed : resident.data.data + inner) + first_row * step;
#pragma unroll
            for (int k = 0; k < kTileInner; k += 16) {
                uint32_t left[MT][4];
#pragma unroll
                for (int i = 0; i < MT; ++i)
                    load_matrices<false>(left[i], inputs + 16 * i * step + k + left_at(lane, step));
                if (p.gain) {
                    const int at = inner + k + 2 * (lane % 4);
                    const uint32_t low = at < p.inner ? read_constant<uint32_t>(p.gain + 2 * at) : 0;
                    const uint32_t high = at + 8 < p.inner ? read_constant<uint32_t>(p.gain + 2 * at + 16) : 0;
#pragma unroll
                    for (int i = 0; i < MT; ++i) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) left[i][j] = scale_pair<E>(left[i][j], j < 2 ? low : high);
                    }
                }
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    if (j >= each) continue;
                    uint32_t right[4];
                    load_matrices<false>(right,
                                         weights + (first + 8 * j) * kStageStep + k + right_at(lane, kStageStep));
#pragma unroll
                    for (int i = 0; i < MT; ++i) {
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            multiply_16x8x16<E>(sums[i][j + n], left[i][0], left[i][1], left[i][2], left[i][3],
                                                right[2 * n], right[2 * n + 1]);
                        }
                    }
                }
            }
        }
        inner += kTileInner;
        if (inner < p.inner) continue;
        if (kStreamed && p.normed) {
            constexpr int kEach = kTileThreads / kTileRows<MT>;
            for (int lanes = 1; lanes < kEach; lanes *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
            if (thread % kEach == 0) memory.inverse[thread / kEach] = inverse_rms(squares, p.inner);
            squares = 0.0f;
            __syncthreads();
        }
        const int live = p.live(tile);
        constexpr int kMembers = kPaired ? 2 : 1;
        typename P::Column columns[8 / kMembers];
#pragma unroll
        for (int j = 0; j < 8 / kMembers; ++j) {
            columns[j] = p.column(tile, first / kMembers + 8 * j + 2 * (lane % 4));
            columns[j].inside = columns[j].inside && kMembers * j < each;
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int r = first_row + 16 * i + 8 * h + lane / 4;
                if (r >= live) continue;
                const typename P::Row row = p.row(tile, r);
                const float scale = p.normed ? memory.inverse[r] : 1.0f;
#pragma unroll
                for (int j = 0; j < 8 / kMembers; ++j) {
                    if (!columns[j].inside) continue;
                    const float* const x = sums[i][kMembers * j] + 2 * h;
                    const float* const y = sums[i][kMembers * j + kMembers - 1] + 2 * h;
                    const float a[2] = {x[0] * scale, x[1] * scale}, b[2] = {y[0] * scale, y[1] * scale};
                    p.finish(row, columns[j], a, b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
            }
        }
        inner = 0;
        ++tile;
    }
    wait_for_copies<0>();
    __syncthreads();
}

}  // namespace mc::cuda

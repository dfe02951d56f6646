// Few windows in 16 bits, all stages in one launch: what encode<M> does (kernel.cuh), for latency. A stage is short, so
// what counts is the chain of what waits for something else, in instructions as in loads:
//   - a block's weights of the next stage are on their way to its registers between its arrival at the barrier and the
//     wait for the others: they do not depend on what the others do, and neither do their addresses;
//   - activations, and what a sum is added to or turned by, are loaded together, not a chunk at a time;
//   - attention and pooling go by 16 bytes, a warp at a time;
//   - little is divided, and code is short: two products, of pairs and not. A copy a stage came to 250 KB of instructions.
// Chain of a stage: activations from L2, 40 to 170 KB through the block (0.4 to 1.5 us), products, the sum over warps and
// the store (0.6), the barrier (1.2 to 1.5): an estimate of 40 us for the 14 stages of the default net, not measured.
#pragma once

#include <algorithm>
#include <utility>

#include "attend.cuh"
#include "grid.cuh"
#include "pieces.cuh"
#include "product.cuh"

namespace mc::cuda {

#if defined(__CUDACC__)
constexpr int kStreamItems = kUnit / kEncodeThreads;
MC_DEVICE int stream_warps() { return kEncodeThreads / 32; }
MC_DEVICE int stream_threads() { return kEncodeThreads; }
#else
constexpr int kStreamItems = kUnit / 32;
MC_DEVICE int stream_warps() { return static_cast<int>(blockDim.x) / 32; }
MC_DEVICE int stream_threads() { return static_cast<int>(blockDim.x); }
#endif

// A barrier of the grid in two halves: work that the other blocks' writes do not matter to stands between them.
#if defined(__CUDACC__)
using GridArrival = cooperative_groups::grid_group::arrival_token;
MC_DEVICE GridArrival grid_arrive() { return cooperative_groups::this_grid().barrier_arrive(); }
MC_DEVICE void grid_wait(GridArrival& arrival) { cooperative_groups::this_grid().barrier_wait(std::move(arrival)); }
#else
struct GridArrival {};
inline GridArrival grid_arrive() { return {}; }
inline void grid_wait(GridArrival&) { grid_barrier(); }
#endif

// Sums of a warp [32 rows, 16 outputs], rows 20 apart: lanes that write hit different banks.
constexpr int kSumStep = 20, kWarpSums = kUnitRows * kSumStep;

inline int64_t stream_bytes(const EncodeCall& c, int64_t warps) {
    return std::max(shared_bytes_of<float>(warps * 2 * kWarpSums) + shared_bytes_of<float>(warps * kUnitRows),
                    2 * shared_bytes_of<float>(c.rows_each));
}

template <class E>
struct Streaming {
    using M = TensorMath<E>;
    const EncodeCall& c;
    char* memory;
    Quad held[16];  // the next product's weights: 2 chunks of a warp in pairs, or 8
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);

    MC_DEVICE Streaming(const EncodeCall& call, char* shared) : c(call), memory(shared), held{} {}

    template <bool kPaired>
    static constexpr int kChunks = kPaired ? 2 : 8;

    static MC_DEVICE int row_units(const Linear& l) { return (l.rows + kUnitRows - 1) / kUnitRows; }

    // Chunks from `from` on of the unit that begins at `output`.
    template <bool kPaired>
    MC_DEVICE void load_weights(const Linear& l, int output, int from) {
        constexpr int kMembers = kPaired ? 2 : 1;
        const int g = lane / 4, piece = 8 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kMembers; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int o = output + g + 8 * i;
                const char* const row = o < l.outputs ? l.weight(c, o, n == 1) : nullptr;
#pragma unroll
                for (int j = 0; j < kChunks<kPaired>; ++j) {
                    const int at = (from + j * stream_warps() + warp) * kChunk + piece;
                    held[2 * (kMembers * j + n) + i] = row && at < l.inner ? read_constant<Quad>(row + 2 * at) : Quad{};
                }
            }
        }
    }

    // Zeros where the block has no unit: nothing that was held lives on.
    MC_DEVICE void hold(const Linear& l) {
        const int output = block < l.units() ? block / row_units(l) * kUnitOutputs : l.outputs;
        if (l.paired) {
            load_weights<true>(l, output, 0);
        } else {
            load_weights<false>(l, output, 0);
        }
    }

    MC_DEVICE const char* input(const Linear& l, int r) const {
        if (l.step != kFirst) return input_row<M>(c, l, r);
        const int n = c.windows == 1 ? 0 : r / c.tokens;
        return c.blocks + n * c.blocks_n + (r - n * c.tokens) * c.blocks_k;
    }

    template <bool kPaired>
    MC_DEVICE void sum(const Linear& l, int output, int row, Sums& s) {
        constexpr int kTogether = kPaired ? 2 : 4, kMembers = kPaired ? 2 : 1;
        const int g = lane / 4, piece = 8 * (lane % 4);
        const char* inputs[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int r = row + 8 * t + g;
            inputs[t] = r < l.rows ? input(l, r) : nullptr;
        }
        for (int from = 0; from * kChunk < l.inner; from += kChunks<kPaired> * stream_warps()) {
            if (from > 0) load_weights<kPaired>(l, output, from);
#pragma unroll
            for (int first = 0; first < kChunks<kPaired>; first += kTogether) {
                if ((from + first * stream_warps() + warp) * kChunk >= l.inner) break;
                Quad x[kTogether][4], gain[kTogether] = {};
#pragma unroll
                for (int j = 0; j < kTogether; ++j) {
                    const int at = (from + (first + j) * stream_warps() + warp) * kChunk + piece;
                    const bool inside = at < l.inner;
#pragma unroll
                    for (int t = 0; t < 4; ++t) {
                        x[j][t] = inside && inputs[t] ? read<Quad>(inputs[t] + 2 * at) : Quad{};
                    }
                    if (kPaired && inside) gain[j] = read_constant<Quad>(l.gain + 2 * at);
                }
#pragma unroll
                for (int j = 0; j < kTogether; ++j) {
                    const Quad* const w = held + 2 * kMembers * (first + j);
#pragma unroll
                    for (int t = 0; t < 4; ++t) {
                        if (kPaired || l.normed) square_and_gain<E>(x[j][t], gain[j], kPaired, s.squares[t]);
                        multiply<E>(s.a[t], w[0], w[1], x[j][t]);
                        if (kPaired) multiply<E>(s.b[t], w[2], w[3], x[j][t]);
                    }
                }
            }
        }
    }

    // What a sum is added to, or turned by.
    template <bool kPaired>
    MC_DEVICE void load_other(const Linear& l, int o, int r, float (&to)[2]) const {
        to[0] = to[1] = 0.0f;
        if (o >= l.outputs || r >= l.rows) return;
        if (kPaired) {
            if (l.step != kQkv || o >= c.width) return;
            const float* const phase = c.phases + 2 * ((c.windows == 1 ? r : r % c.rows_each) * c.half + o % c.half);
            to[0] = read<float>(phase);
            to[1] = read<float>(phase + 1);
        } else if (l.step == kFirst) {
            to[0] = M::weight(c, c.level.data, o);
        } else if (l.step != kProject) {
            to[0] = load<M>(row_of<M>(c.h, r, c.width), o);
        }
    }

    template <bool kPaired>
    MC_DEVICE void store_sum(const Linear& l, int o, int r, float a, float b, const float (&other)[2]) const {
        if (!kPaired && l.step == kFirst) {
            const int n = c.windows == 1 ? 0 : r / c.tokens;
            store<M>(row_of<M>(c.h, r + n * (c.rows_each - c.tokens), c.width), o, a + other[0]);
        } else if (kPaired && l.step == kQkv) {
            char* const to = row_of<M>(c.turned, r, 3 * c.width);
            const bool turns = o < c.width;  // queries and keys
            const int first = l.first(c, o);
            store<M>(to, first, turns ? a * other[0] - b * other[1] : a);
            store<M>(to, first + c.half, turns ? b * other[0] + a * other[1] : b);
        } else if (kPaired) {
            store<M>(row_of<M>(c.swiglu, r, c.ffn), o, a / (1.0f + expf(-a)) * b);
        } else if (l.step == kProject) {
            write(c.y + static_cast<int64_t>(r) * c.embed + o, a);
        } else {
            store<M>(row_of<M>(c.h, r, c.width), o, other[0] + a);
        }
    }

    // The block's units; the first one's weights are held.
    template <bool kPaired>
    MC_DEVICE void product(const Linear& l) {
        constexpr int kMembers = kPaired ? 2 : 1;
        const int thread = static_cast<int>(threadIdx.x), units = l.units(), rows = row_units(l);
        SharedMemory shared(memory);
        const Span<float> sums = shared.take<float>(stream_warps() * 2 * kWarpSums);
        const Span<float> squares = shared.take<float>(stream_warps() * kUnitRows);
        for (int unit = block; unit < units; unit += blocks) {
            const int output = unit / rows * kUnitOutputs, row = unit % rows * kUnitRows;
            if (unit != block) load_weights<kPaired>(l, output, 0);
            float other[kStreamItems][2];
#pragma unroll
            for (int n = 0; n < kStreamItems; ++n) {
                const int i = thread + n * stream_threads();
                if (i < kUnit) load_other<kPaired>(l, output + i % kUnitOutputs, row + i / kUnitOutputs, other[n]);
            }
            Sums s = {};
            sum<kPaired>(l, output, row, s);
#pragma unroll
            for (int t = 0; t < 4; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    using P = Places<true>;
                    const int at = 2 * warp * kWarpSums + P::row(lane, t, i) * kSumStep + P::output(lane, t, i);
                    sums[at] = s.a[t][i];
                    if (kMembers == 2) sums[at + kWarpSums] = s.b[t][i];
                }
                if (!l.normed) continue;
                float square = s.squares[t];
                square += __shfl_xor_sync(0xffffffffu, square, 1);
                square += __shfl_xor_sync(0xffffffffu, square, 2);
                if (lane % 4 == 0) squares[warp * kUnitRows + 8 * t + lane / 4] = square;
            }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < kStreamItems; ++n) {
                const int i = thread + n * stream_threads();
                const int o = output + i % kUnitOutputs, r = row + i / kUnitOutputs;
                if (i >= kUnit || o >= l.outputs || r >= l.rows) continue;
                const int at = i / kUnitOutputs * kSumStep + i % kUnitOutputs;
                float a = 0.0f, b = 0.0f, square = 0.0f;
#pragma unroll 8
                for (int w = 0; w < stream_warps(); ++w) {
                    a += sums[2 * w * kWarpSums + at];
                    if (kMembers == 2) b += sums[(2 * w + 1) * kWarpSums + at];
                    if (l.normed) square += squares[w * kUnitRows + i / kUnitOutputs];
                }
                const float scale = l.normed ? inverse_rms(square, l.inner) : 1.0f;
                store_sum<kPaired>(l, o, r, a * scale, b * scale, other[n]);
            }
            if (unit + blocks < units) __syncthreads();
        }
    }

    MC_DEVICE void attend() const {
        for (int unit = block + blocks * warp; unit < query_units(c); unit += blocks * stream_warps()) {
            attend_unit<E>(c, unit);
        }
    }
};

}  // namespace mc::cuda

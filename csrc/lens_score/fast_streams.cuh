// The streams of 16-bit entries through tensor cores, operands copied to shared memory some steps ahead: 48 KB of
// entries a multiprocessor for products, 64 KB for sums, where 2.4 TB/s at 0.8 us ask for 15. Each number is read from
// shared memory once or twice: the warps share out the inner dimension of a step and add up what they have at the end.
// Whole tiles in four parts rather than eight: a warp's products are half of the registers then.
#pragma once

#include <algorithm>

#include "call.cuh"
#include "fragments.cuh"
#include "grid.cuh"

namespace mc::cuda {

constexpr int kFastVectors = 72;                       // that meet the entries: absorbed, then direct
constexpr int kFastWidth = 128, kFastLine = kFastWidth + 8;  // columns of a step; elements from row to row
constexpr int kFastPacks = kFastWidth / 8;
constexpr int kFastStages = 4, kFastStage = (kTile + kFastVectors) * kFastLine;
constexpr int kFastOut = kTile + 4;  // numbers from vector to vector: banks apart
constexpr int kSumStages = 5, kSumLine = kTile + 8, kSumStage = kTile * (kFastLine + kSumLine + 2);

// How long the second-level cache should keep what is copied.
enum class Keep { kNormally, kBriefly, kLong };

#if defined(__CUDACC__)

MC_DEVICE uint64_t keep_policy(Keep keep) {
    uint64_t bits;
    if (keep == Keep::kNormally) {
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(bits));
    } else if (keep == Keep::kLong) {
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(bits));
    } else {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(bits));
    }
    return bits;
}

MC_DEVICE void copy_async(void* to, const void* from, bool valid, uint64_t policy) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :
                 : "r"(at), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}

#else

MC_DEVICE uint64_t keep_policy(Keep) { return 0; }
MC_DEVICE void copy_async(void* to, const void* from, bool valid, uint64_t) { copy_async(to, from, valid); }

#endif

// Of a tile's entries the columns from kFastWidth step on: c.keep of eight such pieces are kept from stream to stream,
// evenly spread over what any block reads, so that all blocks wait for as much.
MC_DEVICE bool is_kept(int keep, int tile, int step) { return ((tile + step) * 3 & 7) < keep; }

MC_DEVICE uint64_t piece_policy(const LensCall& c, int tile, int step, bool last) {
    if (c.keep == 0) return keep_policy(Keep::kNormally);
    return keep_policy(!last && is_kept(c.keep, tile, step) ? Keep::kLong : Keep::kBriefly);
}

struct StreamMemory {
    Span<float> inverse, squares;  // [kTile], [kInnerParts, kTile]
    Span<float> maxima;            // [kTile], of vectors
    Span<uint16_t> stages;
    Span<float> out;  // over the stages: [kInnerParts, kFastVectors, kFastOut], of which the first becomes the sum
};

constexpr int kInnerParts = 4;  // of a step of products
constexpr int kFastFixed = kTile + kInnerParts * kTile + kTile;
constexpr int64_t kFastRing = std::max(int64_t{2} * kFastStages * kFastStage, int64_t{2} * kSumStages * kSumStage);
static_assert(kFastRing >= int64_t{4} * kInnerParts * kFastVectors * kFastOut, "what the parts leave");

MC_DEVICE StreamMemory stream_memory() {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    StreamMemory m{};
    m.inverse = shared.take<float>(kTile);
    m.squares = shared.take<float>(kInnerParts * kTile);
    m.maxima = shared.take<float>(kTile);
    SharedMemory over = shared;
    m.stages = shared.take<uint16_t>(kFastRing / 2);
    m.out = over.take<float>(kFastRing / 4);
    return m;
}

// out[v, n] = x_n . v for the tile's entries, the absorbed vectors and, `direct`, the direct rows behind them;
// inverse[n] = 1 / rms(x_n), where it is not known yet found and written. A warp has 32 columns of half of the entries
// in each step. Ends with a barrier.
template <class E>
MC_DEVICE void fast_products(const LensCall& c, const StreamMemory& memory, int tile, bool direct, bool known) {
    constexpr int kRows = kTile / 32, kColumns = kFastVectors / 8, kAhead = kFastStages - 1;
    constexpr int kApart = kLensThreads / kFastPacks, kEntryRows = kTile / kApart;
    constexpr int kVectorRows = (kFastVectors + kApart - 1) / kApart;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int pack = thread % kFastPacks * 8, row = thread / kFastPacks, count = c.vectors_n();
    const int all = count + (direct ? c.n_direct : 0), e = c.e, steps = (e + kFastWidth - 1) / kFastWidth;
    const int left = c.n - tile * kTile, at = row * kFastLine + pack;
    const char* const entries = c.entries.data + (static_cast<int64_t>(tile) * kTile + row) * c.entries.row + 2 * pack;
    const char* const vectors = c.vectors + int64_t{2} * (row * c.e_step + pack);
    const auto load = [&](int step) {
        uint16_t* const to = memory.stages.part(step % kFastStages * kFastStage, kFastStage).data + at;
        const bool inside = step * kFastWidth + pack < e;
        const uint64_t policy = piece_policy(c, tile, step, direct);
        const char* from = entries + int64_t{2} * step * kFastWidth;
#pragma unroll
        for (int i = 0; i < kEntryRows; ++i, from += kApart * c.entries.row) {
            copy_async(to + i * kApart * kFastLine, from, inside && row + i * kApart < left, policy);
        }
        from = vectors + int64_t{2} * step * kFastWidth;
#pragma unroll
        for (int i = 0; i < kVectorRows; ++i, from += int64_t{2} * kApart * c.e_step) {
            if (i + 1 == kVectorRows && row + i * kApart >= kFastVectors) break;
            copy_async(to + (kTile + i * kApart) * kFastLine, from, inside && row + i * kApart < all);
        }
    };
    float sums[kRows][kColumns][4] = {}, squares[kRows][2] = {};
    __syncthreads();
    const int inner = warp % kInnerParts, upper = warp / kInnerParts * kTile / 2, k = inner * 32;
    const int left_lane = upper * kFastLine + left_at(lane, kFastLine) + k, right_lane = right_at(lane, kFastLine) + k;
    const int last_lane = lane % 8 * kFastLine + lane / 8 % 2 * 8 + k;  // of eight vectors: the upper matrices again
#pragma unroll 1
    for (int s = -kAhead; s < steps; ++s) {
        if (s < 0) {
            if (s + kAhead < steps) load(s + kAhead);
            commit_copies();
            continue;
        }
        if (!MC_FAULT(2)) wait_for_copies<kAhead - 1>();
        __syncthreads();
        const uint16_t* const x = memory.stages.part(s % kFastStages * kFastStage, kFastStage).data;
        const uint16_t* const v = x + kTile * kFastLine;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t a[kRows][4], b[(kColumns + 1) / 2][4];
#pragma unroll
            for (int i = 0; i < kRows; ++i) load_matrices<false>(a[i], x + i * 16 * kFastLine + left_lane + 16 * half);
#pragma unroll
            for (int j = 0; j < kColumns; j += 2) {
                const int vector = j * 8 * kFastLine + 16 * half + (j + 1 < kColumns ? right_lane : last_lane);
                load_matrices<false>(b[j / 2], v + vector);
            }
            if (half) {  // behind the operands: copies that wait for room would hold those up
                if (s + kAhead < steps) load(s + kAhead);  // into what all have used by now
                commit_copies();
            }
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const uint32_t(&y)[4] = b[j / 2];
                    multiply_16x8x16<E>(sums[i][j], a[i][0], a[i][1], a[i][2], a[i][3], y[j % 2 * 2], y[j % 2 * 2 + 1]);
                }
            }
            if (!known) {
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        const float low = low_of<E>(a[i][w]), high = high_of<E>(a[i][w]);
                        squares[i][w % 2] += low * low;
                        squares[i][w % 2] += high * high;
                    }
                }
            }
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    const int g = lane / 4, part = lane % 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int vector = inner * kFastVectors + j * 8 + 2 * part + w % 2;
                memory.out[vector * kFastOut + upper + i * 16 + g + w / 2 * 8] = sums[i][j][w];
            }
        }
        if (!known) {
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                float square = squares[i][w];
                square += __shfl_xor_sync(0xffffffffu, square, 1);
                square += __shfl_xor_sync(0xffffffffu, square, 2);
                if (part == 0) memory.squares[inner * kTile + upper + i * 16 + g + w * 8] = square;
            }
        }
    }
    __syncthreads();
    constexpr int kFours = kFastVectors * kFastOut / 4;
#pragma unroll 1
    for (int i = thread; i < kFours; i += kLensThreads) {
        Pack<float, 4> sum{};
#pragma unroll
        for (int w = 0; w < kInnerParts; ++w) {
            const int64_t from = (static_cast<int64_t>(w) * kFours + i) * 4;
            (void)memory.out[from + 3];
            const auto x = *reinterpret_cast<const Pack<float, 4>*>(&memory.out[from]);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum.x[j] += x.x[j];
        }
        *reinterpret_cast<Pack<float, 4>*>(&memory.out[4 * i]) = sum;
    }
    if (thread < kTile) {
        float* const kept = c.inverse + tile * kTile + thread;
        if (known) {
            memory.inverse[thread] = read<float>(kept);
        } else {
            float square = 0.0f;
#pragma unroll
            for (int w = 0; w < kInnerParts; ++w) square += memory.squares[w * kTile + thread];
            const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(square / static_cast<float>(e) + kLensEps));
            memory.inverse[thread] = inverse;
            write(kept, inverse);
        }
    }
    __syncthreads();
}

// Of what fast_products has left: p[v, n] = exp(a[v, n] - tops[v, tile]) / rms(x_n), totals[v, tile] = the sum of the
// exponentials. A vector by four threads.
template <class E>
MC_DEVICE void fast_softmax(const LensCall& c, const StreamMemory& memory, int tile) {
    constexpr int kEach = kTile / 4;
    const int v = static_cast<int>(threadIdx.x) / 4, first = static_cast<int>(threadIdx.x) % 4 * kEach;
    const int left = c.n - tile * kTile - first;
    float a[kEach], by[kEach], top = -INFINITY, total = 0.0f;
    (void)memory.out[v * kFastOut + first + kEach - 1];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
        const auto x = *reinterpret_cast<const Pack<float, 4>*>(&memory.out[v * kFastOut + first + i]);
        const auto y = *reinterpret_cast<const Pack<float, 4>*>(&memory.inverse[first + i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            by[i + j] = y.x[j];
            a[i + j] = i + j < left ? x.x[j] * y.x[j] : -INFINITY;
            top = fmaxf(top, a[i + j]);
        }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float most = c.entry_dtype == 1 ? 65504.0f : INFINITY;
    Quad out[kEach / 8];
#pragma unroll
    for (int i = 0; i < kEach; i += 2) {
        float scaled[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float p = i + j < left ? __expf(a[i + j] - top) : 0.0f;
            total += p;
            // Of a zero entry 1 / rms is 1e6: in fp16 that must not become infinite, which times 0 is NaN.
            scaled[j] = i + j < left ? p * by[i + j] : 0.0f;
            scaled[j] = scaled[j] > most ? most : scaled[j];
        }
        out[i / 8].x[i / 2 % 4] = pack_pair<E>(scaled[0], scaled[1]);
    }
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (first == 0) write(c.tile_tops + tile * kTile + v, top);
    if (v >= c.vectors_n()) return;
    char* const to = c.p + 2 * ((static_cast<int64_t>(v) * c.tiles + tile) * kTile + first);
#pragma unroll
    for (int i = 0; i < kEach / 8; ++i) write(to + 16 * i, out[i]);
    if (first > 0) return;
    write(c.tops + v * c.tiles + tile, top);
    write(c.totals + v * c.tiles + tile, total);
}

}  // namespace mc::cuda

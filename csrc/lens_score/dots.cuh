// Rows of weights against up to 16 rows of queries: R rows a warp, M = 8 or 16 queries, sums in registers. Lane l has
// columns 4 l .. 4 l + 3 of every 128, so that a warp's loads of weights are contiguous and those from shared memory
// meet no bank twice; the weights of kAtOnce such pieces are in flight together, as a step of the query's side is one
// or two latencies of memory long, not bandwidth.
#pragma once

#include "call.cuh"
#include "grid.cuh"

namespace mc::cuda {

constexpr int kPiece = 4 * kWarp, kAtOnce = 4;

MC_BOTH int padded_to_4(int n) { return (n + 3) / 4 * 4; }

// Elements of a 16-bit type, which is asked for by a select: a branch would keep loads from being in flight together.
MC_DEVICE float widen_16(uint16_t bits, bool half) { return half ? Half::widen(bits) : Bfloat::widen(bits); }

// Four elements of a row of `size` from `i` on, zeros beyond.
MC_DEVICE void weights4(const char* row, int dtype, int i, int size, float (&out)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = i + j < size ? weight_at(row, dtype, i + j) : 0.0f;
}

MC_DEVICE bool on_8(const char* row, int64_t step) {
    return reinterpret_cast<uintptr_t>(row) % 8 == 0 && step % 8 == 0;
}

// Rows of fp32 in shared memory, `step` (a multiple of 4) apart, zeros behind their ends.
struct Staged {
    Span<float> rows;
    int step;

    MC_DEVICE void four(int m, int k, float (&out)[4]) const {
#if !defined(__CUDACC__)
        (void)rows[m * step + k + 3];
#endif
        const auto p = *reinterpret_cast<const Pack<float, 4>*>(rows.data + m * step + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = p.x[j];
    }
};

// Packs of weights that are asked for together and used one after the other by a loop that is not unrolled: each step
// of the query's side runs once, and a long one would wait for its instructions instead.
template <class Packs, int Count, int R>
struct Queue {
    Packs held[Count][R];

    // The first R, the others move up.
    MC_DEVICE void next(Packs (&out)[R]) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            out[r] = held[0][r];
#pragma unroll
            for (int i = 0; i + 1 < Count; ++i) held[i][r] = held[i + 1][r];
        }
    }
};

template <int R>
using RowQueue = Queue<Pack<uint16_t, 4>, kAtOnce, R>;

// The next kAtOnce pieces of R rows of 16-bit weights from column `base` on, zeros from `to` on and for rows that are
// not.
template <int R>
MC_DEVICE void fetch(const char* first, int64_t step, int rows, int base, int to, RowQueue<R>& queue) {
    const int column = base + 4 * (static_cast<int>(threadIdx.x) % kWarp);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int k = column + i * kPiece;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            queue.held[i][r] = {};
            if (k < to && r < rows) queue.held[i][r] = read_constant<Pack<uint16_t, 4>>(first + r * step + 2 * k);
        }
    }
}

template <int R>
MC_DEVICE void widen_rows(const Pack<uint16_t, 4> (&bits)[R], bool half, float (&w)[R][4]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[r][j] = widen_16(bits[r].x[j], half);
    }
}

// sums[r * M + m] += row r (of `rows` that exist) . in_m over columns [from, to), `from` a multiple of 4; a lane's
// share. Queries that are not are the last one again: a branch for each would make many loops of this one.
template <int R, int M>
MC_DEVICE void add_dots(const char* first, int64_t step, int rows, int dtype, int from, int to, int q, const Staged& in,
                        float (&sums)[R * M]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto add = [&](int k, const float(&w)[R][4]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float x[4];
            in.four(min(m, q - 1), k, x);
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[r * M + m] += w[r][j] * x[j];
            }
        }
    };
    if (dtype != 0 && (to - from) % 4 == 0 && on_8(first, step)) {
        for (int base = from; base < to; base += kAtOnce * kPiece) {
            RowQueue<R> queue;
            fetch<R>(first, step, rows, base, to, queue);
#pragma unroll 1
            for (int k = base + 4 * lane; k < min(to, base + kAtOnce * kPiece); k += kPiece) {
                Pack<uint16_t, 4> bits[R];
                float w[R][4];
                queue.next(bits);
                widen_rows<R>(bits, dtype == 1, w);
                add(k, w);
            }
        }
        return;
    }
#pragma unroll 1
    for (int k = from + 4 * lane; k < to; k += kPiece) {
        float w[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r) weights4(first + min(r, rows - 1) * step, dtype, k, to, w[r]);
        add(k, w);
    }
}

// Sums over the warp of Count numbers a lane, in Count - 1 and a few shuffles: each halving leaves a lane half of them.
// Lane l then has, in sums[0 .. kHeld<Count> - 1], those numbered from held_at<Count>(l) on.
template <int Count>
constexpr int kHeld = Count > kWarp ? Count / kWarp : 1;
template <int Count>
MC_DEVICE int held_at(int lane) {
    return Count >= kWarp ? lane * kHeld<Count> : lane / (kWarp / (Count < kWarp ? Count : kWarp));
}

template <int Count>
MC_DEVICE void reduce(float (&sums)[Count]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int step = 0; step < 5; ++step) {
        const int lanes = kWarp / 2 >> step, left = Count >> step;
        const bool upper = lane & lanes;
        if (left > 1) {
#pragma unroll
            for (int i = 0; i < left / 2; ++i) {
                const float sent = upper ? sums[i] : sums[i + left / 2], kept = upper ? sums[i + left / 2] : sums[i];
                sums[i] = kept + __shfl_xor_sync(0xffffffffu, sent, lanes);
            }
        } else {
            sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], lanes);
        }
    }
}

// The reduced sums, each told to one lane: visit(row, m, sum).
template <int R, int M, class Visit>
MC_DEVICE void each_dot(float (&sums)[R * M], int rows, int q, const Visit& visit) {
    constexpr int kCount = R * M;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, first = held_at<kCount>(lane);
    reduce<kCount>(sums);
    if (kCount < kWarp && lane % (kWarp / (kCount < kWarp ? kCount : kWarp)) != 0) return;
#pragma unroll
    for (int i = 0; i < kHeld<kCount>; ++i) {
        const int r = (first + i) / M, m = (first + i) % M;
        if (r < rows && m < q) visit(r, m, sums[i]);
    }
}

}  // namespace mc::cuda

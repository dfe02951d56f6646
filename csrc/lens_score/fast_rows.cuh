// The side of the queries on tensor cores: up to 8 rows against matrices of 16-bit weights, each of which is read once.
//
// These steps run once a call, from instructions that no cache holds: a step is as long as its chain of latencies and
// its code. So 16 rows of weights are one operand straight from memory, all loads of a warp under way together, and
// what they meet is two numbers of 16 bits each, high and low, which keep 16 bits of bf16 and 22 of fp16.
#pragma once

#include "call.cuh"
#include "fragments.cuh"
#include "grid.cuh"

namespace mc::cuda {

constexpr int kFastQueries = 8, kFastRows = 16;             // of a product
constexpr int kFastChunk = 1024, kFastStep = kFastChunk + 8;  // columns that are staged together; an odd number of 16 B
constexpr int kFastColumns = 32 * kLensWarps, kTurnedStep = 128 + 8;
constexpr int kFastSums = kFastRows * kFastQueries;

struct RowsMemory {
    Span<uint16_t> high, low;                // [8, kFastStep]
    Span<uint16_t> turned_high, turned_low;  // [8, kTurnedStep]
    Span<float> wide;                        // [8, kFastChunk]
    Span<float> partial, sums;               // [kLensWarps, 16, 8], [groups, 16, 8]
};

MC_DEVICE RowsMemory rows_memory() {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    RowsMemory m{};
    m.high = shared.take<uint16_t>(kFastQueries * kFastStep);
    m.low = shared.take<uint16_t>(kFastQueries * kFastStep);
    m.turned_high = shared.take<uint16_t>(kFastQueries * kTurnedStep);
    m.turned_low = shared.take<uint16_t>(kFastQueries * kTurnedStep);
    m.wide = shared.take<float>(kFastQueries * kFastChunk);
    m.partial = shared.take<float>(kLensWarps * kFastSums);
    m.sums = shared.take<float>(kLensWarps * kFastSums);
    return m;
}

template <class T>
MC_DEVICE T from_shared(Span<uint16_t> x, int64_t i) {
    constexpr int64_t kLast = sizeof(T) / sizeof(uint16_t) - 1;
    (void)x[i + kLast];
    return *reinterpret_cast<const T*>(&x[i]);
}

template <class E>
MC_DEVICE void split_number(float x, uint16_t& high, uint16_t& low) {
    high = E::narrow(x);
    low = E::narrow(x - E::widen(high));
}

template <class E>
MC_DEVICE void put_four(Span<uint16_t> high, Span<uint16_t> low, int64_t at, const float (&x)[4]) {
    Pack<uint16_t, 4> h, l;
#pragma unroll
    for (int j = 0; j < 4; ++j) split_number<E>(x[j], h.x[j], l.x[j]);
    (void)high[at + 3], (void)low[at + 3];
    *reinterpret_cast<Pack<uint16_t, 4>*>(&high[at]) = h;
    *reinterpret_cast<Pack<uint16_t, 4>*>(&low[at]) = l;
}

constexpr int kSumPacks = 4, kPackColumns = 4 * kWarp;  // of a lane's columns at a time; from one to the next

// x[i] = four numbers from column kPackColumns i on of the sum of `copies` arrays at `from`, `apart` numbers from each
// other; zero from `width` on and where not `valid`. All loads are under way together: each that waited for another
// would be the step's time.
MC_DEVICE void sum_packs(const float* from, bool valid, int copies, int64_t apart, int width,
                         float (&x)[kSumPacks][4]) {
    constexpr int kTogether = 4;
#pragma unroll
    for (int i = 0; i < 4 * kSumPacks; ++i) x[i / 4][i % 4] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < copies; first += kTogether) {
        Pack<float, 4> loaded[kSumPacks][kTogether] = {};
#pragma unroll
        for (int i = 0; i < kSumPacks; ++i) {
#pragma unroll
            for (int n = 0; n < kTogether; ++n) {
                if (valid && i * kPackColumns < width && first + n < copies) {
                    loaded[i][n] = read<Pack<float, 4>>(from + (first + n) * apart + i * kPackColumns);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kSumPacks; ++i) {
            const Pack<float, 4>(&y)[kTogether] = loaded[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) x[i][j] += (y[0].x[j] + y[1].x[j]) + (y[2].x[j] + y[3].x[j]);
        }
    }
}

// Staged row m, by warp m = such a sum times `by`. Ends without a barrier.
template <class E>
MC_CALLED void stage_sum(const float* from, bool valid, int copies, int64_t apart, float by, int width) {
    const RowsMemory memory = rows_memory();
    const int m = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
    for (int base = lane * 4; base < width; base += kSumPacks * kPackColumns) {
        float x[kSumPacks][4];
        sum_packs(from + base, valid, copies, apart, width - base, x);
#pragma unroll
        for (int i = 0; i < kSumPacks; ++i) {
            const int k = base + i * kPackColumns;
            if (k >= width) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) x[i][j] *= by;
            put_four<E>(memory.high, memory.low, m * kFastStep + k, x[i]);
        }
    }
}

// sums[group, r, m] = row r of a group . staged row m; groups (1, 2, 4 or 8) of `rows` <= 16 rows, group_step bytes
// apart. Begins with a barrier, for what was staged, and ends with one.
template <class E>
MC_CALLED void row_products(const char* weight, int64_t row, int64_t group_step, int groups, int rows, int width) {
    const RowsMemory memory = rows_memory();
    constexpr int kTogether = 4;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4;
    const int c = lane % 4, slices = kLensWarps / groups, steps = width / 32, base = g * kFastStep + 8 * c;
    const char* const from = weight + warp / slices * group_step + 16 * c;  // of lane 4 g + c: rows g and g + 8
    const char* const upper = from + min(g, rows - 1) * row;
    const char* const lower = from + min(g + 8, rows - 1) * row;
    float sums[4] = {};
    bool staged = false;
#pragma unroll 1
    for (int first = warp % slices; first < steps || !staged; first += kTogether * slices) {
        Quad a[kTogether][2];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int step = first + i * slices;
            if (step < steps) {
                a[i][0] = read_constant<Quad>(upper + 64 * step);
                a[i][1] = read_constant<Quad>(lower + 64 * step);
            }
        }
        if (!staged) __syncthreads();  // weights do not wait for what they meet
        staged = true;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int step = first + i * slices;
            if (step < steps) {
                multiply<E>(sums, a[i][0], a[i][1], from_shared<Quad>(memory.high, base + 32 * step));
                multiply<E>(sums, a[i][0], a[i][1], from_shared<Quad>(memory.low, base + 32 * step));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        memory.partial[warp * kFastSums + (g + i / 2 * 8) * kFastQueries + 2 * c + i % 2] = sums[i];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < groups * kFastSums; i += kLensThreads) {
        float x = 0.0f;
#pragma unroll
        for (int s = 0; s < kLensWarps; ++s) {
            if (s < slices) x += memory.partial[(i / kFastSums * slices + s) * kFastSums + i % kFastSums];
        }
        memory.sums[i] = x;
    }
    __syncthreads();
}

MC_DEVICE float fast_inverse(float square, int size) {
    return __fdiv_rn(1.0f, __fsqrt_rn(square / static_cast<float>(size) + kLensEps));
}

constexpr int kRowPacks = kFastChunk / kPackColumns;  // of a lane, of a row

// Four elements of each of a lane's packs of a row; zero from `width` on and where not `valid`.
MC_DEVICE void load_row(const char* row, bool valid, int width, Pack<uint16_t, 4> (&x)[kRowPacks]) {
    const int from = static_cast<int>(threadIdx.x) % kWarp * 4;
#pragma unroll
    for (int i = 0; i < kRowPacks; ++i) {
        const int k = from + i * kPackColumns;
        x[i] = {};
        if (valid && k < width) x[i] = read_constant<Pack<uint16_t, 4>>(row + 2 * k);
    }
}

// parts[s, m, j] = w_in[j] . query_m over the s-th chunk of E; squares[s, m]: of the queries.
template <class E>
MC_DEVICE void fast_project(const LensCall& c) {
    const RowsMemory memory = rows_memory();
    const int thread = static_cast<int>(threadIdx.x), m = thread / kWarp, tasks = c.d / kFastRows * c.parts_n;
#pragma unroll 1
    for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
        const int group = task / c.parts_n, part = task % c.parts_n, first = part * c.chunk;
        const int width = min(c.chunk, c.e - first);
        const char* const weights = c.w_in.data + group * kFastRows * c.w_in.row + 2 * first;
        if (thread % kFastRows * 64 < width) {  // on their way while the queries are
            prefetch(weights + thread / kFastRows * c.w_in.row + thread % kFastRows * 128);
        }
        Pack<uint16_t, 4> query[kRowPacks];
        load_row(c.queries.data + m * c.queries.row + 2 * first, m < c.q, width, query);
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < kRowPacks; ++i) {
            const int k = thread % kWarp * 4 + i * kPackColumns;
            if (k >= width) break;
            float x[4];
            widen<E, 4>(query[i], x);
#pragma unroll
            for (int j = 0; j < 4; ++j) square += x[j] * x[j];
            put_four<E>(memory.high, memory.low, m * kFastStep + k, x);
        }
        square = warp_sum(square);
        if (group == 0 && m < c.q && thread % kWarp == 0) write(c.squares + part * kFastQueries + m, square);
        row_products<E>(weights, c.w_in.row, 0, 1, kFastRows, width);
        if (thread < kFastSums && thread % 8 < c.q) {
            write(c.parts + (part * kMost + thread % 8) * c.d + group * kFastRows + thread / 8, memory.sums[thread]);
        }
    }
}

// Staged = norm(z, gain). projected: z is what `fast_project` has left, and block 0 writes it.
template <class E>
MC_DEVICE void fast_norm(const LensCall& c, const char* gain, bool projected) {
    const RowsMemory memory = rows_memory();
    const int m = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool valid = m < c.q;
    Pack<uint16_t, 4> gains[kRowPacks];
    load_row(gain, valid, c.d, gains);
    float by = 1.0f, square = 0.0f;
    if (projected && valid) {
        float all = 0.0f;
#pragma unroll 1
        for (int s = lane; s < c.parts_n; s += kWarp) all += read<float>(c.squares + s * kFastQueries + m);
        by = fast_inverse(warp_sum(all), c.e);
    }
    const float* const z = projected ? c.parts + m * c.d : c.z + m * c.d;
#pragma unroll 1
    for (int base = lane * 4; base < c.d; base += kSumPacks * kPackColumns) {
        float x[kSumPacks][4];
        sum_packs(z + base, valid, projected ? c.parts_n : 1, static_cast<int64_t>(kMost) * c.d, c.d - base, x);
#pragma unroll
        for (int i = 0; i < kSumPacks; ++i) {
            const int k = base + i * kPackColumns;
            if (k >= c.d) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[i][j] *= by;
                square += x[i][j] * x[i][j];
                memory.wide[m * kFastChunk + k + j] = x[i][j];
            }
            if (projected && blockIdx.x == 0 && valid) {
                write(c.z + m * c.d + k, Pack<float, 4>{x[i][0], x[i][1], x[i][2], x[i][3]});
            }
        }
    }
    const float inverse = fast_inverse(warp_sum(square), c.d);
#pragma unroll
    for (int i = 0; i < kRowPacks; ++i) {
        const int k = lane * 4 + i * kPackColumns;
        if (k >= c.d) break;
        float x[4];
        widen<E, 4>(gains[i], x);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] *= inverse * memory.wide[m * kFastChunk + k + j];
        put_four<E>(memory.high, memory.low, m * kFastStep + k, x);
    }
}

}  // namespace mc::cuda

// What the attention kernels are told, and which part of the work a block has.
#pragma once

#include "fp8.cuh"
#include "turns.cuh"

namespace mc::cuda {

struct AttendCall {
    const char *q, *k, *v;
    char* out;
    int64_t q_step[3], k_step[3], v_step[3], out_step[3];  // bytes: b, head, query or slot
    const int64_t *q_pos, *kv_pos;
    const double* inv_freq;  // nullptr: nothing is rotated
    // [Hkv], of fp8 keys and values.
    const float *k_scale, *v_scale;
    const float *sigma, *bias;
    float* lse;          // [B, Hq, T]
    float* mass;         // [B, S] or nullptr
    float* logits;       // [B, Hq, T, S], where mass is wanted
    float* partial_out;  // [splits, B Hq T, D], or nullptr: one split, to out and lse
    // Of a row's logits the greatest and the sum of exp(logit - greatest), not lse: the last bit of lse is 0.001 where
    // logits are 10^4, an error of every probability.
    float *tops, *totals;        // [splits, B Hq T], or nullptr
    float *row_top, *row_total;  // [B, Hq, T], of all splits, where mass is wanted
    float scale;                 // of <q, k>: with the magnitude of both rotations
    int64_t all_rows;            // B Hq T
    int32_t batch, heads, kv_heads, group, queries, slots, dims, half;
    int32_t rows;  // queries that a KV head serves: row m is head m % group of query m / group
    int32_t row_tiles, splits, chunk;
    bool interleaved;
};

// A block's rows [first, first + count) of one KV head, and its slots [low, high).
struct Part {
    int b, h, first, count, split, low, high;

    MC_DEVICE int query(const AttendCall& c, int row) const { return (first + row) / c.group; }
    MC_DEVICE int head(const AttendCall& c, int row) const { return h * c.group + (first + row) % c.group; }
    // Of [B, Hq, T].
    MC_DEVICE int64_t index(const AttendCall& c, int row) const {
        return (static_cast<int64_t>(b) * c.heads + head(c, row)) * c.queries + query(c, row);
    }
    // -1, which sees nothing, where there is no such row.
    MC_DEVICE int64_t position(const AttendCall& c, int row) const {
        return row < count ? read_constant<int64_t>(c.q_pos + static_cast<int64_t>(b) * c.queries + query(c, row)) : -1;
    }
    MC_DEVICE const char* queries(const AttendCall& c, int row) const {
        return c.q + b * c.q_step[0] + head(c, row) * c.q_step[1] + query(c, row) * c.q_step[2];
    }
    MC_DEVICE const char* keys(const AttendCall& c) const { return c.k + b * c.k_step[0] + h * c.k_step[1]; }
    MC_DEVICE const char* values(const AttendCall& c) const { return c.v + b * c.v_step[0] + h * c.v_step[1]; }
};

// Blocks are numbered (b, KV head, split, tile of rows): those that read the same keys run together.
MC_DEVICE Part part_of(const AttendCall& c, int block, int tile_rows) {
    Part p;
    const int tile = block % c.row_tiles;
    p.split = block / c.row_tiles % c.splits;
    p.h = block / c.row_tiles / c.splits % c.kv_heads;
    p.b = block / c.row_tiles / c.splits / c.kv_heads;
    p.first = tile * tile_rows;
    p.count = min(tile_rows, c.rows - p.first);
    p.low = p.split * c.chunk;
    p.high = min(p.low + c.chunk, c.slots);
    return p;
}

// The frequencies in shared memory.
struct Bands {
    Span<uint64_t> step;
    Span<float> frequency;

    static MC_DEVICE Bands take(const AttendCall& c, SharedMemory& shared) {
        return {shared.take<uint64_t>(c.half), shared.take<float>(c.half)};
    }
    static int64_t bytes(int64_t half) { return shared_bytes_of<uint64_t>(half) + shared_bytes_of<float>(half); }

    // By all threads; a barrier has to follow.
    MC_DEVICE void fill(const AttendCall& c) const {
        for (int i = static_cast<int>(threadIdx.x); i < c.half; i += static_cast<int>(blockDim.x)) {
            const double f = read_constant<double>(c.inv_freq + i);
            step[i] = step_of(f);
            frequency[i] = static_cast<float>(f);
        }
    }
    // exp(-(frequency sigma)^2 / 2): exactly 1 where either is 0.
    MC_DEVICE float damping(int band, float sigma) const {
        const float spread = frequency[band] * sigma;
        return exp2f(spread * spread * -0.72134752044448170f);
    }
};

constexpr float kLog2 = 0.69314718055994530942f;
#if defined(__CUDACC__)
#define MC_INFINITY __int_as_float(0x7f800000)
#else
#define MC_INFINITY HUGE_VALF
#endif

// Of <q, k> and of the result, for keys and values that are stored as S.
template <class S>
MC_DEVICE float scale_of(const AttendCall& c, const Part& p) {
    if constexpr (std::is_same_v<S, Fp8>) return c.scale * read_constant<float>(c.k_scale + p.h);
    return c.scale;
}
template <class S>
MC_DEVICE float result_scale_of(const AttendCall& c, const Part& p) {
    if constexpr (std::is_same_v<S, Fp8>) return read_constant<float>(c.v_scale + p.h);
    return 1.0f;
}

// exp(x - top), 0 where top is -infinity. Not by exp2f: a large difference in units of log 2 is rounded once more.
MC_DEVICE float share(float x, float top) { return top == -MC_INFINITY ? 0.0f : expf(x - top); }

MC_DEVICE float lse_of(float top, float total) { return total > 0.0f ? top + log2f(total) * kLog2 : -MC_INFINITY; }

// An element of row `row`'s result; top and total: greatest logit, sum of exp(logit - top).
template <class E, class S>
MC_DEVICE void store_result(const AttendCall& c, const Part& p, int row, int dim, float sum, float top, float total) {
    const int64_t index = p.index(c, row);
    const float x = (total > 0.0f ? sum / total : 0.0f) * result_scale_of<S>(c, p);
    const int64_t at = p.split * c.all_rows + index;
    if (dim == 0 && c.tops) {
        write(c.tops + at, top);
        write(c.totals + at, total);
    }
    if (c.partial_out) return write(c.partial_out + at * c.dims + dim, x);
    char* to = c.out + p.b * c.out_step[0] + p.head(c, row) * c.out_step[1] + p.query(c, row) * c.out_step[2];
    write(to + dim * sizeof(typename E::Bits), E::narrow(x));
    if (dim == 0) write(c.lse + index, lse_of(top, total));
}

}  // namespace mc::cuda

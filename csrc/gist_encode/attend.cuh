// Attention inside windows on tensor cores: a warp takes 16 queries of a head, and the window's keys and values 16 at a
// time, from memory into the operands' registers (fragments.cuh). Keys' scores are 2% of a layer's FLOPs: what counts is
// that a warp needs no other and no shared memory. Heads of a multiple of 8 dimensions, up to 128. A window's rows are
// all that is read, so that what another one holds, NaN too, does not matter.
//
// Lane 4 g + c has: scores of queries g and g + 8 with keys 2c and 2c + 1 of each 8; of queries 2c and 2c + 1 of each 8
// the sums of values' dimensions 8 g .. 8 g + 7 (and, of 128, 64 behind).
#pragma once

#include "fragments.cuh"
#include "net.cuh"

namespace mc::cuda {

constexpr int kAttendThreads = 128, kAttendQueries = 16;

MC_BOTH int query_tiles(const EncodeCall& c) { return (c.rows_each + kAttendQueries - 1) / kAttendQueries; }

// A head of a window: row 0 of queries, keys, values, `step` bytes apart, and of what becomes of it.
struct Head {
    const char *q, *k, *v;
    int64_t step;
    char* out;
    int64_t out_step;
};

template <int D>
MC_DEVICE void load_row(const char* row, bool valid, int dims, int first, Quad (&to)[D / 32]) {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        const int piece = 4 * j + first;
        to[j] = valid && 8 * piece < dims ? read<Quad>(row + 16 * piece) : Quad{};
    }
}

template <class E, int D>
MC_DEVICE void attend_queries(const Head& head, int rows, int dims, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = lane % 4;
    const float scale = rsqrtf(static_cast<float>(dims));
    Quad query[2][D / 32];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + 8 * r + g;
        load_row<D>(head.q + row * head.step, row < rows, dims, c, query[r]);
    }
    float top[2] = {-3.0e38f, -3.0e38f}, total[2] = {}, sums[2][D / 16][4] = {};
    for (int from = 0; from < rows; from += 16) {
        float x[2][4] = {};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int row = from + 8 * t + g;
            Quad key[D / 32];
            load_row<D>(head.k + row * head.step, row < rows, dims, c, key);
#pragma unroll
            for (int j = 0; j < D / 32; ++j) multiply<E>(x[t], query[0][j], query[1][j], key[j]);
        }
        Quad value[4][D / 64];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = from + 2 * c + i % 2 + i / 2 * 8;
#pragma unroll
            for (int j = 0; j < D / 64; ++j) {
                const int piece = 8 * j + g;
                value[i][j] =
                    row < rows && 8 * piece < dims ? read<Quad>(head.v + row * head.step + 16 * piece) : Quad{};
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float greatest = top[r];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& logit = x[i / 2][2 * r + i % 2];
                logit = from + i / 2 * 8 + 2 * c + i % 2 < rows ? logit * scale : -3.0e38f;
                greatest = max(greatest, logit);
            }
            greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
            greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
            const float shrink = expf(top[r] - greatest);
            top[r] = greatest;
            total[r] *= shrink;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& p = x[i / 2][2 * r + i % 2];
                p = from + i / 2 * 8 + 2 * c + i % 2 < rows ? expf(p - greatest) : 0.0f;
                total[r] += p;
            }
            const float shrinks[2] = {__shfl_sync(0xffffffffu, shrink, 8 * c),
                                      __shfl_sync(0xffffffffu, shrink, 8 * c + 4)};
            const uint32_t early = pack_pair<E>(x[0][2 * r], x[0][2 * r + 1]);
            const uint32_t late = pack_pair<E>(x[1][2 * r], x[1][2 * r + 1]);
#pragma unroll
            for (int m = 0; m < D / 16; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][m][i] *= shrinks[i % 2];
                const uint32_t v0 = value[0][m / 4].x[m % 4], v1 = value[1][m / 4].x[m % 4];
                const uint32_t v2 = value[2][m / 4].x[m % 4], v3 = value[3][m / 4].x[m % 4];
                multiply_16x8x16<E>(sums[r][m], lower_halves(v0, v1), upper_halves(v0, v1), lower_halves(v2, v3),
                                    upper_halves(v2, v3), early, late);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float inverse = 1.0f / __shfl_sync(0xffffffffu, total[r], 8 * c + 4 * i);
            const int row = first + 8 * r + 2 * c + i;
#pragma unroll
            for (int j = 0; j < D / 64; ++j) {
                const int piece = 8 * j + g;
                Quad out;
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    out.x[m] = pack_pair<E>(sums[r][4 * j + m][i] * inverse, sums[r][4 * j + m][2 + i] * inverse);
                }
                if (row < rows && 8 * piece < dims) write(head.out + row * head.out_step + 16 * piece, out);
            }
        }
    }
}

MC_BOTH int query_units(const EncodeCall& c) { return c.windows * c.heads * query_tiles(c); }

// A tile of queries, from and to the workspace. D: dimensions that heads have at most.
template <class E, int D = 128>
MC_DEVICE void attend_unit(const EncodeCall& c, int unit) {
    const int tiles = query_tiles(c), n = unit / tiles / c.heads, first = unit / tiles % c.heads * 2 * c.half;
    const int64_t row = static_cast<int64_t>(n) * c.rows_each;
    using M = TensorMath<E>;
    const char* const q = row_of<M>(c.turned, row, 3 * c.width) + 2 * first;
    const Head head{
        q,          q + 2 * c.width, q + 4 * c.width, 6 * c.width, row_of<M>(c.attention, row, c.width) + 2 * first,
        2 * c.width};
    const int query = unit % tiles * kAttendQueries;
    if (D <= 64 || 2 * c.half <= 64) {
        attend_queries<E, 64>(head, c.rows_each, 2 * c.half, query);
    } else {
        attend_queries<E, 128>(head, c.rows_each, 2 * c.half, query);
    }
}

// All heads of all windows, a warp at a time.
template <class E>
__global__ void __launch_bounds__(kAttendThreads) attend_windows(const __grid_constant__ EncodeCall c) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int unit = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / 32;
    if (unit < query_units(c)) attend_unit<E>(c, unit);
}

}  // namespace mc::cuda

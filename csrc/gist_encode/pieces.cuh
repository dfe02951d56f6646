// The encoder's stages that are no linear map: what stands beside the first one, attention, pooling, the match of RMS.
#pragma once

#include "mc_kernels.h"
#include "net.cuh"

namespace mc::cuda {

constexpr int kEncodeThreads = 256, kColumns = 256, kMostHeadDims = 128;

// Over the block, in a fixed order. Every thread gets it; `warps` floats of shared memory.
MC_DEVICE float block_sum(float x, const Span<float>& warps) {
    for (int lanes = 1; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    if (threadIdx.x % 32 == 0) warps[static_cast<int>(threadIdx.x) / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += warps[w];
    __syncthreads();
    return sum;
}

// Units beside the first product: phases, 256 columns of a window's centred mean, its class token where `h` is here.
MC_BOTH int first_units(const EncodeCall& c) {
    return 1 + c.windows * ((c.embed + kColumns - 1) / kColumns) + (c.rows_each > c.tokens && c.h ? c.windows : 0);
}

// Of row i / half of a window, band i % half.
MC_DEVICE void write_phase(const EncodeCall& c, int i) {
    const double frequency = exp2(-c.log2_theta * (i % c.half) / c.half);
    float cos, sin;
    cos_sin(turn_of(i / c.half, step_of(frequency)), cos, sin);
    write(c.phases + 2 * i, cos);
    write(c.phases + 2 * i + 1, sin);
}

template <class M>
MC_DEVICE void first_unit(const EncodeCall& c, int unit) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    if (unit == 0) {
        for (int i = thread; i < c.rows_each * c.half; i += size) write_phase(c, i);
        return;
    }
    const int each = (c.embed + kColumns - 1) / kColumns, means = c.windows * each;
    if (--unit < means) {
        const int n = unit / each, from = unit % each * kColumns;
        for (int e = from + thread; e < min(from + kColumns, c.embed); e += size) {
            // Several sums side by side: their loads are on their way together, and long windows round less.
            float sums[8] = {};
            for (int j = 0; j < c.tokens; j += 8) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (j + i < c.tokens) sums[i] += M::block(c, c.blocks + n * c.blocks_n + (j + i) * c.blocks_k, e);
                }
            }
            float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            sum = sum / static_cast<float>(c.tokens) - (c.centres ? M::weight(c, c.mu.data, e) : 0.0f);
            write(c.centred + static_cast<int64_t>(n) * c.embed + e, sum);
        }
        return;
    }
    char* h = row_of<M>(c.h, (unit - means) * c.rows_each + c.tokens, c.width);
    for (int i = thread; i < c.width; i += size) {
        store<M>(h, i, M::weight(c, c.pool_q.data, i) + M::weight(c, c.level.data, i));
    }
}

// 32 queries of one head of a window: a warp takes four at a time, a lane a key, then a lane some dimensions of the values.
// Keys and values pass through shared memory, 32 of them at a time.
constexpr int kQueries = 4, kKeys = 32;

struct AttendMemory {
    Span<float> keys, values;      // [32, dims + 1] (a column is then in different banks), [32, dims]
    Span<float> queries, weights;  // [warps, dims, 4], [warps, 32, 4]

    MC_DEVICE AttendMemory(SharedMemory shared, int dims, int warps)
        : keys(shared.take<float>(kKeys * (dims + 1))),
          values(shared.take<float>(kKeys * dims)),
          queries(shared.take<float>(warps * dims * kQueries)),
          weights(shared.take<float>(warps * kKeys * kQueries)) {}
    static int64_t bytes(int64_t dims, int64_t warps) {
        return shared_bytes_of<float>(kKeys * (dims + 1)) + shared_bytes_of<float>(kKeys * dims) +
               shared_bytes_of<float>(warps * dims * kQueries) + shared_bytes_of<float>(warps * kKeys * kQueries);
    }
};

MC_BOTH int attend_units(const EncodeCall& c) { return c.windows * c.heads * ((c.rows_each + 31) / 32); }

template <class M>
MC_DEVICE void attend(const EncodeCall& c, SharedMemory shared, int unit) {
    constexpr int kEach = kMostHeadDims / 32;
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    const int lane = thread % 32, warp = thread / 32, warps = size / 32, tiles = (c.rows_each + 31) / 32;
    const int n = unit / tiles / c.heads, dims = 2 * c.half, first = unit / tiles % c.heads * dims;
    const AttendMemory m(shared, dims, warps);
    const Span<float> queries = m.queries.part(warp * dims * kQueries, dims * kQueries);
    const Span<float> weights = m.weights.part(warp * kKeys * kQueries, kKeys * kQueries);
    const float scale = rsqrtf(static_cast<float>(dims));
    const auto element = [&](int j, int at) {
        const int64_t row = static_cast<int64_t>(n) * c.rows_each + j;
        return j < c.rows_each ? load<M>(row_of<M>(c.turned, row, 3 * c.width), at + first) : 0.0f;
    };
    for (int pass = 0; pass < 32; pass += kQueries * warps) {
        const int query = unit % tiles * 32 + pass + kQueries * warp;
        for (int i = lane; i < kQueries * dims; i += 32) {
            queries[i % dims * kQueries + i / dims] = element(query + i / dims, i % dims) * scale;
        }
        float top[kQueries], total[kQueries] = {}, sums[kQueries][kEach] = {};
#pragma unroll
        for (int r = 0; r < kQueries; ++r) top[r] = -3.0e38f;
        for (int from = 0; from < c.rows_each; from += kKeys) {
            __syncthreads();
            for (int i = thread; i < kKeys * dims; i += size) {
                const int j = i / dims, d = i % dims;
                m.keys[j * (dims + 1) + d] = element(from + j, c.width + d);
                m.values[i] = element(from + j, 2 * c.width + d);
            }
            __syncthreads();
            const bool some = from + lane < c.rows_each;
            float x[kQueries] = {};
            for (int d = 0; d < dims; ++d) {
                const float key = m.keys[lane * (dims + 1) + d];
#pragma unroll
                for (int r = 0; r < kQueries; ++r) x[r] += queries[d * kQueries + r] * key;
            }
#pragma unroll
            for (int r = 0; r < kQueries; ++r) {
                float greatest = some ? x[r] : -3.0e38f;
                for (int lanes = 1; lanes < 32; lanes *= 2) {
                    greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, lanes));
                }
                greatest = max(greatest, top[r]);
                const float p = some ? expf(x[r] - greatest) : 0.0f, shrink = expf(top[r] - greatest);
                top[r] = greatest;
                total[r] = total[r] * shrink + p;
                weights[lane * kQueries + r] = p;
#pragma unroll
                for (int e = 0; e < kEach; ++e) sums[r][e] *= shrink;
            }
            __syncwarp();
            for (int k = 0; k < min(kKeys, c.rows_each - from); ++k) {
#pragma unroll
                for (int e = 0; e < kEach; ++e) {
                    if (lane + 32 * e >= dims) continue;
                    const float value = m.values[k * dims + lane + 32 * e];
#pragma unroll
                    for (int r = 0; r < kQueries; ++r) sums[r][e] += weights[k * kQueries + r] * value;
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int r = 0; r < kQueries; ++r) {
            for (int lanes = 1; lanes < 32; lanes *= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], lanes);
            if (query + r >= c.rows_each) continue;
            char* to = row_of<M>(c.attention, static_cast<int64_t>(n) * c.rows_each + query + r, c.width);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                if (lane + 32 * e < dims) store<M>(to, first + lane + 32 * e, sums[r][e] / total[r]);
            }
        }
        __syncwarp();
    }
    __syncthreads();
}

// One gist of a window: the final norm of its rows, weighted. element(j, i): of row j, number i. Takes 2 rows_each floats
// of shared memory.
template <class M, class Element>
MC_DEVICE void pool(const EncodeCall& c, SharedMemory shared, int unit, const Element& element) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x), lane = thread % 32;
    const Span<float> logits = shared.take<float>(c.rows_each), inverse = shared.take<float>(c.rows_each);
    const char* query = c.pool_q.at(0, unit % c.gists);
    for (int j = thread / 32; j < c.rows_each; j += size / 32) {
        float squares = 0.0f, dot = 0.0f;
        for (int i = lane; i < c.width; i += 32) {
            const float x = element(j, i);
            squares += x * x;
            if (c.pool == MC_POOL_SOFTMAX) {
                dot += x * M::weight(c, c.final_norm.data, i) * M::weight(c, query, i);
            }
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
            dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        }
        if (lane == 0) {
            inverse[j] = inverse_rms(squares, c.width);
            logits[j] = dot * inverse[j] * rsqrtf(static_cast<float>(c.width));
        }
    }
    __syncthreads();
    // Of a class token, that row alone.
    const int from = c.pool == MC_POOL_CLS ? c.rows_each - 1 : 0;
    float top = -3.0e38f, total = 0.0f;
    for (int j = from; j < c.rows_each; ++j) top = max(top, logits[j]);
    for (int j = from; j < c.rows_each; ++j) total += expf(logits[j] - top);
    // The mean's logits are all 0.
    for (int j = from + thread; j < c.rows_each; j += size) inverse[j] *= expf(logits[j] - top) / total;
    __syncthreads();
    char* to = row_of<M>(c.pooled, unit, c.width);
    for (int i = thread; i < c.width; i += size) {
        float sum = 0.0f;
#pragma unroll 4
        for (int j = from; j < c.rows_each; ++j) sum += inverse[j] * element(j, i);
        store<M>(to, i, sum * M::weight(c, c.final_norm.data, i));
    }
    __syncthreads();
}

// One gist: the centred mean at the target's RMS, plus what the net says, brought to the gain's RMS.
template <class M>
MC_DEVICE void match(const EncodeCall& c, SharedMemory shared, int unit) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    const Span<float> warps = shared.take<float>(size / 32);
    const float* centred = c.centred + static_cast<int64_t>(unit / c.gists) * c.embed;
    const float* y = c.y + static_cast<int64_t>(unit) * c.embed;
    float squares = 0.0f;
    for (int e = thread; e < c.embed; e += size) {
        const float x = read<float>(centred + e);
        squares += x * x;
    }
    const float base = inverse_rms(block_sum(squares, warps), c.embed) * c.target_rms;
    squares = 0.0f;
    for (int e = thread; e < c.embed; e += size) {
        const float z = read<float>(centred + e) * base + read<float>(y + e);
        squares += z * z;
    }
    const float scale = inverse_rms(block_sum(squares, warps), c.embed) * c.target_rms * M::weight(c, c.gain.data, 0);
    char* to = c.out + unit / c.gists * c.out_n + unit % c.gists * c.out_g;
    for (int e = thread; e < c.embed; e += size) {
        M::store_out(c, to, e, (read<float>(centred + e) * base + read<float>(y + e)) * scale);
    }
}

}  // namespace mc::cuda

// The encoder's stages that are no linear map: what stands beside the first one, attention, pooling, the match of RMS.
#pragma once

#include "net.cuh"

namespace mc::cuda {

constexpr int kEncodeThreads = 256, kColumns = 256, kMostHeadDims = 256;

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

// Units beside the first product: phases, 256 columns of a window's centred mean, its class token.
MC_BOTH int first_units(const EncodeCall& c) {
    return 1 + c.windows * ((c.embed + kColumns - 1) / kColumns) + (c.rows_each > c.tokens ? c.windows : 0);
}

template <class M>
MC_DEVICE void first_unit(const EncodeCall& c, int unit) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    if (unit == 0) {
        for (int i = thread; i < c.rows_each * c.half; i += size) {
            const double frequency = exp2(-c.log2_theta * (i % c.half) / c.half);
            float cos, sin;
            cos_sin(turn_of(i / c.half, step_of(frequency)), cos, sin);
            write(c.phases + 2 * i, cos);
            write(c.phases + 2 * i + 1, sin);
        }
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

// One head of a window: a warp a query, a lane a key, then a lane some dimensions of the values.
template <class M>
MC_DEVICE void attend(const EncodeCall& c, SharedMemory shared, int unit) {
    constexpr int kEach = kMostHeadDims / 32;
    const Span<float> weights = shared.take<float>(static_cast<int>(blockDim.x));  // of a warp's 32 keys
    const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
    const int n = unit / c.heads, dims = 2 * c.half, first = unit % c.heads * dims;
    const float scale = rsqrtf(static_cast<float>(dims));
    const auto row = [&](int j) { return row_of<M>(c.turned, static_cast<int64_t>(n) * c.rows_each + j, 3 * c.width); };
    for (int i = static_cast<int>(threadIdx.x) / 32; i < c.rows_each; i += warps) {
        const char* query = row(i);
        float top = -3.0e38f, total = 0.0f, sums[kEach] = {};
        for (int from = 0; from < c.rows_each; from += 32) {
            const int j = from + lane;
            const bool some = j < c.rows_each;
            const char* key = row(some ? j : 0);
            float x = 0.0f;
#pragma unroll 8
            for (int d = 0; d < dims; ++d) x += load<M>(query, first + d) * load<M>(key, c.width + first + d);
            x = some ? x * scale : -3.0e38f;
            float greatest = x;
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, lanes));
            }
            greatest = max(greatest, top);
            const float p = some ? expf(x - greatest) : 0.0f, shrink = expf(top - greatest);
            top = greatest;
            total = total * shrink + p;
#pragma unroll
            for (int e = 0; e < kEach; ++e) sums[e] *= shrink;
            weights[static_cast<int>(threadIdx.x)] = p;
            __syncwarp();
#pragma unroll 4
            for (int k = 0; k < min(32, c.rows_each - from); ++k) {
                const float weight = weights[static_cast<int>(threadIdx.x) - lane + k];
                const char* value = row(from + k);
#pragma unroll
                for (int e = 0; e < kEach; ++e) {
                    if (lane + 32 * e < dims) sums[e] += weight * load<M>(value, 2 * c.width + first + lane + 32 * e);
                }
            }
            __syncwarp();
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
        char* to = row_of<M>(c.attention, static_cast<int64_t>(n) * c.rows_each + i, c.width);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            if (lane + 32 * e < dims) store<M>(to, first + lane + 32 * e, sums[e] / total);
        }
    }
}

// One gist of a window: the final norm of its rows, weighted. weights: 2 rows_each floats of shared memory.
template <class M>
MC_DEVICE void pool(const EncodeCall& c, SharedMemory shared, int unit) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x), lane = thread % 32;
    const Span<float> logits = shared.take<float>(c.rows_each), inverse = shared.take<float>(c.rows_each);
    const int n = unit / c.gists, g = unit % c.gists;
    const char* query = c.pool_q.at(0, g);
    const auto row = [&](int j) { return row_of<M>(c.h, static_cast<int64_t>(n) * c.rows_each + j, c.width); };
    for (int j = thread / 32; j < c.rows_each; j += size / 32) {
        float squares = 0.0f, dot = 0.0f;
        for (int i = lane; i < c.width; i += 32) {
            const float x = load<M>(row(j), i);
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
    float top = -3.0e38f, total = 0.0f;
    for (int j = 0; j < c.rows_each; ++j) top = max(top, logits[j]);
    for (int j = 0; j < c.rows_each; ++j) total += expf(logits[j] - top);
    char* to = row_of<M>(c.pooled, static_cast<int64_t>(n) * c.gists + g, c.width);
    for (int i = thread; i < c.width; i += size) {
        float sum = 0.0f;
        if (c.pool == MC_POOL_CLS) {
            sum = load<M>(row(c.rows_each - 1), i) * inverse[c.rows_each - 1];
        } else {  // the mean's logits are all 0
#pragma unroll 4
            for (int j = 0; j < c.rows_each; ++j) {
                sum += expf(logits[j] - top) / total * inverse[j] * load<M>(row(j), i);
            }
        }
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

// The kernel of stream.cuh: its stages that are no product, and their order.
#pragma once

#include "prefetch.cuh"
#include "stream.cuh"

namespace mc::cuda {

// Eight elements of a weight, which need not begin on 16 bytes.
MC_DEVICE Quad eight_of(const char* row, int piece) {
    const char* const at = row + 16 * piece;
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0) return read_constant<Quad>(at);
    Quad out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.x[i] = read_constant<uint16_t>(at + 4 * i) |
                   static_cast<uint32_t>(read_constant<uint16_t>(at + 4 * i + 2)) << 16;
    }
    return out;
}

// One gist of a window, as `pool`: a warp has four rows at a time, whose loads are on their way together.
template <class E>
MC_DEVICE void pool_window(const EncodeCall& c, SharedMemory shared, int unit) {
    using M = TensorMath<E>;
    constexpr int N = 4;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warps = stream_warps();
    const Span<float> logits = shared.take<float>(c.rows_each), weights = shared.take<float>(c.rows_each);
    const int64_t first = static_cast<int64_t>(unit / c.gists) * c.rows_each;
    const char *const query = c.pool_q.at(0, unit % c.gists), *const norm = c.final_norm.data;
    for (int from = thread / 32; from < c.rows_each; from += N * warps) {
        float squares[N] = {}, dots[N] = {};
#pragma unroll 2
        for (int piece = lane; 8 * piece < c.width; piece += 32) {
            Quad x[N], by{}, q{};
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int j = from + n * warps;
                x[n] = j < c.rows_each ? read<Quad>(row_of<M>(c.h, first + j, c.width) + 16 * piece) : Quad{};
            }
            if (c.pool == MC_POOL_SOFTMAX) {
                by = eight_of(norm, piece);
                q = read_constant<Quad>(query + 16 * piece);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low_by = low_of<E>(by.x[i]) * low_of<E>(q.x[i]);
                const float high_by = high_of<E>(by.x[i]) * high_of<E>(q.x[i]);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float low = low_of<E>(x[n].x[i]), high = high_of<E>(x[n].x[i]);
                    squares[n] += low * low + high * high;
                    dots[n] += low * low_by + high * high_by;
                }
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                squares[n] += __shfl_xor_sync(0xffffffffu, squares[n], lanes);
                dots[n] += __shfl_xor_sync(0xffffffffu, dots[n], lanes);
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int j = from + n * warps;
            if (lane != 0 || j >= c.rows_each) continue;
            weights[j] = inverse_rms(squares[n], c.width);
            logits[j] = dots[n] * weights[j] * rsqrtf(static_cast<float>(c.width));
        }
    }
    __syncthreads();
    // Of a class token, that row alone. The mean's logits are all 0. Each warp sums on its own.
    const int begin = c.pool == MC_POOL_CLS ? c.rows_each - 1 : 0;
    float top = -3.0e38f, total = 0.0f;
    for (int j = begin + lane; j < c.rows_each; j += 32) top = max(top, logits[j]);
    for (int lanes = 1; lanes < 32; lanes *= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, lanes));
    for (int j = begin + lane; j < c.rows_each; j += 32) total += expf(logits[j] - top);
    for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    for (int j = begin + thread; j < c.rows_each; j += stream_threads()) weights[j] *= expf(logits[j] - top) / total;
    __syncthreads();
    char* const to = row_of<M>(c.pooled, unit, c.width);
    for (int i = thread; 2 * i < c.width; i += stream_threads()) {
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (int j = begin; j < c.rows_each; ++j) {
            const auto pair = read<uint32_t>(row_of<M>(c.h, first + j, c.width) + 4 * i);
            low += weights[j] * low_of<E>(pair);
            high += weights[j] * high_of<E>(pair);
        }
        write(to + 4 * i, pack_pair<E>(low * M::weight(c, norm, 2 * i), high * M::weight(c, norm, 2 * i + 1)));
    }
    __syncthreads();
}

// What stands beside the first product, from the last block on: those have no unit of it where windows are few. Phases,
// whose powers are slow, a number a thread.
template <class E>
MC_DEVICE void beside_first(const EncodeCall& c, int size) {
    const int blocks = static_cast<int>(gridDim.x), last = blocks - 1 - static_cast<int>(blockIdx.x);
    const int units = first_units(c);
    const int turn = (last + blocks - (units - 1) % blocks) % blocks;
    for (int i = turn * size + static_cast<int>(threadIdx.x); i < c.rows_each * c.half; i += blocks * size) {
        write_phase(c, i);
    }
    for (int unit = 1 + last; unit < units; unit += blocks) first_unit<TensorMath<E>>(c, unit);
}

template <class E>
__global__ void __launch_bounds__(kEncodeThreads, 1) encode_stream(const __grid_constant__ EncodeCall c) {
    using M = TensorMath<E>;
    MC_SHARED_MEMORY(memory);
    // First what the first stage wants: it would wait behind 16 MB of the others.
    const Matrix tokens{c.blocks, c.blocks_n, c.blocks_k};
    prefetch_rows(tokens, c.windows, c.tokens, 2 * static_cast<int64_t>(c.embed));
    const int stages = c.stages(), gists = c.windows * c.gists;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        Streaming<E> s(c, memory);  // anew: what a stage has held is not kept through those without a product
        const Step step = c.step(stage);
        const Linear l(c, step, step == kFirst || step >= kPool ? 0 : c.layer(stage));
        const bool product = step != kAttend && step != kPool && step != kMatch;
        if (stage == 0) {
            s.hold(l);
            prefetch_weights(c, 2);
            beside_first<E>(c, stream_threads());
        } else {
            GridArrival arrival = grid_arrive();
            if (product) s.hold(l);
            if (!MC_FAULT(21)) grid_wait(arrival);
        }
        if (product) {
            if (l.paired) {
                s.template product<true>(l);
            } else {
                s.template product<false>(l);
            }
        } else if (step == kAttend) {
            s.attend();
        } else if (step == kPool) {
            for (int unit = s.block; unit < gists; unit += s.blocks) pool_window<E>(c, SharedMemory(memory), unit);
        } else {
            for (int unit = s.block; unit < gists; unit += s.blocks) match<M>(c, SharedMemory(memory), unit);
        }
    }
}

}  // namespace mc::cuda

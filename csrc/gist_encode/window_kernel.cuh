// The kernel of window.cuh: its stages and their order.
#pragma once

#include "stream_kernel.cuh"
#include "window.cuh"

namespace mc::cuda {

template <class E>
struct Window {
    using M = TensorMath<E>;
    const EncodeCall& c;
    const WindowMemory& memory;
    // Anew in each stage: what a stage makes of them is not kept in registers through the others.
    int thread = fresh(static_cast<int>(threadIdx.x)), size = fresh(static_cast<int>(blockDim.x));
    int lane = thread % 32, warp = thread / 32, warps = size / 32;
    int block = fresh(static_cast<int>(blockIdx.x)), blocks = fresh(static_cast<int>(gridDim.x));

    MC_DEVICE Window(const EncodeCall& call, const WindowMemory& m) : c(call), memory(m) {}

    // Row i of the block's weights of a stage.
    MC_DEVICE const char* weight_row(const Linear& l, int first, int i) const {
        const int unit = first + i / kUnitWeights * blocks, r = i % kUnitWeights;
        if (!l.paired) return l.w.at(l.layer, unit * kUnitWeights + r);
        return l.weight(c, unit * (kUnitWeights / 2) + r % 8, r >= 8);
    }

    // Copies of all weights of the block: a lane counts what a stage takes, a warp asks for a stage, the first two stages'
    // rows ahead of the others'.
    MC_DEVICE void ask() const {
        const int stages = c.stages();
        int end = lane < stages ? held(lane) : 0;
        const int own = end;
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int below = __shfl_sync(0xffffffffu, end, max(lane - lanes, 0));
            end += lane >= lanes ? below : 0;
        }
        const int begin = end - own;
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
            for (int s = warp; s < stages; s += warps) {
                if ((s < 2) == (pass == 0)) ask_stage(s, __shfl_sync(0xffffffffu, begin, s));
            }
            __syncthreads();
        }
    }
    MC_DEVICE int layer_of(int s, Step step) const { return step == kFirst || step >= kPool ? 0 : c.layer(s); }
    // Bytes of a stage's weights.
    MC_DEVICE int held(int s) const {
        const Step step = c.step(s);
        if (!is_product(step)) return 0;
        const Linear l(c, step, layer_of(s, step));
        return StageUnits(c, step, l.layer, blocks).of(block, blocks) * kUnitWeights * StageUnits::row_bytes(l.inner);
    }
    MC_DEVICE void ask_stage(int s, int at) const {
        const Step step = c.step(s);
        if (!is_product(step)) return;
        const Linear l(c, step, layer_of(s, step));
        const StageUnits u(c, step, l.layer, blocks);
        const int rows = u.of(block, blocks) * kUnitWeights, bytes = StageUnits::row_bytes(l.inner);
        if (rows == 0) return;
        if (lane == 0) expect_bytes(&memory.arrivals[s], rows * 2 * l.inner);
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < rows; i += 32) {
            copy_row(memory.weights.data + at + i * bytes, weight_row(l, u.first(block, blocks), i), 2 * l.inner,
                     &memory.arrivals[s]);
        }
    }

    // Where a sum goes, and what it is added to or turned by (nullptr: neither): known before the stage may begin.
    struct End {
        const char* other;
        char* to;
    };
    template <bool kPaired>
    MC_DEVICE End end_of(const Linear& l, int o, int r) const {
        if (!kPaired) {
            const int n = l.step != kFirst || c.windows == 1 ? 0 : r / c.tokens;
            char* const h = row_of<M>(c.h, r + n * (c.rows_each - c.tokens), c.width) + 2 * o;
            return {l.step == kFirst ? c.level.data + 2 * o : h, h};
        }
        if (l.step == kGateUp) return {nullptr, row_of<M>(c.swiglu, r, c.ffn) + 2 * o};
        const int head = o / c.half, j = c.windows == 1 ? r : r % c.rows_each;
        const float* const phase = c.phases + 2 * (j * c.half + o - head * c.half);
        return {o < c.width ? reinterpret_cast<const char*>(phase) : nullptr,
                row_of<M>(c.turned, r, 3 * c.width) + 2 * (o + head * c.half)};
    }
    template <bool kPaired>
    MC_DEVICE void load_other(const Linear& l, const End& end, float (&to)[2]) const {
        if (end.other == nullptr) return;
        if (kPaired) {
            to[0] = read<float>(end.other);
            to[1] = read<float>(end.other + 4);
        } else if (l.step == kFirst) {
            to[0] = M::weight(c, end.other, 0);
        } else {
            to[0] = load<M>(end.other, 0);
        }
    }
    template <bool kPaired>
    MC_DEVICE void store_sum(const Linear& l, const End& end, float a, float b, const float (&other)[2]) const {
        if (!kPaired) {
            store<M>(end.to, 0, a + other[0]);
        } else if (l.step == kGateUp) {
            store<M>(end.to, 0, a / (1.0f + expf(-a)) * b);
        } else {
            store<M>(end.to, 0, end.other ? a * other[0] - b * other[1] : a);
            store<M>(end.to + 2 * c.half, 0, end.other ? b * other[0] + a * other[1] : b);
        }
    }

    // Sums of 32 columns at a time: chunks `group`, `group + groups` .. Rows times themselves on tensor cores are two
    // instructions where squaring and adding are 32: their squares are the diagonal.
    template <bool kPaired>
    MC_DEVICE void sum(const Linear& l, const char* weights, const char* const (&inputs)[4], int group, int groups,
                       float (&s)[4][4], float (&squares)[4][4]) const {
        constexpr int kTogether = kPaired ? 4 : 8;
        const int g = lane / 4, piece = 8 * (lane % 4), chunks = l.inner / kChunk;
        const int bytes = StageUnits::row_bytes(l.inner);
        const char *const upper = weights + g * bytes, *const lower = upper + 8 * bytes;
#pragma unroll 1
        for (int from = group; from < chunks; from += kTogether * groups) {
            Quad x[kTogether][4], gain[kTogether];
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int at = 2 * (min(from + j * groups, chunks - 1) * kChunk + piece);
#pragma unroll
                for (int t = 0; t < 4; ++t) x[j][t] = read<Quad>(inputs[t] + at);
                if (kPaired) gain[j] = read_constant<Quad>(l.gain + at);
            }
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int at = 2 * ((from + j * groups) * kChunk + piece);
                if (from + j * groups >= chunks) continue;
                const Quad w0 = *reinterpret_cast<const Quad*>(upper + at);
                const Quad w1 = *reinterpret_cast<const Quad*>(lower + at);
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    if (kPaired || l.normed) multiply<E>(squares[t], x[j][t], x[j][t], x[j][t]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (kPaired) x[j][t].x[i] = scale_pair<E>(x[j][t].x[i], gain[j].x[i]);
                    }
                    multiply<E>(s[t], w0, w1, x[j][t]);
                }
            }
        }
    }

    // The block's units, two at a time, each by its share of the warps. weights: the stage's. wait: until what the stage
    // reads is there.
    template <bool kPaired, class Wait>
    MC_DEVICE void product(const Linear& l, const char* weights, int first, int units, const Wait& wait) const {
        constexpr int kOutputs = kPaired ? kUnitWeights / 2 : kUnitWeights, kItems = kOutputs * kWindowRows;
        const char* inputs[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int r = min(8 * t + lane / 4, l.rows - 1), n = l.step != kFirst || c.windows == 1 ? 0 : r / c.tokens;
            inputs[t] = l.step == kFirst ? c.blocks + n * c.blocks_n + (r - n * c.tokens) * c.blocks_k
                                         : input_row<M>(c, l, r);
        }
        const int most = min(min(units, 2), warps), groups = warps / most, member = warp / groups;
        for (int pass = 0; pass < units; pass += most) {
            const int together = min(most, units - pass);
            const auto output = [&](int i) { return (first + (pass + i / kItems) * blocks) * kOutputs + i % kOutputs; };
            const auto row = [&](int i) { return i / kOutputs % kWindowRows; };
            End end = end_of<kPaired>(l, output(thread), min(row(thread), l.rows - 1));
            float early[2] = {};
            if (pass == 0) wait();
            if (thread < together * kItems) load_other<kPaired>(l, end, early);
            if (member < together) {
                float s[4][4] = {}, squares[4][4] = {};
                const int unit_bytes = kUnitWeights * StageUnits::row_bytes(l.inner);
                sum<kPaired>(l, weights + (pass + member) * unit_bytes, inputs, warp % groups, groups, s, squares);
#pragma unroll
                for (int t = 0; t < 4; ++t) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        using P = Places<true>;
                        memory.sums[warp * kWindowSums + P::row(lane, t, i) * kWindowStep + P::output(lane, t, i)] =
                            s[t][i];
                    }
                    const int g = lane / 4;
                    if (l.normed && lane % 4 == g / 2) {
                        memory.squares[warp * kWindowRows + 8 * t + g] = g % 2 ? squares[t][1] : squares[t][0];
                    }
                }
            }
            __syncthreads();
            for (int i = thread; i < together * kItems; i += size) {
                const int r = row(i), at = r * kWindowStep + i % kOutputs, from = i / kItems * groups;
                float a = 0.0f, b = 0.0f, square = 0.0f;
#pragma unroll 8
                for (int w = from; w < from + groups; ++w) {
                    a += memory.sums[w * kWindowSums + at];
                    if (kPaired) b += memory.sums[w * kWindowSums + at + kOutputs];
                    if (l.normed) square += memory.squares[w * kWindowRows + r];
                }
                if (r >= l.rows) continue;
                const float scale = l.normed ? inverse_rms(square, l.inner) : 1.0f;
                if (i != thread) {
                    end = end_of<kPaired>(l, output(i), r);
                    load_other<kPaired>(l, end, early);
                }
                store_sum<kPaired>(l, end, a * scale, b * scale, early);
            }
            if (pass + most < units) __syncthreads();
        }
    }

    // A gist's pooled row, by every block that projects it, and the block's outputs of it.
    MC_DEVICE void project(const Linear& l, const char* weights, int first, int units, int gist) const {
        const int rows = c.rows_each;
        const Span<float> logits = memory.squares.part(0, kWindowRows);
        const Span<float> inverse = memory.squares.part(kWindowRows, kWindowRows);
        const Span<float> parts = memory.sums.part(0, static_cast<int64_t>(warps) * c.width);
        const Span<float> pooled = memory.sums.part(static_cast<int64_t>(warps) * c.width, c.width);
        const char *const h = row_of<M>(c.h, static_cast<int64_t>(gist / c.gists) * rows, c.width);
        const char *const query = c.pool_q.at(0, gist % c.gists), *const norm = c.final_norm.data;
        for (int j = warp; j < rows; j += warps) {
            float squares = 0.0f, dot = 0.0f;
            for (int piece = lane; 8 * piece < c.width; piece += 32) {
                const Quad x = read<Quad>(h + 2 * j * c.width + 16 * piece);
                const Quad by = eight_of(norm, piece), q = read_constant<Quad>(query + 16 * piece);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float low = low_of<E>(x.x[i]), high = high_of<E>(x.x[i]);
                    squares += low * low + high * high;
                    dot += low * (low_of<E>(by.x[i]) * low_of<E>(q.x[i])) +
                           high * (high_of<E>(by.x[i]) * high_of<E>(q.x[i]));
                }
            }
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
                dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
            }
            if (lane != 0) continue;
            inverse[j] = inverse_rms(squares, c.width);
            logits[j] = c.pool == MC_POOL_SOFTMAX ? dot * inverse[j] * rsqrtf(static_cast<float>(c.width)) : 0.0f;
        }
        __syncthreads();
        // Of a class token, that row alone. The mean's logits are all 0.
        const int begin = c.pool == MC_POOL_CLS ? rows - 1 : 0;
        const bool counts = lane >= begin && lane < rows;
        float top = counts ? logits[lane] : -3.0e38f;
        for (int lanes = 1; lanes < 32; lanes *= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, lanes));
        const float p = counts ? expf(logits[lane] - top) : 0.0f;
        float total = p;
        for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
        const float weight = counts ? inverse[lane] * p / total : 0.0f;
        for (int from = 0; 8 * from < c.width; from += 32) {
            const int piece = from + lane;
            float s[8] = {};
            for (int j = warp; j < rows; j += warps) {
                const float by = __shfl_sync(0xffffffffu, weight, j);
                if (j < begin || 8 * piece >= c.width) continue;
                const Quad x = read<Quad>(h + 2 * j * c.width + 16 * piece);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[2 * i] += by * low_of<E>(x.x[i]);
                    s[2 * i + 1] += by * high_of<E>(x.x[i]);
                }
            }
            if (8 * piece >= c.width) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) parts[warp * c.width + 8 * piece + i] = s[i];
        }
        __syncthreads();
        for (int i = thread; i < c.width; i += size) {
            float s = 0.0f;
#pragma unroll 8
            for (int w = 0; w < warps; ++w) s += parts[w * c.width + i];
            pooled[i] = s * M::weight(c, norm, i);
        }
        __syncthreads();
        for (int i = warp; i < units * kUnitWeights; i += warps) {
            const char* const w = weights + i * StageUnits::row_bytes(l.inner);
            float s = 0.0f;
            for (int piece = lane; 8 * piece < c.width; piece += 32) {
                const Quad x = *reinterpret_cast<const Quad*>(w + 16 * piece);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    s += low_of<E>(x.x[k]) * pooled[8 * piece + 2 * k] + high_of<E>(x.x[k]) * pooled[8 * piece + 2 * k + 1];
                }
            }
            for (int lanes = 1; lanes < 32; lanes *= 2) s += __shfl_xor_sync(0xffffffffu, s, lanes);
            const int o = (first + i / kUnitWeights * blocks) * kUnitWeights + i % kUnitWeights;
            if (lane == 0) write(c.y + static_cast<int64_t>(gist) * c.embed + o, s);
        }
        __syncthreads();
    }
};

template <class E>
__global__ void __launch_bounds__(kWindowThreads, 1) encode_window(const __grid_constant__ EncodeCall c) {
    MC_SHARED_MEMORY(base);
    const int stages = c.stages(), gists = c.windows * c.gists;
    const WindowMemory memory(SharedMemory(base), c, static_cast<int>(blockDim.x) / 32);
    if (threadIdx.x == 0) {
        write(c.flags + blockIdx.x, uint32_t{0});
        expect_arrivals(memory.arrivals.data, stages);
    }
    __syncthreads();
    Window<E>(c, memory).ask();
    beside_first<E>(c, static_cast<int>(blockDim.x));
    prefetch_rows(c.attn_norm, c.layers, 1, 2 * static_cast<int64_t>(c.width));
    prefetch_rows(c.ffn_norm, c.layers, 1, 2 * static_cast<int64_t>(c.width));
    prefetch_rows(c.final_norm, 1, 1, 2 * static_cast<int64_t>(c.width));
    prefetch_rows(c.pool_q, 1, c.gists, 2 * static_cast<int64_t>(c.width));
    int at = 0, waits = 0, from = 0, count = 0;  // waits: for the stage, of `count` blocks from `from` on
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        const Step step = c.step(stage);
        if (step == kPool) continue;  // with the projection
        const Window<E> window(c, memory);
        const int block = window.block, blocks = window.blocks;
        const Linear l(c, step, step == kFirst || step >= kPool ? 0 : c.layer(stage));
        StageUnits u(c, step, l.layer, blocks);
        if (step == kAttend) u.units = query_units(c), u.base = 0;
        if (step == kMatch) u.units = gists, u.base = 0;
        const int units = u.of(block, blocks);
        // Behind the first stage for all, then for those of the stage before. Under emulation they meet in each.
        const auto wait = [&] {
            if (stage > 0 && waits == 0 && !MC_FAULT(21)) grid_barrier();
            if (waits > 0) wait_for_stage(c, waits, from, count, blocks);
        };
        if (units == 0) {
            if (waits == 0 || kStagesMeet) wait();
        } else if (step == kAttend) {
            wait();
            for (int unit = block + blocks * window.warp; unit < u.units; unit += blocks * window.warps) {
                attend_unit<E, kWindowHead>(c, unit);
            }
        } else if (step == kMatch) {
            wait();
            for (int unit = block; unit < gists; unit += blocks) match<TensorMath<E>>(c, SharedMemory(base), unit);
        } else {
            const char* const weights = memory.weights.data + at;
            const int first = u.first(block, blocks);
            at += units * kUnitWeights * StageUnits::row_bytes(l.inner);
            wait_for_rows(&memory.arrivals[stage]);
            if (step == kProject) {
                wait();
                for (int gist = 0; gist < gists; ++gist) window.project(l, weights, first, units, gist);
            } else if (l.paired) {
                window.template product<true>(l, weights, first, units, wait);
            } else {
                window.template product<false>(l, weights, first, units, wait);
            }
        }
        waits = stage;
        from = u.base;
        count = min(u.units, blocks);
        if (units > 0) finish_stage(c, stage);
    }
}

}  // namespace mc::cuda

// The encoder's linear maps: 16 outputs (or pairs of them) of 32 rows are a unit, which a block does; its warps share the
// inner dimension, and their sums meet in shared memory. A norm in front costs no pass: the gain multiplies the operand,
// squares are summed beside it, and the sum is scaled.
#pragma once

#include "fragments.cuh"
#include "net.cuh"

namespace mc::cuda {

constexpr int kUnitOutputs = 16, kUnitRows = 32, kChunk = 32, kUnit = kUnitOutputs * kUnitRows;

struct Linear {
    Step step;
    int layer, rows, outputs, inner;  // outputs: pairs, where `paired`
    Matrix w;
    const char* gain;  // nullptr: none
    bool normed, paired;

    MC_BOTH Linear(const EncodeCall& c, Step step_, int layer_) : step(step_), layer(layer_) {
        rows = step == kFirst ? c.windows * c.tokens : step == kProject ? c.windows * c.gists : c.rows;
        inner = step == kFirst ? c.embed : step == kDown ? c.ffn : c.width;
        outputs = step == kQkv ? 3 * c.width / 2 : step == kGateUp ? c.ffn : step == kProject ? c.embed : c.width;
        w = step == kFirst       ? c.w_in
            : step == kQkv       ? c.qkv
            : step == kAttendOut ? c.attn_out
            : step == kGateUp    ? c.gate_up
            : step == kDown      ? c.down
                                 : c.w_out;
        gain = step == kQkv ? c.attn_norm.at(layer) : step == kGateUp ? c.ffn_norm.at(layer) : nullptr;
        normed = step == kFirst || step == kQkv || step == kGateUp;
        paired = step == kQkv || step == kGateUp;
    }
    MC_BOTH int units() const {
        return (outputs + kUnitOutputs - 1) / kUnitOutputs * ((rows + kUnitRows - 1) / kUnitRows);
    }
    // The rows of the weight that output i is made of: gate and up, or both members of a pair that turns (heads have `half`
    // pairs each, one head after another through queries, keys and values).
    MC_DEVICE int first(const EncodeCall& c, int i) const { return step == kQkv ? i + i / c.half * c.half : i; }
    MC_DEVICE int second(const EncodeCall& c, int i) const { return step == kQkv ? first(c, i) + c.half : c.ffn + i; }
    MC_DEVICE int row(const EncodeCall& c, int i, bool other) const { return other ? second(c, i) : first(c, i); }
    MC_DEVICE const char* weight(const EncodeCall& c, int i, bool other) const { return w.at(layer, row(c, i, other)); }
};

template <class M>
MC_DEVICE const char* input_row(const EncodeCall& c, const Linear& l, int r) {
    if (l.step == kFirst) return c.blocks + r / c.tokens * c.blocks_n + r % c.tokens * c.blocks_k;
    char* const base = l.step == kAttendOut ? c.attention
                       : l.step == kDown    ? c.swiglu
                       : l.step == kProject ? c.pooled
                                            : c.h;
    return row_of<M>(base, r, l.inner);
}

// What a warp sums: of output `output(lane, t, i)` and row `row(lane, t, i)`; squares of row `square_row(lane, t)`.
struct Sums {
    float a[4][4], b[4][4], squares[4];
};

template <bool kTensor>
struct Places {
    static MC_DEVICE int output(int lane, int t, int i) { return kTensor ? lane / 4 + i / 2 * 8 : 4 * (lane / 8) + t; }
    static MC_DEVICE int row(int lane, int t, int i) {
        return kTensor ? 8 * t + 2 * (lane % 4) + i % 2 : 4 * (lane % 8) + i;
    }
};

template <class E>
MC_DEVICE void square_and_gain(Quad& x, const Quad& gain, bool gained, float& squares) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = low_of<E>(x.x[i]), high = high_of<E>(x.x[i]);
        squares += low * low + high * high;
        if (gained) x.x[i] = pack_pair<E>(low * low_of<E>(gain.x[i]), high * high_of<E>(gain.x[i]));
    }
}

template <class E>
MC_DEVICE void sum_chunks(TensorMath<E>, const EncodeCall& c, const Linear& l, int output, int row, Sums& s) {
    using M = TensorMath<E>;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, piece = lane % 4, step = kChunk * static_cast<int>(blockDim.x) / 32;
    const char *weights[2][2], *inputs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int o = output + g + 8 * i;
        weights[0][i] = o < l.outputs ? l.weight(c, o, false) : nullptr;
        weights[1][i] = o < l.outputs && l.paired ? l.weight(c, o, true) : nullptr;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const int r = row + 8 * t + g;
        inputs[t] = r < l.rows ? input_row<M>(c, l, r) : nullptr;
    }
#pragma unroll 2
    for (int k = warp * kChunk; k < l.inner; k += step) {
        const int at = k + 8 * piece;
        const bool inside = at < l.inner;
        Quad w[2][2], x[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                w[n][i] = inside && weights[n][i] ? read_constant<Quad>(weights[n][i] + 2 * at) : Quad{};
            }
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) x[t] = inside && inputs[t] ? read<Quad>(inputs[t] + 2 * at) : Quad{};
        if (l.normed) {
            Quad gain{};
            if (l.gain && inside) gain = read_constant<Quad>(l.gain + 2 * at);
#pragma unroll
            for (int t = 0; t < 4; ++t) square_and_gain<E>(x[t], gain, l.gain != nullptr, s.squares[t]);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            multiply<E>(s.a[t], w[0][0], w[0][1], x[t]);
            if (l.paired) multiply<E>(s.b[t], w[1][0], w[1][1], x[t]);
        }
    }
}

MC_DEVICE void sum_chunks(PlainMath, const EncodeCall& c, const Linear& l, int output, int row, Sums& s) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int step = kChunk * static_cast<int>(blockDim.x) / 32;
    const char *inputs[4], *weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = row + 4 * (lane % 8) + i, o = output + 4 * (lane / 8) + i;
        inputs[i] = r < l.rows ? input_row<PlainMath>(c, l, r) : nullptr;
        weights[0][i] = o < l.outputs ? l.weight(c, o, false) : nullptr;
        weights[1][i] = o < l.outputs && l.paired ? l.weight(c, o, true) : nullptr;
    }
    for (int from = warp * kChunk; from < l.inner; from += step) {
        for (int k = from; k < min(from + kChunk, l.inner); ++k) {
            const float gain = l.gain ? PlainMath::weight(c, l.gain, k) : 1.0f;
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = !inputs[i]         ? 0.0f
                       : l.step == kFirst ? PlainMath::block(c, inputs[i], k)
                                          : load<PlainMath>(inputs[i], k);
                s.squares[i] += x[i] * x[i];
                x[i] *= gain;
            }
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const float a = weights[0][t] ? PlainMath::weight(c, weights[0][t], k) : 0.0f;
                const float b = weights[1][t] ? PlainMath::weight(c, weights[1][t], k) : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s.a[t][i] += a * x[i];
                    s.b[t][i] += b * x[i];
                }
            }
        }
    }
}

// Sums a and b of output o and row r, scaled, go where the step wants them.
template <class M>
MC_DEVICE void finish(const EncodeCall& c, const Linear& l, int o, int r, float a, float b) {
    if (l.step == kFirst) {
        const int row = r / c.tokens * c.rows_each + r % c.tokens;
        store<M>(row_of<M>(c.h, row, c.width), o, a + M::weight(c, c.level.data, o));
    } else if (l.step == kQkv) {
        char* to = row_of<M>(c.turned, r, 3 * c.width);
        const int first = l.first(c, o);
        if (o < c.width) {  // queries and keys
            const float* phase = c.phases + 2 * (r % c.rows_each * c.half + o % (c.width / 2) % c.half);
            const float cos = read<float>(phase), sin = read<float>(phase + 1), x = a * cos - b * sin;
            b = b * cos + a * sin;
            a = x;
        }
        store<M>(to, first, a);
        store<M>(to, first + c.half, b);
    } else if (l.step == kGateUp) {
        store<M>(row_of<M>(c.swiglu, r, c.ffn), o, a / (1.0f + expf(-a)) * b);
    } else if (l.step == kProject) {
        write(c.y + static_cast<int64_t>(r) * c.embed + o, a);
    } else {
        char* h = row_of<M>(c.h, r, c.width);
        store<M>(h, o, load<M>(h, o) + a);
    }
}

struct ProductMemory {
    Span<float> sums, squares;  // [warps, a and b, 16, 32], [warps, 32]

    MC_DEVICE ProductMemory(SharedMemory shared, int warps)
        : sums(shared.take<float>(warps * 2 * kUnit)), squares(shared.take<float>(warps * kUnitRows)) {}
    static int64_t bytes(int64_t warps) {
        return shared_bytes_of<float>(warps * 2 * kUnit) + shared_bytes_of<float>(warps * kUnitRows);
    }
};

template <class M>
MC_DEVICE void product(const EncodeCall& c, const Linear& l, SharedMemory shared, int unit) {
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    const int lane = thread % 32, warp = thread / 32, warps = size / 32;
    const ProductMemory memory(shared, warps);
    const int row_units = (l.rows + kUnitRows - 1) / kUnitRows;
    const int output = unit / row_units * kUnitOutputs, row = unit % row_units * kUnitRows;
    Sums s = {};
    sum_chunks(M{}, c, l, output, row, s);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            using P = Places<M::kTensor>;
            const int at = P::output(lane, t, i) * kUnitRows + P::row(lane, t, i);
            memory.sums[2 * warp * kUnit + at] = s.a[t][i];
            if (l.paired) memory.sums[(2 * warp + 1) * kUnit + at] = s.b[t][i];
        }
        float squares = s.squares[t];
        if (M::kTensor) {
            squares += __shfl_xor_sync(0xffffffffu, squares, 1);
            squares += __shfl_xor_sync(0xffffffffu, squares, 2);
            if (lane % 4 == 0) memory.squares[warp * kUnitRows + 8 * t + lane / 4] = squares;
        } else if (lane < 8) {
            memory.squares[warp * kUnitRows + 4 * lane + t] = squares;
        }
    }
    __syncthreads();
    for (int i = thread; i < kUnit; i += size) {
        const int o = output + i / kUnitRows, r = row + i % kUnitRows;
        if (o >= l.outputs || r >= l.rows) continue;
        float a = 0.0f, b = 0.0f, squares = 0.0f;
        for (int w = 0; w < warps; ++w) {
            a += memory.sums[2 * w * kUnit + i];
            if (l.paired) b += memory.sums[(2 * w + 1) * kUnit + i];
            squares += memory.squares[w * kUnitRows + i % kUnitRows];
        }
        const float scale = l.normed ? inverse_rms(squares, l.inner) : 1.0f;
        finish<M>(c, l, o, r, a * scale, b * scale);
    }
    __syncthreads();
}

}  // namespace mc::cuda

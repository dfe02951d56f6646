// The score pass on 16-bit entries: products, then the head, whose two layers are products of 16 hidden units and 8
// entries of a warp. See fast_rows.cuh for numbers in two parts.
#pragma once

#include "fast_rows.cuh"
#include "fast_streams.cuh"

namespace mc::cuda {

constexpr int kFastInputs = 256;  // of the head, at most

struct FastHead {
    Span<float> out, values;     // as fast_products leaves it; [8, heads * head_values]
    Span<uint16_t> high, low;    // [kTile, step]
    int step;
};

MC_DEVICE FastHead fast_head(const LensCall& c, const StreamMemory& memory) {
    SharedMemory shared(reinterpret_cast<char*>(memory.out.data));
    FastHead h{};
    h.step = (c.inputs + 31) / 32 * 32 + 8;
    h.out = shared.take<float>(kFastVectors * kFastOut);
    h.values = shared.take<float>(static_cast<int64_t>(kFastQueries) * c.heads * c.head_values);
    h.high = shared.take<uint16_t>(static_cast<int64_t>(kTile) * h.step);
    h.low = shared.take<uint16_t>(static_cast<int64_t>(kTile) * h.step);
    return h;
}

// Inputs of the head for the tile's entries, each by four threads: every fourth head, direct row and feature.
template <class E>
MC_DEVICE void fast_inputs(const LensCall& c, const FastHead& head, float inverse, int64_t entry) {
    const int n = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile, q = c.q;
    const int dv = c.head_values, width = c.heads * dv, direct = width + c.heads, features = direct + c.n_direct;
    const auto put = [&](int i, float x) {
        split_number<E>(x, head.high[n * head.step + i], head.low[n * head.step + i]);
    };
#pragma unroll 1
    for (int h = part; h < c.heads; h += 4) {
        float p[kFastQueries], top = -INFINITY, total = 0.0f;
#pragma unroll
        for (int m = 0; m < kFastQueries; ++m) {
            p[m] = m < q ? head.out[(h * q + m) * kFastOut + n] * inverse : -INFINITY;
            top = fmaxf(top, p[m]);
        }
#pragma unroll
        for (int m = 0; m < kFastQueries; ++m) {
            p[m] = m < q ? __expf(p[m] - top) : 0.0f;
            total += p[m];
        }
        const float share = __fdividef(1.0f, total);
#pragma unroll 1
        for (int i = 0; i < dv; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int m = 0; m < kFastQueries; ++m) sum += p[m] * head.values[m * width + h * dv + i];
            put(h * dv + i, sum * share);
        }
        put(width + h, top + __logf(total) - __logf(static_cast<float>(q)));
    }
#pragma unroll 1
    for (int j = part; j < c.n_direct; j += 4) {
        put(direct + j, head.out[(c.vectors_n() + j) * kFastOut + n] * inverse);
    }
#pragma unroll 1
    for (int first = part; first < c.n_features; first += 16) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool valid = entry < c.n && first + 4 * i < c.n_features;
            x[i] = valid ? weight_at(c.features.data + entry * c.features.row, 0, first + 4 * i) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + 4 * i < c.n_features) put(features + first + 4 * i, x[i]);
        }
    }
#pragma unroll 1
    for (int i = c.inputs + part; i < head.step - 8; i += 4) put(i, 0.0f);
}

template <class E>
MC_DEVICE float one_weight(const char* row, int i) {
    return E::widen(read_constant<uint16_t>(row + 2 * i));
}

// Scores of 8 entries of the tile by each warp.
template <class E>
MC_DEVICE void fast_hidden(const LensCall& c, const FastHead& head, int tile) {
    constexpr int kTogether = 4, kUnits = 2;  // steps, tiles of hidden units
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4;
    const int part = lane % 4, steps = (c.inputs + 31) / 32, base = (warp * 8 + g) * head.step + 8 * part;
    float scores[2][2] = {};  // [column][entry]
#pragma unroll 1
    for (int first_unit = 0; first_unit < c.hidden; first_unit += 16 * kUnits) {
        // All loads before all products, of which each tile of units would wait for its own.
        int rows[kUnits][2];
        float sums[kUnits][4] = {}, bias[kUnits][2], out[kUnits][2][2];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int unit = first_unit + 16 * u + g + 8 * r;
                rows[u][r] = min(unit, c.hidden - 1);
                bias[u][r] = one_weight<E>(c.head_bias.data, rows[u][r]);
                out[u][r][0] = unit < c.hidden ? one_weight<E>(c.head_out.data, rows[u][r]) : 0.0f;
                out[u][r][1] = unit < c.hidden ? one_weight<E>(c.head_out.data + c.head_out.row, rows[u][r]) : 0.0f;
            }
        }
#pragma unroll 1
        for (int first = 0; first < steps; first += kTogether) {
            Quad a[kUnits][kTogether][2] = {};
#pragma unroll
            for (int i = 0; i < kUnits * kTogether; ++i) {
                const int u = i / kTogether, step = first + i % kTogether, k = 32 * step + 8 * part;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const char* const from = c.head_in.data + rows[u][r] * c.head_in.row + 2 * k;
                    if (k < c.inputs) a[u][i % kTogether][r] = read_constant<Quad>(from);
                }
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (first + i >= steps) break;
                const Quad high = from_shared<Quad>(head.high, base + 32 * (first + i));
                const Quad low = from_shared<Quad>(head.low, base + 32 * (first + i));
#pragma unroll
                for (int u = 0; u < kUnits; ++u) {
                    multiply<E>(sums[u], a[u][i][0], a[u][i][1], high);
                    multiply<E>(sums[u], a[u][i][0], a[u][i][1], low);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * kUnits; ++i) {
            const int u = i / 4, r = i / 2 % 2, n = i % 2;
            const float x = sums[u][2 * r + n] + bias[u][r], y = x / (1.0f + __expf(-x));
            scores[0][n] += out[u][r][0] * y;
            scores[1][n] += out[u][r][1] * y;
        }
    }
    const int column = g / 2, n = g % 2;
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x = scores[i / 2][i % 2];
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
        if (g == i) score = x;
    }
    const int64_t entry = static_cast<int64_t>(tile) * kTile + warp * 8 + 2 * part + n;
    if (g >= 4 || entry >= c.n) return;
    const bool legal = !c.legal || read_constant<uint8_t>(c.legal + 2 * entry + column);
    score += one_weight<E>(c.head_out_bias.data, column);
    write(reinterpret_cast<float*>(c.out + entry * c.out_row + column * c.out_column), legal ? score : 0.0f);
}

// What the head needs of the net beside what fast_products leaves, then the scores of the tile.
template <class E>
MC_DEVICE void fast_head_of(const LensCall& c, const StreamMemory& memory, int tile) {
    const FastHead head = fast_head(c, memory);
    const int thread = static_cast<int>(threadIdx.x), width = c.heads * c.head_values;
    for (int i = thread; i < kFastQueries * width; i += kLensThreads) {
        head.values[i] = i < c.q * width ? read<float>(c.values + i) : 0.0f;
    }
    __syncthreads();
    fast_inputs<E>(c, head, memory.inverse[thread % kTile], static_cast<int64_t>(tile) * kTile + thread % kTile);
    __syncthreads();
    fast_hidden<E>(c, head, tile);
}

// The stream of a read pass's logits, or (`score`) of the scores: one, so that its code is there once. Grid: tiles.
template <class E>
MC_DEVICE void fast_tiles(const LensCall& c, bool score, bool known) {
    const StreamMemory memory = stream_memory();
#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x); tile < c.tiles; tile += static_cast<int>(gridDim.x)) {
        fast_products<E>(c, memory, tile, score, known);
        if (score) {
            fast_head_of<E>(c, memory, tile);
        } else {
            fast_softmax<E>(c, memory, tile);
        }
    }
}

}  // namespace mc::cuda

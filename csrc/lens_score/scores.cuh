// The score pass of lens_score: each entry attends to the queries, and a small head makes two numbers of it.
#pragma once

#include "product.cuh"
#include "query.cuh"

namespace mc::cuda {

constexpr int kHeadInputs = 32, kHeadStep = kTile + 4;  // inputs whose weights are staged together; steps of rows

// What the head of a tile of entries works with.
struct HeadMemory {
    Span<float> out;      // [kTileRows, kTile], over the stages
    Span<float> weights;  // [kHeadInputs, kHeadStep], behind it
    Span<float> inverse;  // [kTile]
    Span<float> inputs;   // [inputs, kTile]
    Span<float> scores;   // [kLensWarps, 2, kTile]
};

template <class E>
struct LensMemory : HeadMemory {
    Span<typename E::Bits> stages;
    Span<float> of_vectors;  // [kTileRows]
    Span<float> factors;     // [2, kTileRows]
};

// Steps follow each other, so they share memory: products, the side of the queries, and the head of what a product
// left.
template <class E>
constexpr int64_t lens_shared_bytes(int64_t q, int64_t widest, int64_t head_dim, int64_t inputs) {
    const int64_t product = shared_bytes_of<typename E::Bits>(int64_t{kStages<E>} * kStageElements);
    const int64_t row = widest > kChunk ? (widest + 3) / 4 * 4 : kChunk;
    const int64_t query =
        shared_bytes_of<float>(q * row) + shared_bytes_of<float>(head_dim * kMost) + shared_bytes_of<float>(kPartials);
    const int64_t head = shared_bytes_of<float>(kTileRows * kTile + kHeadInputs * kHeadStep + inputs * kTile);
    const int64_t two = product > query ? product : query;
    return shared_bytes_of<float>(kFixedMemory) + (two > head ? two : head);
}

template <class E>
MC_DEVICE LensMemory<E> lens_memory(const LensCall& c) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    LensMemory<E> m{};
    const Span<float> fixed = shared.take<float>(kFixedMemory);
    m.of_vectors = fixed.part(0, kTileRows);
    m.factors = fixed.part(kTileRows, 2 * kTileRows);
    m.inverse = fixed.part(3 * kTileRows, kTile);
    m.scores = fixed.part(3 * kTileRows + kTile, 2 * kLensWarps * kTile);
    SharedMemory over = shared;
    m.stages = shared.take<typename E::Bits>(int64_t{kStages<E>} * kStageElements);
    m.out = over.take<float>(kTileRows * kTile);
    m.weights = over.take<float>(kHeadInputs * kHeadStep);
    m.inputs = over.take<float>(static_cast<int64_t>(c.inputs) * kTile);
    return m;
}

// The direct rows follow the absorbed vectors, with zeros up to e_step as theirs.
MC_CALLED void direct_vectors(const LensCall& c) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kLensThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLensThreads + threadIdx.x;
         i < static_cast<int64_t>(c.n_direct) * c.e_step; i += step) {
        const int64_t j = i / c.e_step, k = i % c.e_step;
        write_operand(c.vectors, c.operand, (c.vectors_n() + j) * c.e_step + k,
                      k < c.e ? weight_at(c.direct.data + j * c.direct.row, c.weight_dtype, k) : 0.0f);
    }
}

// Inputs of the head for entry n of a tile, by four threads: `part` has every fourth head, direct row and feature.
MC_DEVICE void head_inputs(const LensCall& c, const HeadMemory& memory, int64_t entry, int n, int part) {
    const int dv = c.head_values, width = c.heads * dv;
    const float inverse = memory.inverse[n];
    for (int h = part; h < c.heads; h += 4) {
        float p[kMost], top = -INFINITY, total = 0.0f;
#pragma unroll
        for (int m = 0; m < kMost; ++m) {
            p[m] = m < c.q ? memory.out[(h * c.q + m) * kTile + n] * inverse : -INFINITY;
            top = fmaxf(top, p[m]);
        }
#pragma unroll
        for (int m = 0; m < kMost; ++m) {
            p[m] = m < c.q ? expf(p[m] - top) : 0.0f;
            total += p[m];
        }
        for (int i = 0; i < dv; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int m = 0; m < kMost; ++m) {
                sum += m < c.q ? p[m] * read<float>(c.values + m * width + h * dv + i) : 0.0f;
            }
            memory.inputs[(h * dv + i) * kTile + n] = sum / total;
        }
        memory.inputs[(width + h) * kTile + n] = top + logf(total) - logf(static_cast<float>(c.q));
    }
    const int first = width + c.heads;
    for (int j = part; j < c.n_direct; j += 4) {
        memory.inputs[(first + j) * kTile + n] = memory.out[(c.vectors_n() + j) * kTile + n] * inverse;
    }
    for (int i = part; i < c.n_features; i += 4) {
        memory.inputs[(first + c.n_direct + i) * kTile + n] =
            entry < c.n ? weight_at(c.features.data + entry * c.features.row, 0, i) : 0.0f;
    }
}

// weights[k, h] = head_in[h0 + h, k0 + k], zeros outside.
MC_DEVICE void stage_head(const LensCall& c, const HeadMemory& memory, int h0, int k0) {
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kHeadInputs * kTile; i += kLensThreads) {
        const int h = i / kHeadInputs, k = i % kHeadInputs;
        const bool some = h0 + h < c.hidden && k0 + k < c.inputs;
        memory.weights[k * kHeadStep + h] =
            some ? weight_at(c.head_in.data + (h0 + h) * c.head_in.row, c.weight_dtype, k0 + k) : 0.0f;
    }
}

MC_DEVICE Pack<float, 4> four_at(Span<float> x, int64_t i) {
#if !defined(__CUDACC__)
    (void)x[i + 3];
#endif
    return *reinterpret_cast<const Pack<float, 4>*>(x.data + i);
}

// sums[o][i] += head_out_o silu(head_in inputs + bias) of hidden units [h0, h0 + kTile), a thread's four, of its four
// entries.
MC_DEVICE void add_hidden(const LensCall& c, const HeadMemory& memory, int h0, float (&sums)[2][4]) {
    const int thread = static_cast<int>(threadIdx.x), unit = thread / 16 * 4, n = thread % 16 * 4;
    float x[4][4] = {};
    for (int k0 = 0; k0 < c.inputs; k0 += kHeadInputs) {
        __syncthreads();
        stage_head(c, memory, h0, k0);
        __syncthreads();
        const int count = min(kHeadInputs, c.inputs - k0);
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
            const auto w = four_at(memory.weights, k * kHeadStep + unit);
            const auto in = four_at(memory.inputs, (k0 + k) * kTile + n);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) x[h][i] += w.x[h] * in.x[i];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
        const int at = h0 + unit + h;
        if (at >= c.hidden) break;
        const float bias = weight_at(c.head_bias.data, c.weight_dtype, at);
        const float out0 = weight_at(c.head_out.data, c.weight_dtype, at),
                    out1 = weight_at(c.head_out.data + c.head_out.row, c.weight_dtype, at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float y = silu(x[h][i] + bias);
            sums[0][i] += out0 * y;
            sums[1][i] += out1 * y;
        }
    }
}

// The scores of a tile.
MC_DEVICE void head_scores(const LensCall& c, const HeadMemory& memory, int tile) {
    const int thread = static_cast<int>(threadIdx.x), n = thread % kTile, part = thread / kTile;
    const int64_t entry = static_cast<int64_t>(tile) * kTile + n;
    head_inputs(c, memory, entry, n, part);
    float sums[2][4] = {};
    for (int h0 = 0; h0 < c.hidden; h0 += kTile) add_hidden(c, memory, h0, sums);
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float sum = sums[o][i] + __shfl_xor_sync(0xffffffffu, sums[o][i], 16);
            if (thread % kWarp < 16) memory.scores[(thread / kWarp * 2 + o) * kTile + thread % 16 * 4 + i] = sum;
        }
    }
    __syncthreads();
    if (part < 2 && entry < c.n) {  // `part` is the column
        float x = weight_at(c.head_out_bias.data, c.weight_dtype, part);
#pragma unroll
        for (int i = 0; i < kLensWarps; ++i) x += memory.scores[(i * 2 + part) * kTile + n];
        const bool legal = !c.legal || read_constant<uint8_t>(c.legal + 2 * entry + part);
        write(reinterpret_cast<float*>(c.out + entry * c.out_row + part * c.out_column), legal ? x : 0.0f);
    }
}

// Grid: tiles of entries.
template <class E>
MC_CALLED void score_entries(const LensCall& c) {
    const LensMemory<E> memory = lens_memory<E>(c);
    for (int tile = static_cast<int>(blockIdx.x); tile < c.tiles; tile += static_cast<int>(gridDim.x)) {
        float squares;
        product<E, true>(c, {c.vectors, c.e_step, c.vectors_n() + c.n_direct, tile * kTile, 0, 0, c.e}, memory.stages,
                         memory.out.data, squares, {});
        inverse_rms(c, squares, memory.inverse);
        head_scores(c, memory, tile);
    }
}

}  // namespace mc::cuda

// The score pass of lens_score: each entry attends to the queries, and a small head makes two numbers of it.
#pragma once

#include "product.cuh"
#include "query.cuh"

namespace mc::cuda {

// What the head of a tile of entries works with.
struct HeadMemory {
    Span<float> out;      // [kTileRows, kTile], over the stages
    Span<float> inverse;  // [kTile]
    Span<float> inputs;   // [inputs, kTile]
    Span<float> scores;   // [4, 2, kTile]
};

template <class E>
struct LensMemory : HeadMemory {
    Span<typename E::Bits> stages;
    Span<float> inverse_of_vectors;  // [kTileRows]
    Span<float> in;                  // [q, max(d, f)]
    Span<float> turned;              // [d / heads, 16]
};

// Steps follow each other, so they share memory: products, then the side of the queries, then the head.
template <class E>
constexpr int64_t lens_shared_bytes(int64_t q, int64_t widest, int64_t head_dim, int64_t inputs) {
    const int64_t product = shared_bytes_of<typename E::Bits>(int64_t{kStages<E>} * kStageElements);
    const int64_t query = shared_bytes_of<float>(q * widest) + shared_bytes_of<float>(head_dim * kMost);
    return (product > query ? product : query) + shared_bytes_of<float>(kTile) + shared_bytes_of<float>(kTileRows) +
           shared_bytes_of<float>(inputs * kTile) + shared_bytes_of<float>(8 * kTile);
}

template <class E>
MC_DEVICE LensMemory<E> lens_memory(SharedMemory& shared, const LensCall& c) {
    LensMemory<E> m{};
    m.inverse = shared.take<float>(kTile);
    m.inverse_of_vectors = shared.take<float>(kTileRows);
    m.inputs = shared.take<float>(static_cast<int64_t>(c.inputs) * kTile);
    m.scores = shared.take<float>(8 * kTile);
    SharedMemory again = shared, over = shared;
    m.stages = shared.take<typename E::Bits>(int64_t{kStages<E>} * kStageElements);
    m.out = over.take<float>(kTileRows * kTile);
    m.in = again.take<float>(static_cast<int64_t>(c.q) * max(c.d, c.f));
    m.turned = again.take<float>(static_cast<int64_t>(c.head_dim()) * kMost);
    return m;
}

// values[m, i] = score_v[i] . norm(z_m), of what `absorb` has staged.
MC_CALLED void score_values(const LensCall& c, Span<float> in) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, width = c.heads * c.head_values;
    for (int i = grid_warp(); i < width; i += grid_warps()) {
        const float dot = dots(c.score_v.data + i * c.score_v.row, c.weight_dtype, c.d, c.q, staged_rows(in, c.d));
        if (lane < c.q) write(c.values + lane * width + i, dot);
    }
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
MC_CALLED void head_inputs(const LensCall& c, const HeadMemory& memory, int64_t entry, int n, int part) {
    const int dv = c.head_values, width = c.heads * dv;
    const float inverse = memory.inverse[n];
    for (int h = part; h < c.heads; h += 4) {
        const auto logit = [&](int m) { return memory.out[(h * c.q + m) * kTile + n] * inverse; };
        float top = -INFINITY, total = 0.0f;
        for (int m = 0; m < c.q; ++m) top = fmaxf(top, logit(m));
        for (int m = 0; m < c.q; ++m) total += expf(logit(m) - top);
        for (int i = 0; i < dv; ++i) {
            float sum = 0.0f;
            for (int m = 0; m < c.q; ++m) {
                sum += expf(logit(m) - top) * read<float>(c.values + m * width + h * dv + i);
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

// The scores of a tile.
MC_CALLED void head_scores(const LensCall& c, const HeadMemory& memory, int tile) {
    const int thread = static_cast<int>(threadIdx.x), n = thread % kTile, part = thread / kTile;
    const int64_t entry = static_cast<int64_t>(tile) * kTile + n;
    head_inputs(c, memory, entry, n, part);
    __syncthreads();
    float sums[2] = {};
    for (int i = part; i < c.hidden; i += 4) {
        float x = weight_at(c.head_bias.data, c.weight_dtype, i);
        const char* const row = c.head_in.data + i * c.head_in.row;
        for (int k = 0; k < c.inputs; ++k) x += weight_at(row, c.weight_dtype, k) * memory.inputs[k * kTile + n];
        x = silu(x);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            sums[o] += weight_at(c.head_out.data + o * c.head_out.row, c.weight_dtype, i) * x;
        }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) memory.scores[(part * 2 + o) * kTile + n] = sums[o];
    __syncthreads();
    if (part < 2 && entry < c.n) {  // `part` is the column
        float x = weight_at(c.head_out_bias.data, c.weight_dtype, part);
        for (int i = 0; i < 4; ++i) x += memory.scores[(i * 2 + part) * kTile + n];
        const bool legal = !c.legal || read_constant<uint8_t>(c.legal + 2 * entry + part);
        write(reinterpret_cast<float*>(c.out + entry * c.out_row + part * c.out_column), legal ? x : 0.0f);
    }
}

// Grid: tiles of entries.
template <class E>
MC_DEVICE void score_entries(const LensCall& c, const LensMemory<E>& memory) {
    for (int tile = static_cast<int>(blockIdx.x); tile < c.tiles; tile += static_cast<int>(gridDim.x)) {
        float squares;
        product<E, true>(c, {c.vectors, c.e_step, c.vectors_n() + c.n_direct, tile * kTile, 0, 0, c.e}, memory.stages,
                         memory.out.data, squares);
        inverse_rms(c, squares, memory.inverse);
        head_scores(c, memory, tile);
    }
}

}  // namespace mc::cuda

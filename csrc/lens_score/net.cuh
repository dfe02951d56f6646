// What follows a weighted sum in a read pass: the attended values, and the two updates of the queries' states.
#pragma once

#include "query.cuh"

namespace mc::cuda {

// The maximum of vector v's logits over all tiles; by one warp.
MC_DEVICE float top_of_all(const LensCall& c, int v) {
    float top = -INFINITY;
#pragma unroll 4
    for (int t = static_cast<int>(threadIdx.x) % kWarp; t < c.tiles; t += kWarp) {
        top = fmaxf(top, read<float>(c.tops + v * c.tiles + t));
    }
    return warp_max(top);
}

// The sum of vector v's weights over all tiles, relative to that maximum; by one warp.
MC_DEVICE float mass_of(const LensCall& c, int v) {
    const float top = top_of_all(c, v);
    float mass = 0.0f;
#pragma unroll 4
    for (int t = static_cast<int>(threadIdx.x) % kWarp; t < c.tiles; t += kWarp) {
        const int at = v * c.tiles + t;
        mass += read<float>(c.totals + at) * expf(read<float>(c.tops + at) - top);
    }
    return warp_sum(mass);
}

// parts[s, m, j] = read_v[j] . context of (head of j, m) over the s-th kChunk columns. The context is the sum over
// splits of the weighted sums, over the sum of the weights. A block to each head, chunk and kRows of the head's rows.
template <int M>
MC_CALLED void attended_values_of(const LensCall& c, int pass) {
    const QueryMemory memory = query_memory(c);
    constexpr int R = 4, kRows = R * kLensWarps;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, size = c.head_dim(), groups = (size + kRows - 1) / kRows;
    for (int task = static_cast<int>(blockIdx.x); task < c.heads * c.parts_n * groups;
         task += static_cast<int>(gridDim.x)) {
        const int head = task / (c.parts_n * groups), part = task / groups % c.parts_n, first = part * kChunk;
        const int width = min(kChunk, c.e - first), j = task % groups * kRows + warp * R, rows = min(R, size - j);
        const int64_t apart = static_cast<int64_t>(c.vectors_n()) * c.e_step;
        stage_rows(c.sums + static_cast<int64_t>(head) * c.q * c.e_step + first, c.e_step, width, c.q, c.splits, apart,
                   memory.in);
        for (int m = warp; m < c.q; m += kLensWarps) {
            const float mass = mass_of(c, head * c.q + m);
            if (threadIdx.x % kWarp == 0) memory.masses[m] = mass;
        }
        __syncthreads();
        if (rows > 0) {
            const int64_t row = static_cast<int64_t>(head) * size + j, bytes = c.weight_dtype == 0 ? 4 : 2;
            float sums[R * M] = {};
            add_dots<R, M>(c.read_v.of(pass) + row * c.read_v.row + first * bytes, c.read_v.row, rows,
                           c.weight_dtype, 0, width, c.q, Staged{memory.in, padded_to_4(width)}, sums);
            each_dot<R, M>(sums, rows, c.q, [&](int r, int m, float x) {
                write(c.parts + (part * kMost + m) * padded_to_4(c.d) + row + r, x / memory.masses[m]);
            });
        }
        __syncthreads();
    }
}

MC_DEVICE void attended_values(const LensCall& c, int pass) {
    c.q <= 8 ? attended_values_of<8>(c, pass) : attended_values_of<16>(c, pass);
}

// z += weight [d, size] in, where in is the sum of `copies` arrays [16, size padded to 4] of the workspace.
template <int M>
MC_CALLED void add_linear_of(const LensCall& c, const LensRows& weight, int pass, int size, const float* in,
                             int copies) {
    const QueryMemory memory = query_memory(c);
    const int step = padded_to_4(size);
    stage_rows(in, step, size, c.q, copies, static_cast<int64_t>(kMost) * step, memory.in);
    __syncthreads();
    for (int j = spread_row(); j < c.d; j += spread_rows()) {
        float sums[M] = {};
        add_dots<1, M>(weight.of(pass) + j * weight.row, weight.row, 1, c.weight_dtype, 0, size, c.q,
                       Staged{memory.in, step}, sums);
        each_dot<1, M>(sums, 1, c.q, [&](int, int m, float x) {
            float* const to = c.z + m * padded_to_4(c.d) + j;
            write(to, read<float>(to) + x);
        });
    }
    __syncthreads();
}

MC_DEVICE void add_linear(const LensCall& c, const LensRows& weight, int pass, int size, const float* in, int copies) {
    c.q <= 8 ? add_linear_of<8>(c, weight, pass, size, in, copies)
             : add_linear_of<16>(c, weight, pass, size, in, copies);
}

// act[m, i] = silu(gate) up of norm(z_m, gain).
template <int M>
MC_CALLED void swiglu_of(const LensCall& c, int pass) {
    const QueryMemory memory = query_memory(c);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t row = c.mlp_gate_up.row;
    stage_norm(c, c.mlp_norm.of(pass));
    for (int i = spread_row(); i < c.f; i += spread_rows()) {
        float sums[2 * M] = {};
        add_dots<2, M>(c.mlp_gate_up.of(pass) + i * row, c.f * row, 2, c.weight_dtype, 0, c.d, c.q,
                       Staged{memory.in, padded_to_4(c.d)}, sums);
        reduce<2 * M>(sums);
        const float up = __shfl_xor_sync(0xffffffffu, sums[0], kWarp / 2);  // gates are in the lower half of the warp
        const int m = held_at<2 * M>(lane);
        if (m < c.q && lane * M % (kWarp / 2) == 0) write(c.act + m * padded_to_4(c.f) + i, silu(sums[0]) * up);
    }
    __syncthreads();
}

MC_DEVICE void swiglu(const LensCall& c, int pass) {
    c.q <= 8 ? swiglu_of<8>(c, pass) : swiglu_of<16>(c, pass);
}

// values[m, i] = score_v[i] . norm(z_m), of what `absorb` has staged.
template <int M>
MC_CALLED void score_values_of(const LensCall& c) {
    const QueryMemory memory = query_memory(c);
    const int width = c.heads * c.head_values;
    for (int i = spread_row(); i < width; i += spread_rows()) {
        float sums[M] = {};
        add_dots<1, M>(c.score_v.data + i * c.score_v.row, c.score_v.row, 1, c.weight_dtype, 0, c.d, c.q,
                       Staged{memory.in, padded_to_4(c.d)}, sums);
        each_dot<1, M>(sums, 1, c.q, [&](int, int m, float x) { write(c.values + m * width + i, x); });
    }
}

MC_DEVICE void score_values(const LensCall& c) {
    c.q <= 8 ? score_values_of<8>(c) : score_values_of<16>(c);
}

}  // namespace mc::cuda

// The steps of the queries' side between the streams: see fast_rows.cuh.
#pragma once

#include "fast_rows.cuh"

namespace mc::cuda {

// 32 columns a warp of vectors [head's queries] = turned^T w_k, rows 4 c .. 4 c + 3 of every 16 in lane 4 g + c,
// columns 4 g .. 4 g + 3: a product may number both as it likes. High and low parts are the upper and lower half of A.
template <class E>
MC_DEVICE void fast_columns(const LensCall& c, int head, int first, const char* w_k, int64_t row) {
    const RowsMemory memory = rows_memory();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, part = lane % 4, size = c.head_dim();
    constexpr int kTogether = 4;
    float sums[4][4] = {};
    const char* const from = w_k + 4 * part * row + 2 * (first + 4 * g);
    const int at = g * kTurnedStep + 4 * part;
#pragma unroll 1
    for (int base = 0; base < size; base += 16 * kTogether) {
        Pack<uint32_t, 2> x[kTogether][4];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
            if (base + 16 * t < size) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[t][i] = read_constant<Pack<uint32_t, 2>>(from + (base + 16 * t + i) * row);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
            if (base + 16 * t < size) {
                const auto high = from_shared<Pack<uint32_t, 2>>(memory.turned_high, at + base + 16 * t);
                const auto low = from_shared<Pack<uint32_t, 2>>(memory.turned_low, at + base + 16 * t);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int w = i / 2;
                    const uint32_t upper = i % 2 ? upper_halves(x[t][0].x[w], x[t][1].x[w])
                                                 : lower_halves(x[t][0].x[w], x[t][1].x[w]);
                    const uint32_t lower = i % 2 ? upper_halves(x[t][2].x[w], x[t][3].x[w])
                                                 : lower_halves(x[t][2].x[w], x[t][3].x[w]);
                    multiply_16x8x16<E>(sums[i], high.x[0], low.x[0], high.x[1], low.x[1], upper, lower);
                }
            }
        }
    }
    if (g >= c.q) return;
    Quad out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int a = i % 2 * 2, b = i / 2;  // columns 8 part + 4 b + a and the next
        out.x[i] = pack_pair<E>(sums[a][b] + sums[a][b + 2], sums[a + 1][b] + sums[a + 1][b + 2]);
    }
    write(c.vectors + (static_cast<int64_t>(head * c.q + g) * c.e_step + first + 8 * part) * 2, out);
}

// Values, not a reference to one of two: the call's numbers are constants of the launch, and a pointer to them would
// make each a load from memory.
MC_DEVICE LensRows either(bool first, const LensRows& x, const LensRows& y) {
    return {first ? x.data : y.data, first ? x.pass : y.pass, first ? x.row : y.row};
}

// vectors[h q + m] = scale w_k[h]^T (w_q norm(z_m, gain))[h]: a block to each head and kFastColumns columns. score:
// values[m, i] = score_v[i] . norm(z_m) too, by the blocks behind them, and the direct rows behind the vectors.
template <class E>
MC_DEVICE void fast_absorb(const LensCall& c, LensRows gain, LensRows w_q, LensRows w_k, int pass, bool projected,
                           bool score) {
    const RowsMemory memory = rows_memory();
    const int thread = static_cast<int>(threadIdx.x), size = c.head_dim(), width = c.heads * c.head_values;
    const int chunks = (c.e + kFastColumns - 1) / kFastColumns, absorbing = c.heads * chunks;
    const int tasks = absorbing + (score ? (width + kFastRows - 1) / kFastRows : 0);
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
    // Direct rows, behind the vectors.
    const int row_packs = c.e / 8, packs = score ? c.n_direct * row_packs : 0;
    const int mine = static_cast<int>(blockIdx.x) + thread * static_cast<int>(gridDim.x);
    const auto straight = [&](int i) {
        return read_constant<Quad>(c.direct.data + i / row_packs * c.direct.row + i % row_packs * 16);
    };
    Quad ahead{};
    if (mine < packs) ahead = straight(mine);
    fast_norm<E>(c, gain.of(pass), projected);
#pragma unroll 1
    for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
        const bool valued = task >= absorbing;
        const int head = task / chunks, first = valued ? (task - absorbing) * kFastRows : head * size;
        const LensRows w = either(valued, c.score_v, w_q);
        const char* const weight = (valued ? w.data : w.of(pass)) + first * w.row;
        row_products<E>(weight, w.row, kFastRows * w.row, valued ? 1 : size / kFastRows,
                        valued ? min(kFastRows, width - first) : kFastRows, c.d);
        if (valued) {
            const int i = first + thread / 8, m = thread % 8;
            if (thread < kFastSums && i < width && m < c.q) write(c.values + m * width + i, memory.sums[thread]);
            continue;
        }
#pragma unroll 1
        for (int i = thread; i < size * kFastQueries; i += kLensThreads) {
            const int at = i % 8 * kTurnedStep + i / 8;
            split_number<E>(memory.sums[i] * scale, memory.turned_high[at], memory.turned_low[at]);
        }
        __syncthreads();
        const int column = task % chunks * kFastColumns + thread / kWarp * 32;
        const char* const keys = w_k.of(pass) + static_cast<int64_t>(first) * w_k.row;
        if (column < c.e) fast_columns<E>(c, head, column, keys, w_k.row);
    }
#pragma unroll 1
    for (int i = mine; i < packs; i += kLensThreads * static_cast<int>(gridDim.x)) {
        char* const to = c.vectors + int64_t{2} * (c.vectors_n() + i / row_packs) * c.e_step + i % row_packs * 16;
        write(to, i == mine ? ahead : straight(i));
    }
}

// The sum of vector v's weights over all tiles, relative to the maximum of its logits; by one warp.
MC_DEVICE float fast_mass(const LensCall& c, int v) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    constexpr int kTogether = 4;
    float top = -INFINITY, mass = 0.0f;
#pragma unroll 1
    for (int first = lane; first - lane < c.tiles; first += kTogether * kWarp) {
        float tops[kTogether], totals[kTogether], next = top;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int t = first + i * kWarp, at = v * c.tiles + t;
            tops[i] = t < c.tiles ? read<float>(c.tops + at) : -INFINITY;
            totals[i] = t < c.tiles ? read<float>(c.totals + at) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) next = fmaxf(next, tops[i]);
        next = warp_max(next);
        mass *= __expf(top - next);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) mass += totals[i] * __expf(tops[i] - next);
        top = next;
    }
    return warp_sum(mass);
}

// parts[s, m, j] = read_v[j] . context of (head of j, m) over the s-th chunk of E; the context is the sum over splits
// of the weighted sums, over the sum of the weights.
template <class E>
MC_DEVICE void fast_attended(const LensCall& c, int pass) {
    const RowsMemory memory = rows_memory();
    const int thread = static_cast<int>(threadIdx.x), m = thread / kWarp, tasks = c.d / kFastRows * c.parts_n;
#pragma unroll 1
    for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
        const int row = task / c.parts_n * kFastRows, part = task % c.parts_n, first = part * c.chunk;
        const int width = min(c.chunk, c.e - first), v = row / c.head_dim() * c.q + m;
        const float share = m < c.q ? __fdiv_rn(1.0f, fast_mass(c, v)) : 0.0f;
        const float* const sums = c.sums + static_cast<int64_t>(v) * c.e_step + first;
        stage_sum<E>(sums, m < c.q, c.splits, static_cast<int64_t>(c.vectors_n()) * c.e_step, share, width);
        row_products<E>(c.read_v.of(pass) + row * c.read_v.row + 2 * first, c.read_v.row, 0, 1, kFastRows, width);
        if (thread < kFastSums && thread % 8 < c.q) {
            write(c.parts + (part * kMost + thread % 8) * c.d + row + thread / 8, memory.sums[thread]);
        }
    }
}

// z [16, d] += weight [d, size] in, where in is the sum of `copies` arrays [16, size].
template <class E>
MC_CALLED void fast_linear(const char* weight, int64_t step, float* z, int d, int q, int size, const float* in,
                           int copies) {
    const RowsMemory memory = rows_memory();
    const int thread = static_cast<int>(threadIdx.x), m = thread / kWarp;
#pragma unroll 1
    for (int row = static_cast<int>(blockIdx.x) * kFastRows; row < d;
         row += static_cast<int>(gridDim.x) * kFastRows) {
        const bool writes = thread < kFastSums && thread % 8 < q;
        float* const to = z + thread % 8 * d + row + thread / 8;
        const float before = writes ? read<float>(to) : 0.0f;
        stage_sum<E>(in + m * size, m < q, copies, static_cast<int64_t>(kMost) * size, 1.0f, size);
        row_products<E>(weight + row * step, step, 0, 1, kFastRows, size);
        if (writes) write(to, before + memory.sums[thread]);
    }
}

// act[m, i] = silu(gate) up of norm(z_m, gain).
template <class E>
MC_DEVICE void fast_swiglu(const LensCall& c, int pass) {
    const RowsMemory memory = rows_memory();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t row = c.mlp_gate_up.row;
    if (static_cast<int>(blockIdx.x) * kFastRows < c.f) fast_norm<E>(c, c.mlp_norm.of(pass), false);
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) * kFastRows; i < c.f; i += static_cast<int>(gridDim.x) * kFastRows) {
        row_products<E>(c.mlp_gate_up.of(pass) + i * row, row, c.f * row, 2, kFastRows, c.d);
        if (thread < kFastSums && thread % 8 < c.q) {
            const float gate = memory.sums[thread], up = memory.sums[kFastSums + thread];
            write(c.act + thread % 8 * c.f + i + thread / 8, gate / (1.0f + __expf(-gate)) * up);
        }
    }
}

}  // namespace mc::cuda

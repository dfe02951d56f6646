// The side of the queries: up to 16 rows against weight matrices, a warp to each row of a weight, which is read once.
#pragma once

#include "call.cuh"
#include "grid.cuh"

namespace mc::cuda {

// Eight elements of a weight's row from `i` on, zeros beyond `n`.
MC_DEVICE void weights8(const char* row, int dtype, int i, int n, float (&out)[8]) {
    const bool two = dtype != 0;
    if (i + 8 <= n && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
        if (two) {
            const auto p = read_constant<Pack<uint16_t, 8>>(row + 2 * i);
            dtype == 1 ? widen<Half, 8>(p, out) : widen<Bfloat, 8>(p, out);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const auto p = read_constant<Pack<uint32_t, 4>>(row + 4 * (i + 4 * half));
#pragma unroll
                for (int j = 0; j < 4; ++j) out[4 * half + j] = Float::widen(p.x[j]);
            }
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = i + j < n ? weight_at(row, dtype, i + j) : 0.0f;
}

// What a weight's rows are multiplied with: q rows in shared memory, or in memory the sum of `copies` arrays.
struct Source {
    const float* staged;  // [q, step], or nullptr
    int step;
    const char* far;
    int dtype, copies;
    int64_t row, copy;  // bytes
};

MC_DEVICE Source staged_rows(Span<float> in, int step) { return {in.data, step, nullptr, 0, 0, 0, 0}; }

MC_DEVICE float far_at(const Source& s, int m, int k) {
    const char* at = s.far + m * s.row;
    float x = 0.0f;
    for (int i = 0; i < s.copies; ++i, at += s.copy) {
        if (s.dtype == 0) {
            x += read<float>(at + 4 * static_cast<int64_t>(k));
        } else {
            const uint16_t bits = read<uint16_t>(at + 2 * static_cast<int64_t>(k));
            x += s.dtype == 1 ? Half::widen(bits) : Bfloat::widen(bits);
        }
    }
    return x;
}

// row . in_m, by one warp; lane m < q has it.
MC_CALLED float dots(const char* row, int dtype, int size, int q, const Source& in) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float dot[kMost] = {}, out = 0.0f;
    for (int k = lane * 8; k < size; k += kWarp * 8) {
        float w[8];
        weights8(row, dtype, k, size, w);
#pragma unroll
        for (int m = 0; m < kMost; ++m) {
            if (m >= q) break;
            if (in.staged) {
                const float* const x = in.staged + m * in.step + k;
#pragma unroll
                for (int j = 0; j < 8; ++j) dot[m] += k + j < size ? w[j] * x[j] : 0.0f;
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) dot[m] += k + j < size ? w[j] * far_at(in, m, k + j) : 0.0f;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kMost; ++m) {
        if (m >= q) break;
        const float sum = warp_sum(dot[m]);
        out = lane == m ? sum : out;
    }
    return out;
}

MC_DEVICE int grid_warp() { return static_cast<int>(blockIdx.x * kLensWarps + threadIdx.x / kWarp); }
MC_DEVICE int grid_warps() { return static_cast<int>(gridDim.x) * kLensWarps; }

// z_m = w_in query_m / rms(query_m).
MC_CALLED void project_queries(const LensCall& c) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const Source queries{nullptr, 0, c.queries.data, c.entry_dtype, 1, c.queries.row, 0};
    for (int j = grid_warp(); j < c.d; j += grid_warps()) {
        const float dot = dots(c.w_in.data + j * c.w_in.row, c.weight_dtype, c.e, c.q, queries);
        float square = 0.0f;
        for (int m = 0; m < c.q; ++m) {
            float part = 0.0f;
            for (int k = lane; k < c.e; k += kWarp) {
                const float x = far_at(queries, m, k);
                part += x * x;
            }
            part = warp_sum(part);
            square = lane == m ? part : square;
        }
        const float mean = square / static_cast<float>(c.e);
        if (lane < c.q) write(c.z + lane * c.d + j, __fdiv_rn(dot, __fsqrt_rn(mean + kLensEps)));
    }
}

// in [q, d] = norm(z, gain), by every block for itself. Ends with a barrier.
MC_CALLED void stage_norm(const LensCall& c, const char* gain, Span<float> in) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int m = static_cast<int>(threadIdx.x) / kWarp; m < c.q; m += kLensWarps) {
        float square = 0.0f;
        for (int k = lane; k < c.d; k += kWarp) {
            const float x = read<float>(c.z + m * c.d + k);
            square += x * x;
        }
        const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(square) / static_cast<float>(c.d) + kLensEps));
        for (int k = lane; k < c.d; k += kWarp) {
            in[m * c.d + k] = read<float>(c.z + m * c.d + k) * inverse * weight_at(gain, c.weight_dtype, k);
        }
    }
    __syncthreads();
}

// Element i of an array of operands.
MC_DEVICE void write_operand(char* to, int operand, int64_t i, float x) {
    if (operand == 0) {
        write(reinterpret_cast<float*>(to) + i, x);
    } else {
        write(reinterpret_cast<uint16_t*>(to) + i, operand == 1 ? Half::narrow(x) : Bfloat::narrow(x));
    }
}

// vectors[h q + m] = scale w_k[h]^T (w_q in_m)[h]. A block to each head and kLensThreads columns; the head's rows of w_q
// are multiplied anew for each, which costs less than another barrier of the grid.
MC_CALLED void absorb(const LensCall& c, const char* gain, const char* w_q, int64_t q_row, const char* w_k,
                      int64_t k_row, Span<float> in, Span<float> turned) {
    const int thread = static_cast<int>(threadIdx.x), size = c.head_dim(),
              chunks = (c.e_step + kLensThreads - 1) / kLensThreads;
    const float scale = rsqrtf(static_cast<float>(size));
    stage_norm(c, gain, in);
    for (int task = static_cast<int>(blockIdx.x); task < c.heads * chunks; task += static_cast<int>(gridDim.x)) {
        const int head = task / chunks, column = task % chunks * kLensThreads + thread;
        for (int j = thread / kWarp; j < size; j += kLensWarps) {
            const float dot = dots(w_q + (static_cast<int64_t>(head) * size + j) * q_row, c.weight_dtype, c.d, c.q,
                                   staged_rows(in, c.d));
            if (thread % kWarp < c.q) turned[j * kMost + thread % kWarp] = dot * scale;
        }
        __syncthreads();
        if (column < c.e_step) {  // zeros from e on: tiles end in them
            float sum[kMost] = {};
#pragma unroll 4
            for (int j = 0; j < size && column < c.e; ++j) {
                const float w =
                    weight_at(w_k + (static_cast<int64_t>(head) * size + j) * k_row, c.weight_dtype, column);
#pragma unroll
                for (int m = 0; m < kMost; ++m) {
                    if (m < c.q) sum[m] += turned[j * kMost + m] * w;
                }
            }
#pragma unroll
            for (int m = 0; m < kMost; ++m) {
                if (m >= c.q) break;
                const int64_t at = static_cast<int64_t>(head * c.q + m) * c.e_step + column;
                write_operand(c.vectors, c.operand, at, sum[m]);
            }
        }
        __syncthreads();
    }
}

// parts[s, m, j] = read_v[j] . context of (head of j, m) over the s-th part of E. The context is the sum over splits of
// the weighted sums, over the sum of the weights.
MC_CALLED void attended_values(const LensCall& c, const char* w_v, int64_t v_row, Span<float> masses) {
    const int thread = static_cast<int>(threadIdx.x), count = c.vectors_n();
    for (int v = thread / kWarp; v < count; v += kLensWarps) {
        float total = 0.0f;
        for (int t = thread % kWarp; t < c.tiles; t += kWarp) total += read<float>(c.totals + v * c.tiles + t);
        total = warp_sum(total);
        if (thread % kWarp == 0) masses[v] = total;
    }
    __syncthreads();
    const int chunk = ((c.e + kParts - 1) / kParts + 7) / 8 * 8;
    for (int task = grid_warp(); task < c.d * kParts; task += grid_warps()) {
        // Neighbouring warps have one head and one part, whose context then comes from the first-level cache.
        const int part = task / c.d, j = task % c.d, head = j / c.head_dim(), first = part * chunk;
        const int size = max(min(chunk, c.e - first), 0);
        const int64_t floats = (static_cast<int64_t>(head) * c.q) * c.e + first,
                      split = static_cast<int64_t>(count) * c.e;
        const Source context{nullptr, 0,        reinterpret_cast<const char*>(c.sums + floats), 0, c.splits,
                             4 * c.e, 4 * split};
        const int64_t bytes = c.weight_dtype == 0 ? 4 : 2;
        const float dot = dots(w_v + j * v_row + first * bytes, c.weight_dtype, size, c.q, context);
        const int lane = thread % kWarp;
        if (lane < c.q) write(c.parts + (part * kMost + lane) * c.d + j, dot / masses[head * c.q + lane]);
    }
    __syncthreads();
}

// z += weight [d, size] in, where in is the sum of `copies` arrays [16, size] of the workspace.
MC_CALLED void add_linear(const LensCall& c, const char* weight, int64_t row, int size, const float* in, int copies,
                          Span<float> staged) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    for (int i = thread; i < c.q * size; i += kLensThreads) {
        float x = 0.0f;
        for (int copy = 0; copy < copies; ++copy) x += read<float>(in + copy * kMost * size + i);
        staged[i] = x;
    }
    __syncthreads();
    for (int j = grid_warp(); j < c.d; j += grid_warps()) {
        const float dot = dots(weight + j * row, c.weight_dtype, size, c.q, staged_rows(staged, size));
        float* const to = c.z + lane * c.d + j;
        if (lane < c.q) write(to, read<float>(to) + dot);
    }
}

MC_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

// act[m, i] = silu(gate) up of norm(z_m, gain).
MC_CALLED void swiglu(const LensCall& c, const char* gain, const char* weight, int64_t row, Span<float> in) {
    stage_norm(c, gain, in);
    for (int i = grid_warp(); i < c.f; i += grid_warps()) {
        const Source normed = staged_rows(in, c.d);
        const float gate = dots(weight + i * row, c.weight_dtype, c.d, c.q, normed);
        const float up = dots(weight + (static_cast<int64_t>(c.f) + i) * row, c.weight_dtype, c.d, c.q, normed);
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        if (lane < c.q) write(c.act + lane * c.f + i, silu(gate) * up);
    }
}

}  // namespace mc::cuda

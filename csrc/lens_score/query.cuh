// The side of the queries: up to 16 rows against weight matrices, each of which is read once (w_q of `absorb`: once a
// block). Rows of the workspace are padded to a multiple of four numbers.
#pragma once

#include "dots.cuh"

namespace mc::cuda {

constexpr int kPartials = kLensWarps / 2 * 8 * kColumns;
// Behind what all steps have in shared memory (kFixedMemory numbers) each step has its own. Functions place it for
// themselves: what they were told of it could be any memory to the compiler.
constexpr int kFixedMemory = kTile + 3 * kTileRows + 2 * kLensWarps * kTile;

// What these steps have.
struct QueryMemory {
    Span<float> in;       // [q, widest of d, f, kChunk padded to 4]
    Span<float> turned;   // [d / heads, 16]
    Span<float> partial;  // [kPartials]: of warps, before they are added up
    Span<float> masses;   // [kTileRows]
};

MC_DEVICE QueryMemory query_memory(const LensCall& c) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    QueryMemory m{};
    m.masses = shared.take<float>(kFixedMemory).part(0, kTileRows);
    m.partial = shared.take<float>(kPartials);
    m.turned = shared.take<float>(static_cast<int64_t>(c.head_dim()) * kMost);
    m.in = shared.take<float>(static_cast<int64_t>(c.q) * max(padded_to_4(max(c.d, c.f)), kChunk));
    return m;
}

// Row `index` of those that blocks share out one by one, then warps: few rows meet all multiprocessors.
MC_DEVICE int spread_row() {
    return static_cast<int>(threadIdx.x) / kWarp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
}
MC_DEVICE int spread_rows() { return static_cast<int>(gridDim.x) * kLensWarps; }

// Rows of the queries as the caller gives them.
template <int M>
MC_DEVICE void query_four(const LensCall& c, int k, int to, float (&x)[M][4]) {
    const bool fast = c.entry_dtype != 0 && k + 4 <= to && on_8(c.queries.data, c.queries.row);
    if (fast) {
        Pack<uint16_t, 4> bits[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            bits[m] = read_constant<Pack<uint16_t, 4>>(c.queries.data + min(m, c.q - 1) * c.queries.row + 2 * k);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) x[m][j] = widen_16(bits[m].x[j], c.entry_dtype == 1);
        }
        return;
    }
#pragma unroll
    for (int m = 0; m < M; ++m) weights4(c.queries.data + min(m, c.q - 1) * c.queries.row, c.entry_dtype, k, to, x[m]);
}

// z_m = w_in query_m / rms(query_m). A block to each R rows of w_in, a warp to each eighth of E.
template <int M>
MC_CALLED void project_queries_of(const LensCall& c) {
    const Span<float> partial = query_memory(c).partial;
    constexpr int R = 32 / M, kEach = (R + 1) * M;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int part = padded_to_4((c.e + kLensWarps - 1) / kLensWarps), from = warp * part,
              to = min(from + part, c.e);
    for (int first = static_cast<int>(blockIdx.x) * R; first < c.d; first += static_cast<int>(gridDim.x) * R) {
        const int rows = min(R, c.d - first);
        const char* const weight = c.w_in.data + first * c.w_in.row;
        const bool fast = c.weight_dtype != 0 && c.e % 4 == 0 && on_8(weight, c.w_in.row);
        float sums[R * M] = {}, squares[M] = {};
        RowQueue<R> queue;
#pragma unroll 1
        for (int k = from + 4 * lane, i = 0; k < to; k += kPiece, ++i) {
            float w[R][4], x[M][4];
            if (fast) {
                Pack<uint16_t, 4> bits[R];
                if (i % kAtOnce == 0) fetch<R>(weight, c.w_in.row, rows, k - 4 * lane, to, queue);
                queue.next(bits);
                widen_rows<R>(bits, c.weight_dtype == 1, w);
            } else {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    weights4(weight + min(r, rows - 1) * c.w_in.row, c.weight_dtype, k, to, w[r]);
                }
            }
            query_four<M>(c, k, to, x);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    squares[m] += x[m][j] * x[m][j];
#pragma unroll
                    for (int r = 0; r < R; ++r) sums[r * M + m] += w[r][j] * x[m][j];
                }
            }
        }
        each_dot<R, M>(sums, R, M, [&](int r, int m, float x) { partial[warp * kEach + r * M + m] = x; });
        each_dot<1, M>(squares, 1, M, [&](int, int m, float x) { partial[warp * kEach + R * M + m] = x; });
        __syncthreads();
        for (int i = thread; i < R * M; i += kLensThreads) {
            const int r = i / M, m = i % M;
            float dot = 0.0f, square = 0.0f;
            for (int w = 0; w < kLensWarps; ++w) {
                dot += partial[w * kEach + i];
                square += partial[w * kEach + R * M + m];
            }
            const float mean = square / static_cast<float>(c.e);
            if (r < rows && m < c.q) {
                write(c.z + m * padded_to_4(c.d) + first + r, __fdiv_rn(dot, __fsqrt_rn(mean + kLensEps)));
            }
        }
        __syncthreads();
    }
}

MC_DEVICE void project_queries(const LensCall& c) {
    c.q <= 8 ? project_queries_of<8>(c) : project_queries_of<16>(c);
}

// to [q, size padded to 4] = the sum of `copies` arrays of the workspace, `apart` numbers from each other, whose rows
// are `step` numbers apart: both multiples of four. Zeros behind the rows.
MC_DEVICE void stage_rows(const float* from, int64_t step, int size, int q, int copies, int64_t apart, Span<float> to) {
    const int packs = padded_to_4(size) / 4;
    for (int i = static_cast<int>(threadIdx.x); i < q * packs; i += kLensThreads) {
        const int m = i / packs, k = i % packs * 4;
        const float* const at = from + m * step + k;
        float sum[4] = {};
        if (k + 4 <= size) {
#pragma unroll 4
            for (int copy = 0; copy < copies; ++copy) {
                const auto x = read<Pack<float, 4>>(at + copy * apart);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[j] += x.x[j];
            }
        } else {
            for (int copy = 0; copy < copies; ++copy) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[j] += k + j < size ? read<float>(at + copy * apart + j) : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) to[m * 4 * packs + k + j] = sum[j];
    }
}

// in [q, d padded to 4] = norm(z, gain), by every block for itself. Ends with a barrier.
MC_CALLED void stage_norm(const LensCall& c, const char* gain) {
    const Span<float> in = query_memory(c).in;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, step = padded_to_4(c.d);
    stage_rows(c.z, step, c.d, c.q, 1, 0, in);
    __syncthreads();
    for (int m = static_cast<int>(threadIdx.x) / kWarp; m < c.q; m += kLensWarps) {
        float square = 0.0f;
        for (int k = lane; k < c.d; k += kWarp) square += in[m * step + k] * in[m * step + k];
        const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(square) / static_cast<float>(c.d) + kLensEps));
#pragma unroll 4
        for (int k = lane; k < c.d; k += kWarp) in[m * step + k] *= inverse * weight_at(gain, c.weight_dtype, k);
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

// turned[j, m] = scale w_q[head's row j] . in_m.
template <int M>
MC_CALLED void turn_queries(const LensCall& c, const char* w_q, int64_t row) {
    const QueryMemory memory = query_memory(c);
    constexpr int R = 32 / M;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, size = c.head_dim();
    // Not rsqrtf: it is off by an ulp or two on a device, and logits of some hundreds multiply that.
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
    const Staged in{memory.in, padded_to_4(c.d)};
    for (int j = warp * R; j < size; j += kLensWarps * R) {
        float sums[R * M] = {};
        const int rows = min(R, size - j);
        add_dots<R, M>(w_q + j * row, row, rows, c.weight_dtype, 0, c.d, c.q, in, sums);
        each_dot<R, M>(sums, rows, c.q, [&](int r, int m, float x) { memory.turned[(j + r) * kMost + m] = x * scale; });
    }
}

// Columns [first, first + kColumns) of vectors `head`: a warp has every eighth row of w_k, a lane eight columns.
MC_CALLED void absorb_columns(const LensCall& c, int head, int first, const char* w_k, int64_t row) {
    const QueryMemory memory = query_memory(c);
    constexpr int M = 8, kRows = 8;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, column = first + thread % kWarp * 8,
              size = c.head_dim(), half = kLensWarps / 2, slot = warp % half * M * kColumns + thread % kWarp * 8;
    const bool fast = c.weight_dtype != 0 && column + 8 <= c.e && row % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(w_k) % 16 == 0;
#pragma unroll 1
    for (int m0 = 0; m0 < c.q; m0 += M) {
        float sums[M][8] = {};
        const auto add = [&](int j, const float(&w)[8]) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float by = memory.turned[j * kMost + min(m0 + m, c.q - 1)];
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[m][i] += by * w[i];
            }
        };
        if (fast) {
            for (int base = warp; base < size; base += kRows * kLensWarps) {
                Queue<Pack<uint16_t, 8>, kRows, 1> queue;
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const int j = base + r * kLensWarps;
                    queue.held[r][0] = {};
                    if (j < size) queue.held[r][0] = read_constant<Pack<uint16_t, 8>>(w_k + j * row + 2 * column);
                }
#pragma unroll 1
                for (int j = base; j < min(size, base + kRows * kLensWarps); j += kLensWarps) {
                    Pack<uint16_t, 8> bits[1];
                    float w[8];
                    queue.next(bits);
#pragma unroll
                    for (int i = 0; i < 8; ++i) w[i] = widen_16(bits[0].x[i], c.weight_dtype == 1);
                    add(j, w);
                }
            }
        } else {
#pragma unroll 1
            for (int j = warp; j < size; j += kLensWarps) {
                float w[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    w[i] = column + i < c.e ? weight_at(w_k + j * row, c.weight_dtype, column + i) : 0.0f;
                }
                add(j, w);
            }
        }
        for (int turn = 1; turn >= 0; --turn) {
            if (warp / half == turn) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        float& to = memory.partial[slot + m * kColumns + i];
                        to = turn ? sums[m][i] : to + sums[m][i];
                    }
                }
            }
            __syncthreads();
        }
        const int at = first + thread;  // zeros from e on: tiles end in them
#pragma unroll 1
        for (int m = 0; m < M && m0 + m < c.q && at < c.e_step; ++m) {
            float x = 0.0f;
#pragma unroll
            for (int w = 0; w < half; ++w) x += memory.partial[(w * M + m) * kColumns + thread];
            write_operand(c.vectors, c.operand, static_cast<int64_t>(head * c.q + m0 + m) * c.e_step + at, x);
        }
        __syncthreads();
    }
}

// vectors[h q + m] = scale w_k[h]^T (w_q in_m)[h]. A block to each head and kColumns columns; the head's rows of w_q
// are multiplied anew for each, which costs less than another barrier of the grid.
MC_DEVICE void absorb(const LensCall& c, const LensRows& gain, const LensRows& w_q, const LensRows& w_k, int pass) {
    const int size = c.head_dim(), chunks = (c.e_step + kColumns - 1) / kColumns;
    stage_norm(c, gain.of(pass));
    for (int task = static_cast<int>(blockIdx.x); task < c.heads * chunks; task += static_cast<int>(gridDim.x)) {
        const int head = task / chunks;
        const int64_t row = static_cast<int64_t>(head) * size;
        const char* const rows = w_q.of(pass) + row * w_q.row;
        c.q <= 8 ? turn_queries<8>(c, rows, w_q.row) : turn_queries<16>(c, rows, w_q.row);
        __syncthreads();
        absorb_columns(c, head, task % chunks * kColumns, w_k.of(pass) + row * w_k.row, w_k.row);
    }
}

MC_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace mc::cuda

// Attention of up to 4 rows to a range of slots for every dtype, head and layout, in fp32 without tensor cores: fp32
// queries (whose products are exact), heads of other widths, partial rotary, addresses and strides off 16 bytes. See
// kernel.cuh.
//
// A block takes 32 slots at a time: their keys are turned into shared memory, each warp multiplies its share of the
// dimensions for all slots and rows, and each thread sums its dimensions of the values.
#pragma once

#include "call.cuh"

namespace mc::cuda {

constexpr int kPlainThreads = 128, kPlainRows = 4, kPlainSlots = 32, kPlainDimsEach = 2;

struct PlainMemory {
    Bands bands;
    Span<float> queries;  // [dims, rows]
    Span<float> keys;     // [slots, dims + 1]: a column is then in different banks
    Span<float> parts;    // [warps, slots, rows]: products over a warp's dimensions
    Span<float> weights;  // [slots, rows]
    Span<float> top, total, shrink;
    Span<int64_t> at;

    MC_DEVICE PlainMemory(const AttendCall& c, SharedMemory& shared, int warps)
        : bands(Bands::take(c, shared)),
          queries(shared.take<float>(c.dims * kPlainRows)),
          keys(shared.take<float>(kPlainSlots * (c.dims + 1))),
          parts(shared.take<float>(warps * kPlainSlots * kPlainRows)),
          weights(shared.take<float>(kPlainSlots * kPlainRows)),
          top(shared.take<float>(kPlainRows)),
          total(shared.take<float>(kPlainRows)),
          shrink(shared.take<float>(kPlainRows)),
          at(shared.take<int64_t>(kPlainSlots)) {}

    static int64_t bytes(int64_t dims, int64_t half, int64_t warps) {
        return Bands::bytes(half) + shared_bytes_of<float>(dims * kPlainRows) +
               shared_bytes_of<float>(kPlainSlots * (dims + 1)) +
               shared_bytes_of<float>(warps * kPlainSlots * kPlainRows) +
               shared_bytes_of<float>(kPlainSlots * kPlainRows) + 3 * shared_bytes_of<float>(kPlainRows) +
               shared_bytes_of<int64_t>(kPlainSlots);
    }
};

// Item i of a row: a pair that turns, then one of the other dimensions. x and y go to dimensions first and second.
template <class E>
MC_DEVICE void load_turned(const AttendCall& c, const Bands& bands, const char* row, int item, int64_t position,
                           float sigma, bool damped, int& first, int& second, float& x, float& y) {
    using Bits = typename E::Bits;
    const bool pair = item < c.half;
    first = !pair ? item + c.half : c.interleaved ? 2 * item : item;
    second = !pair ? first : c.interleaved ? first + 1 : first + c.half;
    x = E::widen(read_constant<Bits>(row + first * sizeof(Bits)));
    if (!pair) return;
    y = E::widen(read_constant<Bits>(row + second * sizeof(Bits)));
    float cos, sin;
    cos_sin(turn_of(position, bands.step[item]), cos, sin);
    if (damped) {
        const float damp = bands.damping(item, sigma);
        cos *= damp;
        sin *= damp;
    }
    const float a = x * cos - y * sin;
    y = y * cos + x * sin;
    x = a;
}

template <class E>
MC_DEVICE void turn_queries(const AttendCall& c, const Part& p, const PlainMemory& m) {
    const int items = c.dims - c.half;
    for (int i = static_cast<int>(threadIdx.x); i < items * kPlainRows; i += static_cast<int>(blockDim.x)) {
        const int row = i / items, item = i % items;
        int first = item < c.half && c.interleaved ? 2 * item : item < c.half ? item : item + c.half, second = first;
        if (item < c.half) second = c.interleaved ? first + 1 : first + c.half;
        float x = 0.0f, y = 0.0f;
        if (row < p.count) {
            load_turned<E>(c, m.bands, p.queries(c, row), item, p.position(c, row), 0.0f, false, first, second, x, y);
        }
        m.queries[first * kPlainRows + row] = x;
        if (second != first) m.queries[second * kPlainRows + row] = y;
    }
}

template <class S>
MC_DEVICE void turn_keys(const AttendCall& c, const Part& p, const PlainMemory& m, int tile, int64_t latest) {
    const int items = c.dims - c.half;
    const char* keys = p.keys(c);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < items * kPlainSlots; i += static_cast<int>(blockDim.x)) {
        const int s = i / items;
        const int64_t at = m.at[s];
        if (at < 0 || at > latest) continue;
        const int64_t index = static_cast<int64_t>(p.b) * c.slots + tile + s;
        const float sigma = c.sigma ? read_constant<float>(c.sigma + index) : 0.0f;
        int first, second;
        float x, y = 0.0f;
        load_turned<S>(c, m.bands, keys + (tile + s) * c.k_step[2], i % items, at, sigma, c.sigma != nullptr, first,
                       second, x, y);
        m.keys[s * (c.dims + 1) + first] = x;
        if (second != first) m.keys[s * (c.dims + 1) + second] = y;
    }
}

// A warp's dimensions of <query, key>, a lane a slot.
MC_DEVICE void multiply_keys(const AttendCall& c, const PlainMemory& m, int64_t latest) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int each = (c.dims + static_cast<int>(blockDim.x) / 32 - 1) / (static_cast<int>(blockDim.x) / 32);
    const int from = min(warp * each, c.dims), to = min(from + each, c.dims);
    float sum[kPlainRows] = {};
    if (m.at[lane] >= 0 && m.at[lane] <= latest) {
        for (int d = from; d < to; ++d) {
            const float key = m.keys[lane * (c.dims + 1) + d];
#pragma unroll
            for (int r = 0; r < kPlainRows; ++r) sum[r] += m.queries[d * kPlainRows + r] * key;
        }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) m.parts[(warp * kPlainSlots + lane) * kPlainRows + r] = sum[r];
}

// Scores become weights relative to the greatest so far. A warp a row, a lane a slot.
MC_DEVICE void soften_plain(const AttendCall& c, const Part& p, const PlainMemory& m, int tile, float scale) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32, s = tile + lane;
    for (int r = static_cast<int>(threadIdx.x) / 32; r < kPlainRows; r += warps) {
        float x = 0.0f;
        for (int w = 0; w < warps; ++w) x += m.parts[(w * kPlainSlots + lane) * kPlainRows + r];
        const bool visible = m.at[lane] >= 0 && m.at[lane] <= p.position(c, r);
        x *= scale;
        if (c.bias && visible) {
            x += read_constant<float>(c.bias + static_cast<int64_t>(p.b) * c.slots + s);
        }
        if (!visible) x = -MC_INFINITY;
        if (c.logits && r < p.count && s < p.high) write(c.logits + p.index(c, r) * c.slots + s, x);
        const float before = m.top[r];
        float top = x;
        for (int lanes = 1; lanes < 32; lanes *= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, lanes));
        top = max(top, before);
        x = share(x, top);
        m.weights[lane * kPlainRows + r] = x;
        for (int lanes = 1; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
        __syncwarp();  // all lanes have read the row's top
        if (lane == 0) {
            m.shrink[r] = share(before, top);
            m.total[r] = m.total[r] * m.shrink[r] + x;
            m.top[r] = top;
        }
        __syncwarp();
    }
}

// Queries of E, keys and values of S.
template <class E, class S>
__global__ void __launch_bounds__(kPlainThreads) attend_plain(const __grid_constant__ AttendCall c) {
    MC_SHARED_MEMORY(memory);
    SharedMemory shared(memory);
    const Part p = part_of(c, static_cast<int>(blockIdx.x), kPlainRows);
    const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
    const PlainMemory m(c, shared, size / 32);
    m.bands.fill(c);
    for (int r = thread; r < kPlainRows; r += size) {
        m.top[r] = -MC_INFINITY;
        m.total[r] = 0.0f;
    }
    __syncthreads();
    turn_queries<E>(c, p, m);
    int64_t latest = -1;
    for (int r = 0; r < kPlainRows; ++r) latest = max(latest, p.position(c, r));

    float sums[kPlainDimsEach][kPlainRows] = {};
    const char* values = p.values(c);
    const float scale = scale_of<S>(c, p);
    for (int tile = p.low; tile < p.high; tile += kPlainSlots) {
        for (int s = thread; s < kPlainSlots; s += size) {
            m.at[s] = tile + s < p.high
                          ? read_constant<int64_t>(c.kv_pos + static_cast<int64_t>(p.b) * c.slots + tile + s)
                          : -1;
        }
        __syncthreads();
        turn_keys<S>(c, p, m, tile, latest);
        __syncthreads();
        multiply_keys(c, m, latest);
        __syncthreads();
        soften_plain(c, p, m, tile, scale);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kPlainDimsEach; ++i) {
            const int d = thread + i * size;
            if (d >= c.dims) continue;
#pragma unroll
            for (int r = 0; r < kPlainRows; ++r) sums[i][r] *= m.shrink[r];
#pragma unroll 8
            for (int s = 0; s < kPlainSlots; ++s) {
                if (m.at[s] < 0 || m.at[s] > latest) continue;
                using Bits = typename S::Bits;
                const int slot = tile + s + (MC_FAULT(12) ? 1 : 0);
                const float x = S::widen(read_constant<Bits>(values + slot * c.v_step[2] + d * sizeof(Bits)));
#pragma unroll
                for (int r = 0; r < kPlainRows; ++r) sums[i][r] += m.weights[s * kPlainRows + r] * x;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPlainDimsEach; ++i) {
        const int d = thread + i * size;
        if (d >= c.dims) continue;
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
            if (r < p.count) store_result<E, S>(c, p, r, d, sums[i][r], m.top[r], m.total[r]);
        }
    }
}

}  // namespace mc::cuda

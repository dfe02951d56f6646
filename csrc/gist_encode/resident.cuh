// The encoder for many windows, those of a block staying with it: a group's residual stream, 128 rows or 64 (4 or 2 windows
// of 32), lies in shared memory from the first product to the pooling, while the weights stream past it from L2.
//
// Shared memory: rows * (Eg + 8) * 2 bytes (Eg to the next multiple of 32), and 93 or 77 KB for stages (tiles.cuh). So
//   227 KB (sm_90, 100)  128 rows up to Eg = 512, 64 rows up to 1184
//   163 KB (sm_80)       128 rows up to Eg = 256, 64 rows up to 672
//    99 KB (sm_86, 89)   64 rows up to Eg = 160
// of which 64 rows are taken up to 768: beyond, tiles of all windows' rows read weights less often, and the activations
// that travel between them weigh less beside the products.
// What does not fit goes through a scratch of the block's own in L2: queries, keys, values of some heads, attention's
// result, SwiGLU's: 2 * 128 * 1792 bytes of the default net, 60 MB on 132 multiprocessors, of which 50 stay in an H100's L2.
// It never holds more than a group's rows, and is written over by the next step.
#pragma once

#include "attend.cuh"
#include "pieces.cuh"
#include "tiled.cuh"

namespace mc::cuda {

constexpr int kResidentHead = 64;  // dimensions, at most: more take the registers that products need

MC_BOTH int resident_step(int width) { return (width + kTileInner - 1) / kTileInner * kTileInner + 8; }

template <int MT>
int64_t resident_bytes(int64_t width) {
    return TileMemory::bytes<MT>() +
           shared_bytes_of<uint16_t>(static_cast<int64_t>(kTileRows<MT>) * resident_step(static_cast<int>(width)));
}

// A group of windows, and where a block has it. Scratch: rows of `c.scratch_columns`: of the heads of a pass queries, keys
// and values, head by head, then, for all heads, attention's result; or all of SwiGLU's.
template <class E>
struct Group {
    using M = TensorMath<E>;
    const EncodeCall& c;
    Resident h;
    char* scratch;
    int window, windows, rows;

    MC_DEVICE char* row(int r) const { return row_of<M>(scratch, r, c.scratch_columns); }
    MC_DEVICE int attention() const { return c.pass_heads * 6 * c.half; }
};

// kFirst, kAttendOut, kDown: to the residual stream.
template <class E>
struct GroupSum {
    using M = TensorMath<E>;
    const EncodeCall& c;
    const Group<E>& group;
    Linear l;
    int inner, wide, tiles;
    const char *weights, *gain = nullptr;
    bool normed;

    MC_DEVICE GroupSum(const Group<E>& g, Step step, int layer) : c(g.c), group(g), l(g.c, step, layer) {
        inner = l.inner;
        wide = tile_width(c.width, kTileOutputs, 32);
        tiles = (c.width + wide - 1) / wide;
        weights = l.w.at(l.layer);
        normed = step == kFirst;
    }
    MC_DEVICE uint32_t weight(int tile, int n) const {
        const int o = tile * wide + n;
        return o < c.width ? l.w.offset(o) : kNoWeight;
    }
    MC_DEVICE const char* input(int, int r) const {
        if (r >= group.rows) return nullptr;
        if (l.step != kFirst) return group.row(r) + (l.step == kDown ? 0 : 2 * group.attention());
        const int each = fresh(c.rows_each), n = group.window + r / each, j = r % each;
        return j < c.tokens ? c.blocks + n * c.blocks_n + j * c.blocks_k : nullptr;
    }
    MC_DEVICE int live(int) const { return group.rows; }
    using Column = PlaceInRow;
    struct Row {
        uint32_t* h;
        bool token;  // a class token's: its row of inputs was zeros
    };
    MC_DEVICE Column column(int tile, int n) const {
        const int o = tile * wide + n;
        return {o, -1, o < c.width};
    }
    MC_DEVICE Row row(int, int r) const {
        return {reinterpret_cast<uint32_t*>(&group.h.data[r * group.h.step]),
                l.step == kFirst && r % fresh(c.rows_each) == c.tokens};
    }
    MC_DEVICE void finish(const Row& row, const Column& column, const float (&a)[2], const float (&)[2]) const {
        uint32_t* const h = row.h + column.at / 2;
        uint32_t add = *h;
        float x = a[0], y = a[1];
        if (l.step == kFirst) {
            add = read_constant<uint32_t>(c.level.data + 2 * column.at);
            if (row.token) {
                const uint32_t token = read_constant<uint32_t>(c.pool_q.data + 2 * column.at);
                x = low_of<E>(token);
                y = high_of<E>(token);
            }
        }
        *h = pack_pair<E>(x + low_of<E>(add), y + high_of<E>(add));
    }
};

// kQkv of some heads, kGateUp: from the residual stream to the scratch.
template <class E>
struct GroupPairs {
    using M = TensorMath<E>;
    const EncodeCall& c;
    const Group<E>& group;
    Linear l;
    int outputs, first_head, inner, wide, tiles;  // outputs: pairs
    const char *weights, *gain;
    bool normed = true;

    MC_DEVICE GroupPairs(const Group<E>& g, Step step, int layer, int head, int heads)
        : c(g.c), group(g), l(g.c, step, layer), first_head(head) {
        outputs = step == kQkv ? heads * 3 * c.half : c.ffn;
        inner = c.width;
        wide = tile_width(2 * outputs, kTileOutputs, 64);
        tiles = (2 * outputs + wide - 1) / wide;
        weights = l.w.at(l.layer);
        gain = l.gain;
    }
    MC_DEVICE const char* input(int, int) const { return nullptr; }
    MC_DEVICE uint32_t weight(int tile, int n) const {
        const int i = tile * (wide / 2) + pair_of(n);
        if (i >= outputs) return kNoWeight;
        if (l.step == kGateUp) return l.w.offset(is_partner(n) ? c.ffn + i : i);
        const int half = fresh(c.half), third = i / half, pair = i % half;
        const int row = third % 3 * c.width + (first_head + third / 3) * 2 * half + pair;
        return l.w.offset(is_partner(n) ? row + half : row);
    }
    MC_DEVICE int live(int) const { return group.rows; }
    using Column = PlaceInRow;
    struct Row {
        char* to;
        const float* phases;
    };
    MC_DEVICE Column column(int tile, int n) const {
        const int i = tile * (wide / 2) + n;
        Column out{i, -1, i < outputs};
        if (l.step == kQkv) {
            // Half a head is even here: neighbours are of one head and third.
            const int half = fresh(c.half), third = i / half, pair = i % half;
            out.at = third * 2 * half + pair;
            if (third % 3 < 2) out.phase = 2 * pair;
        }
        return out;
    }
    MC_DEVICE Row row(int, int r) const { return {group.row(r), c.phases + 2 * (r % fresh(c.rows_each) * c.half)}; }
    MC_DEVICE void finish(const Row& row, const Column& column, const float (&a)[2], const float (&b)[2]) const {
        if (l.step == kGateUp) {
            store_pair<E>(row.to, column.at, silu(a[0]) * b[0], silu(a[1]) * b[1]);
            return;
        }
        float x[2] = {a[0], a[1]}, y[2] = {b[0], b[1]};
        if (column.phase >= 0) turn_pairs(row.phases + column.phase, x, y);
        store_pair<E>(row.to, column.at, x[0], x[1]);
        store_pair<E>(row.to, column.at + c.half, y[0], y[1]);
    }
};

// 1 / rms of the group's rows.
template <class E>
MC_DEVICE void row_norms(const Group<E>& group, const Span<float>& inverse) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int r = static_cast<int>(threadIdx.x) / 32; r < group.rows; r += kTileThreads / 32) {
        float squares = 0.0f;
        for (int i = 2 * lane; i < group.c.width; i += 64) {
            const uint32_t x = *reinterpret_cast<const uint32_t*>(&group.h.data[r * group.h.step + i]);
            squares += low_of<E>(x) * low_of<E>(x) + high_of<E>(x) * high_of<E>(x);
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
        if (lane == 0) inverse[r] = inverse_rms(squares, group.c.width);
    }
    __syncthreads();
}

template <class E>
MC_DEVICE void attend_heads(const Group<E>& group, int head, int heads) {
    const EncodeCall& c = group.c;
    const int tiles = query_tiles(c), dims = 2 * c.half;
    for (int u = static_cast<int>(threadIdx.x) / 32; u < group.windows * heads * tiles; u += kTileThreads / 32) {
        const int one = u / tiles % heads;
        char* const row = group.row(u / tiles / heads * c.rows_each);
        const char* const q = row + 6 * one * dims;
        attend_queries<E, kResidentHead>({q, q + 2 * dims, q + 4 * dims, 2 * c.scratch_columns,
                                          row + 2 * (group.attention() + (head + one) * dims), 2 * c.scratch_columns},
                                         c.rows_each, dims, u % tiles * kAttendQueries);
    }
    __syncthreads();
}

template <class E, int MT>
__global__ void __launch_bounds__(kTileThreads, 1) encode_resident(const __grid_constant__ EncodeCall c) {
    MC_SHARED_MEMORY(memory);
    SharedMemory shared(memory);
    const TileMemory tile_memory = TileMemory::take<MT>(shared);
    const int row_step = resident_step(c.width), thread = static_cast<int>(threadIdx.x);
    const Resident h{shared.take<uint16_t>(kTileRows<MT> * row_step), row_step};
    char* const scratch =
        row_of<TensorMath<E>>(c.scratch, static_cast<int64_t>(blockIdx.x) * kTileRows<MT>, c.scratch_columns);
    const int pads = row_step - c.width;
    for (int i = thread; i < kTileRows<MT> * pads; i += kTileThreads) {
        h.data[i / pads * row_step + c.width + i % pads] = 0;
    }
    for (int first = static_cast<int>(blockIdx.x) * c.group; first < c.windows;
         first += static_cast<int>(gridDim.x) * c.group) {
        const int windows = min(c.group, c.windows - first);
        const Group<E> group{c, h, scratch, first, windows, windows * c.rows_each};
        // Ahead of the layers' halves the first product: one copy of the code for all that end in the residual stream.
        for (int half = -1; half < 2 * c.layers; ++half) {
            const int layer = half / 2;
            const bool attends = half % 2 == 0;
            if (half >= 0) {
                row_norms(group, tile_memory.inverse);
                for (int head = 0; head < (attends ? c.heads : 1); head += c.pass_heads) {
                    const int heads = min(c.pass_heads, c.heads - head);
                    multiply_tiles<E, MT, false, true>(
                        GroupPairs<E>(group, attends ? kQkv : kGateUp, layer, head, heads), tile_memory, h);
                    if (attends) attend_heads(group, head, heads);
                }
            }
            const Step step = half < 0 ? kFirst : attends ? kAttendOut : kDown;
            multiply_tiles<E, MT, true, false>(GroupSum<E>(group, step, layer), tile_memory, {});
        }
        for (int unit = 0; unit < windows * c.gists; ++unit) {
            const int row = unit / c.gists * c.rows_each;
            pool<TensorMath<E>>(c, SharedMemory(memory), first * c.gists + unit,
                                [&](int j, int i) { return E::widen(h.data[(row + j) * h.step + i]); });
        }
    }
}

}  // namespace mc::cuda

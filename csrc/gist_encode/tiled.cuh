// A linear map of the encoder for many rows, one launch: tiles of 128 rows (tiles.cuh), the norm in front taken from the
// rows that pass by, what follows the map done where its sums are. For windows that do not stay in shared memory
// (resident.cuh), and for the gists' projection.
#pragma once

#include "product.cuh"
#include "tiles.cuh"

namespace mc::cuda {

constexpr int kTiledRows = 4;  // of 32

// Which rows of the weight a tile of pairs has: eight first members, then their eight partners.
MC_DEVICE int pair_of(int n) { return n / 16 * 8 + n % 8; }
MC_DEVICE bool is_partner(int n) { return n / 8 % 2 != 0; }

// Two neighbours, in an activation.
template <class E>
MC_DEVICE void store_pair(char* row, int i, float x, float y) {
    write(row + 2 * i, pack_pair<E>(x, y));
}

// Where an output, or pair, and its neighbour go in a row, and of those that turn the phases; -1: none.
struct PlaceInRow {
    int at, phase;
    bool inside;
};

// Pairs that a head's position turns: x + i y by cos and sin of two phases side by side.
MC_DEVICE void turn_pairs(const float* phase, float (&x)[2], float (&y)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float cos = read<float>(phase + 2 * i), sin = read<float>(phase + 2 * i + 1);
        const float turned = x[i] * cos - y[i] * sin;
        y[i] = y[i] * cos + x[i] * sin;
        x[i] = turned;
    }
}

MC_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

template <class E, bool kPaired>
struct TiledProduct {
    using M = TensorMath<E>;
    const EncodeCall& c;
    Linear l;
    int inner, wide, columns, tiles;  // columns: tiles side by side; tiles: of this block
    const char *weights, *gain;
    bool normed;

    MC_DEVICE TiledProduct(const EncodeCall& call, const Linear& linear) : c(call), l(linear) {
        inner = l.inner;
        wide = c.tile_outputs;
        columns = tile_columns(l, wide);
        const int all = columns * ((l.rows + kTileRows<kTiledRows> - 1) / kTileRows<kTiledRows>);
        tiles = (all - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
        weights = l.w.at(l.layer);
        gain = l.gain;
        normed = l.normed;
    }
    static MC_BOTH int tile_columns(const Linear& l, int wide) {
        const int each = kPaired ? wide / 2 : wide;
        return (l.outputs + each - 1) / each;
    }
    // Tiles of one row of tiles run together: its inputs come from memory once.
    MC_DEVICE int at(int tile) const { return static_cast<int>(blockIdx.x) + tile * static_cast<int>(gridDim.x); }
    MC_DEVICE int first_row(int tile) const { return at(tile) / columns * kTileRows<kTiledRows>; }
    MC_DEVICE int first_output(int tile) const { return at(tile) % columns * (kPaired ? wide / 2 : wide); }
    MC_DEVICE uint32_t weight(int tile, int n) const {
        const int o = first_output(tile) + (kPaired ? pair_of(n) : n);
        return o < l.outputs ? l.w.offset(l.row(c, o, kPaired && is_partner(n))) : kNoWeight;
    }
    MC_DEVICE const char* input(int tile, int row) const {
        const int r = first_row(tile) + row;
        return r < l.rows ? input_row<M>(c, l, r) : nullptr;
    }
    MC_DEVICE int live(int tile) const { return min(kTileRows<kTiledRows>, l.rows - first_row(tile)); }
    using Column = PlaceInRow;
    // `add`: what a sum is added to.
    struct Row {
        char* to;
        const char* add;
        const float* phases;
    };
    MC_DEVICE Column column(int tile, int n) const {
        const int o = first_output(tile) + n;
        Column out{o, -1, o < l.outputs};
        if (kPaired && l.step == kQkv && out.inside) {
            out.at = l.first(c, o);
            if (o < c.width) out.phase = 2 * (o % (c.width / 2) % c.half);
        }
        return out;
    }
    MC_DEVICE Row row(int tile, int row) const {
        const int r = first_row(tile) + row;
        if constexpr (kPaired) {
            if (l.step == kGateUp) return {row_of<M>(c.swiglu, r, c.ffn), nullptr, nullptr};
            return {row_of<M>(c.turned, r, 3 * c.width), nullptr, c.phases + 2 * (r % c.rows_each * c.half)};
        }
        if (l.step == kProject)
            return {reinterpret_cast<char*>(c.y + static_cast<int64_t>(r) * c.embed), nullptr, nullptr};
        const bool first = l.step == kFirst;
        char* const h = row_of<M>(c.h, first ? r / c.tokens * c.rows_each + r % c.tokens : r, c.width);
        return {h, first ? c.level.data : h, nullptr};
    }
    MC_DEVICE void finish(const Row& row, const Column& column, const float (&a)[2], const float (&b)[2]) const {
        if constexpr (kPaired) {
            if (l.step == kGateUp) {
                store_pair<E>(row.to, column.at, silu(a[0]) * b[0], silu(a[1]) * b[1]);
                return;
            }
            float x[2] = {a[0], a[1]}, y[2] = {b[0], b[1]};
            if (column.phase >= 0) turn_pairs(row.phases + column.phase, x, y);
            store_pair<E>(row.to, column.at, x[0], x[1]);
            store_pair<E>(row.to, column.at + c.half, y[0], y[1]);
        } else if (l.step == kProject) {
            write(row.to + 4 * column.at, Pack<float, 2>{{a[0], a[1]}});
        } else {
            const uint32_t before = read<uint32_t>(row.add + 2 * column.at);
            store_pair<E>(row.to, column.at, a[0] + low_of<E>(before), a[1] + high_of<E>(before));
        }
    }
};

template <class E>
__global__ void __launch_bounds__(kTileThreads, 1) encode_tiles(const __grid_constant__ EncodeCall c) {
    MC_SHARED_MEMORY(memory);
    SharedMemory shared(memory);
    const TileMemory tile_memory = TileMemory::take<kTiledRows>(shared);
    const Step step = c.step(c.first_stage);
    const Linear l(c, step, step == kFirst || step >= kPool ? 0 : c.layer(c.first_stage));
    if (l.paired) {
        multiply_tiles<E, kTiledRows, true, true>(TiledProduct<E, true>(c, l), tile_memory, {});
    } else {
        multiply_tiles<E, kTiledRows, true, false>(TiledProduct<E, false>(c, l), tile_memory, {});
    }
}

}  // namespace mc::cuda

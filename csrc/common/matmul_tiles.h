// The micro-kernel of matmul.h on matrix tiles, written once over `Tiles` (tile_amx.h, tile_emulated.h).
//
// Two tiles of A, 16 rows each, meet two of a panel, 16 columns each: 4 tiles of C, all 8 that there are. A step of the
// panel is a row of a tile. Fewer rows of A are fewer rows of its tiles; a panel always has all its columns. Sums begin with
// what C holds, where that is added to, and so do those of later parts of long rows.
#pragma once

#include <cstring>

#include "matmul.h"

namespace mc {
namespace {

enum { kC00, kC01, kC10, kC11, kA0, kA1, kW0, kW1 };

constexpr int64_t kTileRows = 16;

inline TileConfig tile_config(int64_t rows) {
    const int64_t upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper;
    TileConfig out;
    const auto shape = [&](int tile, int64_t n) {
        out.rows[tile] = static_cast<uint8_t>(n);
        out.row_bytes[tile] = n ? 64 : 0;
    };
    shape(kA0, upper);
    shape(kC00, upper);
    shape(kC01, upper);
    shape(kA1, lower);
    shape(kC10, lower);
    shape(kC11, lower);
    shape(kW0, kTileSteps);
    shape(kW1, kTileSteps);
    return out;
}

// What is read next, a few lines with every step of tiles: a panel is read for 32 rows in less time than it takes to come
// from beyond the second-level cache.
struct Fetch {
    const char* next;
    int64_t lines;  // a step

    explicit Fetch(const Product& p) : next(p.next), lines(0) {
        if (!next) return;
        const int64_t blocks = (p.m + 2 * kTileRows - 1) / (2 * kTileRows);
        lines = (p.next_step * kTileSteps / 64 + blocks - 1) / blocks;
    }
    void some() {
        for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Steps [from, to) of a product of at most 2 * kTileRows rows, on top of what `c` holds or of nothing.
template <bool kTwo>
inline void sum_tiles(Tiles& t, const Product& p, const char* a, int64_t from, int64_t to, bool add, float* c,
                      int64_t c_step, Fetch& fetch) {
    const int64_t step = c_step * 4, a_lower = kTileRows * p.a_step;
    float* lower = c + kTileRows * c_step;
    if (add) {
        t.load<kC00>(c, step);
        t.load<kC01>(c + 16, step);
        if constexpr (kTwo) t.load<kC10>(lower, step);
        if constexpr (kTwo) t.load<kC11>(lower + 16, step);
    } else {
        t.zero<kC00>();
        t.zero<kC01>();
        if constexpr (kTwo) t.zero<kC10>();
        if constexpr (kTwo) t.zero<kC11>();
    }
    a += 4 * from;
    const char* w = p.w + from * p.w_step;
    for (int64_t i = from; i < to; i += kTileSteps, a += 4 * kTileSteps, w += kTileSteps * p.w_step) {
        fetch.some();
        t.load<kA0>(a, p.a_step);
        t.load<kW0>(w, p.w_step);
        t.multiply<kC00, kA0, kW0>();
        t.load<kW1>(w + 64, p.w_step);
        t.multiply<kC01, kA0, kW1>();
        if constexpr (kTwo) {
            t.load<kA1>(a + a_lower, p.a_step);
            t.multiply<kC10, kA1, kW0>();
            t.multiply<kC11, kA1, kW1>();
        }
    }
    t.store<kC00>(c, step);
    t.store<kC01>(c + 16, step);
    if constexpr (kTwo) t.store<kC10>(lower, step);
    if constexpr (kTwo) t.store<kC11>(lower + 16, step);
}

// The same of a part of a panel: what is beyond its n columns is not C's.
template <bool kTwo>
inline void sum_tiles_beside(Tiles& t, const Product& p, const char* a, int64_t from, int64_t to, bool add, float* c,
                             int64_t rows, Fetch& fetch) {
    alignas(64) float sums[2 * kTileRows][kPanel];
    const auto bytes = static_cast<size_t>(p.n) * sizeof(float);
    for (int64_t r = 0; add && r < rows; ++r) std::memcpy(sums[r], c + r * p.c_step, bytes);
    sum_tiles<kTwo>(t, p, a, from, to, add, sums[0], kPanel, fetch);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * p.c_step, sums[r], bytes);
}

// Steps that are multiplied with all rows before the next ones are: as much of a panel, and of 32 rows, fits the
// first-level cache.
inline int64_t steps_at_once(const Product& p) {
    constexpr int64_t kMost = 160;
    if (p.m <= 2 * kTileRows || p.steps <= kMost) return p.steps;
    const int64_t parts = (p.steps + kMost - 1) / kMost;
    return (p.steps / parts + kTileSteps - 1) / kTileSteps * kTileSteps;
}

// The rows that this thread's tiles have shapes for, 0 for none: configuring them waits for all that they do, and the products
// of a job mostly have the same.
thread_local int64_t configured = 0;

void release_tiles() {
    Tiles::release();
    configured = 0;
}

void multiply_tiles(const Product& p) {
    Tiles t;
    const int64_t part = steps_at_once(p);
    int64_t from = 0;
    Fetch fetch(p);
    do {
        const int64_t to = from + part < p.steps ? from + part : p.steps;
        const bool add = p.add || from > 0;
        for (int64_t first = 0; first < p.m; first += 2 * kTileRows) {
            const int64_t rows = p.m - first < 2 * kTileRows ? p.m - first : 2 * kTileRows;
            if (rows != configured) t.configure(tile_config(rows));
            configured = rows;
            const char* a = p.a + first * p.a_step;
            float* c = p.c + first * p.c_step;
            const bool two = rows > kTileRows, whole = p.n == kPanel;
            if (two && whole) sum_tiles<true>(t, p, a, from, to, add, c, p.c_step, fetch);
            if (two && !whole) sum_tiles_beside<true>(t, p, a, from, to, add, c, rows, fetch);
            if (!two && whole) sum_tiles<false>(t, p, a, from, to, add, c, p.c_step, fetch);
            if (!two && !whole) sum_tiles_beside<false>(t, p, a, from, to, add, c, rows, fetch);
        }
        from = to;
    } while (from < p.steps);
}

}  // namespace
}  // namespace mc

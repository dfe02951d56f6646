// The micro-kernel of matmul.h on matrix tiles, written once over `Tiles` (tile_amx.h, tile_emulated.h).
//
// Two tiles of A, 16 rows each, meet two of a panel, 16 columns each: 4 tiles of C, all 8 that there are. A step of the
// panel is a row of a tile. Fewer rows of A are fewer rows of its tiles; a panel always has all its columns.
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

template <bool kTwo>
inline void sum_tiles(Tiles& t, const Product& p, const char* a) {
    t.zero<kC00>();
    t.zero<kC01>();
    if constexpr (kTwo) {
        t.zero<kC10>();
        t.zero<kC11>();
    }
    const char* w = p.w;
    for (int64_t i = 0; i < p.steps; i += kTileSteps, a += 4 * kTileSteps, w += kTileSteps * p.w_step) {
        t.load<kW0>(w, p.w_step);
        t.load<kW1>(w + 64, p.w_step);
        t.load<kA0>(a, p.a_step);
        t.multiply<kC00, kA0, kW0>();
        t.multiply<kC01, kA0, kW1>();
        if constexpr (kTwo) {
            t.load<kA1>(a + kTileRows * p.a_step, p.a_step);
            t.multiply<kC10, kA1, kW0>();
            t.multiply<kC11, kA1, kW1>();
        }
    }
}

void multiply_tiles(const Product& p) {
    Tiles t;
    int64_t configured = 0;
    for (int64_t first = 0; first < p.m; first += 2 * kTileRows) {
        const int64_t rows = p.m - first < 2 * kTileRows ? p.m - first : 2 * kTileRows;
        if (rows != configured) t.configure(tile_config(rows));
        configured = rows;
        const char* a = p.a + first * p.a_step;
        float* c = p.c + first * p.c_step;
        const bool direct = p.n == kPanel && !p.add;
        alignas(64) float sums[2 * kTileRows][kPanel];
        float* out = direct ? c : sums[0];
        const int64_t step = (direct ? p.c_step : kPanel) * 4;
        if (rows > kTileRows) {
            sum_tiles<true>(t, p, a);
            t.store<kC10>(out + kTileRows * step / 4, step);
            t.store<kC11>(out + kTileRows * step / 4 + 16, step);
        } else {
            sum_tiles<false>(t, p, a);
        }
        t.store<kC00>(out, step);
        t.store<kC01>(out + 16, step);
        for (int64_t r = 0; !direct && r < rows; ++r, c += p.c_step) {
            for (int64_t n = 0; n < p.n; ++n) c[n] = p.add ? c[n] + sums[r][n] : sums[r][n];
        }
    }
}

}  // namespace
}  // namespace mc

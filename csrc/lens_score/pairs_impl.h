// A tile's products with bf16 operands, where the level multiplies those (matmul.h): in half the time of fp32 ones, and
// entries need no widening.
//
// Included by lens_impl.h after vec_<level>.h; for what may be used here see there. A tile's rows multiply with the panel
// where they lie, or copied, a span of dimensions at a time, to where their number of cache lines is odd and their rest
// is zero; for the weighted sums, where an entry is a step, two entries at a time become the pairs of a step.
#pragma once

#include <cstring>

#include "lens.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr int64_t kPairs = kTile / 2;
constexpr int64_t kRowsAtOnce = 14;  // of a product: those of a tile in registers

// A tile's entries as steps of a product: so many rows.
inline int64_t whole_rows(int64_t count) { return product_steps(kBF16, count) * 2; }

// Rows of a tile from some dimension on, as a product takes them.
struct TileRows {
    const char* x;
    int64_t step;
};

// Whether a tile's rows can be multiplied where they lie: they are whole steps, and those of a product's tile do not
// crowd into few sets of the first-level cache.
inline bool lie_well(const Stream& s, int64_t count) {
    const int64_t apart = s.step % 2048;
    return s.dims % (2 * kTileSteps) == 0 && count == whole_rows(count) && apart >= 64 && apart <= 2048 - 64;
}

// `count` entries from entry `first` and dimension `at` on, `dims` of them: where they lie, or copied, with zeros up to
// whole steps and rows.
inline TileRows lay_out(const Stream& s, int64_t first, int64_t count, int64_t at, int64_t dims, char* copied) {
    const char* row = s.entries + first * s.step + at * BF16::kBytes;
    if (lie_well(s, count)) return {row, s.step};
    const int64_t bytes = dims * BF16::kBytes, whole = product_steps(kBF16, dims) * 4, rows = whole_rows(count);
    char* out = copied;
    for (int64_t r = 0; r < count; ++r, row += s.step, out += kSpanBytes) {
        std::memcpy(out, row, static_cast<size_t>(bytes));
        std::memset(out + bytes, 0, static_cast<size_t>(whole - bytes));
    }
    for (int64_t r = count; r < rows; ++r, out += kSpanBytes) std::memset(out, 0, static_cast<size_t>(whole));
    return {copied, kSpanBytes};
}

// Adds up squares [count, kWidth] of `dims` dimensions.
inline void add_squares(TileRows rows, int64_t count, int64_t dims, float* squares) {
    const int64_t whole = product_steps(kBF16, dims) * 4;
    for (int64_t r = 0; r < count; ++r, squares += Vec::kWidth) {
        const char* row = rows.x + r * rows.step;
        Vec sum = load(squares), more = Vec::all(0.0f);
        for (int64_t i = 0; i < whole; i += 4 * Vec::kWidth) {
            const Pair x = load_pair(BF16{}, row + i);
            sum = fmadd(x.first, x.first, sum);
            more = fmadd(x.second, x.second, more);
        }
        store(squares, add(sum, more));
    }
}

// Memory that is read next, fetched by and by.
struct Ahead {
    const char* next;  // NULL: nothing
    int64_t step;      // bytes for every step of a product
};

// The `count` rows that follow a tile of s, in the course of its products.
inline Ahead ahead_of(const Stream& s, const char* next, int64_t count, int64_t products) {
    if (count <= 0 || s.step > 2 * s.dims * BF16::kBytes) return {nullptr, 0};
    return {next, count * s.step / (products * product_steps(kBF16, s.dims)) + 1};
}

inline int64_t parts_of(int64_t count) { return (count + kRowsAtOnce - 1) / kRowsAtOnce; }

// out[n, j] (+)= <x_n, panel column j> over dimensions [at, at + dims), which are `x`.
inline void multiply_span(const Stream& s, TileRows x, int64_t count, int64_t at, int64_t dims, float* out,
                          Ahead& ahead) {
    const int64_t panel = panel_bytes(kBF16, s.dims), line = kPanel * 4, steps = product_steps(kBF16, dims);
    const int64_t parts = parts_of(count);
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t r = part * count / parts, rows = (part + 1) * count / parts - r;
        for (int64_t j = 0; j < s.columns; j += kPanel) {
            const char* w = s.pairs + j / kPanel * panel + at / 2 * line;
            const int64_t n = s.columns - j < kPanel ? s.columns - j : kPanel;
            s.matmul->multiply[kBF16]({x.x + r * x.step, x.step, rows, w, line, steps, out + r * s.columns + j,
                                       s.columns, n, at > 0, ahead.next, ahead.step});
            if (ahead.next) ahead.next += steps * ahead.step;
        }
    }
}

// Weights [entry, columns] become rows of pairs [column, kWeightBytes], zeros from `count` to `rows`.
inline void pair_weights(const float* weights, int64_t columns, int64_t count, int64_t rows, char* out) {
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
        uint16_t narrow[kTile][Vec::kWidth] = {};
        uint32_t pairs[kPairs][Vec::kWidth];
        for (int64_t n = 0; n < count; ++n) {
            Vec::store(BF16{}, reinterpret_cast<char*>(narrow[n]), load(weights + n * columns + j));
        }
        for (int64_t n = 0; n < rows / 2; ++n) {
            for (int i = 0; i < Vec::kWidth; ++i) {
                pairs[n][i] = narrow[2 * n][i] | static_cast<uint32_t>(narrow[2 * n + 1][i]) << 16;
            }
        }
        for (int i = 0; i < Vec::kWidth; ++i, out += kWeightBytes) {
            for (int64_t n = 0; n < rows / 2; ++n) std::memcpy(out + n * 4, &pairs[n][i], 4);
        }
    }
}

// kPanel dimensions of two entries at a time.
inline void pair_entries(const char* row, int64_t step, int64_t rows, uint32_t* out) {
    for (int64_t n = 0; n < rows; n += 2, row += 2 * step, out += kPanel) {
        uint16_t a[kPanel], b[kPanel];
        std::memcpy(a, row, sizeof a);
        std::memcpy(b, row + step, sizeof b);
        for (int i = 0; i < kPanel; ++i) out[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
    }
}

// sums[j] (+)= sum_n weights[n, j] x_n over dimensions [at, at + dims), which are `x`.
inline void gather_span(const ReadRun& a, TileRows x, const char* weights, int64_t rows, int64_t at, int64_t dims,
                        bool more) {
    alignas(64) uint32_t pairs[kPairs * kPanel];
    for (int64_t d = 0; d < dims; d += kPanel) {
        pair_entries(x.x + d * BF16::kBytes, x.step, rows, pairs);
        const int64_t n = dims - d < kPanel ? dims - d : kPanel;
        a.stream.matmul->multiply[kBF16]({weights, kWeightBytes, a.vectors, reinterpret_cast<const char*>(pairs),
                                          kPanel * 4, rows / 2, a.sums + at + d, a.sums_step, n, more});
    }
}

inline void rescale(const ReadRun& a, const float* scale) {
    for (int64_t j = 0; j < a.vectors; ++j) {
        if (scale[j] == 1.0f) continue;
        float* sums = a.sums + j * a.sums_step;
        for (int64_t i = 0; i < round_up(a.stream.dims, kStrip); i += Vec::kWidth) {
            store(sums + i, mul(load(sums + i), Vec::all(scale[j])));
        }
    }
}

}  // namespace
}  // namespace mc

// A tile's products with bf16 operands, where the level multiplies those (matmul.h): in half the time of fp32 ones or much
// less, and entries need no widening.
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

constexpr int64_t kRegisterRows = 14;      // of a product: those of a tile in registers
constexpr int64_t kMatrixRows = 32;        // that matrix tiles multiply at once
constexpr int64_t kRowsBytes = 256 << 10;  // of rows that meet a panel: they and the next ones fit a second-level cache
constexpr int64_t kNearBytes = 768 << 10;  // of a tile that is still there when its weights are known
constexpr float kRmsEps = 1e-12f;

// Where a pass keeps what belongs to one tile.
struct Tile {
    float *widened, *weights, *products, *scale, *rest;

    explicit Tile(const Stream& s)
        : widened(s.scratch),
          weights(widened + kTile * kSpanStep),
          products(weights + s.columns * (weight_bytes(s.tile) / 4)),
          scale(products + s.tile * s.columns),
          rest(scale + s.columns) {}

    char* copied() const { return reinterpret_cast<char*>(widened); }
};

inline bool on_matrix_tiles(const Stream& s) { return s.matmul->outruns_memory; }

inline float inverse_rms(Vec squares, int64_t dims) {
    return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dims) + kRmsEps);
}

// 1 / rms of a row.
inline float inverse_rms(const char* row, int64_t dims) {
    Vec acc[4];
    for (Vec& one : acc) one = Vec::all(0.0f);
    int64_t i = 0;
    for (; i + 4 * Vec::kWidth <= dims; i += 4 * Vec::kWidth) {
        for (int half = 0; half < 2; ++half) {
            const Pair x = load_pair(BF16{}, row + (i + 2 * half * Vec::kWidth) * BF16::kBytes);
            acc[2 * half] = fmadd(x.first, x.first, acc[2 * half]);
            acc[2 * half + 1] = fmadd(x.second, x.second, acc[2 * half + 1]);
        }
    }
    for (; i < dims; i += Vec::kWidth) {
        const int64_t left = dims - i;
        const char* p = row + i * BF16::kBytes;
        const Vec x = left < Vec::kWidth ? Vec::load_part(BF16{}, p, static_cast<int>(left)) : Vec::load(BF16{}, p);
        acc[0] = fmadd(x, x, acc[0]);
    }
    return inverse_rms(add(add(acc[0], acc[1]), add(acc[2], acc[3])), dims);
}

// Rows of a tile from some dimension on, as a product takes them.
struct TileRows {
    const char* x;
    int64_t step;
};

// Whether rows can be multiplied where they lie: they are whole steps, and where a product comes back to a cache line those
// that it has at once do not crowd into few sets of the first-level cache.
inline bool lie_well(const Stream& s) {
    const int64_t apart = s.step % 2048;
    return s.dims % (2 * kTileSteps) == 0 && (on_matrix_tiles(s) || (apart >= 64 && apart <= 2048 - 64));
}

// Dimensions that are multiplied at a time: all of them, or equal parts in whole strips.
inline int64_t span_of(const Stream& s, bool copied) {
    if (!copied && on_matrix_tiles(s)) return s.dims;
    const int64_t most = copied ? kCopySpan : kSpan, spans = (s.dims + most - 1) / most;
    return round_up((s.dims + spans - 1) / spans, kStrip);
}

// `count` entries from entry `first` and dimension `at` on, `dims` of them, copied with zeros up to whole steps and up to
// `rows`.
inline TileRows copy_rows(const Stream& s, int64_t first, int64_t count, int64_t rows, int64_t at, int64_t dims,
                          char* to) {
    const char* row = s.entries + first * s.step + at * BF16::kBytes;
    const int64_t bytes = dims * BF16::kBytes, whole = product_steps(kBF16, dims) * 4;
    char* out = to;
    for (int64_t r = 0; r < count; ++r, row += s.step, out += kCopyBytes) {
        std::memcpy(out, row, static_cast<size_t>(bytes));
        std::memset(out + bytes, 0, static_cast<size_t>(whole - bytes));
    }
    for (int64_t r = count; r < rows; ++r, out += kCopyBytes) std::memset(out, 0, static_cast<size_t>(whole));
    return {to, kCopyBytes};
}

// Products of rows [r, r + rows) of the tile that begins at entry `first`. ahead: bytes that follow them and are fetched
// meanwhile.
inline void multiply_rows(const Stream& s, int64_t first, int64_t r, int64_t rows, const Tile& tile, int64_t ahead) {
    const bool copied = !lie_well(s);
    const int64_t panel = panel_bytes(kBF16, s.dims), line = kPanel * 4, span = span_of(s, copied);
    const char *row = s.entries + (first + r) * s.step, *next = ahead ? row + rows * s.step : nullptr;
    const int64_t bytes = ahead / (panels_of(s.columns) * product_steps(kBF16, s.dims)) + 1;
    for (int64_t at = 0; at < s.dims; at += span) {
        const int64_t dims = s.dims - at < span ? s.dims - at : span, steps = product_steps(kBF16, dims);
        const TileRows x = copied ? copy_rows(s, first + r, rows, rows, at, dims, tile.copied())
                                  : TileRows{row + at * BF16::kBytes, s.step};
        for (int64_t j = 0; j < s.columns; j += kPanel) {
            const char* w = s.pairs + j / kPanel * panel + at / 2 * line;
            const int64_t n = s.columns - j < kPanel ? s.columns - j : kPanel;
            s.matmul->multiply[kBF16]({x.x, x.step, rows, w, line, steps, tile.products + r * s.columns + j, s.columns,
                                       n, at > 0, next, bytes});
            if (next) next += steps * bytes;
        }
    }
}

// Asks for whole rows, one after the other: the processor sees that and reads ahead by itself.
inline void touch_rows(const char* row, int64_t step, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; ++r, row += step) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
}

// As `meet`, with bf16 products.
inline void meet_pairs(const Stream& s, int64_t first, int64_t count, const Tile& tile) {
    const bool matrix = on_matrix_tiles(s);
    const int64_t row_bytes = s.dims * BF16::kBytes, fit = kRowsBytes / row_bytes / kMatrixRows * kMatrixRows;
    const int64_t most = !matrix ? kRegisterRows : fit < kMatrixRows ? kMatrixRows : fit;
    const int64_t unit = matrix ? kMatrixRows : 1, parts = (count + most - 1) / most, units = (count + unit - 1) / unit;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t r = part * units / parts * unit, stop = (part + 1) * units / parts * unit;
        const int64_t rows = (stop < count ? stop : count) - r, left = s.count - first - r - rows;
        const char* row = s.entries + (first + r) * s.step;
        if (matrix && !s.first_pass) touch_rows(row, s.step, rows, row_bytes);
        for (int64_t n = 0; s.first_pass && n < rows; ++n) {
            s.inverse[first + r + n] = inverse_rms(row + n * s.step, s.dims);
        }
        // Matrix tiles wait for what is fetched meanwhile; they do better when the rows have been touched before.
        const int64_t ahead = matrix || s.step > 2 * row_bytes ? 0 : left < rows ? left : rows;
        multiply_rows(s, first, r, rows, tile, ahead * s.step);
    }
}

// Weights [entry, columns] become rows of pairs [column, step bytes], zeros from `count` to `rows`.
inline void pair_weights(const float* weights, int64_t columns, int64_t count, int64_t rows, char* out, int64_t step) {
    constexpr int64_t kEntries = 2 * Vec::kWidth;
    for (int64_t first = 0; first < rows; first += kEntries) {
        for (int64_t j = 0; j < columns; j += Vec::kWidth) {
            uint16_t narrow[kEntries][Vec::kWidth] = {};
            for (int64_t n = 0; n < kEntries && first + n < count; ++n) {
                Vec::store(BF16{}, reinterpret_cast<char*>(narrow[n]), load(weights + (first + n) * columns + j));
            }
            Vec pairs[Vec::kWidth];
            for (int64_t n = 0; n < Vec::kWidth; ++n) {
                uint32_t two[Vec::kWidth];
                for (int i = 0; i < Vec::kWidth; ++i) {
                    two[i] = narrow[2 * n][i] | static_cast<uint32_t>(narrow[2 * n + 1][i]) << 16;
                }
                pairs[n] = Vec::load(F32{}, reinterpret_cast<const char*>(two));
            }
            transpose(pairs);
            for (int i = 0; i < Vec::kWidth; ++i) Vec::store(F32{}, out + (j + i) * step + first * 2, pairs[i]);
        }
    }
}

// A strip of two entries at a time, as steps of panels [kPanel columns]. far: entries are beyond the second-level cache, and
// so are later strips.
inline void pair_entries(const char* row, int64_t step, int64_t rows, int64_t panels, bool far, uint32_t* out) {
    constexpr int64_t kAhead = 1 * kStrip * BF16::kBytes;
    for (int64_t n = 0; n < rows; n += 2, row += 2 * step, out += kPanel) {
        if (far) {
            __builtin_prefetch(row + kAhead, 0, 2);
            __builtin_prefetch(row + step + kAhead, 0, 2);
            __builtin_prefetch(row + kAhead + 64, 0, 2);
            __builtin_prefetch(row + step + kAhead + 64, 0, 2);
        }
        for (int64_t p = 0; p < panels; ++p) {
            uint16_t a[kPanel], b[kPanel];
            std::memcpy(a, row + p * sizeof a, sizeof a);
            std::memcpy(b, row + step + p * sizeof a, sizeof b);
            for (int i = 0; i < kPanel; ++i) {
                out[p * kMostEntries / 2 * kPanel + i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
            }
        }
    }
}

inline void rescale(const ReadRun& a, const float* scale) {
    float* sums = a.sums;
    for (int64_t at = 0; at < a.stream.dims; at += kStrip) {
        for (int64_t j = 0; j < a.vectors; ++j, sums += kStrip) {
            if (scale[j] == 1.0f) continue;
            const Vec by = Vec::all(scale[j]);
            for (int64_t i = 0; i < kStrip; i += Vec::kWidth) store(sums + i, mul(load(sums + i), by));
        }
    }
}

// The weighted sums of a tile with bf16 products.
inline void gather_pairs(const ReadRun& a, int64_t first, int64_t count, const Tile& tile) {
    const Stream& s = a.stream;
    const int64_t rows = product_steps(kBF16, count) * 2;
    const bool copied = s.dims % (2 * kTileSteps) || count<rows, far = count * s.dims * BF16::kBytes> kNearBytes;
    const int64_t span = copied ? span_of(s, true) : s.dims, step = weight_bytes(s.tile);
    char* weights = reinterpret_cast<char*>(tile.weights);
    pair_weights(tile.products, s.columns, count, rows, weights, step);
    if (first > 0) rescale(a, tile.scale);
    alignas(64) uint32_t pairs[2][kMostEntries / 2 * kPanel];
    const TileRows whole{s.entries + first * s.step, s.step};
    for (int64_t at = 0; at < s.dims; at += span) {
        const int64_t dims = s.dims - at < span ? s.dims - at : span;
        const TileRows x = copied ? copy_rows(s, first, count, rows, at, dims, tile.copied()) : whole;
        for (int64_t d = 0; d < dims; d += kStrip) {
            float* sums = a.sums + sum_at(a, at + d);
            const char* next = far ? reinterpret_cast<const char*>(sums + a.vectors * kStrip) : nullptr;
            const int64_t next_bytes = a.vectors * kPanel * 4 / (rows / 2), panels = dims - d > kPanel ? 2 : 1;
            pair_entries(x.x + d * BF16::kBytes, x.step, rows, panels, far, pairs[0]);
            for (int64_t p = 0; p < panels; ++p) {
                s.matmul->multiply[kBF16]({weights, step, a.vectors, reinterpret_cast<const char*>(pairs[p]),
                                           kPanel * 4, rows / 2, sums + p * kPanel, kStrip, kPanel, first > 0, next,
                                           next_bytes});
                if (next) next += a.vectors * kPanel * 4;
            }
        }
    }
}

}  // namespace
}  // namespace mc

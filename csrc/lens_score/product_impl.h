// Register-tiled products over a vector type: sums of outer products, so that no sum crosses a register.
//
// Included by lens_impl.h after vec_<level>.h; for what may be used here see there. Everywhere acc[r][v] gathers
// b[r, k] * a[k, v], b a scalar that is broadcast, a a vector: kRows * kVectors multiply-adds for kRows + kVectors
// loads.
#pragma once

#include "lens.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr bool kWide = Vec::kManyRegisters;
constexpr int kMostVectors = kWide ? 4 : 2;
constexpr int64_t kPartial = 64;  // products that are summed one by one: partial sums keep the error of long ones small

// Rows of a tile of kVectors vectors: what the registers hold.
constexpr int most_rows(int vectors) {
    return kWide ? (vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 16) : (vectors == 2 ? 6 : 12);
}

template <int kRows, int kVectors>
struct Accumulators {
    Vec at[kRows][kVectors];

    void add(const float* b, int64_t b_row, int64_t b_step, const float* a, int64_t a_step, int64_t n) {
        for (int64_t k = 0; k < n; ++k, b += b_step, a += a_step) {
            Vec x[kVectors];
            for (int v = 0; v < kVectors; ++v) x[v] = load(a + v * Vec::kWidth);
            for (int r = 0; r < kRows; ++r) {
                const Vec by = Vec::all(b[r * b_row]);
                for (int v = 0; v < kVectors; ++v) at[r][v] = fmadd(by, x[v], at[r][v]);
            }
        }
    }

    void store_to(float* out, int64_t step) const {
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) store(out + r * step + v * Vec::kWidth, at[r][v]);
        }
    }
};

// Calls f.rows<R>(first) so that the Rs cover [first, end): as many as the registers hold, then fours, twos and ones.
template <int kMost, class F>
inline void in_rows(int64_t first, int64_t end, F&& f) {
    for (; first + kMost <= end; first += kMost) f.template rows<kMost>(first);
    if constexpr (kMost > 8) {
        for (; first + 8 <= end; first += 8) f.template rows<8>(first);
    }
    for (; first + 4 <= end; first += 4) f.template rows<4>(first);
    if (first + 2 <= end) {
        f.template rows<2>(first);
        first += 2;
    }
    if (first < end) f.template rows<1>(first);
}

// The same for the vectors of `n` floats, a multiple of kPad: f.vectors<V>(first float). Five are three and two.
template <class F>
inline void in_vectors(int64_t n, F&& f) {
    int64_t at = 0, left = n / Vec::kWidth;
    for (; left >= kMostVectors && left != kMostVectors + 1; left -= kMostVectors, at += kMostVectors * Vec::kWidth) {
        f.template vectors<kMostVectors>(at);
    }
    if constexpr (kWide) {
        if (left == 5 || left == 3) {
            f.template vectors<3>(at);
            at += 3 * Vec::kWidth;
            left -= 3;
        }
    }
    for (; left >= 2; left -= 2, at += 2 * Vec::kWidth) f.template vectors<2>(at);
    if (left) f.template vectors<1>(at);
}

// Products of a widened span with the panel: out[n, j] (+)= sum_k x[n, k] panel[k, j].
struct Multiply {
    const float* x;  // [kTile, kSpan]
    const float* panel;
    int64_t dims, columns;
    float* out;  // [kTile, columns]
    int64_t count;
    bool more;  // out holds the products of spans before
    // What is read next, fetched meanwhile: `next_count` rows that follow each other `next_step` bytes apart.
    const char* next;
    int64_t next_step, next_bytes, next_count;

    template <int kVectors>
    void vectors(int64_t column) {
        in_rows<most_rows(kVectors)>(0, count, Columns<kVectors>{*this, column});
    }

    template <int kVectors>
    struct Columns {
        const Multiply& m;
        int64_t column;

        template <int kRows>
        void rows(int64_t n) {
            float* out = m.out + n * m.columns + column;
            for (int64_t k = 0; k < m.dims; k += kPartial) {
                Accumulators<kRows, kVectors> acc;
                const bool more = m.more || k > 0;
                for (int r = 0; r < kRows; ++r) {
                    for (int v = 0; v < kVectors; ++v) acc.at[r][v] = Vec::all(0.0f);
                }
                acc.add(m.x + n * kSpanStep + k, kSpanStep, 1, m.panel + k * m.columns + column, m.columns,
                        m.dims - k < kPartial ? m.dims - k : kPartial);
                for (int r = 0; more && r < kRows; ++r) {
                    for (int v = 0; v < kVectors; ++v) {
                        acc.at[r][v] = add(acc.at[r][v], load(out + r * m.columns + v * Vec::kWidth));
                    }
                }
                acc.store_to(out, m.columns);
            }
            for (int64_t r = n; column == 0 && r < n + kRows && r < m.next_count; ++r) {
                for (int64_t i = 0; i < m.next_bytes; i += 64) __builtin_prefetch(m.next + r * m.next_step + i, 0, 2);
            }
        }
    };
};

// out[m, 0..kStrip) = begin + sum_i b[m, i] a[i, 0..kStrip), begin = out * scale[m], or bias[m], or 0.
struct Gather {
    const float* b;  // element [m, i] at m * b_row + i * b_step
    int64_t b_row, b_step;
    const float* a;  // [n, kStrip]
    int64_t a_step, n;
    float* out;
    int64_t out_step;
    const float *scale, *bias;

    template <int kVectors>
    void vectors(int64_t at, int64_t count) {
        in_rows<most_rows(kVectors)>(0, count, Columns<kVectors>{*this, at});
    }

    template <int kVectors>
    struct Columns {
        const Gather& g;
        int64_t at;

        template <int kRows>
        void rows(int64_t m) {
            Accumulators<kRows, kVectors> acc;
            float* out = g.out + m * g.out_step + at;
            for (int r = 0; r < kRows; ++r) {
                const Vec begin = Vec::all(g.scale ? g.scale[m + r] : g.bias ? g.bias[m + r] : 0.0f);
                for (int v = 0; v < kVectors; ++v) {
                    acc.at[r][v] = g.scale ? mul(begin, load(out + r * g.out_step + v * Vec::kWidth)) : begin;
                }
            }
            acc.add(g.b + m * g.b_row, g.b_row, g.b_step, g.a + at, g.a_step, g.n);
            acc.store_to(out, g.out_step);
        }
    };

    // All `count` rows m.
    void operator()(int64_t count) {
        for (int64_t i = 0; i < kStrip; i += kMostVectors * Vec::kWidth) vectors<kMostVectors>(i, count);
    }
};

// Element i of `rows` rows goes to out[row * out_step + i - first] for i in [first, first + kStrip); zeros beyond
// `dims`.
// squares [rows, kWidth] or NULL: adds up squares.
template <class T>
inline void widen_strip(const char* row, int64_t step, int64_t rows, int64_t first, int64_t dims, float* out,
                        int64_t out_step, float* squares) {
    const int64_t n = dims - first < kStrip ? dims - first : kStrip;
    for (int64_t r = 0; r < rows; ++r, row += step, out += out_step) {
        const char* p = row + first * T::kBytes;
        Vec sum = squares ? load(squares + r * Vec::kWidth) : Vec::all(0.0f);
        for (int64_t i = 0; i < kStrip; i += Vec::kWidth, p += Vec::kWidth * T::kBytes) {
            const Vec x = i + Vec::kWidth <= n ? Vec::load(T{}, p)
                          : i < n              ? Vec::load_part(T{}, p, static_cast<int>(n - i))
                                               : Vec::all(0.0f);
            store(out + i, x);
            if (squares) sum = fmadd(x, x, sum);
        }
        if (squares) store(squares + r * Vec::kWidth, sum);
    }
}

}  // namespace
}  // namespace mc

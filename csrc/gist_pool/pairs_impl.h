// gist_pool with bf16 products: a product adds two neighbours' at a time, and nothing is widened.
//
// Included by gist_avx512bf16.cpp. For blocks and weights of bf16 and dims a multiple of kStep. Logits and norms are
// products of what is bf16 already; an entry's weight p and the vector that meets M are rounded. Two rows interleaved by
// 128-bit lanes are operands of a sum over both: `low` and `high` of a step's elements, put in order at last.
#pragma once

#include "gist_impl.h"

namespace mc {
namespace {

constexpr int64_t kStep = 32;         // elements of a register
constexpr int64_t kRowsAhead = 4;     // of M, from where it is read to where it is fetched
constexpr int64_t kMostEntries = 16;  // whose sums across registers are taken together

inline __m512i load_step(const char* p) { return _mm512_loadu_si512(p); }
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

struct Sums {
    __m512 low, high;

    void add(__m512i weights, __m512i first, __m512i second) {
        low = dot(low, weights, _mm512_unpacklo_epi16(first, second));
        high = dot(high, weights, _mm512_unpackhi_epi16(first, second));
    }
    Pair in_order() const {
        const __m512i four = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i more = _mm512_add_epi32(four, _mm512_set1_epi32(8));
        return {{_mm512_permutex2var_ps(low, four, high)}, {_mm512_permutex2var_ps(low, more, high)}};
    }
};

// n floats, a multiple of kWidth, to bf16.
inline void narrow(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kWidth) Vec::store(BF16{}, reinterpret_cast<char*>(out + i), load(x + i));
}

// x_j . w of all entries, and their x_j . x_j if kSquare.
template <bool kSquare>
inline void pair_scores(const PoolBlock& a, const char* w, float* dots, float* squares) {
    const char* w_value = w + a.dims * BF16::kBytes;
    for (int64_t e = 0; e < a.count; e += kMostEntries) {
        Vec dot_of[kMostEntries], square_of[kMostEntries];
        const int64_t n = a.count - e < kMostEntries ? a.count - e : kMostEntries;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t slot = a.rows.slots[e + i];
            const char *k = a.rows.k + slot * a.k_step, *v = a.rows.v + slot * a.v_step;
            if (kSquare && a.next.k) fetch(a.next.k + a.next.slots[e + i] * a.k_step, a.dims * BF16::kBytes);
            __m512 dot_k = _mm512_setzero_ps(), dot_v = dot_k, square_k = dot_k, square_v = dot_k;
            for (int64_t d = 0; d < a.dims * BF16::kBytes; d += kStep * BF16::kBytes) {
                const __m512i x = load_step(k + d), y = load_step(v + d);
                dot_k = dot(dot_k, x, load_step(w + d));
                dot_v = dot(dot_v, y, load_step(w_value + d));
                if constexpr (kSquare) {
                    square_k = dot(square_k, x, x);
                    square_v = dot(square_v, y, y);
                }
            }
            dot_of[i].v = _mm512_add_ps(dot_k, dot_v);
            if constexpr (kSquare) square_of[i].v = _mm512_add_ps(square_k, square_v);
        }
        for (int64_t i = n; i < kMostEntries; ++i) dot_of[i] = square_of[i] = Vec::all(0.0f);
        store(dots + e, sums(dot_of));
        if constexpr (kSquare) store(squares + e, sums(square_of));
    }
}

// out[d ..] = scale * sum_j p_j x_j[d ..] in kSteps steps. p: padded with zeros to an even number.
template <int kSteps>
inline void pair_gather(const PoolBlock& a, const Part& x, const uint16_t* p, float scale, int64_t d, float* out) {
    const char* next = d == 0 ? x.next : nullptr;
    Sums acc[kSteps];
    for (Sums& one : acc) one.low = one.high = _mm512_setzero_ps();
    for (int64_t j = 0; j < a.count; j += 2) {
        const bool both = j + 1 < a.count;
        const char* row = x.rows + d * BF16::kBytes;
        const char *first = row + a.rows.slots[j] * x.step, *second = both ? row + a.rows.slots[j + 1] * x.step : first;
        if (next) {
            fetch(next + x.next_slots[j] * x.step, a.dims * BF16::kBytes);
            if (both) fetch(next + x.next_slots[j + 1] * x.step, a.dims * BF16::kBytes);
        }
        int pair;
        __builtin_memcpy(&pair, p + j, sizeof pair);
        const __m512i weights = _mm512_set1_epi32(pair);
        for (int i = 0; i < kSteps; ++i) {
            const int64_t at = i * kStep * BF16::kBytes;
            acc[i].add(weights, load_step(first + at), load_step(second + at));
        }
    }
    for (int i = 0; i < kSteps; ++i) {
        const Pair y = acc[i].in_order();
        store(out + d + i * kStep, mul(y.first, Vec::all(scale)));
        store(out + d + i * kStep + kWidth, mul(y.second, Vec::all(scale)));
    }
}

inline void pair_gather_part(const PoolBlock& a, const Part& x, const uint16_t* p, float scale, float* out) {
    int64_t d = 0;
    for (; d + 4 * kStep <= a.dims; d += 4 * kStep) pair_gather<4>(a, x, p, scale, d, out);
    for (; d + 2 * kStep <= a.dims; d += 2 * kStep) pair_gather<2>(a, x, p, scale, d, out);
    if (d < a.dims) pair_gather<1>(a, x, p, scale, d, out);
}

void pool_pairs(const PoolBlock& a) {
    const int64_t entries = padded(a.count), y_step = gist_step(a.dims);
    float *inv_rms = a.scores, *p = inv_rms + entries;
    for (int64_t g = 0; g < a.gists; ++g) {
        if (g == 0) {
            pair_scores<true>(a, a.w_pairs, p, inv_rms);
        } else {
            pair_scores<false>(a, a.w_pairs + g * a.w_step, p + g * entries, nullptr);
        }
    }
    rms_to_inverse(a, inv_rms);
    const Part keys{a.rows.k, a.k_step, nullptr, nullptr};
    Part values{a.rows.v, a.v_step, a.next.v, a.next.slots};
    for (int64_t g = 0; g < a.gists; ++g, p += entries) {
        const float total = soften(p, inv_rms, a.b + g * entries, entries);
        float* y = a.y + g * y_step;
        uint16_t* weights = reinterpret_cast<uint16_t*>(p);  // in their place: an entry's are written after it was read
        narrow(p, entries, weights);
        pair_gather_part(a, keys, weights, 1.0f / total, y);
        pair_gather_part(a, values, weights, 1.0f / total, y + a.dims);
        values.next = nullptr;
    }
}

// Rows [i, i + kRows) and kSteps steps of columns from e on. y: rows of pairs.
template <int kRows, int kSteps>
inline void pair_product(const Residual& a, int64_t i, int64_t e) {
    Sums acc[kRows][kSteps];
    for (auto& row : acc) {
        for (Sums& one : row) one.low = one.high = _mm512_setzero_ps();
    }
    const uint16_t* y = a.pairs + i * a.step;
    const char* m = a.m + e * BF16::kBytes;
    const char* ahead = a.fetch && i == 0 && e == 0 ? a.m + kRowsAhead * a.m_step : nullptr;
    for (int64_t d = 0; d < a.width; d += 2, m += 2 * a.m_step) {
        if (ahead) {
            fetch(ahead, a.width * BF16::kBytes);
            fetch(ahead + a.m_step, a.width * BF16::kBytes);
            ahead += 2 * a.m_step;
        }
        __m512i low[kSteps], high[kSteps];
        for (int x = 0; x < kSteps; ++x) {
            const __m512i first = load_step(m + x * kStep * BF16::kBytes);
            const __m512i second = load_step(m + a.m_step + x * kStep * BF16::kBytes);
            low[x] = _mm512_unpacklo_epi16(first, second);
            high[x] = _mm512_unpackhi_epi16(first, second);
        }
        for (int r = 0; r < kRows; ++r) {
            int pair;
            __builtin_memcpy(&pair, y + r * a.step + d, sizeof pair);
            const __m512i factor = _mm512_set1_epi32(pair);
            for (int x = 0; x < kSteps; ++x) {
                acc[r][x].low = dot(acc[r][x].low, factor, low[x]);
                acc[r][x].high = dot(acc[r][x].high, factor, high[x]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int x = 0; x < kSteps; ++x) add_rest(a, acc[r][x].in_order(), i + r, e + x * kStep);
    }
}

void residual_pairs(const Residual& a) {
    for (int64_t i = 0; i < a.n; ++i) narrow(a.y + i * a.step, a.width, a.pairs + i * a.step);
    int64_t i = 0;
    for (; i + kTileRows <= a.n; i += kTileRows) {  // the width is a multiple of two steps
        for (int64_t e = 0; e < a.width; e += 2 * kStep) pair_product<kTileRows, 2>(a, i, e);
    }
    for (; i < a.n; ++i) {
        int64_t e = 0;
        for (; e + 8 * kStep <= a.width; e += 8 * kStep) pair_product<1, 8>(a, i, e);
        for (; e + 4 * kStep <= a.width; e += 4 * kStep) pair_product<1, 4>(a, i, e);
        for (; e < a.width; e += 2 * kStep) pair_product<1, 2>(a, i, e);
    }
}

}  // namespace
}  // namespace mc

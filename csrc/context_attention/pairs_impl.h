// context_attention with bf16 products, for the usual heads of bf16: a product adds two neighbours' at a time.
//
// Included by attend_avx512bf16.cpp. A key turns in fp32 and is rounded to bf16, as are the turned queries and what the
// softmax gives an entry; sums are fp32. Dimensions of keys and queries lie as a register of bf16 is widened: even
// ones, then odd ones. Two rows of values interleaved by 128-bit lanes are operands of a sum over both: `low` and `high` of a
// step's elements, put in order at last.
#pragma once

#include "attend_impl.h"

namespace mc {
namespace {

constexpr int kStep = 32;      // elements of a register of bf16
constexpr int kStrip = 16;     // keys that turn before they are multiplied: what `sums` takes
constexpr int kAtOnce = 4;     // queries, and keys, whose products stay in registers
constexpr int kValueSteps = 2;  // of the values' dimensions: as many sums of kAtOnce queries stay in registers
alignas(64) const char kNoValue[kStep * kValueSteps * BF16::kBytes] = {};

inline __m512i load_step(const void* p) { return _mm512_loadu_si512(p); }
inline Vec dot(Vec sum, __m512i a, __m512i b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
}
inline void narrow(Vec low, Vec high, uint16_t* out) {
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}

inline void narrow_query(const float* q, int64_t dims, uint16_t* out) {
    for (int64_t d = 0; d < dims; d += kStep) {
        const Pair x = as_loaded(BF16{}, Pair{load(q + d), load(q + d + Vec::kWidth)});
        narrow(x.first, x.second, out + d);
    }
}

inline void pack_queries(const float* q, int64_t rows, int64_t step, int64_t dims, uint16_t* out) {
    for (int64_t j = 0; j < rows; ++j) narrow_query(q + j * step, dims, out + j * dims);
}

// A key turned, in bf16; its phase has even pairs first.
template <int kDims>
inline void turn_key(const char* row, const float* phase, uint16_t* out) {
    constexpr int kHalf = kDims / 2;
    for (int d = 0; d < kHalf; d += kStep) {
        const Pair x = load_pair(BF16{}, row + d * BF16::kBytes);
        const Pair y = load_pair(BF16{}, row + (kHalf + d) * BF16::kBytes);
        const Vec c = load(phase + d), more_c = load(phase + d + Vec::kWidth);
        const Vec s = load(phase + kHalf + d), more_s = load(phase + kHalf + d + Vec::kWidth);
        narrow(fnmadd(y.first, s, mul(x.first, c)), fnmadd(y.second, more_s, mul(x.second, more_c)), out + d);
        narrow(fmadd(x.first, s, mul(y.first, c)), fmadd(x.second, more_s, mul(y.second, more_c)), out + kHalf + d);
    }
}

// Keys [e, e + kStrip) to a.turned [kStrip, kDims] of bf16; beyond the last entry what is there stays.
template <int kDims>
inline void turn_keys(const HeadBlock& a, int64_t e) {
    const int64_t end = e + kStrip < a.entries->count ? e + kStrip : a.entries->count;
    uint16_t* out = reinterpret_cast<uint16_t*>(a.turned);
    for (int64_t i = e; i < end; ++i, out += kDims) {
        const int64_t slot = a.entries->slot[i];
        if (a.next) fetch_row<kDims * BF16::kBytes>(a.next + slot * a.k_step);
        turn_key<kDims>(a.k + slot * a.k_step, a.phase + i * kDims, out);
    }
}

// Products of queries [j, j + kRows) with the turned keys, into column e of p.
template <int kDims, int kRows>
inline void score_keys(const HeadBlock& a, int64_t j, int64_t e) {
    const uint16_t *q = a.q_pairs + j * kDims, *keys = reinterpret_cast<const uint16_t*>(a.turned);
    const char* next = j == 0 ? a.next_v : nullptr;
    Vec products[kRows][kStrip];
    for (int group = 0; group < kStrip; group += kAtOnce, keys += kAtOnce * kDims) {
        for (int i = 0; i < kAtOnce && next; ++i) fetch_row<kDims>(next + a.entries->slot[e + group + i] * a.v_step);
        Vec acc[kAtOnce][kRows];
        for (auto& key : acc) {
            for (Vec& one : key) one = Vec::all(0.0f);
        }
        for (int d = 0; d < kDims; d += kStep) {
            __m512i by[kRows];
            for (int r = 0; r < kRows; ++r) by[r] = load_step(q + r * kDims + d);
            for (int i = 0; i < kAtOnce; ++i) {
                const __m512i key = load_step(keys + i * kDims + d);
                for (int r = 0; r < kRows; ++r) acc[i][r] = dot(acc[i][r], by[r], key);
            }
        }
        for (int i = 0; i < kAtOnce; ++i) {
            for (int r = 0; r < kRows; ++r) products[r][group + i] = acc[i][r];
        }
    }
    for (int r = 0; r < kRows; ++r) store(a.p + (j + r) * kBlock + e, sums(products[r]));
}

// out [kStep] += sums by 128-bit lanes.
inline void add_in_order(Vec low, Vec high, float* out) {
    const __m512i four = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i more = _mm512_add_epi32(four, _mm512_set1_epi32(8));
    store(out, add(load(out), {_mm512_permutex2var_ps(low.v, four, high.v)}));
    store(out + Vec::kWidth, add(load(out + Vec::kWidth), {_mm512_permutex2var_ps(low.v, more, high.v)}));
}

// out[j .. j + kRows) += p v in kValueSteps steps of dimensions from d on.
template <int kDims, int kRows>
inline void gather_values(const HeadBlock& a, int64_t j, int d) {
    const char* next = j == 0 && d == 0 && a.next_v ? a.next_v + kDims : nullptr;
    Vec low[kRows][kValueSteps], high[kRows][kValueSteps];
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kValueSteps; ++i) low[r][i] = high[r][i] = Vec::all(0.0f);
    }
    const uint16_t* p = a.p_pairs + j * kBlock;
    const char* v = a.v + d * BF16::kBytes;
    for (int64_t e = 0; e < a.entries->count; e += 2) {
        const char* first = v + a.entries->slot[e] * a.v_step;
        const char* second = e + 1 < a.entries->count ? v + a.entries->slot[e + 1] * a.v_step : kNoValue;
        if (next) {
            fetch_row<kDims>(next + a.entries->slot[e] * a.v_step);
            fetch_row<kDims>(next + a.entries->slot[e + 1] * a.v_step);
        }
        __m512i even[kValueSteps], odd[kValueSteps];
        for (int i = 0; i < kValueSteps; ++i) {
            const __m512i x = load_step(first + i * kStep * BF16::kBytes);
            const __m512i y = load_step(second + i * kStep * BF16::kBytes);
            even[i] = _mm512_unpacklo_epi16(x, y);
            odd[i] = _mm512_unpackhi_epi16(x, y);
        }
        for (int r = 0; r < kRows; ++r) {
            int pair;
            __builtin_memcpy(&pair, p + r * kBlock + e, sizeof pair);
            const __m512i weights = _mm512_set1_epi32(pair);
            for (int i = 0; i < kValueSteps; ++i) {
                low[r][i] = dot(low[r][i], weights, even[i]);
                high[r][i] = dot(high[r][i], weights, odd[i]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kValueSteps; ++i) {
            add_in_order(low[r][i], high[r][i], a.out + (j + r) * a.out_step + d + i * kStep);
        }
    }
}

template <int kNumber>
struct Constant {
    static constexpr int value = kNumber;
};

// Calls rows(j, number) with as many rows as stay in registers, the number a constant.
template <class F>
inline void in_rows(int64_t n, F&& rows) {
    int64_t j = 0;
    for (; j + kAtOnce <= n; j += kAtOnce) rows(j, Constant<kAtOnce>{});
    switch (n - j) {
        case 3: return rows(j, Constant<3>{});
        case 2: return rows(j, Constant<2>{});
        case 1: return rows(j, Constant<1>{});
        default: return;
    }
}

template <int kDims>
inline void attend_dims(const HeadBlock& a) {
    const int64_t count = a.entries->count, n = (count + kStrip - 1) / kStrip * kStrip;
    for (int64_t e = 0; e < count; e += kStrip) {
        turn_keys<kDims>(a, e);
        in_rows(a.rows, [&](int64_t j, auto rows) { score_keys<kDims, rows.value>(a, j, e); });
    }
    for (int64_t j = 0; j < a.rows; ++j) {
        soften(a, j, n, kDims);
        const float* p = a.p + j * kBlock;
        for (int64_t e = 0; e < n; e += kStep) narrow(load(p + e), load(p + e + kStrip), a.p_pairs + j * kBlock + e);
    }
    in_rows(a.rows, [&](int64_t j, auto rows) {
        for (int d = 0; d < kDims; d += kStep * kValueSteps) gather_values<kDims, rows.value>(a, j, d);
    });
}

// As Kept<BF16> of soften_impl.h. power errs by 2.6e-6, a thousandth of what rounding to bf16 does (minimax polynomial);
// in put a product with ones adds two neighbours' rounded numbers at a time.
struct KeptPairs {
    static Vec power(Vec x) {
        x = greater(Vec::all(-127.0f), x);
        const Vec n = {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}, f = sub(x, n);
        Vec y = fmadd(f, Vec::all(9.570068679749966e-3f), Vec::all(5.5917806923389435e-2f));
        y = fmadd(y, f, Vec::all(2.40247443318367e-1f));
        y = fmadd(y, f, Vec::all(6.931218504905701e-1f));
        y = fmadd(y, f, Vec::all(9.999992847442627e-1f));
        return {_mm512_scalef_ps(y.v, n.v)};
    }
    static Vec put(float* row, int64_t e, const Vec (&x)[kPanel / Vec::kWidth], Vec total) {
        char* out = reinterpret_cast<char*>(row) + e * BF16::kBytes;
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1].v, x[0].v));
        _mm512_storeu_si512(out, both);
        return dot(total, both, _mm512_set1_epi16(0x3f80));
    }
};

inline void attend_pairs(const HeadBlock& a) { a.shape->dims == 64 ? attend_dims<64>(a) : attend_dims<128>(a); }

}  // namespace
}  // namespace mc

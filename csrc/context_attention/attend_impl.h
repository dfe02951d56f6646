// The primitives of context_attention, written once over a vector type and compiled once per instruction set.
//
// Included by attend_<level>.cpp after vec_<level>.h; for what may be used here see there.
#pragma once

#include "attend.h"
#include "score_impl.h"
#include "soften_impl.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr int kTileRows = 4;
constexpr int kTileVectors = Vec::kManyRegisters ? 4 : 2;  // kTileRows times as many accumulators stay in registers

// The first n elements, at most kWidth, then zeros; n may be negative. kWhole: n is at least kWidth.
template <class T, bool kWhole>
inline Vec load_first(const char* p, int64_t n) {
    if (kWhole || n >= Vec::kWidth) return Vec::load(T{}, p);
    return n > 0 ? Vec::load_part(T{}, p, static_cast<int>(n)) : Vec::all(0.0f);
}

inline void fetch(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

inline void phases_of(const PhaseRows& a) {
    const int64_t width = a.width, mask = (int64_t{1} << a.bits) - 1;
    for (int64_t i = 0; i < a.n; ++i) {
        const float* high = a.high + (a.position[i] >> a.bits) * 2 * width;
        const float* low = a.low + (a.position[i] & mask) * 2 * width;
        float* out = a.out + i * 2 * width;
        for (int64_t b = 0; b < width; b += Vec::kWidth) {
            const Vec ch = load(high + b), sh = load(high + width + b), cl = load(low + b), sl = load(low + width + b);
            store(out + b, fnmadd(sh, sl, mul(ch, cl)));
            store(out + width + b, fmadd(sh, cl, mul(ch, sl)));
        }
    }
    for (int64_t i = 0; a.sigma && i < a.n; ++i) {
        if (a.sigma[i] == 0.0f) continue;  // bit-identical to none
        const Vec sigma = Vec::all(a.sigma[i]);
        float* out = a.out + i * 2 * width;
        for (int64_t b = 0; b < width; b += Vec::kWidth) {
            const Vec spread = mul(sigma, load(a.inv_freq + b));
            const Vec damp = exp2(mul(mul(spread, spread), Vec::all(-0.5f * kLog2E)));
            store(out + b, mul(load(out + b), damp));
            store(out + width + b, mul(load(out + width + b), damp));
        }
    }
}

// Vector i of a turned row goes to out + i * step. kWhole: the pairs fill vectors, and there is nothing but pairs.
template <class T, bool kInterleaved, bool kWhole>
inline void turn_row(const char* row, const float* phase, const RowShape& s, float scale, float* out, int64_t step) {
    const int64_t rotated = kInterleaved ? 2 * s.half : s.half, second = s.width / Vec::kWidth * step;
    int64_t at = 0;
    for (; at < s.width; at += Vec::kWidth, out += step) {
        const Vec c = load(phase + at), sn = load(phase + s.width + at);
        const char* p = row + at * T::kBytes;
        const Vec x = load_first<T, kWhole>(p, rotated - at);
        if constexpr (kInterleaved) {
            store(out, fmadd(swap_pairs(x), sn, mul(x, c)));
        } else {
            const Vec y = load_first<T, kWhole>(p + s.half * T::kBytes, rotated - at);
            store(out, fnmadd(y, sn, mul(x, c)));
            store(out + second, fmadd(x, sn, mul(y, c)));
        }
    }
    if constexpr (kWhole) return;
    if constexpr (!kInterleaved) out += second;
    const char* rest = row + 2 * s.half * T::kBytes;
    const int64_t end = s.padded - (kInterleaved ? 1 : 2) * s.width;
    for (int64_t i = 0; i < end; i += Vec::kWidth, out += step) {
        store(out, mul(load_first<T, false>(rest + i * T::kBytes, s.dims - 2 * s.half - i), Vec::all(scale)));
    }
}

template <class T, bool kInterleaved>
void turn(const TurnRows& a) {
    for (int64_t i = 0; i < a.n; ++i) {
        turn_row<T, kInterleaved, false>(a.base + i * a.step, a.phase + i * 2 * a.shape->width, *a.shape, a.rest_scale,
                                         a.out + i * a.shape->padded, Vec::kWidth);
    }
}

// A strip of kWidth keys is turned so that equal vectors of all of them lie side by side: [padded / kWidth, key, kWidth].
constexpr int64_t kStripStep = Vec::kWidth * Vec::kWidth;

template <class T, bool kInterleaved, bool kWhole>
void turn_strip(const HeadBlock& a, int64_t e) {
    const RowShape s = *a.shape;
    const int64_t end = e + Vec::kWidth < a.entries->count ? e + Vec::kWidth : a.entries->count;
    const int64_t bytes = s.dims * T::kBytes;
    const float* phase = a.phase + e * 2 * s.width;
    float* out = a.turned;
    for (int64_t i = e; i < end; ++i, phase += 2 * s.width, out += Vec::kWidth) {
        const int64_t slot = a.entries->slot[i];
        fetch(a.v + slot * a.v_step, bytes);
        turn_row<T, kInterleaved, kWhole>(a.k + slot * a.k_step, phase, s, 1.0f, out, kStripStep);
    }
}

// Products of all queries with a strip of turned keys, into column e of p.
inline void scores(const HeadBlock& a, int64_t e) {
    const int64_t padded = a.shape->padded;
    const float* q = a.q;
    for (int64_t j = 0; j < a.rows; ++j) {
        Vec acc[Vec::kWidth];
        const float* keys = a.turned;
        const float* end = q + padded;
        const Vec first_q = load(q);
        for (int i = 0; i < Vec::kWidth; ++i) acc[i] = mul(first_q, load(keys + i * Vec::kWidth));
        for (q += Vec::kWidth; q != end; q += Vec::kWidth) {
            keys += kStripStep;
            const Vec qd = load(q);
            for (int i = 0; i < Vec::kWidth; ++i) acc[i] = fmadd(qd, load(keys + i * Vec::kWidth), acc[i]);
        }
        store(a.p + j * kBlock + e, sums(acc));
    }
}

template <class T, bool kInterleaved, bool kWhole>
inline void score_many(const HeadBlock& a) {
    for (int64_t e = 0; e < a.entries->count; e += Vec::kWidth) {
        turn_strip<T, kInterleaved, kWhole>(a, e);
        scores(a, e);
    }
}

// Row j of p from scores to 2^(score - top), with what that means for the running sums.
inline void soften(const HeadBlock& a, int64_t j, int64_t n, int64_t dims) {
    float* p = a.p + j * kBlock;
    const float* plus = a.add ? a.add + j % a.n_times * kBlock : nullptr;
    Vec most = Vec::all(kMinusInfinity);
    for (int64_t e = a.entries->count; e < n; ++e) p[e] = kMinusInfinity;
    for (int64_t e = 0; e < n; e += Vec::kWidth) {
        Vec x = load(p + e);
        if (plus) store(p + e, x = add(x, load(plus + e)));
        most = greater(most, x);
    }
    const float before = a.top[j], here = greatest(most), top = before > here ? before : here;
    if (before != top) {
        const float shrink = first(exp2(Vec::all(before - top)));
        a.top[j] = top;
        a.total[j] *= shrink;
        float* out = a.out + j * a.out_step;
        for (int64_t d = 0; d < dims; d += Vec::kWidth) store(out + d, mul(load(out + d), Vec::all(shrink)));
    }
    // With nothing seen so far (top -infinity) every term is 0; a NaN, which is not the greatest, reaches the total.
    const Vec base = Vec::all(top == kMinusInfinity ? 0.0f : top);
    Vec total = Vec::all(0.0f);
    for (int64_t e = 0; e < n; e += Vec::kWidth) {
        const Vec x = exp2(sub(load(p + e), base));
        store(p + e, x);
        total = add(total, x);
    }
    a.total[j] += sum(total);
}

// out[j .. j + kRows) += p v in kVectors vectors of dimensions from d on; kPart: in the first `part` elements of one.
template <class T, int kRows, int kVectors, bool kPart>
inline void gather(const HeadBlock& a, int64_t j, int64_t d, int part) {
    const char* next = j == 0 && d == 0 ? a.next : nullptr;
    Vec acc[kRows][kVectors];
    float* out = a.out + j * a.out_step + d;
    const float* p = a.p + j * kBlock;
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; ++i) acc[r][i] = load(out + r * a.out_step + i * Vec::kWidth);
    }
    for (int64_t e = 0; e < a.entries->count; ++e) {
        const char* row = a.v + a.entries->slot[e] * a.v_step + d * T::kBytes;
        if (next) fetch(next + e * a.next_step, a.shape->dims * T::kBytes);
        Vec v[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (kPart) {
                v[i] = Vec::load_part(T{}, row, part);
            } else {
                v[i] = Vec::load(T{}, row + i * Vec::kWidth * T::kBytes);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const Vec weight = Vec::all(p[r * kBlock + e]);
            for (int i = 0; i < kVectors; ++i) acc[r][i] = fmadd(weight, v[i], acc[r][i]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; ++i) store(out + r * a.out_step + i * Vec::kWidth, acc[r][i]);
    }
}

template <class T, int kRows>
inline void gather_rows(const HeadBlock& a, int64_t j) {
    constexpr int64_t kTile = kTileVectors * Vec::kWidth;
    const int64_t dims = a.shape->dims;
    int64_t d = 0;
    for (; d + kTile <= dims; d += kTile) gather<T, kRows, kTileVectors, false>(a, j, d, 0);
    for (; d + Vec::kWidth <= dims; d += Vec::kWidth) gather<T, kRows, 1, false>(a, j, d, 0);
    if (d < dims) gather<T, kRows, 1, true>(a, j, d, static_cast<int>(dims - d));
}

template <class T, bool kInterleaved>
void attend(const HeadBlock& a) {
    const RowShape& s = *a.shape;
    const int64_t count = a.entries->count;
    const bool whole = s.dims == 2 * s.half && (kInterleaved ? s.dims : s.half) == s.width;
    if (!whole) {
        score_many<T, kInterleaved, false>(a);
    } else if (!score_few<T, kInterleaved>(a)) {
        score_many<T, kInterleaved, true>(a);
    }
    const int64_t n = (count + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
    for (int64_t j = 0; j < a.rows; ++j) soften(a, j, n, s.dims);
    int64_t j = 0;
    for (; j + kTileRows <= a.rows; j += kTileRows) gather_rows<T, kTileRows>(a, j);
    switch (a.rows - j) {
        case 3:
            return gather_rows<T, 3>(a, j);
        case 2:
            return gather_rows<T, 2>(a, j);
        case 1:
            return gather_rows<T, 1>(a, j);
        default:
            return;
    }
}

template <class T>
void store_row(const float* src, int64_t n, float scale, char* dst) {
    const Vec by = Vec::all(scale);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::store(T{}, dst + i * T::kBytes, mul(load(src + i), by));
    if (i == n) return;
    const int part = static_cast<int>(n - i);
    const Vec last = Vec::load_part(F32{}, reinterpret_cast<const char*>(src + i), part);
    Vec::store_part(T{}, dst + i * T::kBytes, part, mul(last, by));
}

inline AttendOps attend_table(const char* name) {
    return {name,
            phases_of,
            {{turn<F32, false>, turn<F32, true>},
             {turn<F16, false>, turn<F16, true>},
             {turn<BF16, false>, turn<BF16, true>}},
            {{attend<F32, false>, attend<F32, true>},
             {attend<F16, false>, attend<F16, true>},
             {attend<BF16, false>, attend<BF16, true>}},
            {store_row<F32>, store_row<F16>, store_row<BF16>},
            {soften_tile<Kept<F32>>, nullptr, soften_tile<Kept<BF16>>},
            sum_rows,
            1,
            1,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
}

}  // namespace
}  // namespace mc

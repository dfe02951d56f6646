// The row primitives, written once over a vector type and compiled once per instruction set.
//
// Included by rows_<level>.cpp after vec_<level>.h. Everything here is in an unnamed namespace and uses no inline function
// of the standard library: the linker keeps one copy of an inline function, and it might keep the AVX-512 one.
#pragma once

#include <cstring>

#include "rows.h"

namespace mc {
namespace {

constexpr double kHalfPi = 1.57079632679489661923;

// Taylor polynomials; on a quarter turn around 0 their error is below 1e-11, far below the fp32 result's rounding.
inline double sin_near_zero(double x) {
    const double y = x * x;
    double p = -1.0 / 39916800;
    p = p * y + 1.0 / 362880;
    p = p * y - 1.0 / 5040;
    p = p * y + 1.0 / 120;
    p = p * y - 1.0 / 6;
    return x + x * y * p;
}

inline double cos_near_zero(double x) {
    const double y = x * x;
    double p = 1.0 / 479001600;
    p = p * y - 1.0 / 3628800;
    p = p * y + 1.0 / 40320;
    p = p * y - 1.0 / 720;
    p = p * y + 1.0 / 24;
    p = p * y - 0.5;
    return 1.0 + y * p;
}

void phases(const double* turns, int64_t half, int64_t position, double scale, bool interleaved, float* out) {
    const double at = static_cast<double>(position);
    const int64_t width = interleaved ? 2 * half : half;
    float* __restrict cosines = out;
    float* __restrict sines = out + width;
    for (int64_t b = 0; b < half; ++b) {
        // Quarter turns: scaling by 4 is exact, so nothing is lost beyond the one rounding of at * turns[b].
        const double quarters = 4.0 * (at * turns[b]);
        const double whole = __builtin_rint(quarters);
        const double x = (quarters - whole) * kHalfPi;
        const double s = sin_near_zero(x) * scale, c = cos_near_zero(x) * scale;
        const double quadrant = whole - 4.0 * __builtin_floor(whole * 0.25);
        const bool odd = quadrant == 1.0 || quadrant == 3.0;
        const double sine = odd ? c : s, cosine = odd ? s : c;
        sines[b] = static_cast<float>(quadrant >= 2.0 ? -sine : sine);
        cosines[b] = static_cast<float>(quadrant == 1.0 || quadrant == 2.0 ? -cosine : cosine);
    }
    if (!interleaved) return;
    for (int64_t b = half - 1; b >= 0; --b) {  // from the end: spreads in place
        const float c = cosines[b], s = sines[b];
        cosines[2 * b] = cosines[2 * b + 1] = c;
        sines[2 * b] = -s;
        sines[2 * b + 1] = s;
    }
}

template <class T, bool kPart>
inline Vec get(const char* p, int64_t n) {
    if constexpr (kPart) return Vec::load_part(T{}, p, static_cast<int>(n));
    return Vec::load(T{}, p);
}

template <class T, bool kPart>
inline void put(char* p, int64_t n, Vec x) {
    if constexpr (kPart) {
        Vec::store_part(T{}, p, static_cast<int>(n), x);
    } else {
        Vec::store(T{}, p, x);
    }
}

template <bool kPart>
inline Vec phase_at(const float* p, int64_t n) {
    return get<F32, kPart>(reinterpret_cast<const char*>(p), n);
}

// Bands [b, b + n) of one row, n = kWidth unless kPart. Both halves are loaded before either is stored: src may be dst.
template <class T, bool kPart>
inline void rotate_bands(const char* src, char* dst, const float* phase, int64_t half, int64_t b, int64_t n) {
    const Vec c = phase_at<kPart>(phase + b, n), s = phase_at<kPart>(phase + half + b, n);
    const Vec x = get<T, kPart>(src + b * T::kBytes, n), y = get<T, kPart>(src + (half + b) * T::kBytes, n);
    put<T, kPart>(dst + b * T::kBytes, n, fnmadd(y, s, mul(x, c)));
    put<T, kPart>(dst + (half + b) * T::kBytes, n, fmadd(x, s, mul(y, c)));
}

// Elements [i, i + n) of one row of interleaved pairs, n even.
template <class T, bool kPart>
inline void rotate_pairs(const char* src, char* dst, const float* phase, int64_t half, int64_t i, int64_t n) {
    const Vec c = phase_at<kPart>(phase + i, n), s = phase_at<kPart>(phase + 2 * half + i, n);
    const Vec x = get<T, kPart>(src + i * T::kBytes, n);
    put<T, kPart>(dst + i * T::kBytes, n, fmadd(swap_pairs(x), s, mul(x, c)));
}

template <class T>
inline void scale_rest(const char* src, char* dst, int64_t n, float by) {
    const Vec factor = Vec::all(by);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
        put<T, false>(dst + i * T::kBytes, 0, mul(get<T, false>(src + i * T::kBytes, 0), factor));
    }
    if (i < n) put<T, true>(dst + i * T::kBytes, n - i, mul(get<T, true>(src + i * T::kBytes, n - i), factor));
}

template <class T, bool kInterleaved>
inline void rotate_row(const RotateRows& run, const char* src, char* dst, const float* phase) {
    const int64_t width = kInterleaved ? 2 * run.half : run.half;
    int64_t i = 0;
    for (; i + Vec::kWidth <= width; i += Vec::kWidth) {
        if constexpr (kInterleaved) {
            rotate_pairs<T, false>(src, dst, phase, run.half, i, Vec::kWidth);
        } else {
            rotate_bands<T, false>(src, dst, phase, run.half, i, Vec::kWidth);
        }
    }
    if (i < width) {
        if constexpr (kInterleaved) {
            rotate_pairs<T, true>(src, dst, phase, run.half, i, width - i);
        } else {
            rotate_bands<T, true>(src, dst, phase, run.half, i, width - i);
        }
    }
    if (!run.rest) return;
    const int64_t rest_at = 2 * run.half * T::kBytes;
    if (run.rest_scale != 1.0f) {
        scale_rest<T>(src + rest_at, dst + rest_at, run.rest, run.rest_scale);
    } else if (src != dst) {
        std::memcpy(dst + rest_at, src + rest_at, static_cast<size_t>(run.rest * T::kBytes));
    }
}

template <class T, bool kInterleaved>
void rotate(const RotateRows& run) {
    const char* src = run.src;
    char* dst = run.dst;
    const float* phase = run.phase;
    for (int64_t row = 0; row < run.count; ++row) {
        for (int64_t head = 0; head < run.heads; ++head) {
            rotate_row<T, kInterleaved>(run, src + head * run.src_head, dst + head * run.dst_head, phase);
        }
        src += run.src_step;
        dst += run.dst_step;
        phase += run.phase_step;
    }
}

RowOps table_named(const char* name) {
    return {name,
            phases,
            {{rotate<F32, false>, rotate<F32, true>},
             {rotate<F16, false>, rotate<F16, true>},
             {rotate<BF16, false>, rotate<BF16, true>}}};
}

}  // namespace
}  // namespace mc

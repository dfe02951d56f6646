// Vectors with AVX2, FMA and F16C.
//
// `Vec` is kWidth floats: load and store of a full vector or of its first n elements, for each element type, and the
// arithmetic that the primitives are written in. kManyRegisters: there are 32 of them, not 16. All of it is in an unnamed
// namespace and uses no inline function of the standard library: the linker keeps one copy of an inline function, and it
// might keep the AVX-512 one.
//
// greater(a, b) is a > b ? a : b, so a NaN in b stays. power_of_two(t): 2^n, or 0 for n = -127, where t = n + kRounder.
// sums(a): element i is the sum of a[i], of kWidth vectors. transpose(a): element j of a[i] and element i of a[j] change
// places.
//
// load_pair: 2 * kWidth elements in the order that costs least to load; in_order brings it back to that of memory, and
// as_loaded floats that lie in order into it.
#pragma once

#include <immintrin.h>

#include <cstring>

namespace mc {
namespace {

struct F32 {
    static constexpr int kBytes = 4;
};
struct F16 {
    static constexpr int kBytes = 2;
};
struct BF16 {
    static constexpr int kBytes = 2;
};

struct Vec {
    static constexpr int kWidth = 8;
    static constexpr bool kManyRegisters = false;
    __m256 v;

    static Vec all(float x) { return {_mm256_set1_ps(x)}; }

    static Vec load(F32, const char* p) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))}; }
    static Vec load(F16, const char* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static Vec load(BF16, const char* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }

    static void store(F32, char* p, Vec x) { _mm256_storeu_ps(reinterpret_cast<float*>(p), x.v); }
    static void store(F16, char* p, Vec x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store(BF16, char* p, Vec x) {
        // To nearest, ties to even, subnormals included; a NaN stays one (rounding could carry it into infinity).
        const __m256i u = _mm256_castps_si256(x.v), high = _mm256_srli_epi32(u, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
        const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }

    template <class T>
    static Vec load_part(T t, const char* p, int n) {
        alignas(32) char buffer[kWidth * T::kBytes] = {};
        std::memcpy(buffer, p, static_cast<size_t>(n * T::kBytes));
        return load(t, buffer);
    }
    template <class T>
    static void store_part(T t, char* p, int n, Vec x) {
        alignas(32) char buffer[kWidth * T::kBytes];
        store(t, buffer, x);
        std::memcpy(p, buffer, static_cast<size_t>(n * T::kBytes));
    }
};

inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec greater(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float first(Vec a) { return _mm256_cvtss_f32(a.v); }
inline float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float greatest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Vec power_of_two(Vec t) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)))};
}

// Neighbours first within 128 bits, then across.
inline __m256 sum_pairs(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}
inline __m256 sum_fours(const Vec* a) {
    const __m256d x = _mm256_castps_pd(sum_pairs(a[0].v, a[1].v)), y = _mm256_castps_pd(sum_pairs(a[2].v, a[3].v));
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
inline Vec sums(const Vec* a) {
    const __m256 x = sum_fours(a), y = sum_fours(a + 4);
    return {_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31))};
}

// Of 4 vectors and within 128 bits, then across.
inline void transpose_lanes(Vec* a) {
    const __m256d x0 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0].v, a[1].v));
    const __m256d x1 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0].v, a[1].v));
    const __m256d y0 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2].v, a[3].v));
    const __m256d y1 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2].v, a[3].v));
    a[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(x0, y0));
    a[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(x0, y0));
    a[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(x1, y1));
    a[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(x1, y1));
}
inline void transpose(Vec* a) {
    transpose_lanes(a);
    transpose_lanes(a + 4);
    for (int i = 0; i < 4; ++i) {
        const __m256 x = a[i].v, y = a[4 + i].v;
        a[i].v = _mm256_permute2f128_ps(x, y, 0x20);
        a[4 + i].v = _mm256_permute2f128_ps(x, y, 0x31);
    }
}

struct Pair {
    Vec first, second;
};
template <class T>
inline Pair load_pair(T t, const char* p) {
    return {Vec::load(t, p), Vec::load(t, p + Vec::kWidth * T::kBytes)};
}
// Even elements are shifted up, odd ones are in place already: one operation a vector.
inline Pair load_pair(BF16, const char* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))))}};
}
template <class T>
inline Pair in_order(T, Pair x) {
    return x;
}
template <class T>
inline Pair as_loaded(T, Pair x) {
    return x;
}
inline Pair in_order(BF16, Pair x) {
    const __m256 low = _mm256_unpacklo_ps(x.first.v, x.second.v), high = _mm256_unpackhi_ps(x.first.v, x.second.v);
    return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
}
inline Pair as_loaded(BF16, Pair x) {
    const __m256 a = _mm256_permute2f128_ps(x.first.v, x.second.v, 0x20);
    const __m256 b = _mm256_permute2f128_ps(x.first.v, x.second.v, 0x31);
    return {{_mm256_shuffle_ps(a, b, 0x88)}, {_mm256_shuffle_ps(a, b, 0xdd)}};
}

}  // namespace
}  // namespace mc

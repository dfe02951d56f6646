// Vectors with AVX-512 F, BW, DQ and VL.
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

// GCC's own header reads variables that it leaves undefined on purpose, and some versions warn of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

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
    static constexpr int kWidth = 16;
    static constexpr bool kManyRegisters = true;
    __m512 v;

    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

    static Vec load(F32, const char* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(F16, const char* p) { return {_mm512_cvtph_ps(_mm256_loadu_epi16(p))}; }
    static Vec load(BF16, const char* p) { return widen(_mm256_loadu_epi16(p)); }
    static Vec load_part(F32, const char* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    static Vec load_part(F16, const char* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
    static Vec load_part(BF16, const char* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

    static void store(F32, char* p, Vec x) { _mm512_storeu_ps(p, x.v); }
    static void store(F16, char* p, Vec x) { _mm256_storeu_epi16(p, to_f16(x)); }
    static void store(BF16, char* p, Vec x) { _mm256_storeu_epi16(p, to_bf16(x)); }
    static void store_part(F32, char* p, int n, Vec x) { _mm512_mask_storeu_ps(p, first(n), x.v); }
    static void store_part(F16, char* p, int n, Vec x) { _mm256_mask_storeu_epi16(p, first(n), to_f16(x)); }
    static void store_part(BF16, char* p, int n, Vec x) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }

private:
    static Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
    static __m256i to_f16(Vec x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

    // To nearest, ties to even; a NaN stays one (rounding could carry it into infinity). Not vcvtneps2bf16: that takes
    // subnormals for zero.
    static __m256i to_bf16(Vec x) {
        const __m512i u = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(u, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
        const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, high, _mm512_set1_epi32(0x40));
        return _mm512_cvtepi32_epi16(rounded);
    }
};

inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec greater(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float first(Vec a) { return _mm512_cvtss_f32(a.v); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float greatest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec power_of_two(Vec t) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
}

// Neighbours first within 128 bits, then across.
inline __m512 sum_pairs(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 sum_fours(const Vec* a) {
    const __m512d x = _mm512_castps_pd(sum_pairs(a[0].v, a[1].v)), y = _mm512_castps_pd(sum_pairs(a[2].v, a[3].v));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline __m512 sum_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline Vec sums(const Vec* a) {
    return {sum_lanes(sum_lanes(sum_fours(a), sum_fours(a + 4)), sum_lanes(sum_fours(a + 8), sum_fours(a + 12)))};
}

// Of 4 vectors and within 128 bits, then across.
inline void transpose_lanes(Vec* a) {
    const __m512d x0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0].v, a[1].v));
    const __m512d x1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512d y0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2].v, a[3].v));
    const __m512d y1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2].v, a[3].v));
    a[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(x0, y0));
    a[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(x0, y0));
    a[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(x1, y1));
    a[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(x1, y1));
}
inline void transpose(Vec* a) {
    for (int i = 0; i < 16; i += 4) transpose_lanes(a + i);
    for (int i = 0; i < 4; ++i) {
        const __m512 x0 = _mm512_shuffle_f32x4(a[i].v, a[4 + i].v, 0x88);
        const __m512 x1 = _mm512_shuffle_f32x4(a[i].v, a[4 + i].v, 0xdd);
        const __m512 y0 = _mm512_shuffle_f32x4(a[8 + i].v, a[12 + i].v, 0x88);
        const __m512 y1 = _mm512_shuffle_f32x4(a[8 + i].v, a[12 + i].v, 0xdd);
        a[i].v = _mm512_shuffle_f32x4(x0, y0, 0x88);
        a[4 + i].v = _mm512_shuffle_f32x4(x1, y1, 0x88);
        a[8 + i].v = _mm512_shuffle_f32x4(x0, y0, 0xdd);
        a[12 + i].v = _mm512_shuffle_f32x4(x1, y1, 0xdd);
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
    const __m512i x = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
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
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {{_mm512_permutex2var_ps(x.first.v, low, x.second.v)}, {_mm512_permutex2var_ps(x.first.v, high, x.second.v)}};
}
inline Pair as_loaded(BF16, Pair x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {{_mm512_permutex2var_ps(x.first.v, even, x.second.v)}, {_mm512_permutex2var_ps(x.first.v, odd, x.second.v)}};
}

}  // namespace
}  // namespace mc

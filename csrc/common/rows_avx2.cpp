// Row primitives with AVX2, FMA and F16C. Without those flags (another architecture) the level does not exist.
#include "rows.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

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

}  // namespace
}  // namespace mc

#include "rows_impl.h"

namespace mc {

const RowOps* rows_avx2() {
    static const RowOps table = table_named("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::RowOps* mc::rows_avx2() { return nullptr; }

#endif

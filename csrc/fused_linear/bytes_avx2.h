// Bytes with AVX2, see packed_impl.h. Included after vec_avx2.h.
#pragma once

#include "starts.h"

namespace mc {
namespace {

using Bytes = __m256i;
constexpr bool kWholeBytes = false;  // a pair of products of those may be more than 16 bits hold
constexpr int64_t kFourBitRows = 3, kEightBitRows = 1;

inline Bytes load_bytes(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes lower(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes upper(Bytes b) { return lower(_mm256_srli_epi16(b, 4)); }
// Never called, see kWholeBytes.
inline Bytes lower_bytes(Bytes b, Bytes) { return b; }
inline Bytes upper_bytes(Bytes b, Bytes) { return b; }

// Two sums a row, of 16 bits: of 16 products each, at most 16 * 15 * 128 = 30,720, and centred 16,384.
struct Products {
    __m256i v;

    static Products all(int32_t start) { return {_mm256_set1_epi32(start)}; }
    static int32_t start(const int8_t* x, int) { return start_of_halves(x); }
    Products add(Bytes codes, int32_t x) const {
        return {_mm256_add_epi16(v, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x)))};
    }
    static Vec value(Products high, Products low) {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i h = _mm256_madd_epi16(high.v, ones), l = _mm256_madd_epi16(low.v, ones);
        return {_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(h, 8), l))};
    }
};

}  // namespace
}  // namespace mc

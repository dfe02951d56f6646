// Bytes with AVX-512, see packed_impl.h: with VNNI, which all processors have that multiply bf16, or without. Included
// after vec_avx512.h.
#pragma once

#include "starts.h"

namespace mc {
namespace {

using Bytes = __m512i;

inline Bytes load_bytes(const char* p) { return _mm512_loadu_si512(p); }
inline Bytes lower(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes upper(Bytes b) { return lower(_mm512_srli_epi16(b, 4)); }
// By the bits of the third: (b & low) | (c & ~low)
inline Bytes low_of(Bytes b, Bytes c) { return _mm512_ternarylogic_epi64(b, c, _mm512_set1_epi8(15), 0xe4); }
inline Bytes lower_bytes(Bytes b, Bytes c) { return low_of(b, _mm512_slli_epi16(c, 4)); }
inline Bytes upper_bytes(Bytes b, Bytes c) { return low_of(_mm512_srli_epi16(b, 4), c); }

#if defined(__AVX512VNNI__)

constexpr bool kWholeBytes = true;
constexpr int64_t kFourBitRows = 8, kEightBitRows = 8;

struct Products {
    __m512i v;

    static Products all(int32_t start) { return {_mm512_set1_epi32(start)}; }
    static int32_t start(const int8_t* x, int bits) { return start_of_sum(x, bits); }
    Products add(Bytes codes, int32_t x) const { return {_mm512_dpbusd_epi32(v, codes, _mm512_set1_epi32(x))}; }
    static Vec value(Products high, Products low) {
        return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high.v, 8), low.v))};
    }
};

#else

constexpr bool kWholeBytes = false;  // a pair of products of those may be more than 16 bits hold
constexpr int64_t kFourBitRows = 4, kEightBitRows = 1;

// Two sums a row, of 16 bits: of 16 products each, at most 16 * 15 * 128 = 30,720, and centred 16,384.
struct Products {
    __m512i v;

    static Products all(int32_t start) { return {_mm512_set1_epi32(start)}; }
    static int32_t start(const int8_t* x, int) { return start_of_halves(x); }
    Products add(Bytes codes, int32_t x) const {
        return {_mm512_add_epi16(v, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(x)))};
    }
    static Vec value(Products high, Products low) {
        const __m512i ones = _mm512_set1_epi16(1);
        const __m512i h = _mm512_madd_epi16(high.v, ones), l = _mm512_madd_epi16(low.v, ones);
        return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l))};
    }
};

#endif

}  // namespace
}  // namespace mc

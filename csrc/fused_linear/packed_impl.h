// One row of x by a packed W (mc_packed_weight), with bf16 products.
//
// Included by linear_avx512bf16.cpp after pairs_impl.h. With a block's scale s, offset m and codes c, its part of a sum is
//
//   sum of (s c + m) x  =  s (sum of (128 + c) x - 128 sum of x)  +  m sum of x
//
// 128 + c is a bf16 number whose last four bits are c: one logical operation makes 32 of them, no table and no conversion.
// Codes of 8 bits are two of 4. A register has a pair of elements of each of 16 rows of W, which meet the same pair of x in
// all its lanes: scales, offsets and sums are vectors of rows, and nothing is summed across a register. The sums of x by
// block are made once for all rows. In fp32 they and the products lose some 2^-18 of a sum; bf16 rounds it to 2^-9.
#pragma once

#include "packed.h"

namespace mc {
namespace {

static_assert(Vec::kWidth == kPackedRows);

void block_sums(const BlockSums& a) {
    const __m512i ones = _mm512_set1_epi16(0x3F80);
    for (int64_t b = 0; b < a.n / kPackedBlock; ++b) {
        a.sums[b] = sum(dot(Vec::all(0.0f), load_span(a.x + b * kStepBytes), ones));
    }
}

// The codes in the low four bits of each word, as 128 + code.
inline __m512i numbers(__m512i words) {
    return _mm512_ternarylogic_epi64(words, _mm512_set1_epi16(15), _mm512_set1_epi16(0x4300), 0xEA);  // (a & b) | c
}

// sum of (128 + c) x for four bits of the codes of a block of 16 rows.
inline Vec sum_of_products(const char* w, const char* x) {
    Vec part[2] = {Vec::all(0.0f), Vec::all(0.0f)};
    MC_UNROLL for (int q = 0; q < 4; ++q) {
        const auto pair = [&](int k) {
            int32_t bits;
            __builtin_memcpy(&bits, x + 4 * (4 * q + k), sizeof bits);
            return _mm512_set1_epi32(bits);
        };
        const __m512i words = load_span(w + 64 * q);
        part[0] = dot(part[0], numbers(words), pair(0));
        part[1] = dot(part[1], numbers(_mm512_srli_epi16(words, 4)), pair(1));
        part[0] = dot(part[0], numbers(_mm512_srli_epi16(words, 8)), pair(2));
        part[1] = dot(part[1], numbers(_mm512_srli_epi16(words, 12)), pair(3));
    }
    return add(part[0], part[1]);
}

// 16 rows, in one stream: two groups side by side are faster out of a cache and much slower out of memory.
template <int kBits>
void packed_rows(const DotPacked& a, const char* w, float* out) {
    Vec total = Vec::all(0.0f);
    const char* x = a.x;
    for (int64_t b = 0; b < a.n / kPackedBlock; ++b, x += kStepBytes) {
        const Vec less = Vec::all(-128.0f * a.sums[b]);
        Vec codes = add(sum_of_products(w, x), less);
        w += kPackedBits;
        if constexpr (kBits == 8) {
            codes = fmadd(add(sum_of_products(w, x), less), Vec::all(16.0f), codes);
            w += kPackedBits;
        }
        const float* scale = reinterpret_cast<const float*>(w);
        total = fmadd(load(scale), codes, fmadd(load(scale + kPackedRows), Vec::all(a.sums[b]), total));
        w += kPackedRows * 8;
    }
    store(out, total);
}

void dot_packed(const DotPacked& a) {
    const int64_t step = a.n / kPackedBlock * packed_block_bytes(a.bits);
    for (int64_t row = 0; row < a.w_rows; row += kPackedRows) {
        const char* w = a.w + row / kPackedRows * step;
        if (a.bits == 8) packed_rows<8>(a, w, a.out + row);
        else packed_rows<4>(a, w, a.out + row);
    }
}

}  // namespace
}  // namespace mc

// A few rows of x by a packed W (mc_packed_weight), with bf16 products.
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

// sums[j] = sum of (128 + c) x_j for four bits of the codes of a block of 16 rows.
template <int kX>
inline void sums_of_products(const char* w, const char* x, int64_t x_step, Vec* sums) {
    Vec part[kX][2];
    MC_UNROLL for (int j = 0; j < kX; ++j) part[j][0] = part[j][1] = Vec::all(0.0f);
    MC_UNROLL for (int q = 0; q < 4; ++q) {
        const __m512i words = load_span(w + 64 * q);
        const __m512i codes[4] = {numbers(words), numbers(_mm512_srli_epi16(words, 4)),
                                  numbers(_mm512_srli_epi16(words, 8)), numbers(_mm512_srli_epi16(words, 12))};
        MC_UNROLL for (int k = 0; k < 4; ++k) {
            MC_UNROLL for (int j = 0; j < kX; ++j) {
                int32_t pair;
                __builtin_memcpy(&pair, x + j * x_step + 4 * (4 * q + k), sizeof pair);
                part[j][k % 2] = dot(part[j][k % 2], codes[k], _mm512_set1_epi32(pair));
            }
        }
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) sums[j] = add(part[j][0], part[j][1]);
}

// 16 rows by kX rows of x, in one stream: two groups side by side are faster out of a cache and much slower out of memory.
template <int kBits, int kX>
inline void packed_rows(const DotPacked& a, const char* w, float* out) {
    const int64_t blocks = a.n / kPackedBlock;
    const char* x = a.x;
    Vec total[kX];
    MC_UNROLL for (int j = 0; j < kX; ++j) total[j] = Vec::all(0.0f);
    for (int64_t b = 0; b < blocks; ++b, x += kStepBytes) {
        Vec codes[kX], high[kX];
        sums_of_products<kX>(w, x, a.x_step, codes);
        w += kPackedBits;
        if constexpr (kBits == 8) {
            sums_of_products<kX>(w, x, a.x_step, high);
            w += kPackedBits;
        }
        const Vec scale = load(reinterpret_cast<const float*>(w));
        const Vec offset = load(reinterpret_cast<const float*>(w) + kPackedRows);
        w += kPackedRows * 8;
        MC_UNROLL for (int j = 0; j < kX; ++j) {
            const float of_x = a.sums[j * blocks + b];
            const Vec less = Vec::all(-128.0f * of_x);
            codes[j] = add(codes[j], less);
            if constexpr (kBits == 8) codes[j] = fmadd(add(high[j], less), Vec::all(16.0f), codes[j]);
            total[j] = fmadd(scale, codes[j], fmadd(offset, Vec::all(of_x), total[j]));
        }
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) store(out + j * kColumns, total[j]);
}

template <int kBits>
void packed_columns(const DotPacked& a) {
    const int64_t step = a.n / kPackedBlock * packed_block_bytes(kBits);
    for (int64_t row = 0; row < a.w_rows; row += kPackedRows) {
        const char* w = a.w + row / kPackedRows * step;
        float* out = a.out + row;
        switch (a.x_rows) {
            case 1: packed_rows<kBits, 1>(a, w, out); break;
            case 2: packed_rows<kBits, 2>(a, w, out); break;
            case 3: packed_rows<kBits, 3>(a, w, out); break;
            default: packed_rows<kBits, kPackedX>(a, w, out);
        }
    }
}

void dot_packed(const DotPacked& a) {
    if (a.bits == 8) packed_columns<8>(a);
    else packed_columns<4>(a);
}

}  // namespace
}  // namespace mc

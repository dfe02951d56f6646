// Transposition of 32-bit elements with AVX-512, 16 by 16 at a time. Included by linear_avx512bf16.cpp after vec_avx512.h.
#pragma once

#include "linear.h"

namespace mc {
namespace {

// Rows 4 i, i = 0 to 3, of a block: element j of their columns' groups of four.
inline void transpose_fours(const __m512 (&in)[16], __m512 (&out)[16]) {
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(in[i], in[i + 1]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(in[i], in[i + 1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(in[i + 2], in[i + 3]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(in[i + 2], in[i + 3]));
        out[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        out[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        out[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        out[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
}

inline void transpose_block(const char* x, int64_t x_step, int rows, int columns, char* out, int64_t out_step) {
    const auto have = static_cast<__mmask16>((1u << columns) - 1), fill = static_cast<__mmask16>((1u << rows) - 1);
    __m512 in[16], fours[16];
    for (int i = 0; i < 16; ++i) {
        in[i] = i < rows ? _mm512_maskz_loadu_ps(have, x + i * x_step) : _mm512_setzero_ps();
    }
    transpose_fours(in, fours);
    // fours[4 i + j] has in its lane l, of rows 4 i to 4 i + 3, column 4 l + j.
    for (int j = 0; j < 4; ++j) {
        const __m512 a = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
        const __m512 column[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(b, d, 0x88),
                                  _mm512_shuffle_f32x4(a, c, 0xdd), _mm512_shuffle_f32x4(b, d, 0xdd)};
        for (int l = 0; l < 4; ++l) {
            if (4 * l + j < columns) _mm512_mask_storeu_ps(out + (4 * l + j) * out_step, fill, column[l]);
        }
    }
}

void transpose(const Transpose& a) {
    for (int64_t i = 0; i < a.rows; i += 16) {
        const int rows = static_cast<int>(a.rows - i < 16 ? a.rows - i : 16);
        for (int64_t j = 0; j < a.columns; j += 16) {
            const int columns = static_cast<int>(a.columns - j < 16 ? a.columns - j : 16);
            const char* x = a.x + i * a.x_step + 4 * j;
            char* out = a.out + j * a.out_step + 4 * i;
            if (rows == 16 && columns == 16) {
                transpose_block(x, a.x_step, 16, 16, out, a.out_step);  // sizes that the compiler knows
            } else {
                transpose_block(x, a.x_step, rows, columns, out, a.out_step);
            }
        }
    }
}

}  // namespace
}  // namespace mc

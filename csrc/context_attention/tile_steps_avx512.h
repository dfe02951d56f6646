// What head_tiles_impl.h does between tiles, with AVX-512 BF16. Included after pairs_impl.h.
#pragma once

#include "pairs_impl.h"

namespace mc {
namespace {

struct Steps {
    // 32 elements, even ones first.
    static void narrow_query(const float* q, uint16_t* out) { mc::narrow_query(q, kStep, out); }

    template <int kDims>
    static void turn_key(const char* row, const float* phase, uint16_t* out) {
        mc::turn_key<kDims>(row, phase, out);
    }

    // products [keys, 16] become p [rows, kBlock], 32 keys of each.
    static void scores_to_rows(const float* products, int rows, float* p) {
        for (int e = 0; e < 32; e += 16, products += 256, p += 16) {
            for (int r = 0; r < rows; r += 4) four_rows(products + r, rows - r < 4 ? rows - r : 4, p + r * kBlock);
        }
    }

    // p [n], n a multiple of kPad, to bf16, zeros up to whole tiles.
    static void narrow_weights(const float* p, int64_t n, uint16_t* out) {
        for (int64_t e = 0; e < n; e += kStep) {
            const Vec high = e + Vec::kWidth < n ? load(p + e + Vec::kWidth) : Vec::all(0.0f);
            narrow(load(p + e), high, out + e);
        }
    }

    // Two rows of 32 elements, by 128-bit lanes.
    static void interleave(const char* first, const char* second, uint16_t* low, uint16_t* high) {
        const __m512i x = load_step(first), y = load_step(second);
        _mm512_store_si512(low, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(high, _mm512_unpackhi_epi16(x, y));
    }

    // out [32] += sums, put in order.
    static void add_sums(const float* low, const float* high, float* out) {
        add_in_order(load(low), load(high), out);
    }

private:
    // Of 16 keys, 4 products each at a time.
    static void four_rows(const float* products, int rows, float* p) {
        __m512 x[4];
        for (int i = 0; i < 4; ++i) {
            const float* from = products + i * 64;
            __m512 y = _mm512_castps128_ps512(_mm_loadu_ps(from));
            y = _mm512_insertf32x4(y, _mm_loadu_ps(from + 16), 1);
            y = _mm512_insertf32x4(y, _mm_loadu_ps(from + 32), 2);
            x[i] = _mm512_insertf32x4(y, _mm_loadu_ps(from + 48), 3);
        }
        // [key, product] of each 4 keys to [product, key]
        const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (__m512& one : x) one = _mm512_permutexvar_ps(turn, one);
        const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
        store(p, {_mm512_shuffle_f32x4(a, b, 0x88)});
        if (rows > 1) store(p + kBlock, {_mm512_shuffle_f32x4(a, b, 0xdd)});
        if (rows < 3) return;
        const __m512 c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
        store(p + 2 * kBlock, {_mm512_shuffle_f32x4(c, d, 0x88)});
        if (rows > 3) store(p + 3 * kBlock, {_mm512_shuffle_f32x4(c, d, 0xdd)});
    }
};

}  // namespace
}  // namespace mc

// Transposition of 32-bit elements, written once over a vector type, a square of vectors at a time.
//
// Included by linear_<level>.cpp after vec_<level>.h; for what may be used here see there. The elements are bits, loaded and
// stored as floats.
#pragma once

#include "linear.h"

namespace mc {
namespace {

// rows, columns: at most kWidth. kWhole: both are kWidth.
template <bool kWhole>
inline void transpose_square(const Transpose& a, int64_t i, int64_t j, int rows, int columns) {
    const char* x = a.x + i * a.x_step + 4 * j;
    char* out = a.out + j * a.out_step + 4 * i;
    Vec square[Vec::kWidth];
    for (int r = 0; r < Vec::kWidth; ++r) {
        if constexpr (kWhole) square[r] = Vec::load(F32{}, x + r * a.x_step);
        else square[r] = r < rows ? Vec::load_part(F32{}, x + r * a.x_step, columns) : Vec::all(0.0f);
    }
    transpose(square);
    for (int c = 0; c < (kWhole ? Vec::kWidth : columns); ++c) {
        if constexpr (kWhole) Vec::store(F32{}, out + c * a.out_step, square[c]);
        else Vec::store_part(F32{}, out + c * a.out_step, rows, square[c]);
    }
}

void transpose(const Transpose& a) {
    constexpr int kWidth = Vec::kWidth;
    for (int64_t i = 0; i < a.rows; i += kWidth) {
        const int rows = static_cast<int>(a.rows - i < kWidth ? a.rows - i : kWidth);
        for (int64_t j = 0; j < a.columns; j += kWidth) {
            const int columns = static_cast<int>(a.columns - j < kWidth ? a.columns - j : kWidth);
            if (rows == kWidth && columns == kWidth) transpose_square<true>(a, i, j, rows, columns);
            else transpose_square<false>(a, i, j, rows, columns);
        }
    }
}

}  // namespace
}  // namespace mc

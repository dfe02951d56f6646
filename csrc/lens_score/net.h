// Rows of a query's size on their way to the entries: norms, and panels of what the entries meet.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arrays.h"
#include "matmul.h"

namespace mc {

inline double inverse_rms(const float* x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
    return 1.0 / std::sqrt(sum / static_cast<double>(n) + 1e-12);
}

// gain: NULL for none.
inline Rows normed(const Rows& x, const float* gain) {
    Rows out(x.count, x.size);
    for (int64_t m = 0; m < x.count; ++m) {
        const float by = static_cast<float>(inverse_rms(x.at(m), x.size));
        for (int64_t i = 0; i < x.size; ++i) out.at(m)[i] = x.at(m)[i] * by * (gain ? gain[i] : 1.0f);
    }
    return out;
}

// Elements [first, end) of all rows to out [E, columns].
inline void turn(const Rows& rows, int64_t columns, int64_t first, int64_t end, float* out) {
    for (int64_t at = first; at < end; at += kPad) {
        const int64_t last = std::min(at + kPad, end);
        for (int64_t j = 0; j < rows.count; ++j) {
            const float* from = rows.at(j);
            for (int64_t e = at; e < last; ++e) out[e * columns + j] = from[e];
        }
    }
}

// Panels [first, end) of all rows' in bf16, as matmul.h has them. narrow: scratch, all rows in bf16.
inline void pack_pairs(const LensOps& ops, const Rows& rows, int64_t first, int64_t end, char* narrow, float* out) {
    const int64_t bytes = panel_bytes(kBF16, rows.size), step = rows.size * 2;
    for (int64_t i = first; i < end; ++i) {
        const int64_t n = std::min(kPanel, rows.count - i * kPanel);
        char* to = narrow + i * kPanel * step;
        for (int64_t r = 0; r < n; ++r) ops.narrow(rows.at(i * kPanel + r), rows.size, to + r * step);
        pack_panel(kBF16, to, step, n, rows.size, kBF16, reinterpret_cast<char*>(out) + i * bytes);
    }
}

// Rows of bf16 twice each, with zeros up to whole steps: they meet numbers that are two of bf16 (pair_inputs).
inline int64_t twice_bytes(int64_t size) { return 2 * product_steps(kBF16, size) * 4 + 64; }
inline Buffer twice(const Matrix& m, int64_t rows, int64_t size) {
    const int64_t step = twice_bytes(size);
    Buffer out(rows * step / 4);
    for (int64_t i = 0; i < rows && size; ++i) {
        char* to = reinterpret_cast<char*>(out.get()) + i * step;
        for (const int64_t skip : {int64_t{0}, product_steps(kBF16, size) * 4}) {
            std::memcpy(to + skip, m.row(i), static_cast<size_t>(size) * 2);
        }
    }
    return out;
}

}  // namespace mc

// Products of the small net beside the passes on matrix tiles, where weights are bf16: x is two numbers of bf16, so that the
// sums stay nearly those of fp32, and the weights are what time goes for.
//
// Included by lens_impl.h after vec_<level>.h; for what may be used here see there.
#pragma once

#include "net_impl.h"
#include "pairs_impl.h"

namespace mc {
namespace {

// What bf16 holds of 2 kWidth floats, and what it leaves.
inline void split(const float* x, char* held, char* left) {
    for (int64_t i = 0; i < 2; ++i, x += Vec::kWidth) {
        char* at = held + i * Vec::kWidth * BF16::kBytes;
        Vec::store(BF16{}, at, load(x));
        Vec::store(BF16{}, left + i * Vec::kWidth * BF16::kBytes, sub(load(x), Vec::load(BF16{}, at)));
    }
}

void pair_rows(const float* x, int64_t step, int64_t rows, int64_t inputs, char* out) {
    constexpr int64_t kBytes = 2 * Vec::kWidth * BF16::kBytes;
    for (int64_t k = 0; k < inputs; k += 2 * Vec::kWidth, out += Vec::kWidth * kPanel * 4) {
        for (int64_t j = 0; j < kMostQueries; j += Vec::kWidth) {
            Vec held[Vec::kWidth], left[Vec::kWidth];
            for (int64_t i = 0; i < Vec::kWidth; ++i) {
                alignas(64) char parts[2][kBytes] = {};
                if (j + i < rows) split(x + (j + i) * step + k, parts[0], parts[1]);
                held[i] = Vec::load(F32{}, parts[0]);
                left[i] = Vec::load(F32{}, parts[1]);
            }
            transpose(held);
            transpose(left);
            for (int64_t i = 0; i < Vec::kWidth; ++i) {
                Vec::store(F32{}, out + (i * kPanel + j) * 4, held[i]);
                Vec::store(F32{}, out + (i * kPanel + kMostQueries + j) * 4, left[i]);
            }
        }
    }
}

// Weights are rows of A: they multiply where they lie.
void linear_either(const Linear& a) {
    if (!a.matmul) return linear<BF16>(a);
    alignas(64) float c[kMatrixRows][kPanel];
    for (int64_t o = 0; o < a.outputs; o += kMatrixRows) {
        const int64_t n = a.outputs - o < kMatrixRows ? a.outputs - o : kMatrixRows;
        const char* w = a.w + o * a.w_step;
        touch_rows(w, a.w_step, n, a.inputs * BF16::kBytes);
        a.matmul->multiply[kBF16](
            {w, a.w_step, n, a.pairs, kPanel * 4, product_steps(kBF16, a.inputs), c[0], kPanel, kPanel, false});
        for (int64_t m = 0; m < a.rows; ++m) {
            for (int64_t i = 0; i < n; ++i) a.out[m * a.out_step + o + i] = c[i][m] + c[i][kMostQueries + m];
        }
    }
    a.matmul->finish();
}

// Weights are steps of panels, two rows at a time.
void absorb_either(const Absorb& a) {
    if (!a.matmul) return absorb<BF16>(a);
    constexpr int64_t kStep = kTile * BF16::kBytes + 64;
    alignas(64) uint32_t pairs[2][kMostEntries / 2 * kPanel];
    alignas(64) char x[2 * kMostQueries * kStep] = {};
    float c[2 * kMostQueries][kStrip];
    for (int64_t i = 0; i < a.inputs; i += kTile) {
        const int64_t n = a.inputs - i < kTile ? a.inputs - i : kTile;
        for (int64_t m = 0; m < a.rows; ++m) {
            for (int64_t k = 0; k < n; k += 2 * Vec::kWidth) {
                char* to = x + m * kStep + k * BF16::kBytes;
                split(a.x + m * a.x_step + i + k, to, to + kMostQueries * kStep);
            }
        }
        const char* w = a.w + i * a.w_step;
        touch_rows(w, a.w_step, n, a.outputs * BF16::kBytes);
        for (int64_t e = 0; e < a.outputs; e += kStrip) {
            const int64_t panels = a.outputs - e > kPanel ? 2 : 1;
            pair_entries(w + e * BF16::kBytes, a.w_step, n, panels, false, pairs[0]);
            for (int64_t p = 0; p < panels; ++p) {
                a.matmul->multiply[kBF16]({x, kStep, 2 * kMostQueries, reinterpret_cast<const char*>(pairs[p]),
                                           kPanel * 4, n / 2, c[0] + p * kPanel, kStrip, kPanel, false});
            }
            for (int64_t m = 0; m < a.rows; ++m) {
                float* out = a.out + m * a.out_step + e;
                for (int64_t k = 0; k < panels * kPanel; k += Vec::kWidth) {
                    const Vec sum = add(load(c[m] + k), load(c[kMostQueries + m] + k));
                    store(out + k, i ? add(sum, load(out + k)) : sum);
                }
            }
        }
    }
    a.matmul->finish();
}

}  // namespace
}  // namespace mc

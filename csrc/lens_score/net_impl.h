// Products of the small net beside the passes: what is of a query's size, weights in their own dtype.
//
// Included by lens_impl.h after vec_<level>.h; for what may be used here see there.
#pragma once

#include "product_impl.h"

namespace mc {
namespace {

// Products of kRows rows with kOutputs outputs.
template <class T, int kRows, int kOutputs>
struct DotTile {
    const float* x;
    int64_t x_step;
    const char* w;
    int64_t w_step;
    // In whole groups of as many as there are floats in one, whose sums across registers are taken together.
    static constexpr int kSums = (kRows * kOutputs + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
    Vec acc[kSums];

    // kPart: the first `part` elements of a vector.
    template <bool kPart>
    void add(int64_t k, int part) {
        Vec y[kOutputs];
        for (int i = 0; i < kOutputs; ++i) {
            const char* p = w + i * w_step + k * T::kBytes;
            if constexpr (kPart) {
                y[i] = Vec::load_part(T{}, p, part);
            } else {
                y[i] = Vec::load(T{}, p);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const Vec by = load(x + r * x_step + k);
            for (int i = 0; i < kOutputs; ++i) acc[r * kOutputs + i] = fmadd(by, y[i], acc[r * kOutputs + i]);
        }
    }
};

template <class T, int kRows, int kOutputs>
inline void dots(const Linear& a, int64_t m, int64_t o) {
    DotTile<T, kRows, kOutputs> tile{a.x + m * a.x_step, a.x_step, a.w + o * a.w_step, a.w_step, {}};
    for (Vec& one : tile.acc) one = Vec::all(0.0f);
    // Outputs that come next, in the order of memory; the first rows fetch them for all.
    const char* ahead = m == 0 ? tile.w + kOutputs * a.w_step : nullptr;
    constexpr int64_t kBytes = kOutputs * Vec::kWidth * T::kBytes;
    int64_t k = 0;
    for (; k + Vec::kWidth <= a.inputs; k += Vec::kWidth) {
        for (int64_t i = 0; ahead && i < kBytes; i += 64) __builtin_prefetch(ahead + k * kOutputs * T::kBytes + i, 0, 2);
        tile.template add<false>(k, 0);
    }
    if (k < a.inputs) tile.template add<true>(k, static_cast<int>(a.inputs - k));
    float total[tile.kSums];
    for (int i = 0; i < tile.kSums; i += Vec::kWidth) store(total + i, sums(tile.acc + i));
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kOutputs; ++i) a.out[(m + r) * a.out_step + o + i] = total[r * kOutputs + i];
    }
}

template <class T, int kOutputs>
struct Dots {
    const Linear& a;
    int64_t o;

    template <int kRows>
    void rows(int64_t m) {
        dots<T, kRows, kOutputs>(a, m, o);
    }
};

template <class T>
void linear(const Linear& a) {
    constexpr int kOutputs = 2, kRows = kWide ? 8 : 4;
    int64_t o = 0;
    for (; o + kOutputs <= a.outputs; o += kOutputs) in_rows<kRows>(0, a.rows, Dots<T, kOutputs>{a, o});
    for (; o < a.outputs; ++o) in_rows<4>(0, a.rows, Dots<T, 1>{a, o});
}

template <class T>
void absorb(const Absorb& a) {
    alignas(64) float widened[kTile * kStrip];
    float ones[kMostQueries];
    for (float& one : ones) one = 1.0f;
    for (int64_t e = 0; e < a.outputs; e += kStrip) {
        for (int64_t i = 0; i < a.inputs; i += kTile) {
            const int64_t n = a.inputs - i < kTile ? a.inputs - i : kTile;
            widen_strip<T>(a.w + i * a.w_step, a.w_step, n, e, a.outputs, widened, kStrip, nullptr);
            Gather gather{a.x + i, a.x_step, 1, widened, kStrip, n, a.out + e, a.out_step, i ? ones : nullptr, nullptr};
            gather(a.rows);
        }
    }
}

template <class T>
void widen(const char* src, int64_t n, float* dst) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(dst + i, Vec::load(T{}, src + i * T::kBytes));
    if (i == n) return;
    const int part = static_cast<int>(n - i);
    Vec::store_part(F32{}, reinterpret_cast<char*>(dst + i), part, Vec::load_part(T{}, src + i * T::kBytes, part));
}

void narrow(const float* src, int64_t n, char* dst) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::store(BF16{}, dst + i * BF16::kBytes, load(src + i));
    if (i == n) return;
    const int part = static_cast<int>(n - i);
    const Vec last = Vec::load_part(F32{}, reinterpret_cast<const char*>(src + i), part);
    Vec::store_part(BF16{}, dst + i * BF16::kBytes, part, last);
}

void accumulate(const float* src, float weight, int64_t n, float* dst) {
    const Vec by = Vec::all(weight);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(dst + i, fmadd(by, load(src + i), load(dst + i)));
    for (; i < n; ++i) dst[i] += weight * src[i];
}

}  // namespace
}  // namespace mc

// Rows of bf16 for bf16 products, written once over a vector type.
//
// Included by linear_<level>.cpp after vec_<level>.h. A normed row of x is rounded to bf16.
#pragma once

#include "linear.h"
#include "vec_math.h"

namespace mc {
namespace {

void narrow(const NarrowRow& a) {
    auto each = [&](auto&& body) {
        for (int64_t i = 0; i < a.n; i += Vec::kWidth) {
            const int left = static_cast<int>(a.n - i < Vec::kWidth ? a.n - i : Vec::kWidth);
            const char* p = a.x + i * BF16::kBytes;
            body(i, left, left == Vec::kWidth ? Vec::load(BF16{}, p) : Vec::load_part(BF16{}, p, left));
        }
    };
    float scale = 1.0f;
    if (a.gain) {
        Vec squares = Vec::all(0.0f);
        each([&](int64_t, int, Vec x) { squares = fmadd(x, x, squares); });
        scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.n) + a.eps);
    }
    each([&](int64_t i, int left, Vec x) {
        if (a.gain) {
            const char* gain = reinterpret_cast<const char*>(a.gain + i);
            x = mul(mul(x, Vec::all(scale)), left == Vec::kWidth ? load(a.gain + i) : Vec::load_part(F32{}, gain, left));
        }
        Vec::store(BF16{}, a.out + i * BF16::kBytes, x);
    });
    for (int64_t i = (a.n + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth; i < a.padded; i += Vec::kWidth) {
        Vec::store(BF16{}, a.out + i * BF16::kBytes, Vec::all(0.0f));
    }
}

}  // namespace
}  // namespace mc

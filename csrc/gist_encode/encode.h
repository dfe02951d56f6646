// Primitives of gist_encode: all but its matrix products, one table per instruction set.
//
// "Product type" is what a matrix product takes (matmul.h): kF32 or kBF16.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mc {

// out[i] = x[i] * (scale / rms(x)) * gain[i], i < n; zeros from there to `padded`. gain NULL: 1. sum[i] += x[i], or
// NULL: with what the additions so far have lost in lost[i] (Kahan 1965), since what is summed largely cancels after.
struct Normalise {
    const char* x;
    int64_t n;
    const float* gain;
    float scale;
    float *sum, *lost;
    char* out;
    int64_t padded;
};

// out = sum_j p_j s_j over `rows` rows of `width` floats, `step` floats apart; p = softmax_j(scale * <query, s_j>), or
// 1 / rows without a query. p [rows] is scratch.
struct PoolRows {
    const float* s;
    int64_t step, rows, width;
    const float* query;
    float scale;
    float *p, *out;
};

struct EncodeOps {
    const char* name;
    void (*normalise[kDtypes][kDtypes])(const Normalise&);  // [dtype of x][of out]
    void (*softmax)(float* x, int64_t n, float scale);      // x = softmax(scale * x)
    void (*pool)(const PoolRows&);
    void (*gated[kDtypes])(const float* gate, const float* up, int64_t n, char* out);  // silu(gate) * up
    void (*store[kDtypes])(const float* x, int64_t n, char* out);
};

// nullptr where the build has no such level.
const EncodeOps* encode_scalar();
const EncodeOps* encode_avx2();
const EncodeOps* encode_avx512();
const EncodeOps* encode_neon();

}  // namespace mc

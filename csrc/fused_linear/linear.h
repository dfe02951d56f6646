// Primitives of fused_linear, one table of them per instruction set.
//
// A row of x is widened to fp32 once a call, in the order in which a row of W is widened while it is read: `kSpan`
// elements at a time. A span of bf16 gives its even elements, then its odd ones (each takes one operation on the whole
// register); other dtypes stay in order. A row ends in zeros up to a whole span. Where a level multiplies bf16, rows
// of x that are bf16 as W is stay so.
#pragma once

#include <cstdint>

#include "rows.h"
#include "unroll.h"

namespace mc {

constexpr int64_t kSpan = 32;     // elements: two of the widest vectors
constexpr int kTileX = 4;         // rows of x that share a read of W from a register
constexpr int64_t kXRows = 32;    // rows of x that one dot takes, at most
constexpr int64_t kPackedX = 4;   // rows of x that share a read of a packed W from a register
constexpr int64_t kColumns = 64;  // rows of W that one dot takes, at most

// x [n] -> out [padded]: x, or with gain [n] (fp32) x / sqrt(mean(x^2) + eps) * gain.
struct WidenRow {
    const char* x;
    int64_t n, padded;
    const float* gain;
    float eps;
    float* out;
};

// The same for bf16 that stays bf16: what is normed is rounded.
struct NarrowRow {
    const char* x;
    int64_t n, padded;
    const float* gain;
    float eps;
    char* out;
};

// out[r, j] = <W[j], x[r]>: x [x_rows, padded] as WidenRow leaves it, out [x_rows, kColumns].
struct DotRows {
    const char* w;     // the first of w_rows rows, w_step bytes apart, n elements each
    const char* next;  // the row that is read after them: fetched meanwhile
    int64_t w_step, w_rows, n;
    const float* x;
    int64_t x_rows, padded;
    float* out;
    bool fetch;  // with one row of x too, see fetch.h
};

// The same of bf16 by bf16 products: x as NarrowRow leaves it, its rows x_step bytes apart.
struct DotPairs {
    const char *w, *next;
    int64_t w_step, w_rows, n;
    const char* x;
    int64_t x_rows, x_step;
    float* out;
    bool fetch;  // with one row of x too, see fetch.h
};

// x [n] in whole numbers of 2 or 3 bytes, by blocks of 32, see packed_impl.h: bytes [n / 32 * planes *
// kPlaneBytes], scales and sums of x [n / 32].
struct BytesOfRow {
    const float* x;
    int64_t n;
    int planes, bits;  // bits: of the codes that it will meet
    char* bytes;
    float *scales, *sums;
};

// The same by a packed W, see mc_packed_weight.
struct DotPacked {
    const char *w, *next;  // of the first row, which is the first of a group, and of those that are read after them
    bool fetch;
    int bits;
    int64_t w_rows, n;
    const char* x;  // as BytesOfRow leaves it
    int planes;
    int64_t x_rows, x_step;
    const float *scales, *sums;  // [x_rows, n / 32]
    float* out;
};

// out[j, i] = x[i, j] of 32-bit elements: rows and columns of x, whose rows lie x_step bytes apart, out's out_step.
struct Transpose {
    const char* x;
    int64_t x_step, rows, columns;
    char* out;
    int64_t out_step;
};

// out [n] = act(y + bias) + residual; act(y) = y, or with up silu(y) * (up + up_bias). NULL: none.
struct FinishRow {
    const float *y, *bias, *up, *up_bias;
    const char* residual;
    int64_t n;
    char* out;
};

struct LinearOps {
    const char* name;
    void (*widen[kDtypes][2])(const WidenRow&);  // [x's dtype][even elements first]
    void (*dot[kDtypes])(const DotRows&);        // [W's dtype]
    void (*finish[kDtypes])(const FinishRow&);   // [x's dtype]
    bool (*to_bytes)(const BytesOfRow&);         // false where a number is infinite or none
    void (*dot_packed)(const DotPacked&);
    // Rows of x, kXRows at most, up to which a W packed in codes of 4 and of 8 bits is faster than itself: more of them are
    // bound by arithmetic (bench/README.md).
    int64_t packed_rows[2];
    void (*transpose)(const Transpose&);
    // For bf16 products, NULL where the level has none. Subnormal numbers are taken for zero.
    void (*narrow)(const NarrowRow&);
    void (*dot_pairs)(const DotPairs&);
};

// nullptr where the build has no such level.
const LinearOps* linear_scalar();
const LinearOps* linear_avx2();
const LinearOps* linear_avx512();
const LinearOps* linear_avx512bf16();
const LinearOps* linear_neon();
const LinearOps* linear_neondot();
const LinearOps* linear_neonbf16();

}  // namespace mc

// Primitives of gist_pool and collapse: what is done for every block, one table of it per instruction set.
//
// Vectors of floats that belong to a block [key; value] come in two forms. In order: 2 * dims floats, as the formula has
// them. As loaded: key and value apart, each from a multiple of kPad floats on and padded with zeros, within that in the
// order in which the level loads pairs of vectors of the data's dtype.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mc {

constexpr int64_t kPad = 16;  // floats: the widest vector of all levels

static inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Floats of a pooled vector in order, with room for a last vector of the value that is written whole.
static inline int64_t gist_step(int64_t dims) { return padded(2 * dims + kPad); }

// The entries of one block in one head: those of `slots` [count], `step` bytes apart from the base on.
struct BlockRows {
    const char *k, *v;
    const int64_t* slots;
};

// One block pooled into gists: y_g = sum_j softmax_j(n_j . w_g + b_gj) x_j with x_j = [k_j; v_j], n_j = x_j / rms(x_j).
struct PoolBlock {
    BlockRows rows, next;  // next.k NULL, or the block that is read after this one: fetched meanwhile
    int64_t k_step, v_step, count, dims, gists;
    const float* w;  // [gists, 2 * padded(dims)] as loaded
    const float* b;  // [gists, padded(count)], -infinity in the padding
    float* scores;   // scratch [gists + 1, padded(count)]
    float* y;        // [gists, gist_step(dims)] in order
    const char* w_pairs;  // for bf16 products: [gists, 2 * dims] of bf16 as the caller has them, w_step bytes apart
    int64_t w_step;
};

// out = y + y m + c for n pooled vectors of `width` = 2 * dims floats, in order; rows of y and out are `step` floats
// apart, those of m [width, width] m_step bytes.
struct Residual {
    const float* y;
    const char* m;
    int64_t m_step;
    const float* c;  // in order, padded(width)
    int64_t n, width, step;
    float* out;
    bool fetch;       // whether m comes from memory: rows are fetched before they are read, m's and what follows it
    uint16_t* pairs;  // for bf16 products: scratch [n, step]
};

struct GistOps {
    const char* name;
    // [data's dtype]
    void (*pool[kDtypes])(const PoolBlock&);
    void (*arrange[kDtypes])(const float* in_order, int64_t dims, float* as_loaded);
    void (*store[kDtypes])(const float* src, int64_t n, char* dst);
    // [weights' dtype]
    void (*residual[kDtypes])(const Residual&);
    void (*widen[kDtypes])(const char* src, int64_t n, float* dst);
    // With bf16 products, NULL where the level has none: for data and weights of bf16, dims a multiple of kPairDims. p,
    // and of the residual's product y, are rounded to bf16.
    void (*pool_pairs)(const PoolBlock&);
    void (*residual_pairs)(const Residual&);
};

constexpr int64_t kPairDims = 32;

// nullptr where the build has no such level.
const GistOps* gist_scalar();
const GistOps* gist_avx2();
const GistOps* gist_avx512();
const GistOps* gist_avx512bf16();
const GistOps* gist_neon();

}  // namespace mc

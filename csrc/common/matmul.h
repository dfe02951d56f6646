// Matrix products: C[m, n] (+)= A[m, k] W[n, k]^T with W packed once into panels, sums in fp32.
//
// A panel is kPanel rows of W (columns of C), laid out step by step: step s holds what all kPanel columns multiply with
// element s of a row of A, 4 bytes each. As F32 a step is one k, as BF16 a pair of them (k odd: the second is zero). So a
// micro-kernel reads a panel from its beginning to its end whatever the level, and the layout is the same at all levels:
//   F32   w[panel, k, column]              steps = k
//   BF16  w[panel, k / 2, column, k % 2]   steps = k / 2, up to a multiple of kTileSteps: what a matrix tile takes
// Columns that the last panel has too many are zero, and so are the steps beyond k.
//
// Rows of A have the panel's type and as many steps: those of BF16 end in zeros. An element of C is one sum in the order
// of k, whatever m and n are: results do not depend on how a product is cut.
//
// BF16 products take subnormal inputs for zero and flush subnormal sums to zero, as the instructions do.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mc {

constexpr int64_t kPanel = 32;
constexpr int64_t kTileSteps = 16;

// What is multiplied: kF32 or kBF16 of Dtype. Data of other types are packed as kF32.
static inline int64_t product_steps(int type, int64_t k) {
    return type == kBF16 ? (k + 2 * kTileSteps - 1) / (2 * kTileSteps) * kTileSteps : k;
}
static inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }
// What so many columns or rows fill: whole panels.
static inline int64_t whole_panels(int64_t n) { return panels_of(n) * kPanel; }
static inline int64_t panel_bytes(int type, int64_t k) { return product_steps(type, k) * kPanel * 4; }
// From row to row of an A that is made for a product: whole cache lines, an odd number of them, since powers of two
// would put the rows of a tile into few sets of the cache.
static inline int64_t product_row_bytes(int type, int64_t k) { return ((product_steps(type, k) + 15) / 16 | 1) * 64; }

// One panel. C has n columns, n <= kPanel; nothing else is written.
struct Product {
    const char* a;
    int64_t a_step, m;  // bytes from row to row; rows
    const char* w;
    int64_t w_step, steps;  // bytes from step to step (packed: kPanel * 4). All kPanel columns are read
    float* c;
    int64_t c_step, n;  // floats from row to row; columns
    bool add;           // to what C holds; else C is not read
    // What is read afterwards, next_step bytes for each step: a level may fetch it, of matrix tiles all of it once, else
    // for each tile of a few rows anew, next_row bytes further on for each row that went before.
    const char* next = nullptr;
    int64_t next_step = 0, next_row = 0;
};

struct MatmulOps {
    void (*multiply[kDtypes])(const Product&);  // [type]; NULL: not at this level
    // To be called after the last product of a job, on its thread: until then tiles keep the shapes they have. Or NULL.
    void (*finish)();
    bool outruns_memory;  // matrix tiles: a panel is multiplied faster than the next one comes by itself
};

// Rows [0, n) of W, `step` bytes apart, of one panel (n <= kPanel) into `out`, panel_bytes(type, k). type: kF32, or
// kBF16 for rows of kBF16.
void pack_panel(int dtype, const char* w, int64_t step, int64_t n, int64_t k, int type, char* out);

// nullptr where the build has no such level.
const MatmulOps* matmul_scalar();
const MatmulOps* matmul_avx2();
const MatmulOps* matmul_avx512();
const MatmulOps* matmul_avx512bf16();
const MatmulOps* matmul_amx();
const MatmulOps* matmul_emulated();
const MatmulOps* matmul_neon();
const MatmulOps* matmul_neonbf16();

}  // namespace mc

// Row primitives: a row is the D contiguous elements of one entry in one head. One table of them per instruction set.
#pragma once

#include <cstdint>

namespace mc {

// Floating dtypes, numbered as in mc_kernels.h.
enum Dtype : int { kF32 = 0, kF16 = 1, kBF16 = 2, kDtypes = 3 };

// A cache's fp8, which the rows here do not know.
enum : int { kF8E4M3 = 5 };

static inline int64_t dtype_bytes(int dtype) { return dtype == kF32 ? 4 : dtype == kF8E4M3 ? 1 : 2; }

// `count` rows, one after the other: row i goes from src + i * src_step to dst + i * dst_step. Steps are in bytes and
// may be negative; a row's source is its own destination or apart from it.
//
// heads: each row stands for that many, src_head and dst_head bytes apart, which turn by the same phase.
// phase: what `phases` wrote for row 0; row i's lies i * phase_step floats on (0: one phase for all).
// rest: elements beyond the rotated 2 * half, multiplied by rest_scale (copied if that is 1).
struct RotateRows {
    const char* src;
    char* dst;
    int64_t count, src_step, dst_step;
    const float* phase;
    int64_t phase_step, half, rest;
    float rest_scale;
    int64_t heads, src_head, dst_head;
};

struct RowOps {
    const char* name;
    // The phase of one entry: turns [half] are inv_freq / 2 pi; `scale` multiplies both parts, before the only
    // rounding. Writes 2 * half floats (cosines, sines), or interleaved 4 * half: each cosine twice, then each sine
    // with both signs.
    void (*phases)(const double* turns, int64_t half, int64_t position, double scale, bool interleaved, float* out);
    // [dtype][interleaved]
    void (*rotate[kDtypes][2])(const RotateRows&);
};

static inline int64_t phase_floats(int64_t half, bool interleaved) { return (interleaved ? 4 : 2) * half; }

// nullptr where the build has no such level.
const RowOps* rows_scalar();
const RowOps* rows_avx2();
const RowOps* rows_avx512();
const RowOps* rows_neon();

}  // namespace mc

// Primitives of lens_score: the passes over entries, and the products of the small net beside them. One table of
// them per instruction set; [dtype] is that of the entries or of the weights.
//
// Entries are looked at a tile at a time. A tile is widened to fp32, a span of its dimensions at a time, where later
// steps find it in the core's own caches, whatever the entries' stride. Where entries and weights are bf16 and the level
// multiplies that, a tile stays as it is and what it meets is rounded: the vectors, and in a read pass its weights. What else
// matrix tiles multiply with bf16 weights (the small net, the head) is not rounded, but two numbers of bf16.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "rows.h"

namespace mc {

constexpr int64_t kPad = 16;           // floats: the widest vector of all levels
constexpr int64_t kTile = 64;          // entries of a tile
constexpr int64_t kMostEntries = 256;  // of a tile on matrix tiles, a multiple of kTile
constexpr int64_t kStrip = 64;         // dimensions that are summed at a time
constexpr int64_t kMostQueries = 16, kMostDirect = 16;
// Dimensions that are widened at a time: with as much of a panel they fit a second-level cache.
constexpr int64_t kSpan = 768;
// Rows of floats an odd number of cache lines apart: a column of them does not crowd into few sets of a cache.
constexpr int64_t kSpanStep = kSpan + 16;
// The same of bf16.
constexpr int64_t kCopySpan = 320;
constexpr int64_t kCopyBytes = kCopySpan * 2 + 64;

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// `count` entries x of `dims` elements, and the vectors that they meet: panel [dims, columns], columns a multiple of
// kPad.
struct Stream {
    const char* entries;
    int64_t step;  // bytes
    int64_t count, dims;
    const float* panel;
    int64_t columns, tile;  // tile: entries that are looked at at a time
    float* scratch;         // stream_floats(columns), or for a score pass score_floats
    float* inverse;         // [count] 1 / rms(x), which the first pass over entries writes
    bool first_pass;
    const MatmulOps* matmul;  // NULL: products are fp32
    const char* pairs;        // the panel in bf16, as pack_panel packs it
};

// A column's weights for a tile in bf16: an odd number of cache lines.
static inline int64_t weight_bytes(int64_t tile) { return tile * 2 + 64; }
static inline int64_t stream_floats(int64_t columns, int64_t tile) {
    return kTile * kSpanStep + columns * (weight_bytes(tile) / 4) + tile * columns + columns;
}
static_assert(kMostEntries * kCopyBytes <= kTile * kSpanStep * 4, "copies fit where widened entries would be");

// A read pass over a run: with s = <x, panel column j> / rms(x) (in units of log 2) and p = 2^(s - top[j]),
//   top[j] = max s,  total[j] = sum p,  sums[j] = sum p x / rms(x).
struct ReadRun {
    Stream stream;
    int64_t vectors;     // columns in use
    float *top, *total;  // [columns]
    float* sums;         // [E / kStrip, vectors, kStrip], dimensions up to a multiple of kStrip
};

// Floats before the sums of dimension `dim`.
static inline int64_t sum_at(const ReadRun& a, int64_t dim) { return dim / kStrip * kStrip * a.vectors + dim % kStrip; }

// What the head knows beside the entries. X = heads * head_values + heads + direct + features.
struct Head {
    int64_t heads, queries, head_values, direct, features, hidden, inputs;
    const float* values;  // [heads, head_values, queries]
    const float* in;      // [hidden, in_step]
    int64_t in_step;
    const char*
        in_pairs;  // the same twice a row in bf16, each time with zeros up to whole steps; NULL: products are fp32
    int64_t in_pairs_step;  // bytes
    const float* out;       // [2, out_step]
    int64_t out_step;
    const float *in_bias, *out_bias;  // [hidden], [2]
};

// The score pass over a run. Panel: heads * queries columns in units of log 2, then `direct` ones.
struct ScoreRun {
    Stream stream;
    const Head* head;
    const char* features;   // fp32
    int64_t features_step;  // bytes
    const uint8_t* legal;   // [count, 2] or NULL
    char* out;              // fp32
    int64_t out_step;       // bytes
};

static inline int64_t head_floats(const Head& h, int64_t columns) {
    const int64_t pairs = h.in_pairs ? 2 * product_steps(kBF16, h.inputs) : 0;
    return kTile * (columns + h.inputs + h.hidden + 3 + pairs);
}
static inline int64_t score_floats(const Head& h, int64_t columns, int64_t tile) {
    return stream_floats(columns, tile) + head_floats(h, columns);
}

// out[m, o] = <x[m], w[o]> for rows m and outputs o. x rows end in zeros up to a multiple of kPad.
struct Linear {
    const float* x;
    int64_t x_step, rows;
    const char* w;
    int64_t w_step;  // bytes
    int64_t inputs, outputs;
    float* out;
    int64_t out_step;
    const MatmulOps* matmul;  // by matrix tiles; NULL: products are fp32
    const char* pairs;        // x as LensOps::pair_rows makes a panel of it
};

// out[m, e] = sum_i x[m, i] w[i, e]: a vector of projected queries becomes one that meets entries as they are.
struct Absorb {
    const float* x;
    int64_t x_step, rows;
    const char* w;
    int64_t w_step;  // bytes
    int64_t inputs, outputs;
    float* out;               // [rows, out_step]
    int64_t out_step;         // outputs rounded up to kStrip
    const MatmulOps* matmul;  // by matrix tiles; NULL: products are fp32
};

struct LensOps {
    const char* name;
    void (*read[kDtypes])(const ReadRun&);
    void (*score[kDtypes])(const ScoreRun&);
    void (*linear[kDtypes])(const Linear&);
    void (*absorb[kDtypes])(const Absorb&);
    void (*widen[kDtypes])(const char* src, int64_t n, float* dst);
    // Rows of x, at most kMostQueries of whole steps, become columns of a panel of matmul.h: what bf16 holds of them, and from
    // column kMostQueries on what it leaves, so that both products with weights of bf16 together are nearly those of fp32.
    void (*pair_rows)(const float* x, int64_t step, int64_t rows, int64_t inputs, char* out);
    void (*narrow)(const float* src, int64_t n, char* dst);                     // to bf16
    void (*accumulate)(const float* src, float weight, int64_t n, float* dst);  // dst += weight src
};

// nullptr where the build has no such level.
const LensOps* lens_scalar();
const LensOps* lens_avx2();
const LensOps* lens_avx512();
const LensOps* lens_neon();

}  // namespace mc

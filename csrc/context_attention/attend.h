// Primitives of context_attention: what is done for every entry, one table of it per instruction set.
//
// An entry's row is `dims` elements in memory. Turned, it is `padded` floats: the rotated elements (first ones of all
// pairs, then second ones, each `width` floats; or interleaved, as they lie, `width` floats), then those that do not
// turn; each part ends in zeros up to a multiple of kPad floats. A phase is 2 * width floats: cosines and sines of
// the pairs, or interleaved each cosine twice and each sine with both signs (RowOps::phases).
#pragma once

#include <cstdint>

#include "matmul.h"
#include "rows.h"

namespace mc {

constexpr int64_t kPad = 16;     // floats: the widest vector of all levels
constexpr int64_t kBlock = 128;  // entries that are looked at together: long streams over each head's keys and values

struct RowShape {
    int64_t dims, half, width, padded;
};

// Entries of one row of the batch, by their slots relative to some base, at most kBlock. Up to a multiple of kPad the
// last slot is repeated.
struct Entries {
    int32_t slot[kBlock];
    int64_t position[kBlock];
    int64_t count;
};

// Rows base + i * step bytes, turned by phase [n, 2 * width] into out [n, padded]. rest_scale multiplies what does not
// turn.
struct TurnRows {
    const char* base;
    int64_t step, n;
    const float* phase;
    float rest_scale;
    float* out;
    const RowShape* shape;
};

// Phases of n entries, out [n, 2 * width], as products of two tabled ones: of position >> bits and of its low bits.
// sigma [n] and inv_freq [width] (zeros in the padding), or NULL: damps by exp(-(inv_freq sigma)^2 / 2).
struct PhaseRows {
    const float *high, *low;
    int64_t bits, n;
    const int64_t* position;
    const float *sigma, *inv_freq;
    int64_t width;
    float* out;
};

// One block of entries in one KV head, and the online softmax of all queries that this head serves:
//   score[j,e] = <q[j], turned k[e]> + add[j % n_times, e]  (in units of log 2)
// Running: top [rows] greatest score, total [rows] sum of 2^(score - top), out [rows, out_step] that of values.
struct HeadBlock {
    const char *k, *v;  // the head's rows at slot 0 of the block
    int64_t k_step, v_step;
    const Entries* entries;
    const float* phase;  // [count, 2 * width]; NULL: nothing turns
    const float* add;    // [n_times, kBlock] or NULL
    int64_t n_times;
    const float* q;           // [rows, padded]
    const uint16_t* q_pairs;  // for bf16 products: as pack_queries leaves them
    int64_t rows;
    float* turned;      // scratch [kPad, padded]
    float* p;           // [rows, kBlock], becomes 2^(score - top)
    uint16_t* p_pairs;  // for bf16 products: scratch [rows in whole units, kBlock], zero at first
    float *top, *total, *out;
    int64_t out_step;
    const char* next;  // what is read next, kBlock rows next_step bytes apart: fetched meanwhile. NULL: nothing
    int64_t next_step;
    const char* next_v;  // the values at slot 0 of what is read next
    const RowShape* shape;
};

// A tile of queries and a run of keys in the order of their positions, of which a query sees the first ones: products with
// all of them (in units of log 2) become, in the same memory, what the softmax gives them. Running sums as in HeadBlock.
struct ScoreTile {
    float* p;  // [rows, p_step]: scores; then from each row's beginning [columns] numbers of the products' type
    int64_t p_step, rows;
    int64_t columns;      // a multiple of kPanel
    int64_t heads;        // rows of a query, which lie together
    const int64_t* seen;  // [rows / heads] 0..columns. Scores beyond may be anything, and become 0
    const float* bias;    // [columns] or NULL
    float *top, *total;   // total: of what is multiplied, hence of rounded numbers
    float* out;           // anything where top is -infinity
    int64_t out_step;
    int64_t dims;  // a multiple of kPanel
};

struct AttendOps {
    const char* name;
    void (*phases)(const PhaseRows&);
    void (*turn[kDtypes][2])(const TurnRows&);  // [dtype][interleaved]
    void (*attend[kDtypes][2])(const HeadBlock&);
    void (*store[kDtypes])(const float* src, int64_t n, float scale, char* dst);
    void (*soften[kDtypes])(const ScoreTile&);  // [type of the products, see matmul.h]
    // out [columns] += the sum over rows of 2^(score - top) * total; a row whose total is 0 adds nothing.
    void (*sum_rows)(const ScoreTile&);
    // With bf16 products, NULL where the level has none: for heads of bf16 that `in_pairs` names. Turned queries and
    // keys and what the softmax gives an entry are rounded to bf16, subnormal numbers taken for zero. Phases of entries
    // lie with the even pairs first (Frequencies).
    int64_t least_rows;  // fewer queries of a KV head are faster in fp32
    int64_t query_unit;  // that many of them are packed and multiplied together
    // Rows of one KV head, `step` floats apart, to q_pairs: as many bf16 as the rows in whole units have dims.
    void (*pack_queries)(const float* q, int64_t rows, int64_t step, int64_t dims, uint16_t* out);
    void (*attend_pairs)(const HeadBlock&);
    // Before the first attend_pairs of a run of entries and after the last, on its thread; or NULL.
    void (*begin_pairs)();
    void (*end_pairs)();
};

// Heads that bf16 products are made for: all of a row turns, by halves.
static inline bool in_pairs(const RowShape& s, bool interleaved) {
    return !interleaved && s.dims == 2 * s.half && (s.dims == 64 || s.dims == 128);
}

// nullptr where the build has no such level.
const AttendOps* attend_scalar();
const AttendOps* attend_avx2();
const AttendOps* attend_avx512();
const AttendOps* attend_avx512bf16();
const AttendOps* attend_amx();
const AttendOps* attend_emulated();
const AttendOps* attend_neon();

}  // namespace mc

// The primitives of lens_score, written once over a vector type and compiled once per instruction set.
//
// Included by lens_<level>.cpp after vec_<level>.h; for what may be used here see there.
#pragma once

#include <cstring>

#include "head_impl.h"
#include "net_impl.h"
#include "net_pairs_impl.h"
#include "pairs_impl.h"
#include "product_impl.h"

namespace mc {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// Products of the tile that begins at entry `first` with the panel, and in the first pass 1 / rms of its `count`
// entries. A tile of one span stays widened.
template <class T>
void meet(const Stream& s, int64_t first, int64_t count, const Tile& tile) {
    if (s.pairs) return meet_pairs(s, first, count, tile);
    float sums[kTile * Vec::kWidth] = {};
    float* squares = s.first_pass ? sums : nullptr;
    const char* row = s.entries + first * s.step;
    const int64_t after = s.count - first - kTile;
    for (int64_t at = 0; at < s.dims; at += kSpan) {
        const int64_t end = at + kSpan < s.dims ? at + kSpan : s.dims;
        for (int64_t i = at; i < end; i += kStrip) {
            widen_strip<T>(row, s.step, count, i, s.dims, tile.widened + i - at, kSpanStep, squares);
        }
        Multiply m{};
        m.x = tile.widened;
        m.panel = s.panel + at * s.columns;
        m.dims = end - at;
        m.columns = s.columns;
        m.out = tile.products;
        m.count = count;
        m.more = at > 0;
        m.next = row + kTile * s.step + at * T::kBytes;
        m.next_step = s.step;
        m.next_bytes = m.dims * T::kBytes;
        m.next_count = after > 0 ? after : 0;
        in_vectors(s.columns, m);
    }
    for (int64_t n = 0; squares && n < count; ++n) {
        s.inverse[first + n] = inverse_rms(load(squares + n * Vec::kWidth), s.dims);
    }
}

// Products from logits to p / rms, with what that means for the running sums: `scale` is what those shrink by.
inline void soften(const ReadRun& a, int64_t first, int64_t count, const Tile& tile) {
    const int64_t columns = a.stream.columns;
    const float* inverse = a.stream.inverse + first;
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
        float* p = tile.products + j;
        const Vec before = load(a.top + j);
        Vec top = before;
        for (int64_t n = 0; n < count; ++n) {
            const Vec x = mul(load(p + n * columns), Vec::all(inverse[n]));
            store(p + n * columns, x);
            top = greater(top, x);  // a NaN, which may get lost here, is in the total in any case
        }
        const Vec shrink = exp2(sub(before, top));
        Vec total = mul(load(a.total + j), shrink);
        for (int64_t n = 0; n < count; ++n) {
            const Vec x = exp2(sub(load(p + n * columns), top));
            store(p + n * columns, mul(x, Vec::all(inverse[n])));
            total = add(total, x);
        }
        store(a.top + j, top);
        store(a.total + j, total);
        store(tile.scale + j, shrink);
    }
}

template <class T>
void read(const ReadRun& a) {
    const Stream& s = a.stream;
    const Tile tile(s);
    for (int64_t j = 0; j < s.columns; ++j) {
        a.top[j] = kMinusInfinity;
        a.total[j] = 0.0f;
    }
    for (int64_t i = 0; !s.pairs && i < a.vectors * round_up(s.dims, kStrip); ++i) a.sums[i] = 0.0f;
    for (int64_t first = 0; first < s.count; first += s.tile) {
        const int64_t count = s.count - first < s.tile ? s.count - first : s.tile;
        meet<T>(s, first, count, tile);
        soften(a, first, count, tile);
        if (s.pairs) {
            gather_pairs(a, first, count, tile);
            continue;
        }
        for (int64_t at = 0; at < s.dims; at += kStrip) {
            float* x = tile.widened + (s.dims > kSpan ? 0 : at);
            if (s.dims > kSpan) {
                widen_strip<T>(s.entries + first * s.step, s.step, count, at, s.dims, x, kSpanStep, nullptr);
            }
            Gather gather{tile.products,          1,      s.columns,  x,      kSpanStep, count,
                          a.sums + sum_at(a, at), kStrip, tile.scale, nullptr};
            gather(a.vectors);
        }
    }
    if (s.pairs && s.matmul->finish) s.matmul->finish();
}

template <class T>
void score(const ScoreRun& a) {
    const Stream& s = a.stream;
    const Tile tile(s);
    const HeadTile head(*a.head, s.columns, tile.rest);
    // What is not written below is zero: features of entries that do not exist, steps beyond the inputs.
    std::memset(head.turned, 0, static_cast<size_t>(head_floats(*a.head, s.columns)) * sizeof(float));
    for (int64_t first = 0; first < s.count; first += s.tile) {
        const int64_t count = s.count - first < s.tile ? s.count - first : s.tile;
        meet<T>(s, first, count, tile);
        for (int64_t n = 0; n < count; n += kTile) {
            score_entries(a, tile.products + n * s.columns, first + n, count - n < kTile ? count - n : kTile, head);
        }
    }
    if (s.pairs && s.matmul->finish) s.matmul->finish();
}

LensOps lens_table(const char* name) {
    return {name,
            {read<F32>, read<F16>, read<BF16>},
            {score<F32>, score<F16>, score<BF16>},
            {linear<F32>, linear<F16>, linear_either},
            {absorb<F32>, absorb<F16>, absorb_either},
            {widen<F32>, widen<F16>, widen<BF16>},
            pair_rows,
            narrow,
            accumulate};
}

}  // namespace
}  // namespace mc

// The primitives of lens_score, written once over a vector type and compiled once per instruction set.
//
// Included by lens_<level>.cpp after vec_<level>.h; for what may be used here see there.
#pragma once

#include <cstring>

#include "net_impl.h"
#include "pairs_impl.h"
#include "product_impl.h"

namespace mc {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;
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
            Gather gather{tile.products, 1,           s.columns,   x,          kSpanStep,
                          count,         a.sums + sum_at(a, at), kStrip, tile.scale, nullptr};
            gather(a.vectors);
        }
    }
    if (s.pairs && s.matmul->finish) s.matmul->finish();
}

// The columns of a tile's products become rows [column, kTile], each entry's divided by its rms.
inline void turn_over(const Stream& s, const float* products, int64_t first, int64_t count, int64_t used, float* out) {
    const float* inverse = s.inverse + first;
    for (int64_t j = 0; j < used; ++j) {
        for (int64_t n = 0; n < count; ++n) out[j * kTile + n] = products[n * s.columns + j] * inverse[n];
        for (int64_t n = count; n < kTile; ++n) out[j * kTile + n] = 0.0f;
    }
}

// One head's attention of a tile's entries to the queries: logits [queries, kTile] become weights; match.
inline void attend(const Head& h, float* logits, float* values, const float* w, float* match, float* scratch) {
    for (int64_t n = 0; n < kTile; n += Vec::kWidth) {
        Vec top = load(logits + n), total = Vec::all(0.0f);
        for (int64_t m = 1; m < h.queries; ++m) top = greater(top, load(logits + m * kTile + n));
        for (int64_t m = 0; m < h.queries; ++m) {
            float* at = logits + m * kTile + n;
            const Vec p = exp2(sub(load(at), top));
            store(at, p);
            total = add(total, p);
        }
        store(match + n, top);
        store(scratch + n, total);
    }
    const float queries = static_cast<float>(h.queries);
    for (int64_t n = 0; n < kTile; ++n) match[n] = (match[n] + __builtin_log2f(scratch[n] / queries)) * kLn2;
    Gather gather{w, h.queries, 1, logits, kTile, h.queries, values, kTile, nullptr, nullptr};
    gather(h.head_values);
    for (int64_t v = 0; v < h.head_values; ++v) {
        for (int64_t n = 0; n < kTile; ++n) values[v * kTile + n] /= scratch[n];
    }
}

inline void silu(float* x, float* scratch) {
    for (int64_t n = 0; n < kTile; ++n) scratch[n] = __builtin_fabsf(x[n]) * -kLog2E;
    for (int64_t n = 0; n < kTile; n += Vec::kWidth) store(scratch + n, exp2(load(scratch + n)));
    for (int64_t n = 0; n < kTile; ++n) {
        const float e = scratch[n];  // exp(-|x|) cannot overflow
        x[n] = x[n] * (x[n] < 0.0f ? e : 1.0f) / (1.0f + e);
    }
}

inline void write_scores(const ScoreRun& a, int64_t first, int64_t count, const float* scores) {
    for (int64_t n = 0; n < count; ++n) {
        float pair[2] = {scores[n], scores[kTile + n]};
        for (int i = 0; a.legal && i < 2; ++i) {
            if (!a.legal[2 * (first + n) + i]) pair[i] = 0.0f;
        }
        std::memcpy(a.out + (first + n) * a.out_step, pair, sizeof pair);
    }
}

template <class T>
void score(const ScoreRun& a) {
    const Stream& s = a.stream;
    const Head& h = *a.head;
    const Tile tile(s);
    float* turned = tile.rest;                   // [columns, kTile]
    float* inputs = turned + kTile * s.columns;  // [X, kTile]
    float* hidden = inputs + kTile * h.inputs;   // [hidden, kTile]
    float* scores = hidden + kTile * h.hidden;   // [2, kTile]
    float* scratch = scores + 2 * kTile;         // [kTile]
    float* match = inputs + kTile * h.heads * h.head_values;
    float* direct = match + kTile * h.heads;
    float* features = direct + kTile * h.direct;
    const int64_t vectors = h.heads * h.queries, used = vectors + h.direct;
    int64_t met = 0;
    for (int64_t first = 0; first < s.count; first += kTile) {
        const int64_t count = s.count - first < kTile ? s.count - first : kTile;
        for (int64_t n = count; n < kTile; ++n) {  // what does not exist is zero
            for (int64_t f = 0; f < h.features; ++f) features[f * kTile + n] = 0.0f;
        }
        if (first % s.tile == 0) {
            met = first;
            meet<T>(s, first, s.count - first < s.tile ? s.count - first : s.tile, tile);
        }
        turn_over(s, tile.products + (first - met) * s.columns, first, count, used, turned);
        for (int64_t i = 0; i < h.heads; ++i) {
            attend(h, turned + i * h.queries * kTile, inputs + i * h.head_values * kTile,
                   h.values + i * h.head_values * h.queries, match + i * kTile, scratch);
        }
        std::memcpy(direct, turned + vectors * kTile, static_cast<size_t>(h.direct * kTile) * sizeof(float));
        for (int64_t n = 0; n < count; ++n) {
            const char* row = a.features + (first + n) * a.features_step;
            for (int64_t f = 0; f < h.features; ++f) std::memcpy(features + f * kTile + n, row + f * 4, 4);
        }
        Gather first_layer{h.in, h.in_step, 1, inputs, kTile, h.inputs, hidden, kTile, nullptr, h.in_bias};
        first_layer(h.hidden);
        for (int64_t i = 0; i < h.hidden; ++i) silu(hidden + i * kTile, scratch);
        Gather last_layer{h.out, h.out_step, 1, hidden, kTile, h.hidden, scores, kTile, nullptr, h.out_bias};
        last_layer(2);
        write_scores(a, first, count, scores);
    }
    if (s.pairs && s.matmul->finish) s.matmul->finish();
}

LensOps lens_table(const char* name) {
    return {name,
            {read<F32>, read<F16>, read<BF16>},
            {score<F32>, score<F16>, score<BF16>},
            {linear<F32>, linear<F16>, linear<BF16>},
            {absorb<F32>, absorb<F16>, absorb<BF16>},
            {widen<F32>, widen<F16>, widen<BF16>},
            narrow,
            accumulate};
}

}  // namespace
}  // namespace mc

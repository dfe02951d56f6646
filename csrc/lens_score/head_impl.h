// From a tile's products to its scores: attention of entries to queries, and the head beside it, kTile entries at a time.
//
// Included by lens_impl.h after vec_<level>.h; for what may be used here see there. Everything lies as rows of kTile entries,
// so that an entry is a lane.
#pragma once

#include <cstring>

#include "bits.h"
#include "product_impl.h"

namespace mc {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;

// Where a score pass keeps what belongs to kTile entries.
struct HeadTile {
    float* turned;                     // [columns, kTile]
    float* inputs;                     // [X, kTile]: attended values, then:
    float *match, *direct, *features;  // [heads, kTile], [direct, kTile], [features, kTile]
    float *hidden, *scores, *total;    // [hidden, kTile], [2, kTile], [kTile]
    uint32_t* pairs;                   // [panels of kTile, 2 steps, kPanel] of inputs

    HeadTile(const Head& h, int64_t columns, float* scratch)
        : turned(scratch),
          inputs(turned + kTile * columns),
          match(inputs + kTile * h.heads * h.head_values),
          direct(match + kTile * h.heads),
          features(direct + kTile * h.direct),
          hidden(inputs + kTile * h.inputs),
          scores(hidden + kTile * h.hidden),
          total(scores + 2 * kTile),
          pairs(reinterpret_cast<uint32_t*>(total + kTile)) {}
};

// log2 of finite x >= 2^-126: with m in [sqrt 1/2, sqrt 2), 2 atanh((m - 1) / (m + 1)), whose series errs by 4e-9.
inline float log2_of(float x) {
    constexpr uint32_t kRootOfHalf = 0x3f3504f3;
    const uint32_t u = as_bits(x) - kRootOfHalf;
    const float exponent = static_cast<float>(static_cast<int32_t>(u) >> 23);
    const float m = as_float((u & 0x007fffff) + kRootOfHalf), s = (m - 1.0f) / (m + 1.0f), t = s * s;
    const float series = 1.0f + t * (0.333333333f + t * (0.2f + t * (0.142857143f + t * 0.111111111f)));
    return exponent + 2.0f * kLog2E * s * series;
}

// Products [kTile, step] of `count` entries become rows [column, kTile], each entry's multiplied by its 1 / rms.
inline void turn_over(const float* products, int64_t step, const float* inverse, int64_t count, int64_t used,
                      float* out) {
    for (int64_t n = 0; n < kTile; n += Vec::kWidth) {
        for (int64_t j = 0; j < used; j += Vec::kWidth) {
            Vec x[Vec::kWidth];
            for (int64_t i = 0; i < Vec::kWidth; ++i) {
                const bool there = n + i < count;
                x[i] = there ? mul(load(products + (n + i) * step + j), Vec::all(inverse[n + i])) : Vec::all(0.0f);
            }
            transpose(x);
            for (int64_t i = 0; i < Vec::kWidth; ++i) store(out + (j + i) * kTile + n, x[i]);
        }
    }
}

// One head's attention of a tile's entries to the queries: logits [queries, kTile] become weights; match.
inline void attend(const Head& h, float* logits, float* values, const float* w, float* match, float* total) {
    for (int64_t n = 0; n < kTile; n += Vec::kWidth) {
        Vec top = load(logits + n), sum = Vec::all(0.0f);
        for (int64_t m = 1; m < h.queries; ++m) top = greater(top, load(logits + m * kTile + n));
        for (int64_t m = 0; m < h.queries; ++m) {
            float* at = logits + m * kTile + n;
            const Vec p = exp2(sub(load(at), top));
            store(at, p);
            sum = add(sum, p);
        }
        store(match + n, top);
        store(total + n, sum);
    }
    const float even = log2_of(static_cast<float>(h.queries));
    // Of a NaN the logarithm is some number: it gets lost here, but not in the values.
    for (int64_t n = 0; n < kTile; ++n) match[n] = (match[n] + (log2_of(total[n]) - even)) * kLn2;
    for (int64_t n = 0; n < kTile; ++n) total[n] = 1.0f / total[n];
    for (int64_t m = 0; m < h.queries; ++m) {
        float* at = logits + m * kTile;
        for (int64_t n = 0; n < kTile; n += Vec::kWidth) store(at + n, mul(load(at + n), load(total + n)));
    }
    Gather gather{w, h.queries, 1, logits, kTile, h.queries, values, kTile, nullptr, nullptr};
    gather(h.head_values);
}

// Rows of inputs, two at a time, as steps of panels of kTile entries: what bf16 holds of them, and in as many more steps what
// it leaves, so that their products with weights of bf16 are nearly those of fp32.
inline void pair_inputs(const float* inputs, int64_t count, uint32_t* out) {
    constexpr uint32_t kUpper = 0xffff0000;
    const int64_t steps = product_steps(kBF16, count);
    const float none[kTile] = {};
    for (int64_t i = 0; i < count; i += 2, inputs += 2 * kTile) {
        const float *a = inputs, *b = i + 1 < count ? inputs + kTile : none;
        for (int64_t n = 0; n < kTile; n += kPanel) {
            uint32_t* held = out + (n / kPanel * 2 * steps + i / 2) * kPanel;
            uint32_t* left = held + steps * kPanel;
            for (int64_t k = 0; k < kPanel; ++k) {
                const uint32_t x = as_bits(a[n + k]), y = as_bits(b[n + k]);
                const float p = a[n + k] - as_float(x & kUpper), q = b[n + k] - as_float(y & kUpper);
                held[k] = x >> 16 | (y & kUpper);
                // Of infinities nothing is left; NaNs stay ones in what is held.
                left[k] = (p == p ? as_bits(p) >> 16 : 0) | (q == q ? as_bits(q) & kUpper : 0);
            }
        }
    }
}

// hidden = in inputs + bias
inline void first_layer(const ScoreRun& a, const HeadTile& t) {
    const Head& h = *a.head;
    if (!h.in_pairs) {
        Gather gather{h.in, h.in_step, 1, t.inputs, kTile, h.inputs, t.hidden, kTile, nullptr, h.in_bias};
        return gather(h.hidden);
    }
    const int64_t steps = 2 * product_steps(kBF16, h.inputs);
    pair_inputs(t.inputs, h.inputs, t.pairs);
    for (int64_t i = 0; i < h.hidden; ++i) {
        for (int64_t n = 0; n < kTile; ++n) t.hidden[i * kTile + n] = h.in_bias[i];
    }
    for (int64_t n = 0; n < kTile; n += kPanel) {
        const uint32_t* w = t.pairs + n * steps;
        a.stream.matmul->multiply[kBF16]({h.in_pairs, h.in_pairs_step, h.hidden, reinterpret_cast<const char*>(w),
                                          kPanel * 4, steps, t.hidden + n, kTile, kPanel, true});
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

// Scores of `count` entries, at most kTile, from entry `first` on, by their products.
inline void score_entries(const ScoreRun& a, const float* products, int64_t first, int64_t count, const HeadTile& t) {
    const Stream& s = a.stream;
    const Head& h = *a.head;
    const int64_t vectors = h.heads * h.queries;
    turn_over(products, s.columns, s.inverse + first, count, vectors + h.direct, t.turned);
    for (int64_t i = 0; i < h.heads; ++i) {
        attend(h, t.turned + i * h.queries * kTile, t.inputs + i * h.head_values * kTile,
               h.values + i * h.head_values * h.queries, t.match + i * kTile, t.total);
    }
    std::memcpy(t.direct, t.turned + vectors * kTile, static_cast<size_t>(h.direct * kTile) * sizeof(float));
    for (int64_t n = 0; n < count; ++n) {
        const char* row = a.features + (first + n) * a.features_step;
        for (int64_t f = 0; f < h.features; ++f) {
            float x;
            std::memcpy(&x, row + f * 4, 4);
            // Of a NaN as it comes the upper half may be an infinity's (pair_inputs).
            t.features[f * kTile + n] = x == x ? x : __builtin_nanf("");
        }
    }
    first_layer(a, t);
    for (int64_t i = 0; i < h.hidden * kTile; i += Vec::kWidth) store(t.hidden + i, silu(load(t.hidden + i)));
    Gather last_layer{h.out, h.out_step, 1, t.hidden, kTile, h.hidden, t.scores, kTile, nullptr, h.out_bias};
    last_layer(2);
    write_scores(a, first, count, t.scores);
}

}  // namespace
}  // namespace mc

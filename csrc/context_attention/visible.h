// Which entries the queries of a call see, a block at a time.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attend.h"
#include "check.h"

namespace mc {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

class Visible {
public:
    // For at least one query.
    Visible(const mc_context_attention_args& a, const Attention& x) : a_(a), x_(x) {
        for (int64_t b = 0; b < x_.batch; ++b) {
            const int64_t* at = a_.q_pos + b * x_.queries;
            const auto range = std::minmax_element(at, at + x_.queries);
            least_.push_back(*range.first);
            most_.push_back(*range.second);
            furthest_ = std::max(furthest_, *range.second);
        }
    }

    // The greatest position of a query; at least 0.
    int64_t furthest() const { return furthest_; }

    // Entries of a block that some query of the sequence sees.
    void entries(int64_t b, int64_t block, Entries& out) const {
        const int64_t first = block * kBlock, end = std::min(first + kBlock, x_.slots);
        const int64_t *pos = a_.kv_pos + b * x_.slots, most = most_[static_cast<size_t>(b)];
        out.count = 0;
        for (int64_t s = first; s < end; ++s) {
            out.slot[out.count] = static_cast<int32_t>(s - first);
            out.position[out.count] = pos[s];
            out.count += pos[s] >= 0 && pos[s] <= most;
        }
        for (int64_t i = out.count; i % kPad && out.count; ++i) out.slot[i] = out.slot[out.count - 1];
    }

    // Bias and masks of a block, [T, kBlock], or [1, kBlock] where all queries see all; 0: none needed. Up to a multiple of
    // kPad entries that do not exist have numbers too.
    int64_t add(int64_t b, int64_t block, const Entries& e, float* out) const {
        const float* bias = a_.kv_bias ? a_.kv_bias + b * x_.slots + block * kBlock : nullptr;
        bool all = true;
        for (int64_t i = 0; i < e.count; ++i) all = all && e.position[i] <= least_[static_cast<size_t>(b)];
        if (all && !bias) return 0;
        const int64_t n = all ? 1 : x_.queries;
        for (int64_t t = 0; t < n; ++t) {
            const int64_t at = a_.q_pos[b * x_.queries + t];
            for (int64_t i = 0; i < e.count; ++i) {
                const bool seen = all || e.position[i] <= at;
                const float by = bias ? bias[e.slot[i]] * 1.44269504088896340736f : 0.0f;
                out[t * kBlock + i] = seen ? by : kNothing;
            }
            for (int64_t i = e.count; i % kPad; ++i) out[t * kBlock + i] = kNothing;
        }
        return n;
    }

private:
    const mc_context_attention_args& a_;
    const Attention& x_;
    std::vector<int64_t> least_, most_;  // [B] positions of the queries
    int64_t furthest_ = 0;
};

}  // namespace mc

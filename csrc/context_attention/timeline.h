// The entries that queries of one sequence see, in such an order that what a query sees are the first ones: those that all
// see as they lie in memory, then the others by their positions.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "matmul.h"

namespace mc {

struct Timeline {
    std::vector<int64_t> slot, position;  // of each entry
    std::vector<int64_t> seen;            // [T] number of entries that a query sees
    std::vector<float> bias;              // of each entry in units of log 2, up to a whole panel; or of none
    int64_t furthest = 0;                 // the greatest position

    Timeline(const mc_context_attention_args& a, const Attention& x, int64_t b) {
        const int64_t *at = a.q_pos + b * x.queries, *pos = a.kv_pos + b * x.slots;
        int64_t least = INT64_MAX, most = -1;  // of the queries that may see something
        for (int64_t t = 0; t < x.queries; ++t) {
            if (at[t] < 0) continue;
            least = std::min(least, at[t]);
            most = std::max(most, at[t]);
        }
        std::vector<int64_t> later;
        for (int64_t s = 0; s < x.slots; ++s) {
            if (pos[s] < 0 || pos[s] > most) continue;
            furthest = std::max(furthest, pos[s]);
            (pos[s] <= least ? slot : later).push_back(s);
        }
        const auto before = [pos](int64_t i, int64_t j) { return pos[i] != pos[j] ? pos[i] < pos[j] : i < j; };
        if (!std::is_sorted(later.begin(), later.end(), before)) std::sort(later.begin(), later.end(), before);
        const auto all = static_cast<std::ptrdiff_t>(slot.size());
        slot.insert(slot.end(), later.begin(), later.end());
        position.resize(slot.size());
        std::transform(slot.begin(), slot.end(), position.begin(), [pos](int64_t s) { return pos[s]; });
        seen.resize(static_cast<size_t>(x.queries));
        std::transform(at, at + x.queries, seen.begin(), [&](int64_t t) {
            if (t < 0) return int64_t{0};
            return std::upper_bound(position.begin() + all, position.end(), t) - position.begin();
        });
        if (!a.kv_bias) return;
        bias.resize(static_cast<size_t>(panels_of(entries()) * kPanel));
        const float* by = a.kv_bias + b * x.slots;
        std::transform(slot.begin(), slot.end(), bias.begin(),
                       [by](int64_t s) { return by[s] * 1.44269504088896340736f; });
    }

    int64_t entries() const { return static_cast<int64_t>(slot.size()); }
};

}  // namespace mc

// The entries that queries of one sequence see, in the order of their positions: what a query sees are the first ones.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "matmul.h"

namespace mc {

struct Timeline {
    std::vector<int64_t> slot, position;  // of each entry; of equal positions the lower slot first
    std::vector<int64_t> seen;            // [T] number of entries that a query sees
    std::vector<float> bias;              // of each entry in units of log 2, up to a whole panel; or of none

    Timeline(const mc_context_attention_args& a, const Attention& x, int64_t b) {
        const int64_t *at = a.q_pos + b * x.queries, *pos = a.kv_pos + b * x.slots;
        const int64_t most = *std::max_element(at, at + x.queries);
        bool ordered = true;
        for (int64_t s = 0; s < x.slots; ++s) {
            if (pos[s] < 0 || pos[s] > most) continue;
            ordered = ordered && (slot.empty() || pos[slot.back()] <= pos[s]);
            slot.push_back(s);
        }
        if (!ordered) {
            std::sort(slot.begin(), slot.end(), [pos](int64_t i, int64_t j) {
                return pos[i] != pos[j] ? pos[i] < pos[j] : i < j;
            });
        }
        position.resize(slot.size());
        std::transform(slot.begin(), slot.end(), position.begin(), [pos](int64_t s) { return pos[s]; });
        seen.resize(static_cast<size_t>(x.queries));
        std::transform(at, at + x.queries, seen.begin(), [this](int64_t t) {
            return std::upper_bound(position.begin(), position.end(), t) - position.begin();
        });
        if (!a.kv_bias) return;
        bias.resize(static_cast<size_t>(panels_of(entries()) * kPanel));
        const float* by = a.kv_bias + b * x.slots;
        std::transform(slot.begin(), slot.end(), bias.begin(), [by](int64_t s) { return by[s] * 1.44269504088896340736f; });
    }

    int64_t entries() const { return static_cast<int64_t>(slot.size()); }
};

}  // namespace mc

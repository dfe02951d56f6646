// The weighted sums of runs of entries become those of all entries, in the order of runs.
#pragma once

#include <algorithm>
#include <cmath>

#include "arrays.h"

namespace mc {

// What read passes over runs have left (ReadRun of lens.h), run after run.
struct Runs {
    int64_t count, columns, floats;  // floats: of a run's sums
    float *top, *total;              // [count, columns]
    const float* sums;               // [count, floats]
};

// Turns each run's top into its weight, which is right for the greatest score of all runs, and the first run's total into
// that of all.
inline void weigh_runs(const Runs& runs, int64_t vectors) {
    for (int64_t j = 0; j < vectors; ++j) {
        float most = runs.top[j], all = 0.0f;
        for (int64_t r = 1; r < runs.count; ++r) most = std::max(most, runs.top[r * runs.columns + j]);
        for (int64_t r = 0; r < runs.count; ++r) {
            float& weight = runs.top[r * runs.columns + j];
            weight = std::exp2(weight - most);
            all += weight * runs.total[r * runs.columns + j];
        }
        runs.total[j] = all;
    }
}

// Dimensions [first, end), from a multiple of kStrip on.
inline void merge_runs(const Runs& runs, const LensOps& ops, int64_t first, int64_t end, const Rows& out) {
    for (int64_t at = first; at < end; at += kStrip) {
        for (int64_t j = 0; j < out.count; ++j) {
            float* to = out.at(j) + at;
            std::fill(to, to + kStrip, 0.0f);
            for (int64_t r = 0; r < runs.count; ++r) {
                const float* from = runs.sums + r * runs.floats + at * out.count + j * kStrip;
                ops.accumulate(from, runs.top[r * runs.columns + j], kStrip, to);
            }
            for (int64_t i = 0; i < kStrip; ++i) to[i] = at + i < out.size ? to[i] / runs.total[j] : 0.0f;
        }
    }
}

}  // namespace mc

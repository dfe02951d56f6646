// The arguments of lens_score, checked, and the sizes that follow from them.
#pragma once

#include "lens.h"
#include "tensor.h"

namespace mc {

struct Lens {
    int dtype, weight_dtype;
    int64_t entries, queries, dims;                  // N, Q, E
    int64_t width, heads, passes, ffn, head_values;  // d, H, P, f, dv
    int64_t direct, features, hidden, inputs;        // J, F, hidden, X
    int64_t head_dim() const { return width / heads; }
    int64_t vectors() const { return heads * queries; }
};

constexpr int kLensWeights = 18;

// The weights' names and views in the order of the struct.
struct LensWeight {
    const char* name;
    mc_tensor mc_lens_score_args::* view;
};
extern const LensWeight kLensWeightViews[kLensWeights];

// Throws Error for whatever the ABI promises to refuse. Nothing has been written then.
Lens check_lens_score(const mc_lens_score_args& a);

}  // namespace mc

// The arguments of gist_encode, checked: a net's sizes, and its weights as views.
#pragma once

#include "tensor.h"

namespace mc {

enum class Pool : int32_t { kSoftmax = MC_POOL_SOFTMAX, kMean = MC_POOL_MEAN, kCls = MC_POOL_CLS };

struct Net {
    int64_t embed, width, layers, heads, ffn, gists, levels;
    double rope_theta, target_rms;
    Pool pool;

    int64_t head_dim() const { return width / heads; }
};

// Throw Error for whatever the ABI promises to refuse. Nothing has been written then.
Net check_weights(const mc_gist_encode_weights& w);
void check_windows(const mc_gist_encode_args& a, const Net& net);

}  // namespace mc

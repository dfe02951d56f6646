// The arguments of refocus, checked.
#pragma once

#include "../gist_pool/check.h"

namespace mc {

struct Refocusing {
    Pooling pooling[4];  // of each of the weights
    int64_t layers, heads, slots, dims;
};

// Throws Error for whatever the ABI promises to refuse. Nothing has been written then.
Refocusing check_refocus(const mc_refocus_args& a);

}  // namespace mc

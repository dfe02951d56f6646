// The arguments of fused_linear, checked, and what follows from them for addressing.
#pragma once

#include "linear.h"
#include "tensor.h"

namespace mc {

struct Linear {
    int64_t rows, inputs, outputs;                              // N, E, M
    int64_t x_step, weight_step, residual_step, out_step;       // bytes
    const char *x, *weight, *residual, *norm, *bias;            // nullptr: absent
    char* out;
};

// Throws Error for whatever the ABI promises to refuse. Nothing has been written then.
Linear check_fused_linear(const mc_fused_linear_args& a);

}  // namespace mc

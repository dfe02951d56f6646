// fused_linear for many rows of x: as matrix products (matmul.h).
#pragma once

#include "check.h"
#include "isa.h"

namespace mc {

// Whether a call at this level is better served so than by a stream over the weight.
bool serves_linear_tiles(const mc_fused_linear_args& a, const Linear& x, const IsaLevel& level);

void linear_tiles(const mc_fused_linear_args& a, const Linear& x, const IsaLevel& level, const LinearOps& ops,
                  int n_threads);

}  // namespace mc

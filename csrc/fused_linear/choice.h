// Which primitives serve a level.
#pragma once

#include "isa.h"
#include "linear.h"

namespace mc {

// op: who asks, for the error where there are none.
const LinearOps& linear_ops(const IsaLevel& level, const char* op);

}  // namespace mc

// What the emulation's files need of each other, and how tests steer it.
#pragma once

#include "emulate.h"

namespace mc::emulate {

// How many barriers the running thread's block has passed.
int64_t epoch();
// How many barriers of the whole grid.
int64_t grid_epoch();

}  // namespace mc::emulate

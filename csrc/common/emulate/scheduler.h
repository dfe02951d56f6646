// What the emulation's files need of each other, and how tests steer it.
#pragma once

#include "emulate.h"

namespace mc::emulate {

// How many barriers the running thread's block has passed.
int64_t epoch();
// And how many barriers of all blocks.
int64_t phase();

}  // namespace mc::emulate

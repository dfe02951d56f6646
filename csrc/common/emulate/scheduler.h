// What the emulation's files need of each other, and how tests steer it.
#pragma once

#include "emulate.h"

namespace mc::emulate {

// How many barriers the running thread's block has passed.
int64_t epoch();

}  // namespace mc::emulate

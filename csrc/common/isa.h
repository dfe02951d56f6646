// Which instruction set level serves: what the build has, the processor offers and the operating system saves.
#pragma once

#include "rows.h"

namespace mc {

// The row primitives of the level in use. Throws Error(MC_UNAVAILABLE) if MC_CPU_ISA names one that cannot serve.
const RowOps& row_ops();

}  // namespace mc

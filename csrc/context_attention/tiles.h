// context_attention for many queries: see tiles.cpp.
#pragma once

#include "check.h"

namespace mc {

// Whether tiles of queries are the faster way: not whether they can.
bool serves_tiles(const mc_context_attention_args& a, const Attention& x);

// For at least one query, head and slot.
void attend_tiles(const mc_context_attention_args& a, const Attention& x, int n_threads);

}  // namespace mc

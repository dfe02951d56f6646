// context_attention for many queries: see tiles.cpp.
#pragma once

#include "attend.h"
#include "check.h"
#include "isa.h"

namespace mc {

// The primitives that serve a level.
const AttendOps& attend_ops(const IsaLevel& level);

// Of the matrix products: kF32 or kBF16.
int product_type(const Attention& x, const IsaLevel& level);

// Whether a call is for tiles of queries, and not for one stream over the keys: which is faster, or needs no memory for
// every probability.
bool serves_tiles(const Attention& x, bool with_mass);

// For at least one query, head and slot.
void attend_tiles(const mc_context_attention_args& a, const Attention& x, int n_threads);

}  // namespace mc

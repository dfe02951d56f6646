// Before a loop over an array of accumulators: these live in registers only if it is unrolled, which is too much for
// GCC's own limit.
#pragma once

#if defined(__clang__)
#define MC_UNROLL _Pragma("unroll")
#else
#define MC_UNROLL _Pragma("GCC unroll 16")
#endif
